"""What the benchmarks of eval.py share: asking, resuming, ranks, verdicts, counts. Asked of the toy, on a tiny random checkpoint."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import eval
from data import DataError, Message, Renderer, toy_samples
from eval import Bench, Item, generate_outputs, judge_outputs, read_outputs, speaker, toy_items, toy_judge, wilson
from model import Transformer, generate
from test_eval_stabletoolbench import query
from tiny import make_model, write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY = "--count 6 --max-new-tokens 24 --cache-tokens 150".split()         # one row of the cache: outputs come one by one


def launch(*arguments, processes=1):
    torchrun = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([sys.executable, *torchrun, os.path.join(ROOT, "eval.py"), *map(str, arguments)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(monkeypatch, *arguments):
    """eval.py in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    eval.main()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def speech(chatml):
    model, renderer = Transformer.from_pretrained(chatml), Renderer(chatml)
    return model, renderer


@pytest.fixture(scope="module")
def alone(speech):
    """What each toy item's prompt gives by itself."""
    model, renderer = speech
    ids = {i.id: generate(model, [renderer.prompt(i.messages)], 24, {renderer.end})[0] for i in toy_items(6, 1)}
    return {name: renderer.tokenizer.decode(x, skip_special_tokens=False) for name, x in ids.items()}


# -----------------------------------------------------------------------------------------------------------------
# Asking

def test_a_killed_run_is_taken_up_where_it_was(monkeypatch, chatml, alone, tmp_path):
    path = tmp_path / "outputs.0.jsonl"
    run = launch("toy", "--model", chatml, "--out", tmp_path, *TOY)
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = path.read_bytes()[:path.read_bytes().rfind(b"\n") + 1]
    assert 4 <= kept.count(b"\n") < 13 and not (tmp_path / "verdicts.jsonl").exists()
    path.write_bytes(kept + b'{"id": "toy-in-1-0", "outp')              # a line that the kill tore
    main(monkeypatch, "toy", "--model", chatml, "--out", tmp_path, *TOY)
    assert path.read_bytes().startswith(kept)
    assert sorted(line["id"] for line in lines(path)[1:]) == sorted(alone)          # each asked once
    assert {v["id"]: v["output"] for v in lines(tmp_path / "verdicts.jsonl")} == alone
    before = path.read_bytes()
    main(monkeypatch, "toy", "--model", chatml, "--out", tmp_path, *TOY)
    assert path.read_bytes() == before                                  # nothing was left to ask


def test_two_processes_give_the_verdicts_of_one(chatml, alone, tmp_path):
    run = launch("toy", "--model", chatml, "--out", tmp_path, *TOY, processes=2)
    assert run.wait() == 0, run.stdout.read()
    assert [len(lines(tmp_path / f"outputs.{rank}.jsonl")) for rank in (0, 1)] == [7, 7]
    verdicts = lines(tmp_path / "verdicts.jsonl")
    assert verdicts == judge_outputs(eval.BENCHES["toy"], toy_items(6, 1), alone) and len(set(alone.values())) > 6


def test_other_settings_are_refused(speech, alone, tmp_path):
    items, ask = toy_items(6, 1), lambda settings: generate_outputs(*speech, items, 24, folder=str(tmp_path), settings=settings)
    assert ask({"model": "a", "prompts": "b"}) == alone
    with pytest.raises(DataError, match=r"outputs.0.jsonl .*\(prompts differs\).*--out"):
        ask({"model": "a", "prompts": "c"})
    with pytest.raises(DataError, match="model, prompts differ"):
        read_outputs(str(tmp_path), {"model": "c", "prompts": "d"})
    (tmp_path / "outputs.0.jsonl").write_text('{"model": "a", "prompts": "b"}\nnull\n')
    with pytest.raises(DataError, match="outputs.0.jsonl, line 2, is damaged"):
        ask({"model": "a", "prompts": "b"})
    (tmp_path / "outputs.0.jsonl").write_text('{"model": "a"')          # torn in its first line: as if never begun
    assert ask({"model": "a", "prompts": "b"}) == alone


def test_other_weights_in_the_same_folder_are_noticed(tmp_path):
    prints = set()
    for seed in (0, 1, 1):
        make_model(50, seed).save_pretrained(str(tmp_path))
        prints.add(eval.checkpoint_fingerprint(str(tmp_path)))
    assert len(prints) == 2


def test_speaker(speech, alone):
    model, renderer = speech
    items, told = toy_items(6, 1), {}
    conversations = [i.messages for i in items] + [[Message("user", "word " * 3000)]]
    texts = speaker(model, renderer, 24)(conversations, told.__setitem__)
    assert texts == [alone[i.id] for i in items] + [None] and told == dict(enumerate(texts))
    assert speaker(model, renderer, 24, max_length=24)(conversations) == [None] * 13
    assert speaker(model, renderer, 24)([]) == []


