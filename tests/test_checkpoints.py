"""Checkpoints: whatever ends a run, the same command with --resume ends with the same bits."""
import json
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch

import train
from data import DataError, Dataset, Renderer, epoch_batches, read_record
from model import Transformer
from processes import as_a_user, call, said, start, wait_until
from tiny import CAN_SHARD, apigen, make_model, make_tokenizer, relative, write

needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def checkpoints(out, aside=False):
    """The names of the whole checkpoints, or of those that are being written, in order."""
    root = out / "checkpoints"
    return sorted(name for name in (os.listdir(root) if root.exists() else []) if name.endswith(".tmp") == aside)


def newest(out):
    return int(([0] + [name[5:] for name in checkpoints(out)])[-1])


def metrics(out):
    """The lines of metrics.jsonl without the one figure that is of the clock."""
    with open(out / "metrics.jsonl", encoding="utf-8") as f:
        return [{key: value for key, value in json.loads(line).items() if key != "tokens_per_s"} for line in f]


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


def assert_same_run(out, expected):
    assert weights(out) == weights(expected)
    assert metrics(out) == metrics(expected)


def training(work, out, steps, *more):
    """The script and its arguments."""
    return ["train", "--model", work / "model", "--data", work / "data.json", "--method", "sft", "--out", out, "--steps", steps,
            "--lr", "1e-3", "--batch-tokens", 400, "--micro-tokens", 200, *more]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/, data.json and an uninterrupted run of 6 steps in whole/, every second of them a checkpoint."""
    work = tmp_path_factory.mktemp("work")
    (work / "model").mkdir()
    vocabulary = make_tokenizer(work / "model").get_vocab_size()
    make_model(vocabulary).save_pretrained(str(work / "model"))
    write(work / "data.json", apigen(24))
    code, text = call(work, *training(work, work / "whole", 6, "--checkpoint-every", 2, "--keep", 9))
    assert code == 0 and checkpoints(work / "whole") == [f"step-{step:08}" for step in (2, 4, 6)], text
    return work


@pytest.fixture
def unfinished(work, tmp_path):
    """The run of whole/ as it would lie there had it been stopped after step 5."""
    out = shutil.copytree(work / "whole", tmp_path / "out", ignore=shutil.ignore_patterns("model", "step-00000006"))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    return out


def resume(work, out, *more, **limits):
    return call(work, *training(work, out, 6, "--checkpoint-every", 2, "--keep", 9, "--resume", *more), **limits)


# -----------------------------------------------------------------------------------------------------------------
# Killed, told to stop

STEPS = 80


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """As `work`, with a model so large that writing a checkpoint takes as long as a step; whole/ has STEPS steps."""
    work = tmp_path_factory.mktemp("large")
    (work / "model").mkdir()
    vocabulary = make_tokenizer(work / "model").get_vocab_size()
    make_model(vocabulary, hidden_size=128, intermediate_size=256, initializer_range=0.05).save_pretrained(str(work / "model"))
    write(work / "data.json", apigen(24))
    code, text = call(work, *training(work, work / "whole", STEPS, "--checkpoint-every", 0))
    assert code == 0 and checkpoints(work / "whole") == [], text
    return work


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(large, tmp_path):
    """With a checkpoint a step. Kills fall into the start, into the writing of a checkpoint, and anywhere between."""
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 1, "--resume")
    rng, resumed, halfway, first_checkpoint = random.Random(0), 0, set(), 0.2
    for kill in range(23):
        before, began, delay = newest(tmp_path), time.perf_counter(), rng.random()
        aside = checkpoints(tmp_path, aside=True)
        [process] = [as_a_user(*arguments)] if kill < 2 else start(large, *arguments)
        if kill % 3 == 0:
            going = wait_until(lambda: newest(tmp_path) > before, process)
            first_checkpoint = time.perf_counter() - began
            time.sleep(delay * 0.05)
        elif kill % 3 == 1:
            going = wait_until(lambda: set(checkpoints(tmp_path, aside=True)) - set(aside), process)
        else:
            going = wait_until(lambda: time.perf_counter() - began > delay * first_checkpoint, process)
        process.kill()
        text = process.communicate()[0] if kill < 2 else process.join() or said(large)
        assert going and before <= newest(tmp_path) < STEPS, text                           # it was killed, it did not end
        for name in checkpoints(tmp_path, aside=True):
            halfway.add(os.stat(tmp_path / "checkpoints" / name).st_ctime_ns)
        for step in re.findall(r"resumed from .*step-(\d+)", text):
            resumed += 1
            assert int(step) == before                  # nothing is lost but the steps since the last checkpoint
    assert len(halfway) >= 5 and resumed >= 8, (halfway, resumed)
    code, text = call(large, *arguments)
    assert code == 0, text
    assert_same_run(tmp_path, large / "whole")
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, STEPS + 1))
    assert checkpoints(tmp_path) == [f"step-{step:08}" for step in (STEPS - 1, STEPS)] and not checkpoints(tmp_path, aside=True)


def two_steps(out):
    return lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= 2


def test_sigterm_ends_a_run_with_a_checkpoint(large, tmp_path):
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 0)
    process = as_a_user(*arguments)
    assert wait_until(two_steps(tmp_path), process), process.communicate()
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate()
    assert process.returncode == 0 and "told to stop" in text and "Traceback" not in text, text
    assert checkpoints(tmp_path) == [f"step-{len(metrics(tmp_path)):08}"] and 2 <= newest(tmp_path) < STEPS
    code, text = call(large, *arguments, "--resume")
    assert code == 0, text
    assert_same_run(tmp_path, large / "whole")


@needs_sharding
def test_sigterm_to_one_rank_ends_them_all(large, tmp_path):
    arguments = training(large, tmp_path, STEPS, "--checkpoint-every", 0, "--shard", "yes")
    ranks = start(large, *arguments, processes=2)
    assert wait_until(two_steps(tmp_path), ranks[0]), said(large)
    os.kill(ranks[1].pid, signal.SIGTERM)
    for process in ranks:
        process.join()
        assert process.exitcode == 0, said(large)
    assert checkpoints(tmp_path) == [f"step-{len(metrics(tmp_path)):08}"] and 2 <= newest(tmp_path) < STEPS


# -----------------------------------------------------------------------------------------------------------------
# Other numbers of ranks

@needs_sharding
@pytest.mark.parametrize("before, after", [((1, "no"), (2, "yes")), ((2, "yes"), (1, "no")), ((2, "yes"), (2, "no"))],
                         ids=["1 -> 2 sharded", "2 sharded -> 1", "2 sharded -> 2 whole"])
def test_a_checkpoint_goes_on_on_another_number_of_ranks(work, tmp_path, before, after):
    out = tmp_path / "out"
    for (processes, shard), more in ((before, ["--keep", 9]), (after, ["--resume"])):
        code, text = call(work, *training(work, out, 6, "--checkpoint-every", 2, "--shard", shard, *more), processes=processes)
        assert code == 0, text
        if "--resume" in more:
            assert "resumed from" in text and "step-00000002" in text
        else:                                           # had it been stopped after step 3
            shutil.rmtree(out / "model")
            for name in checkpoints(out)[1:]:
                shutil.rmtree(out / "checkpoints" / name)
    ours, expected = (Transformer.from_pretrained(str(path / "model")).state_dict() for path in (out, work / "whole"))
    base = Transformer.from_pretrained(str(work / "model")).state_dict()
    assert all(relative(ours[name], expected[name]) < 1e-5 for name in expected)
    assert any(relative(base[name], expected[name]) > 1e-2 for name in expected)
    for one, other in zip(metrics(out), metrics(work / "whole"), strict=True):
        assert one["step"] == other["step"] and one["loss"] == pytest.approx(other["loss"], rel=1e-5)


# -----------------------------------------------------------------------------------------------------------------
# What cannot be written or read: one sentence, exit code 2, and the checkpoints before are as they were

def refused(result, *words):
    code, text = result
    assert code == 2 and "Traceback" not in text, text
    sentence = text.strip().split("\n")[-1]
    assert sentence.startswith("train.py: ") and all(word in sentence for word in words), text


def test_a_full_disk(work, unfinished):
    data = os.path.getsize(unfinished / "checkpoints" / "step-00000004" / "__0_0.distcp")
    refused(resume(work, unfinished, "--checkpoint-every", 1, largest_file=data // 2), "step 5", "File too large", "--resume")
    assert checkpoints(unfinished) == ["step-00000002", "step-00000004"] and not checkpoints(unfinished, aside=True)
    code, text = resume(work, unfinished)
    assert code == 0 and "step-00000004" in text, text
    assert_same_run(unfinished, work / "whole")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint(work, unfinished, file):
    damaged = unfinished / "checkpoints" / "step-00000004"
    with open(damaged / file, "r+b") as f:
        f.truncate(os.path.getsize(damaged / file) // 2)
    refused(resume(work, unfinished), str(damaged), file, "remove it", "step-00000002")
    shutil.rmtree(damaged)
    code, text = resume(work, unfinished)
    assert code == 0 and "step-00000002" in text, text
    assert_same_run(unfinished, work / "whole")


def test_a_resumed_run_must_be_the_same_run(work, unfinished):
    refused(resume(work, unfinished, "--seed", 1), "another seed")
    refused(resume(work, unfinished, "--lr", 1, "--epochs", 3), "another epochs and lr")
    write(work / "other.json", apigen(25))
    refused(resume(work, unfinished, "--data", work / "other.json"), "another data")


def test_checkpoints_are_not_written_over(work, unfinished):
    refused(call(work, *training(work, unfinished, 6)), "--resume", "checkpoints")


def test_a_finished_run_has_nothing_to_resume(work):
    before = weights(work / "whole")
    code, text = resume(work, work / "whole")
    assert code == 0 and "nothing to resume" in text and weights(work / "whole") == before


def test_metrics_outlive_a_kill_while_they_are_cut(work, unfinished, monkeypatch):
    """On resuming, metrics.jsonl is cut to the checkpoint's steps; killed in the middle of that, no line is lost."""
    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train.json, "dumps", killed)
    monkeypatch.setattr(sys, "argv", [*map(str, training(work, unfinished, 6, "--checkpoint-every", 2, "--resume"))])
    with pytest.raises(KeyboardInterrupt):
        train.main()
    monkeypatch.undo()
    assert len(metrics(unfinished)) == 5


