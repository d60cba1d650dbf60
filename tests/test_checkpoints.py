"""Checkpoints: whatever ends a run, the same command with --resume ends with the same bits."""
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import support.checkpoints
import train
from data import Dataset, epoch_batches
from model import Transformer
from processes import call, in_float32, launch, printed, start, wait_until
from support.cli import DataError
from support.readers import read_record
from support.templates import Renderer
from tiny import CAN_SHARD, apigen, make_checkpoint, make_model, read_lines, relative, write

needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def checkpoint_names(out):
    """All that lies in out/checkpoints, in order."""
    root = out / "checkpoints"
    return sorted(os.listdir(root)) if root.exists() else []


def complete(out):
    """The names of the complete checkpoints."""
    return [name for name in checkpoint_names(out) if not name.endswith(".tmp")]


def temporary(out):
    """The names of the checkpoints that are being written, or whose writing was interrupted."""
    return [name for name in checkpoint_names(out) if name.endswith(".tmp")]


def newest(out):
    """The step of the newest complete checkpoint; 0 if there is none."""
    names = complete(out)
    return int(names[-1].removeprefix("step-")) if names else 0


def checkpoints_of(steps):
    return [f"step-{step:08}" for step in steps]


def metrics(out):
    """The lines of metrics.jsonl without the one figure that depends on the clock."""
    rows = read_lines(out / "metrics.jsonl")
    for row in rows:
        del row["tokens_per_s"]
    return rows


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def assert_same_run(out, expected):
    assert weights(out) == weights(expected)
    assert metrics(out) == metrics(expected)