@pytest.mark.parametrize("cache_tokens", [1, 90, 200, 10_000])
def test_the_size_of_the_cache_changes_nothing(cache_tokens):
    model, told = make_model(60), {}
    prompts = [[1 + (7 * i * j) % 50 for j in range(1, n)] for i, n in enumerate((9, 2, 40, 5, 17, 3, 31, 2, 8))]
    free = [generate(model, [prompt], 20, set())[0] for prompt in prompts]
    stops = {free[0][5], free[2][3], free[4][9], free[7][1]}            # rows end at different steps, some never
    one_by_one = [generate(model, [prompt], 20, stops)[0] for prompt in prompts]
    assert generate(model, prompts, 20, stops, cache_tokens=cache_tokens, finished=told.__setitem__) == one_by_one
    assert told == dict(enumerate(one_by_one)) and len({len(output) for output in one_by_one}) > 2


# -----------------------------------------------------------------------------------------------------------------
# Judging and counting

def test_verdicts_and_summary_of_predictions(monkeypatch, capsys, tmp_path):
    right = {s.id: s.messages[-1].text for kind in (False, True) for s in toy_samples(5, 1, kind)}
    outputs = {name: text for name, text in right.items() if name != "toy-in-1-2"} | {"toy-in-1-0": "no", "toy-in-1-99": "unasked"}
    file = write(tmp_path / "p.jsonl", "\n".join(json.dumps({"id": i, "output": text}) for i, text in outputs.items()))
    main(monkeypatch, "toy", "--predictions", file, "--count", 5, "--limit", 4, "--out", tmp_path / "o")
    summary, verdicts = json.loads((tmp_path / "o" / "summary.json").read_text()), lines(tmp_path / "o" / "verdicts.jsonl")
    assert [v["id"] for v in verdicts] == [f"toy-{kind}-1-{i}" for kind in ("in", "out") for i in range(4)]
    assert all(list(v) == ["id", "category", "correct", "reason", "output"] for v in verdicts)
    assert [v["correct"] for v in verdicts] == [False, True, False, True] + [True] * 4
    assert verdicts[2]["reason"] == "no output" and verdicts[2]["output"] is None
    assert (summary["asked"], summary["answered"], summary["missing"], summary["too_long"]) == (8, 7, 1, 0)
    assert summary["not_asked"] == 3 and summary["limit"] == 4 and len(summary["data_sha256"]) == 64
    assert set(summary["versions"]) == {"python", "torch", "tokenizers"} and summary["predictions"] == file
    assert summary["categories"]["held_in"] == {"asked": 4, "correct": 2, "accuracy": 0.5, "interval": wilson(2, 4)}
    assert "held_in 50.0% of 4 (95 %: 15.0% to 85.0%)" in capsys.readouterr().out
    os.mkdir(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    main(monkeypatch, "toy", "--predictions", file, "--count", 5, "--categories", "held_out")
    said = capsys.readouterr().out
    assert "held_out 100.0% of 5" in said and "held_in" not in said and "wrote" not in said and not os.listdir()


def test_summary_of_a_model(monkeypatch, chatml, tmp_path):
    arguments = ["toy", "--model", chatml, "--count", 2, "--max-new-tokens", 8, "--out", tmp_path]
    main(monkeypatch, *arguments, "--max-length", 60)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["generation"] == {"decoding": "greedy", "max_new_tokens": 8, "max_length": 60, "template": "chatml"}
    assert summary["answered"] == 0 and summary["too_long"] == 4 and summary["categories"]["held_out"]["accuracy"] == 0
    assert all(v["reason"].startswith("prompt too long") for v in lines(tmp_path / "verdicts.jsonl"))
    with pytest.raises(DataError, match="max_length differs"):
        main(monkeypatch, *arguments)


@pytest.mark.parametrize("correct, asked, low, high", [         # Newcombe 1998, table I
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson(correct, asked, low, high):
    assert wilson(correct, asked) == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize("predictions, said", [
    ('{"id": "a", "output": null}', "output"), ('{"output": "x"}', "every line"), ("[1, 2]", "every line"),
    ('{"id": "a", "output": "x"}\n{"id": "a", "output": "y"}', "line 2: the id 'a'"), ('{"id": "a", "output"', "line 1"),
    ('{"id": "a", "output": ' + "9" * 5000 + "}", "every line"), ('{"id": "a", "output": ' + "[" * 200_000, "every line")])
def test_broken_predictions(monkeypatch, tmp_path, predictions, said):
    with pytest.raises(DataError, match=said) as e:
        main(monkeypatch, "toy", "--predictions", write(tmp_path / "p.jsonl", predictions))
    assert "p.jsonl" in str(e.value)


def test_unusable_requests(monkeypatch):
    for arguments, said in ((["--categories", "held_in", "held_on"], "held_on: .* held_in, held_out"), ([], "needs --model and --out")):
        with pytest.raises(DataError, match=said):
            main(monkeypatch, "toy", *arguments, *(["--predictions", os.devnull] if arguments else []))


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN", "\ud800", '"\\ud800"'])
def test_no_output_breaks_the_judge(arguments, tmp_path):
    item = toy_items(1, 1)[0]
    verdict = toy_judge(item, f'Action: f\nAction Input: {{"a": {arguments}}}')
    assert verdict["correct"] is False and json.dumps(verdict).encode()


def test_a_judge_sees_no_missing_output():
    bench = Bench(None, lambda item, output: {"correct": output == item.reference, "reason": "judged", "score": 0.5}, None)
    items = [Item(name, "c", [], "x") for name in "abc"]
    a, b, c = judge_outputs(bench, items, {"a": "x", "b": None})
    assert a == {"id": "a", "category": "c", "correct": True, "reason": "judged", "score": 0.5, "output": "x"}
    assert (b["reason"], c["reason"]) == ("prompt too long for the model", "no output") and not b["correct"] and not c["correct"]


# -----------------------------------------------------------------------------------------------------------------
# Every benchmark from the command line, on one record each: asked of the tiny model, and judged from predictions

STEP = {"id": 0, "prev": [], "name": "find", "args": {}}
PLAN = {"a": {"meta": {"API_list": []}, "ground_truth": [STEP], "meta_data": {"response_format": "json"},
              "origin_prompt": [{"role": "user", "content": "Plan it."}]}}
FOLDERS = {     # benchmark -> its files, and an output that is right
    "bfcl": ({"BFCL_v4_simple_python.json": {"id": "a", "question": [[{"role": "user", "content": "Go."}]], "function": [
        {"name": "go", "description": "", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}]},
              "possible_answer/BFCL_v4_simple_python.json": {"id": "a", "ground_truth": [{"go": {"n": [1]}}]}}, "a", "go(n=1)"),
    "nexus": ({"emailrep_queries.json": [{"query": "Mail?", "reference": "mail(a='x')"}], "function_specs.json": {"emailrep": [
        {"name": "mail", "docstring": "", "args": [{"name": "a", "type": "str", "required": True, "default": None}]}]}},
              "emailrep_0", "mail('x')"),
    "teval": ({"plan_json_v1.json": PLAN}, "plan_json_a", json.dumps([STEP])),
    "stabletoolbench": ({"G1_tool.json": [query(7)]}, "7", "The leek soup.")}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_benchmark_from_the_command_line(monkeypatch, chatml, tmp_path, capsys, name):
    files, item, right = FOLDERS[name]
    for file, content in files.items():
        os.makedirs(os.path.dirname(tmp_path / "data" / file), exist_ok=True)
        (tmp_path / "data" / file).write_text(json.dumps(content) + "\n")
    ask = (name, "--model", chatml, "--data", tmp_path / "data", "--out", tmp_path / "asked", "--max-new-tokens", 4, "--max-steps", 2)
    main(monkeypatch, *ask)
    summary, before = json.loads((tmp_path / "asked/summary.json").read_text()), (tmp_path / "asked/outputs.0.jsonl").read_bytes()
    assert summary["asked"] == 1 and summary["figures"] and len(lines(tmp_path / "asked/outputs.0.jsonl")) == 2
    main(monkeypatch, *ask)                                             # kept, and judged again
    assert (tmp_path / "asked/outputs.0.jsonl").read_bytes() == before
    verdict, = lines(tmp_path / "asked/verdicts.jsonl")
    assert verdict["id"] == item and not verdict["correct"] and verdict["reason"]

    write(tmp_path / "p.jsonl", json.dumps({"id": item, "output": right}) + "\n")
    monkeypatch.setattr(eval, "stb_endpoint", lambda *_: lambda prompt, choices: ("Solved", "it does"))
    judge = ["--judge-url", "http://judge", "--judge-model", "m"] if name == "stabletoolbench" else []
    main(monkeypatch, name, "--predictions", tmp_path / "p.jsonl", "--data", tmp_path / "data", "--out", tmp_path / "judged", *judge)
    verdict, = lines(tmp_path / "judged/verdicts.jsonl")
    assert verdict["correct"], verdict
    with pytest.raises(DataError, match=str(tmp_path)):
        main(monkeypatch, name, "--predictions", tmp_path / "p.jsonl", "--data", tmp_path / "nowhere")
