"""What the benchmarks of eval.py share: asking, resuming, ranks, verdicts, counts.

The toy is asked, of a tiny random checkpoint.
"""
import json
import os
import resource
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import eval
from benchmarks import judge_outputs, stabletoolbench, toy, wilson
from data import Dataset
from eval import make_responder, single_turn
from model import Transformer
from processes import in_float32, launch, wait_until
from shad import save_labels
from stable import query
from support.cli import DataError
from support.generate import generate
from support.outputs import ask_saving, read_outputs
from support.readers import Message, toy_samples
from support.templates import Renderer
from test_chat_template import TEMPLATES, make_chat_checkpoint
from tiny import apigen, make_model, read_lines, write

# with one row of the cache, so that outputs come one by one
TOY = ["--count", 6, "--max-new-tokens", 24, "--cache-tokens", 150]


def main(monkeypatch, *arguments):
    """eval.py in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *in_float32("eval", arguments)])
    eval.main()


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def write_predictions(path, outputs):
    """outputs: {item id: output}; returns the path."""
    lines = [json.dumps({"id": id, "output": text}) for id, text in outputs.items()]
    return write(path, "\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def speaker(chatml):
    """(model, renderer)"""
    return Transformer.from_pretrained(chatml), Renderer(chatml)


@pytest.fixture(scope="module")
def alone(speaker):
    """{item id: what its prompt gives by itself} of the toy's items."""
    model, renderer = speaker
    outputs = {}
    for item in toy.items(6, 1):
        ids, = generate(model, [renderer.prompt(item.messages)], 24, {renderer.end})
        outputs[item.id] = renderer.tokenizer.decode(ids, skip_special_tokens=False)
    return outputs


# --------------------------------------------------------------------------------------------------
# Asking

def test_a_killed_run_is_resumed_where_it_was(monkeypatch, chatml, alone, tmp_path):
    path = tmp_path / "outputs.0.jsonl"
    arguments = ["toy", "--model", chatml, "--out", tmp_path, *TOY]
    process = launch("eval", *arguments)
    running = wait_until(
        lambda: path.exists() and path.read_bytes().count(b"\n") >= 4, process)
    process.send_signal(signal.SIGKILL)
    text, _ = process.communicate()
    assert running, text
    saved = path.read_bytes()
    saved = saved[:saved.rfind(b"\n") + 1]
    assert 4 <= saved.count(b"\n") < 13
    assert not (tmp_path / "verdicts.jsonl").exists()

    path.write_bytes(saved + b'{"id": "toy-in-1-0", "outp')     # a line cut short by the kill
    main(monkeypatch, *arguments)
    assert path.read_bytes().startswith(saved)
    _, *asked = read_lines(path)
    assert sorted(line["id"] for line in asked) == sorted(alone)        # each asked once
    verdicts = read_lines(tmp_path / "verdicts.jsonl")
    assert {v["id"]: v["output"] for v in verdicts} == alone

    before = path.read_bytes()
    main(monkeypatch, *arguments)
    assert path.read_bytes() == before                          # nothing was left to ask


def test_two_processes_give_the_verdicts_of_one(chatml, alone, tmp_path):
    process = launch("eval", "toy", "--model", chatml, "--out", tmp_path, *TOY, processes=2)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    for rank in (0, 1):
        assert len(read_lines(tmp_path / f"outputs.{rank}.jsonl")) == 7
    expected = judge_outputs(toy, toy.items(6, 1), alone)
    assert read_lines(tmp_path / "verdicts.jsonl") == expected
    assert len(set(alone.values())) > 6


def test_outputs_made_with_other_settings_are_refused(speaker, alone, tmp_path):
    items = toy.items(6, 1)
    respond = make_responder(*speaker, max_new_tokens=24)
    file = tmp_path / "outputs.0.jsonl"

    def ask(settings):
        return ask_saving(items, str(tmp_path), settings, lambda mine: single_turn(mine, respond))

    assert ask({"model": "a", "prompts": "b"}) == alone
    with pytest.raises(DataError, match=r"outputs.0.jsonl .*\(prompts differs\).*--out"):
        ask({"model": "a", "prompts": "c"})
    with pytest.raises(DataError, match="model, prompts differ"):
        read_outputs(str(tmp_path), {"model": "c", "prompts": "d"})
    for line in ("null", '{"id": "a", "output": 5}', "[" * 9999, '{"id": [], "output": ""}'):
        file.write_text('{"model": "a", "prompts": "b"}\n' + line + "\n")
        with pytest.raises(DataError, match="outputs.0.jsonl, line 2, is damaged"):
            ask({"model": "a", "prompts": "b"})
    file.write_text('{"model": "a"')        # cut short in its first line: as if never begun
    assert ask({"model": "a", "prompts": "b"}) == alone


