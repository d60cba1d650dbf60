"""The scripts as a user runs them: in processes of their own, from another working directory, on a tiny checkpoint."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from data import Dataset, toy_samples
from model import Transformer
from tiny import apigen, make_checkpoint, make_model, make_tokenizer, write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIELDS = {"step", "loss", "loss_reasoning", "loss_boilerplate", "weight_reasoning", "weight_boilerplate", "lr", "grad_norm", "tokens_per_s"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder that is not the repository: a checkpoint in model/, data.json, and labels/ made by shad.py."""
    work = tmp_path_factory.mktemp("work")
    (work / "model").mkdir()
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(24))
    run(work, "shad.py", *MODEL, "--out", "labels", *TUNING)
    return work


MODEL = ["--model", "model", "--data", "data.json"]
TUNING = "--shuffle 12 --lr 1e-3 --epochs 2 --batch-tokens 1500 --micro-tokens 800 --seed 3".split()
TRAINING = "--steps 5 --lr 1e-3 --batch-tokens 1500 --micro-tokens 800".split()


def call(cwd, script, *arguments, processes=1):
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([sys.executable, *launch, os.path.join(ROOT, script), *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, encoding="utf-8")


def run(cwd, script, *arguments, processes=1):
    done = call(cwd, script, *arguments, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read_labels(path):
    with safe_open(path / "labels.safetensors", framework="np") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()


def metrics(path):
    with open(path / "metrics.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def weights(path):
    return Transformer.from_pretrained(str(path / "model")).state_dict()


def furthest(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -----------------------------------------------------------------------------------------------------------------
# shad.py

def test_labels_file(work):
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    labels, metadata = read_labels(work / "labels")
    assert set(labels) == {"loss_difference", "offsets"}
    assert labels["loss_difference"].dtype == np.float32 and labels["loss_difference"].shape == (dataset.offsets[-1],)
    assert labels["offsets"].dtype == np.int64 and np.array_equal(labels["offsets"], dataset.offsets)
    assert np.isfinite(labels["loss_difference"]).all() and (labels["loss_difference"] < 0).mean() > 0.5
    assert dataset.fingerprint.items() <= metadata.items()
    assert metadata["base_model"] == "model" and float(metadata["threshold"]) == 0.0 and metadata["seed"] == "3"


def test_labels_page_is_self_contained(work):
    page = (work / "labels" / "labels.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    for kind in ("reasoning", "format"):
        assert f'<span class="{kind}" title=' in page
    assert page.count('<div class="sample">') == 24 and "get_weather" in page and "<svg" in page


def test_labels_of_two_processes_are_those_of_one(work, tmp_path):
    run(work, "shad.py", *MODEL, "--out", tmp_path, *TUNING, processes=2)
    (one, metadata), (two, metadata2) = read_labels(work / "labels"), read_labels(tmp_path)
    assert metadata == metadata2 and np.array_equal(one["offsets"], two["offsets"])
    assert np.abs(one["loss_difference"] - two["loss_difference"]).max() < 1e-4 < np.abs(one["loss_difference"]).max()


# -----------------------------------------------------------------------------------------------------------------
# train.py

def test_sft(work, tmp_path):
    said = run(work, "train.py", *MODEL, *TRAINING, "--method", "sft", "--out", tmp_path)
    assert "sft: 5 steps" in said
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5] and all(set(line) == FIELDS for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert furthest(weights(tmp_path), weights(work)) > 1e-3


@pytest.fixture(scope="module")
def rft(work):
    run(work, "train.py", *MODEL, *TRAINING, "--method", "rft", "--labels", "labels", "--out", "rft")
    return work / "rft"


def test_rft_with_labels(work, rft):
    lines = metrics(rft)
    assert len(lines) == 5 and all(set(line) == FIELDS for line in lines)
    assert all(line["loss_reasoning"] > 0 and 0 < line["weight_reasoning"] < 1 for line in lines)
    assert not (rft / "labels").exists()


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_two_processes_train_the_same_weights(work, rft, tmp_path, scope):
    arguments = [*MODEL, *TRAINING, "--method", "rft", "--labels", "labels", "--scope", scope]
    run(work, "train.py", *arguments, "--out", tmp_path / "two", processes=2)
    if scope == "batch":
        run(work, "train.py", *arguments, "--out", tmp_path / "one")
        rft = tmp_path / "one"
    assert furthest(weights(tmp_path / "two"), weights(rft)) < 1e-4 < furthest(weights(rft), weights(work))
    for one, two in zip(metrics(rft), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one | {"tokens_per_s": two["tokens_per_s"]}, rel=1e-4)


def test_the_trained_model_loads_in_transformers(rft):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(rft / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(300, (1, 20))
    with torch.no_grad():
        expected = Transformer.from_pretrained(str(rft / "model"))(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(rft / "model")
    ours = Dataset.load([write(rft / "one.json", apigen(1))], str(rft / "model"), "auto", 2048)
    assert "get_weather" in tokenizer.decode(ours.ids[0])


def test_rft_without_labels_runs_shad_first(work, tmp_path):
    run(work, "train.py", *MODEL, *TRAINING, "--method", "rft", "--out", tmp_path)
    assert (tmp_path / "labels" / "labels.html").is_file() and len(metrics(tmp_path)) == 5
    assert len(read_labels(tmp_path / "labels")[0]["offsets"]) == 25


# -----------------------------------------------------------------------------------------------------------------
# eval.py

def test_eval_loss(work, tmp_path):
    run(work, "eval.py", "loss", *MODEL, "--labels", "labels", "--out", tmp_path)
    losses = json.loads((tmp_path / "summary.json").read_text())["losses"]
    assert {"all", "reasoning", "boilerplate", "SHAD reasoning", "SHAD boilerplate"} <= set(losses)
    for one, other in (("reasoning", "boilerplate"), ("SHAD reasoning", "SHAD boilerplate")):
        n = [losses[name]["tokens"] for name in (one, other)]
        assert sum(n) == losses["all"]["tokens"] and min(n) > 0
        mean = sum(losses[name]["loss"] * losses[name]["tokens"] for name in (one, other)) / sum(n)
        assert mean == pytest.approx(losses["all"]["loss"], rel=1e-5)


def verdicts(path):
    with open(path / "verdicts.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_eval_toy(work, tmp_path):
    run(work, "eval.py", "toy", "--model", "model", "--count", 3, "--out", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["asked"] == 6 and summary["figures"]["success"] == {"held_in": 0.0, "held_out": 0.0}        # a random model
    assert all(summary["losses"][kind]["reasoning"]["loss"] > 0 for kind in ("held_in", "held_out"))
    assert len(verdicts(tmp_path)) == 6
    assert all(set(v) == {"id", "category", "correct", "reason", "output"} for v in verdicts(tmp_path))


def test_eval_toy_predictions(work, tmp_path):
    held_in, held_out = toy_samples(4, 1), toy_samples(4, 1, held_out=True)
    right = {s.id: s.messages[-1].text for s in held_in + held_out}
    outputs = dict(right)
    outputs[held_in[0].id] = right[held_in[0].id].replace("\nAction: ", "\nAction: un")             # another tool
    outputs[held_in[1].id] = right[held_in[1].id].replace('"}', 'x"}')                              # another value
    outputs[held_in[2].id] = re.sub("Thought: .*", "Thought: other words.", right[held_in[2].id])   # still right
    outputs[held_out[0].id] = "I cannot."
    del outputs[held_out[1].id]
    lines = [json.dumps({"id": i, "output": text}) for i, text in outputs.items()]
    said = run(work, "eval.py", "toy", "--predictions", write(tmp_path / "p.jsonl", "\n".join(lines)), "--count", 4, "--out", tmp_path)
    assert "held_in 50.0%" in said
    assert json.loads((tmp_path / "summary.json").read_text())["figures"]["success"] == {"held_in": 0.5, "held_out": 0.5}
    by_id = {v["id"]: v for v in verdicts(tmp_path)}
    assert [by_id[s.id]["correct"] for s in held_in] == [False, False, True, True]
    assert [by_id[s.id]["correct"] for s in held_out] == [False, False, True, True]
    assert "tool" in by_id[held_in[0].id]["reason"] and "arguments" in by_id[held_in[1].id]["reason"]
    assert by_id[held_out[1].id]["output"] is None and all(v["reason"] for v in by_id.values())


# -----------------------------------------------------------------------------------------------------------------
# Bad input: one clear line and exit code 2

@pytest.mark.parametrize("script, arguments, said", [
    ("train.py", "--model model --data nowhere.json --out o", "nowhere.json"),
    ("train.py", "--model model --data broken.jsonl --out o", "broken.jsonl, line 2"),
    ("shad.py", "--model missing --data data.json --out o", "missing"),
    ("shad.py", "--model truncated --data data.json --out o", "truncated/model.safetensors"),
    ("train.py", "--model small --data data.json --method sft --out o", "small"),
    ("train.py", "--model model --data data.json[:9] --labels labels --out o", "data differs"),
    ("train.py", "--model model --data data.json --labels data.json --out o", "data.json"),
    ("train.py", "--model model --data data.json --max-length 5 --out o", "--max-length"),
    ("train.py", "--model model --data data.json --labels labels --out rft", "rft/model"),
    ("eval.py", "toy --out o", "--model"),
    ("train.py", "--model model --data data.json --epochs 0 --out o", "--epochs must be at least 1"),
    ("train.py", "--model model --data data.json --tau 0 --out o", "--tau must be at least"),
    ("shad.py", "--model model --data data.json --shuffle -3 --out o", "--shuffle must be at least 0"),
    ("eval.py", "toy --predictions broken.jsonl --out o", "broken.jsonl"),
    ("eval.py", "toy --predictions null.jsonl --out o", "null.jsonl"),
], ids=lambda x: x if " " in x else "")
def test_bad_input(work, rft, script, arguments, said):
    write(work / "broken.jsonl", json.dumps(apigen(1)[0]) + "\n{oops\n")
    write(work / "null.jsonl", json.dumps({"id": toy_samples(1, 1)[0].id, "output": None}))
    if "small" in arguments:                                # fewer embeddings than its tokenizer has tokens
        make_tokenizer((work / "small").mkdir() or work / "small")
        make_model(100).save_pretrained(str(work / "small"))
    if "truncated" in arguments:
        make_checkpoint((work / "truncated").mkdir() or work / "truncated")
        with open(work / "truncated" / "model.safetensors", "r+b") as f:
            f.truncate(5000)
    done = call(work, script, *arguments.split())
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = done.stderr.strip().split("\n")
    assert "Traceback" not in done.stderr and (len(sentence) == 1 or sentence[0].startswith("usage:")), done.stderr
    assert said in sentence[-1] and sentence[-1].startswith(script + ": ")
    assert not (work / "o" / "model").exists()


@pytest.mark.parametrize("script", ["train.py", "shad.py", "eval.py"])
def test_help(tmp_path, script):
    said = run(tmp_path, script, "--help")
    assert "--model" in said and "--seed" in said and f"python {script}" in said


@pytest.mark.skipif("SHAD_RFT_FULL" not in os.environ, reason="minutes; set SHAD_RFT_FULL")
def test_the_whole_small_reproduction(tmp_path):
    run(tmp_path, "train.py")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["models"]) == {"base", "SFT", "RFT"} and summary["shad"]["truth"]["auc"] > 0.8
    assert summary["models"]["RFT"]["success"]["held_in"] > summary["models"]["base"]["success"]["held_in"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