def training(work, out, steps, *more):
    """The script and its arguments."""
    return ["train", "--model", work / "model", "--data", work / "data.json", "--method", "sft",
            "--out", out, "--steps", steps, "--lr", "1e-3", "--batch-tokens", 400,
            "--micro-tokens", 200, *more]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/, data.json, and an uninterrupted run in whole/.

    The run has 6 steps and a checkpoint every second step.
    """
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(24))
    arguments = training(work, work / "whole", 6, "--checkpoint-every", 2, "--keep", 9)
    code, text = call(work, *arguments)
    assert code == 0, text
    assert complete(work / "whole") == checkpoints_of([2, 4, 6]), text
    return work


@pytest.fixture
def unfinished(work, tmp_path):
    """The run of whole/ as it would be had it been stopped after step 5."""
    later = shutil.ignore_patterns("model", "step-00000006")
    out = shutil.copytree(work / "whole", tmp_path / "out", ignore=later)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    return out


def resume(work, out, *more, **limits):
    arguments = training(
        work, out, 6, "--checkpoint-every", 2, "--keep", 9, "--resume", *more)
    return call(work, *arguments, **limits)


# --------------------------------------------------------------------------------------------------
# Killed, told to stop

STEPS = 80


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """As `work`, with STEPS steps and a model whose checkpoint takes as long as a step."""
    work = tmp_path_factory.mktemp("large")
    make_checkpoint(work / "model", hidden_size=128, intermediate_size=256, initializer_range=0.05)
    write(work / "data.json", apigen(24))
    code, text = call(work, *training(work, work / "whole", STEPS, "--checkpoint-every", 0))
    assert code == 0, text
    assert complete(work / "whole") == [], text
    return work


MOMENTS = ["after a checkpoint", "while one is written", "anywhere"]


def run_and_kill(work, out, arguments, moment, delay, as_a_user):
    """Start a run and kill it; returns (what it printed, seconds from its start to the moment).

    moment: one of MOMENTS. delay: seconds, after a checkpoint or, for "anywhere", after the start.
    """
    step_before = newest(out)
    left_before = set(temporary(out))
    began = time.perf_counter()
    conditions = {
        "after a checkpoint": lambda: newest(out) > step_before,
        "while one is written": lambda: set(temporary(out)) - left_before,
        "anywhere": lambda: time.perf_counter() - began > delay}
    process = launch(*arguments) if as_a_user else start(work, *arguments)[0]
    running = wait_until(conditions[moment], process)
    seconds = time.perf_counter() - began
    if moment == "after a checkpoint":
        time.sleep(delay)
    process.kill()
    if as_a_user:
        text, _ = process.communicate()
    else:
        process.join()
        text = printed(work)
    assert running, text                                # it was killed, it did not end
    assert step_before <= newest(out) < STEPS, text
    for step in re.findall(r"resumed from .*step-(\d+)", text):
        assert int(step) == step_before     # only the steps since the last checkpoint are lost
    return text, seconds


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(large, tmp_path):
    """With a checkpoint every step.

    Kills fall into the start, into the writing of a checkpoint, and anywhere in between.
    """
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 1, "--resume")
    rng = random.Random(0)
    first_checkpoint = 0.2                  # seconds from the start of a run
    resumed = 0
    interrupted = set()                     # checkpoints that a kill left half written
    for kill in range(23):
        moment = MOMENTS[kill % 3]
        delay = rng.random() * (first_checkpoint if moment == "anywhere" else 0.05)
        text, seconds = run_and_kill(
            large, tmp_path, arguments, moment, delay, as_a_user=kill < 2)
        if moment == "after a checkpoint":
            first_checkpoint = seconds
        resumed += text.count("resumed from")
        for name in temporary(tmp_path):
            interrupted.add(os.stat(tmp_path / "checkpoints" / name).st_ctime_ns)
    assert len(interrupted) >= 5
    assert resumed >= 8

    code, text = call(large, *arguments)
    assert code == 0, text
    assert_same_run(tmp_path, large / "whole")
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert complete(tmp_path) == checkpoints_of([STEPS - 1, STEPS])
    assert not temporary(tmp_path)


def wait_for_two_steps(out, process):
    file = out / "metrics.jsonl"

    def two_steps():
        return file.exists() and file.read_text().count("\n") >= 2

    return wait_until(two_steps, process)


def assert_stopped_with_a_checkpoint(out):
    assert complete(out) == checkpoints_of([len(metrics(out))])
    assert 2 <= newest(out) < STEPS


def test_sigterm_ends_a_run_with_a_checkpoint(large, tmp_path):
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 0)
    process = launch(*arguments)
    assert wait_for_two_steps(tmp_path, process), process.communicate()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "told to stop" in text
    assert "Traceback" not in text, text
    assert_stopped_with_a_checkpoint(tmp_path)
    code, text = call(large, *arguments, "--resume")
    assert code == 0, text
    assert_same_run(tmp_path, large / "whole")


@needs_sharding
def test_sigterm_to_one_rank_ends_them_all(large, tmp_path):
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 0, "--shard", "yes")
    ranks = start(large, *arguments, processes=2)
    assert wait_for_two_steps(tmp_path, ranks[0]), printed(large)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for process in ranks:
        process.join()
        assert process.exitcode == 0, printed(large)
    assert_stopped_with_a_checkpoint(tmp_path)


# --------------------------------------------------------------------------------------------------
# Other numbers of ranks

ONE_RANK = (1, "no")                        # (processes, --shard)
TWO_RANKS = (2, "no")
TWO_SHARDED = (2, "yes")


@needs_sharding
@pytest.mark.parametrize("before, after", [
    pytest.param(ONE_RANK, TWO_SHARDED, id="1 -> 2 sharded"),
    pytest.param(TWO_SHARDED, ONE_RANK, id="2 sharded -> 1"),
    pytest.param(TWO_SHARDED, TWO_RANKS, id="2 sharded -> 2 whole")])
def test_a_checkpoint_resumes_on_another_number_of_ranks(work, tmp_path, before, after):
    out = tmp_path / "out"
    arguments = training(work, out, 6, "--checkpoint-every", 2)
    processes, shard = before
    code, text = call(work, *arguments, "--shard", shard, "--keep", 9, processes=processes)
    assert code == 0, text
    shutil.rmtree(out / "model")            # as if it had been stopped after step 3
    for name in complete(out)[1:]:
        shutil.rmtree(out / "checkpoints" / name)
    processes, shard = after
    code, text = call(work, *arguments, "--shard", shard, "--resume", processes=processes)
    assert code == 0, text
    assert "resumed from" in text
    assert "step-00000002" in text

    base, ours, expected = (Transformer.from_pretrained(str(path / "model")).state_dict()
                            for path in (work, out, work / "whole"))
    assert all(relative(ours[name], expected[name]) < 1e-5 for name in expected)
    assert any(relative(base[name], expected[name]) > 1e-2 for name in expected)
    for one, other in zip(metrics(out), metrics(work / "whole"), strict=True):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# What cannot be written or read: one sentence, exit code 2, and earlier checkpoints as they were

def assert_refused(result, *words):
    code, text = result
    assert code == 2, text
    assert "Traceback" not in text, text
    sentence = text.strip().split("\n")[-1]
    assert sentence.startswith("train.py: "), text
    assert all(word in sentence for word in words), text


def test_a_full_disk_harms_no_earlier_checkpoint(work, unfinished):
    size = os.path.getsize(unfinished / "checkpoints" / "step-00000004" / "__0_0.distcp")
    result = resume(work, unfinished, "--checkpoint-every", 1, largest_file=size // 2)
    assert_refused(result, "step 5", "File too large", "--resume")
    assert complete(unfinished) == checkpoints_of([2, 4])
    assert not temporary(unfinished)
    code, text = resume(work, unfinished)
    assert code == 0, text
    assert "step-00000004" in text, text
    assert_same_run(unfinished, work / "whole")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(work, unfinished, file):
    damaged = unfinished / "checkpoints" / "step-00000004"
    with open(damaged / file, "r+b") as f:
        f.truncate(os.path.getsize(damaged / file) // 2)
    result = resume(work, unfinished)
    assert_refused(result, str(damaged), file, "remove it", "step-00000002")
    shutil.rmtree(damaged)
    code, text = resume(work, unfinished)
    assert code == 0, text
    assert "step-00000002" in text, text
    assert_same_run(unfinished, work / "whole")


def test_a_resumed_run_must_be_the_same_run(work, unfinished):
    assert_refused(resume(work, unfinished, "--seed", 1), "another seed")
    assert_refused(resume(work, unfinished, "--lr", 1, "--epochs", 3), "another epochs and lr")
    write(work / "other.json", apigen(25))
    assert_refused(resume(work, unfinished, "--data", work / "other.json"), "another data")
    shutil.copytree(work / "model", work / "other")
    config = json.loads((work / "other" / "config.json").read_text())
    write(work / "other" / "config.json", config | {"rms_norm_eps": 0.1})
    assert_refused(resume(work, unfinished, "--model", work / "other"), "another config")


def test_an_unfinished_run_is_not_overwritten(work, unfinished):
    result = call(work, *training(work, unfinished, 6))
    assert_refused(result, "--resume", "checkpoints")


def test_a_finished_run_has_nothing_to_resume(work):
    before = weights(work / "whole")
    code, text = resume(work, work / "whole")
    assert code == 0
    assert "nothing to resume" in text
    assert weights(work / "whole") == before


def test_metrics_survive_a_kill_while_they_are_cut(work, unfinished, monkeypatch):
    """On resuming, metrics.jsonl is cut to the steps of the checkpoint; no kill loses a line."""
    rows = []

    def killed(row):
        rows.append(row)
        raise KeyboardInterrupt

    arguments = training(work, unfinished, 6, "--checkpoint-every", 2, "--resume")
    json_that_is_killed = SimpleNamespace(load=json.load, loads=json.loads, dumps=killed)
    monkeypatch.setattr(support.checkpoints, "json", json_that_is_killed)
    monkeypatch.setattr(sys, "argv", in_float32("train", arguments))
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert rows[0]["step"] == 1             # killed as it wrote the first line
    assert len(metrics(unfinished)) == 5


# --------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite

def small_run(work, out):
    """(model, dataset, options) for `train`, with a checkpoint every step and an untied head."""
    samples = [read_record(record, i) for i, record in enumerate(apigen(24))]
    dataset = Dataset(samples, Renderer(str(work / "model")))
    model = make_model(dataset.renderer.vocab_size, tie_word_embeddings=False)
    options = train.Options(
        model="", data=[""], out=str(out), method="sft", steps=6, batch_tokens=900,
        micro_tokens=450, checkpoint_every=1, keep=9)
    return model, dataset, options


def plan(dataset, options):
    return epoch_batches(dataset.lengths, dataset.kept, options.batch_tokens, options.seed)


def assert_readable(out, steps, model):
    """The checkpoints of exactly the first `steps` steps exist, and can be read."""
    assert complete(out) == checkpoints_of(range(1, steps + 1))
    assert not temporary(out)
    optimizer = torch.optim.AdamW(model.parameters())
    state = json.loads((out / "checkpoints" / complete(out)[-1] / "state.json").read_text())
    loaded = support.checkpoints.load_checkpoint(str(out), model, optimizer, state["run"])
    assert loaded == steps == len(metrics(out))


def test_a_loss_that_is_not_finite_names_exactly_its_samples(work, tmp_path):
    model, dataset, options = small_run(work, tmp_path)
    third = plan(dataset, options)[2]
    assert len(third) > 2
    bad = [int(third[0]), int(third[-1])]
    used = set(np.concatenate(list(dataset.ids)).tolist())
    unused = min(set(range(dataset.renderer.vocab_size)) - used)
    for i in bad:
        dataset.ids[i][1] = unused          # a token of no other sample, in the prompt
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = float("nan")
    with pytest.raises(DataError) as error:
        train.train(model, dataset, None, options)
    names = ", ".join(dataset.samples[i].id for i in sorted(bad))
    sentence = f"step 3: the loss is not finite; lower --lr, or look at samples {names}."
    assert sentence in str(error.value)
    assert not (tmp_path / "model").exists()
    assert_readable(tmp_path, 2, model)


def test_a_gradient_that_is_not_finite_names_its_batch(work, tmp_path):
    model, dataset, options = small_run(work, tmp_path)
    third = plan(dataset, options)[2]

    def infinite_in_step_3(grad):
        return grad / 0 if len(complete(tmp_path)) == 2 else grad

    model.model.norm.weight.register_hook(infinite_in_step_3)
    with pytest.raises(DataError) as error:
        train.train(model, dataset, None, options)
    names = [dataset.samples[int(i)].id for i in third]
    assert len(names) <= 8
    assert "step 3: the gradient is not finite" in str(error.value)
    assert f"look at samples {', '.join(names)}." in str(error.value)
    assert_readable(tmp_path, 2, model)