def test_other_weights_in_the_same_folder_are_noticed(tmp_path):
    fingerprints = []
    for seed in (0, 1, 1):
        make_model(50, seed).save_pretrained(str(tmp_path))
        fingerprints.append(eval.checkpoint_fingerprint(str(tmp_path)))
    assert len(set(fingerprints)) == 2


def test_each_conversation_gets_its_answer_or_none_without_room_for_it(speaker, alone):
    items = toy.items(6, 1)
    conversations = [item.messages for item in items]
    conversations.append([Message("user", "word " * 3000)])
    answers = list(make_responder(*speaker, 24)(conversations))
    assert len(answers) == 13
    assert dict(answers) == dict(enumerate([alone[item.id] for item in items] + [None]))
    answers = list(make_responder(*speaker, 24, max_length=24)(conversations))
    assert answers == [(i, None) for i in range(13)]
    assert list(make_responder(*speaker, 24)([])) == []


# --------------------------------------------------------------------------------------------------
# Judging and counting

@pytest.fixture
def predictions(tmp_path):
    """A file of toy outputs: one wrong, one missing, one not asked for, all others right."""
    outputs = {}
    for held_out in (False, True):
        for sample in toy_samples(5, 1, held_out):
            outputs[sample.id] = sample.messages[-1].text
    del outputs["toy-in-1-2"]
    outputs["toy-in-1-0"] = "no"
    outputs["toy-in-1-99"] = "not asked for"
    return write_predictions(tmp_path / "p.jsonl", outputs)


def test_predictions_get_verdicts_and_a_summary(monkeypatch, capsys, tmp_path, predictions):
    out = tmp_path / "o"
    main(monkeypatch, "toy", "--predictions", predictions, "--count", 5, "--limit", 4, "--out", out)
    verdicts = read_lines(out / "verdicts.jsonl")
    expected = [f"toy-in-1-{i}" for i in range(4)] + [f"toy-out-1-{i}" for i in range(4)]
    assert [v["id"] for v in verdicts] == expected
    for verdict in verdicts:
        assert list(verdict) == ["id", "category", "correct", "reason", "output"]
    assert [v["correct"] for v in verdicts] == [False, True, False, True] + [True] * 4
    assert verdicts[2]["reason"] == "no output"
    assert verdicts[2]["output"] is None

    summary = read_summary(out)
    assert summary["asked"] == 8
    assert summary["answered"] == 7
    assert summary["missing"] == 1
    assert summary["too_long"] == 0
    assert summary["not_asked"] == 3
    assert summary["limit"] == 4
    assert len(summary["data_sha256"]) == 64
    assert set(summary["versions"]) == {"python", "torch", "tokenizers"}
    assert summary["predictions"] == predictions
    assert summary["categories"]["held_in"] == {
        "asked": 4, "correct": 2, "accuracy": 0.5, "interval": wilson(2, 4)}
    assert "held_in 50.0% of 4 (95 %: 15.0% to 85.0%)" in capsys.readouterr().out


def test_without_out_nothing_is_written(monkeypatch, capsys, tmp_path, predictions):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    main(monkeypatch, "toy", "--predictions", predictions, "--count", 5,
         "--categories", "held_out")
    text = capsys.readouterr().out
    assert "held_out 100.0% of 5" in text
    assert "held_in" not in text
    assert "wrote" not in text
    assert not os.listdir()


def test_prompts_that_are_too_long_are_counted(monkeypatch, chatml, tmp_path):
    arguments = ["toy", "--model", chatml, "--count", 2, "--max-new-tokens", 8, "--out", tmp_path]
    main(monkeypatch, *arguments, "--max-length", 60)
    summary = read_summary(tmp_path)
    assert summary["generation"] == {
        "decoding": "greedy", "weights": "float32", "max_new_tokens": 8, "max_length": 60,
        "template": "chatml"}
    assert summary["answered"] == 0
    assert summary["too_long"] == 4
    assert summary["categories"]["held_out"]["accuracy"] == 0
    for verdict in read_lines(tmp_path / "verdicts.jsonl"):
        assert verdict["reason"].startswith("prompt too long")
    with pytest.raises(DataError, match="max_length differs"):
        main(monkeypatch, *arguments)


