"""The scripts as a user runs them, from another working directory, on a tiny checkpoint."""
import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch
from safetensors import safe_open

from data import Dataset
from model import Transformer
from processes import launch
from support.readers import toy_samples
from tiny import (
    METRICS,
    apigen,
    make_checkpoint,
    make_model,
    make_tokenizer,
    read_lines,
    write,
)

MODEL = ["--model", "model", "--data", "data.json"]
TUNING = ["--shuffle", 12, "--lr", "1e-3", "--epochs", 2, "--batch-tokens", 1500,
          "--micro-tokens", 800, "--seed", 3]
TRAINING = ["--steps", 5, "--lr", "1e-3", "--batch-tokens", 1500, "--micro-tokens", 800]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder that is not the repository: model/, data.json, and labels/ made by shad.py."""
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(24))
    run(work, "shad", *MODEL, "--out", "labels", *TUNING)
    return work


def call(folder, script, *arguments, processes=1):
    """(exit code, standard output, standard error) of a script run in `folder`."""
    process = launch(script, *arguments, processes=processes, cwd=folder, stderr=subprocess.PIPE)
    out, errors = process.communicate()
    return process.returncode, out, errors


def run(folder, script, *arguments, processes=1):
    """What a script prints, which must succeed."""
    code, out, errors = call(folder, script, *arguments, processes=processes)
    assert code == 0, out + errors
    return out


def read_labels(folder):
    """(arrays, metadata) of labels.safetensors."""
    with safe_open(folder / "labels.safetensors", framework="np") as file:
        arrays = {name: file.get_tensor(name) for name in ("loss_difference", "offsets")}
        assert set(arrays) == set(file.keys())
        return arrays, json.loads(file.metadata()["shad"])


def metrics(folder):
    return read_lines(folder / "metrics.jsonl")


def weights(folder):
    return Transformer.from_pretrained(str(folder / "model")).state_dict()


def largest_difference(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --------------------------------------------------------------------------------------------------
# shad.py

def test_labels_hold_a_loss_difference_per_output_token_and_what_they_were_made_from(work):
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    labels, metadata = read_labels(work / "labels")
    difference = labels["loss_difference"]
    assert difference.dtype == np.float32
    assert difference.shape == (dataset.output_starts[-1],)
    assert np.isfinite(difference).all()
    assert (difference < 0).mean() > 0.5
    assert labels["offsets"].dtype == np.int64
    assert np.array_equal(labels["offsets"], dataset.output_starts)
    assert dataset.fingerprint.items() <= metadata.items()
    assert metadata["base_model"] == "model"
    assert metadata["threshold"] == 0.0
    assert metadata["seed"] == 3


def test_the_labels_page_is_self_contained(work):
    page = (work / "labels" / "labels.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", page)
    for kind in ("reasoning", "format"):
        assert f'<span class="{kind}" title=' in page
    assert page.count('<div class="sample">') == 24
    assert "get_weather" in page
    assert "<svg" in page


def test_labels_of_two_processes_are_those_of_one(work, tmp_path):
    run(work, "shad", *MODEL, "--out", tmp_path, *TUNING, processes=2)
    one, metadata = read_labels(work / "labels")
    two, metadata_of_two = read_labels(tmp_path)
    assert metadata == metadata_of_two
    assert np.array_equal(one["offsets"], two["offsets"])
    assert np.abs(one["loss_difference"] - two["loss_difference"]).max() < 1e-4
    assert np.abs(one["loss_difference"]).max() > 1e-4


# --------------------------------------------------------------------------------------------------
# train.py

def test_sft_lowers_the_loss_and_changes_the_weights(work, tmp_path):
    text = run(work, "train", *MODEL, *TRAINING, "--method", "sft", "--out", tmp_path)
    assert "sft: 5 steps" in text
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(set(row) == METRICS for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert largest_difference(weights(tmp_path), weights(work)) > 1e-3


@pytest.fixture(scope="module")
def rft(work):
    run(work, "train", *MODEL, *TRAINING, "--method", "rft", "--labels", "labels", "--out", "rft")
    return work / "rft"


def test_rft_with_labels_reports_both_groups(rft):
    rows = metrics(rft)
    assert len(rows) == 5
    for row in rows:
        assert set(row) == METRICS
        assert row["loss_reasoning"] > 0
        assert 0 < row["weight_reasoning"] < 1
    assert not (rft / "labels").exists()


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_two_processes_train_the_same_weights(work, rft, tmp_path, scope):
    arguments = [*MODEL, *TRAINING, "--method", "rft", "--labels", "labels", "--scope", scope]
    one = rft
    if scope == "batch":
        one = tmp_path / "one"
        run(work, "train", *arguments, "--out", one)
    two = tmp_path / "two"
    run(work, "train", *arguments, "--out", two, processes=2)
    assert largest_difference(weights(two), weights(one)) < 1e-4
    assert largest_difference(weights(one), weights(work)) > 1e-4
    for expected, row in zip(metrics(one), metrics(two), strict=True):
        expected["tokens_per_s"] = row["tokens_per_s"]
        assert row == pytest.approx(expected, rel=1e-4)


def test_the_trained_model_loads_in_transformers(rft):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        rft / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = Transformer.from_pretrained(str(rft / "model"))
    tokens = torch.randint(300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(rft / "model")
    file = write(rft / "one.json", apigen(1))
    dataset = Dataset.load([file], str(rft / "model"), "auto", 2048)
    assert "get_weather" in tokenizer.decode(dataset.ids[0])


def test_rft_without_labels_runs_shad_first(work, tmp_path):
    run(work, "train", *MODEL, *TRAINING, "--method", "rft", "--out", tmp_path)
    assert (tmp_path / "labels" / "labels.html").is_file()
    assert len(metrics(tmp_path)) == 5
    labels, _ = read_labels(tmp_path / "labels")
    assert len(labels["offsets"]) == 25


# --------------------------------------------------------------------------------------------------
# eval.py

def test_loss_by_role_and_by_label_adds_up_to_the_whole(work, tmp_path):
    run(work, "eval", "loss", *MODEL, "--labels", "labels", "--out", tmp_path)
    losses = json.loads((tmp_path / "summary.json").read_text())["losses"]
    for prefix in ("", "SHAD "):
        reasoning = losses[prefix + "reasoning"]
        boilerplate = losses[prefix + "boilerplate"]
        tokens = reasoning["tokens"] + boilerplate["tokens"]
        assert tokens == losses["all"]["tokens"]
        assert reasoning["tokens"] > 0
        assert boilerplate["tokens"] > 0
        total = (reasoning["loss"] * reasoning["tokens"]
                 + boilerplate["loss"] * boilerplate["tokens"])
        assert total / tokens == pytest.approx(losses["all"]["loss"], rel=1e-5)


def test_a_random_model_solves_no_toy_item(work, tmp_path):
    run(work, "eval", "toy", "--model", "model", "--count", 3, "--out", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["asked"] == 6
    assert summary["figures"]["success"] == {"held_in": 0.0, "held_out": 0.0}
    for kind in ("held_in", "held_out"):
        assert summary["losses"][kind]["reasoning"]["loss"] > 0
    verdicts = read_lines(tmp_path / "verdicts.jsonl")
    assert len(verdicts) == 6
    for verdict in verdicts:
        assert set(verdict) == {"id", "category", "correct", "reason", "output"}


def test_toy_predictions_are_right_with_the_right_tool_and_arguments(work, tmp_path):
    held_in = toy_samples(4, 1)
    held_out = toy_samples(4, 1, held_out=True)
    outputs = {sample.id: sample.messages[-1].text for sample in held_in + held_out}
    other_tool, other_value, other_thought, _ = [sample.id for sample in held_in]
    refusal, missing, _, _ = [sample.id for sample in held_out]
    outputs[other_tool] = outputs[other_tool].replace("\nAction: ", "\nAction: un")
    outputs[other_value] = outputs[other_value].replace('"}', 'x"}')
    outputs[other_thought] = re.sub("Thought: .*", "Thought: other words.", outputs[other_thought])
    outputs[refusal] = "I cannot."
    del outputs[missing]
    lines = [json.dumps({"id": id, "output": text}) for id, text in outputs.items()]
    file = write(tmp_path / "p.jsonl", "\n".join(lines))

    text = run(work, "eval", "toy", "--predictions", file, "--count", 4, "--out", tmp_path)
    assert "held_in 50.0%" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["figures"]["success"] == {"held_in": 0.5, "held_out": 0.5}
    verdicts = {v["id"]: v for v in read_lines(tmp_path / "verdicts.jsonl")}
    assert [verdicts[s.id]["correct"] for s in held_in] == [False, False, True, True]
    assert [verdicts[s.id]["correct"] for s in held_out] == [False, False, True, True]
    assert "tool" in verdicts[other_tool]["reason"]
    assert "arguments" in verdicts[other_value]["reason"]
    assert verdicts[missing]["output"] is None
    assert all(v["reason"] for v in verdicts.values())


# --------------------------------------------------------------------------------------------------
# Bad input: one clear sentence and exit code 2

@pytest.fixture(scope="module")
def bad_input(work, rft):
    """`work`, with what cannot be used added to it."""
    record = json.dumps(apigen(1)[0])
    write(work / "broken.jsonl", record + "\n{oops\n")
    write(work / "null.jsonl", json.dumps({"id": toy_samples(1, 1)[0].id, "output": None}))
    os.mkdir(work / "small")                    # fewer embeddings than its tokenizer has tokens
    make_tokenizer(work / "small")
    make_model(100).save_pretrained(str(work / "small"))
    make_checkpoint(work / "truncated")
    with open(work / "truncated" / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    return work


@pytest.mark.parametrize("command, named", [
    ("train --model model --data nowhere.json --out o", "nowhere.json"),
    ("train --model model --data broken.jsonl --out o", "broken.jsonl, line 2"),
    ("shad --model missing --data data.json --out o", "missing"),
    ("shad --model truncated --data data.json --out o", "truncated/model.safetensors"),
    ("train --model small --data data.json --method sft --out o", "small"),
    ("train --model model --data data.json[:9] --labels labels --out o", "data differs"),
    ("train --model model --data data.json --labels data.json --out o", "data.json"),
    ("train --model model --data data.json --max-length 5 --out o", "--max-length"),
    ("train --model model --data data.json --labels labels --out rft", "rft/model"),
    ("eval toy --out o", "--model"),
    ("train --model model --data data.json --epochs 0 --out o", "--epochs must be at least 1"),
    ("train --model model --data data.json --tau 0 --out o", "--tau must be at least"),
    ("train --model model --data data.json --alpha 2 --out o", "--alpha must be at most 1"),
    ("shad --model model --data data.json --shuffle -3 --out o", "--shuffle must be at least 0"),
    ("eval toy --predictions broken.jsonl --out o", "broken.jsonl"),
    ("eval toy --predictions null.jsonl --out o", "null.jsonl"),
])
def test_bad_input_ends_in_one_sentence_that_names_it(bad_input, command, named):
    script, *arguments = command.split()
    code, out, errors = call(bad_input, script, *arguments)
    assert code == 2, out + errors
    assert "Traceback" not in errors, errors
    lines = errors.strip().split("\n")
    assert len(lines) == 1 or lines[0].startswith("usage:"), errors
    assert lines[-1].startswith(f"{script}.py: ")
    assert named in lines[-1]
    assert not (bad_input / "o" / "model").exists()


@pytest.mark.parametrize("script", ["train", "shad", "eval"])
def test_help_begins_with_commands_and_names_the_options(tmp_path, script):
    text = run(tmp_path, script, "--help")
    assert "--model" in text
    assert "--seed" in text
    assert f"python {script}.py" in text


@pytest.mark.skipif("SHAD_RFT_FULL" not in os.environ, reason="minutes; set SHAD_RFT_FULL")
def test_the_whole_small_reproduction(tmp_path):
    run(tmp_path, "train")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    models = summary["models"]
    assert set(models) == {"base", "SFT", "RFT"}
    assert summary["shad"]["truth"]["auc"] > 0.8
    assert models["RFT"]["success"]["held_in"] > models["base"]["success"]["held_in"]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