# -----------------------------------------------------------------------------------------------------------------
# Losses and gradients that are not finite

def small_run(work, out):
    """(model, dataset, options) for `train`, a checkpoint a step; the head is not the embedding."""
    dataset = Dataset([read_record(record, i) for i, record in enumerate(apigen(24))], Renderer(str(work / "model")))
    model = make_model(dataset.renderer.vocab_size, tie_word_embeddings=False)
    return model, dataset, train.Options(model="", data=[""], out=str(out), method="sft", steps=6, batch_tokens=900, micro_tokens=450,
                                         checkpoint_every=1, keep=9)


def assert_whole(out, steps, model, dataset, o):
    """The checkpoints of exactly the first `steps` steps exist, and can be read."""
    assert checkpoints(out) == [f"step-{step + 1:08}" for step in range(steps)] and not checkpoints(out, aside=True)
    optimizer = torch.optim.AdamW(model.parameters())
    state = json.loads((out / "checkpoints" / checkpoints(out)[-1] / "state.json").read_text())
    assert train.load_checkpoint(str(out), model, optimizer, state["run"]) == steps == len(metrics(out))


def test_a_loss_that_is_not_finite_names_exactly_its_samples(work, tmp_path):
    model, dataset, o = small_run(work, tmp_path)
    batches = epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed)
    bad = [int(batches[2][0]), int(batches[2][-1])]                                     # in the third batch
    assert len(batches[2]) > 2
    unused = sorted(set(range(dataset.renderer.vocab_size)) - set(np.concatenate(list(dataset.ids)).tolist()))[0]
    for i in bad:
        dataset.ids[i][1] = unused                                                      # a token of no other sample, in its prompt
    with torch.no_grad():
        model.model.embed_tokens.weight[unused] = float("nan")
    with pytest.raises(DataError) as error:
        train.train(model, dataset, None, o)
    names = [dataset.samples[i].id for i in sorted(bad)]
    assert f"step 3: the loss is not finite; lower --lr, or look at samples {', '.join(names)}." in str(error.value)
    assert not (tmp_path / "model").exists()
    assert_whole(tmp_path, 2, model, dataset, o)


def test_a_gradient_that_is_not_finite_names_its_batch(work, tmp_path):
    model, dataset, o = small_run(work, tmp_path)
    batches = epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed)
    norm, calls = model.model.norm.weight, []

    def from_step_3(grad):
        calls.append(len(checkpoints(tmp_path)))
        return grad / 0 if calls[-1] == 2 else grad
    norm.register_hook(from_step_3)
    with pytest.raises(DataError) as error:
        train.train(model, dataset, None, o)
    names = [dataset.samples[int(i)].id for i in batches[2]]
    assert "step 3: the gradient is not finite" in str(error.value) and len(names) <= 8
    assert f"look at samples {', '.join(names)}." in str(error.value)
    assert_whole(tmp_path, 2, model, dataset, o)