@pytest.mark.parametrize("correct, asked, low, high", [         # Newcombe 1998, table I
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718)])
def test_intervals_are_those_of_newcombe_s_table(correct, asked, low, high):
    assert wilson(correct, asked) == pytest.approx([low, high], abs=5e-5)


@pytest.mark.parametrize("text, sentence", [
    ('{"id": "a", "output": null}', "output"),
    ('{"id": "a", "output": "x"}\n{"output": "x"}', "line 2 lacks 'id'.*every line"),
    ("[1, 2]", "record 1 does .*every line"),
    ('{"id": "a", "output": "x"}\n{"id": "a", "output": "y"}', "line 2: the id 'a'"),
    ('{"id": "a", "output"', "line 1"),
    ('{"id": "a", "output": ' + "9" * 5000 + "}", "line 1: not JSON .*digits"),
    ('{"id": "a", "output": ' + "[" * 200_000, "line 1: not JSON .*deeply")])
def test_broken_predictions_are_refused(monkeypatch, tmp_path, text, sentence):
    with pytest.raises(DataError, match=sentence) as e:
        main(monkeypatch, "toy", "--predictions", write(tmp_path / "p.jsonl", text))
    assert "p.jsonl" in str(e.value)


def test_a_full_disk_names_the_file_of_outputs(tmp_path):
    def run(mine):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit))
        for item in mine:
            yield item, "x" * 90

    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(DataError, match="outputs.0.jsonl could not be written .File too large"):
        try:
            ask_saving(toy.items(3, 1), str(tmp_path), {}, run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert len(read_outputs(str(tmp_path), {})) == 1        # what was whole is kept


def test_a_benchmark_with_an_id_twice_is_refused(monkeypatch):
    items = toy.items(2, 1)
    items[1].id = items[0].id
    monkeypatch.setattr(toy, "items", lambda *_: items)
    with pytest.raises(DataError, match="2 items with the id 'toy-in-1-0'"):
        main(monkeypatch, "toy", "--predictions", os.devnull)


@pytest.mark.parametrize("arguments, sentence", [
    (["--data", "a", "b", "--predictions", os.devnull], "takes one --data folder, not 2"),
    (["--categories", "held_in", "held_on", "--predictions", os.devnull],
     "held_on: .* held_in, held_out"),
    ([], "needs --model and --out")])
def test_what_cannot_be_asked_is_refused(monkeypatch, arguments, sentence):
    with pytest.raises(DataError, match=sentence):
        main(monkeypatch, "toy", *arguments)


@pytest.mark.parametrize("arguments", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN",
                                       "\ud800", '"\\ud800"'])
def test_no_output_breaks_the_judge_of_the_toy(arguments):
    item = toy.items(1, 1)[0]
    verdict = toy.judge(item, f'Action: f\nAction Input: {{"a": {arguments}}}')
    assert verdict["correct"] is False
    assert json.dumps(verdict).encode()


@pytest.mark.parametrize("unit", ["Action:", "Action: ", "Action: a\nAction Input: {"])
def test_the_judge_of_the_toy_takes_no_long_output(unit):
    item = toy.items(1, 1)[0]
    for length in (10_000, 1_000_000):
        start = time.process_time()
        assert not toy.judge(item, unit * (length // len(unit)))["correct"]
        assert time.process_time() - start < 0.5


def test_a_judge_sees_no_missing_output():
    def judge(item, output):
        return {"correct": output == item.reference, "reason": "judged", "score": 0.5}

    items = [eval.Item(name, "c", [], "x") for name in "abc"]
    bench = SimpleNamespace(judge=judge)
    a, b, c = judge_outputs(bench, items, {"a": "x", "b": None})
    assert a == {"id": "a", "category": "c", "correct": True, "reason": "judged", "score": 0.5,
                 "output": "x"}
    assert b["reason"] == "prompt too long for the model"
    assert c["reason"] == "no output"
    assert not b["correct"]
    assert not c["correct"]


def test_the_loss_of_calls_in_the_checkpoints_own_form(monkeypatch, tmp_path):
    directory = make_chat_checkpoint(tmp_path, TEMPLATES["drops earlier reasoning"])
    make_model(Renderer(directory).tokenizer.get_vocab_size()).save_pretrained(directory)
    data = write(tmp_path / "data.json", apigen(6))
    dataset = Dataset.load([data], directory, "auto", 2048, native_calls=True)
    arguments = ["loss", "--model", directory, "--data", data]
    main(monkeypatch, *arguments, "--native-calls", "--out", tmp_path / "calls")
    main(monkeypatch, *arguments, "--out", tmp_path / "text")
    calls, text = (read_summary(tmp_path / name)["losses"] for name in ("calls", "text"))
    tokens = calls["all"]["tokens"]
    assert tokens == dataset.output_starts[-1] != text["all"]["tokens"]

    # labels of the one are none of the other
    save_labels(tmp_path, np.zeros(tokens), dataset, {"threshold": 0.0})
    labelled = [*arguments, "--labels", tmp_path]
    main(monkeypatch, *labelled, "--native-calls", "--out", tmp_path / "labelled")
    with pytest.raises(DataError, match="data and template differ .* --native-calls"):
        main(monkeypatch, *labelled, "--out", tmp_path / "refused")


# --------------------------------------------------------------------------------------------------
# Every benchmark from the command line, on one record: asked of the model, and from predictions

BFCL = {
    "BFCL_v4_simple_python.json": {
        "id": "a", "question": [[{"role": "user", "content": "Go."}]],
        "function": [{"name": "go", "description": "", "parameters": {
            "type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}]},
    "possible_answer/BFCL_v4_simple_python.json": {"id": "a", "ground_truth": [{"go": {"n": [1]}}]}}
NEXUS = {
    "emailrep_queries.json": [{"query": "Mail?", "reference": "mail(a='x')"}],
    "function_specs.json": {"emailrep": [{
        "name": "mail", "docstring": "",
        "args": [{"name": "a", "type": "str", "required": True, "default": None}]}]}}
STEP = {"id": 0, "prev": [], "name": "find", "args": {}}
TEVAL = {
    "plan_json_v1.json": {"a": {
        "meta": {"API_list": []}, "ground_truth": [STEP],
        "meta_data": {"response_format": "json"},
        "origin_prompt": [{"role": "user", "content": "Plan it."}]}}}
FOLDERS = {         # benchmark: (its files, the id of its item, an output that is right)
    "bfcl": (BFCL, "a", "go(n=1)"),
    "nexus": (NEXUS, "emailrep_0", "mail('x')"),
    "teval": (TEVAL, "plan_json_a", json.dumps([STEP])),
    "stabletoolbench": ({"G1_tool.json": [query(7)]}, "7", "The leek soup.")}


@pytest.fixture
def folder(name, tmp_path):
    """The benchmark's own folder."""
    files, _, _ = FOLDERS[name]
    for file, content in files.items():
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(content) + "\n")
    return tmp_path / "data"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_benchmark_is_asked_once_and_judged_again(monkeypatch, chatml, tmp_path, name, folder):
    _, item, _ = FOLDERS[name]
    out = tmp_path / "out"
    arguments = [name, "--model", chatml, "--data", folder, "--out", out,
                 "--max-new-tokens", 4, "--max-steps", 2]
    main(monkeypatch, *arguments)
    summary = read_summary(out)
    assert summary["asked"] == 1
    assert summary["figures"]
    assert len(read_lines(out / "outputs.0.jsonl")) == 2
    before = (out / "outputs.0.jsonl").read_bytes()
    main(monkeypatch, *arguments)
    assert (out / "outputs.0.jsonl").read_bytes() == before
    verdict, = read_lines(out / "verdicts.jsonl")
    assert verdict["id"] == item
    assert not verdict["correct"]
    assert verdict["reason"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_benchmark_judges_predictions(monkeypatch, tmp_path, name, folder):
    def judge(question, **fields):
        return "Solved", "it does"

    _, item, right = FOLDERS[name]
    monkeypatch.setattr(stabletoolbench, "judge_endpoint", lambda *_: judge)
    monkeypatch.setattr(stabletoolbench, "check_reachable", lambda *_: None)
    arguments = [name, "--predictions", write_predictions(tmp_path / "p.jsonl", {item: right})]
    if name == "stabletoolbench":
        arguments += ["--judge-url", "http://judge", "--judge-model", "m"]
    main(monkeypatch, *arguments, "--data", folder, "--out", tmp_path / "out")
    verdict, = read_lines(tmp_path / "out" / "verdicts.jsonl")
    assert verdict["correct"], verdict
    with pytest.raises(DataError, match=str(tmp_path)):
        main(monkeypatch, *arguments, "--data", tmp_path / "nowhere")
