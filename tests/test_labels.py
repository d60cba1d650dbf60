"""Labels: the same bytes from any number of processes, and from a run that was killed again and again."""
import contextlib
import os
import random
import signal
import time

import pytest
import torch

from data import Dataset, load_labels
from processes import call, said, start, wait_until
from tiny import CAN_SHARD, apigen, make_model, make_tokenizer, relative, write


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/, data.json, and whole/, the labels of an uninterrupted run of one process."""
    work = tmp_path_factory.mktemp("work")
    (work / "model").mkdir()
    vocabulary = make_tokenizer(work / "model").get_vocab_size()
    make_model(vocabulary, hidden_size=64, intermediate_size=128).save_pretrained(str(work / "model"))
    write(work / "data.json", apigen(96))
    code, text = call(work, *labelling(work, work / "whole"))
    assert code == 0, text
    return work


def labelling(work, out, *more):
    """The script and its arguments. A batch is one sample, so that no sum over ranks has two terms and even tuning is the same to
    the bit; parts are so small that there are more than 5."""
    return ["shad", "--model", work / "model", "--data", work / "data.json", "--out", out, "--shuffle", 10, "--lr", "1e-3",
            "--batch-tokens", 1, "--micro-tokens", 150, *more]


def labels(out):
    return (out / "labels.safetensors").read_bytes()


def left(out):
    """{file: (inode, time of writing)} of what an unfinished run has finished: parts, and the tuned model."""
    found = {}
    for folder in ("base losses", "tuned model", "tuned losses"):
        with contextlib.suppress(FileNotFoundError):            # it ends just now
            for name in os.listdir(out / "parts" / folder):
                if name.endswith((".npy", ".safetensors")):
                    state = os.stat(out / "parts" / folder / name)
                    found[f"{folder}/{name}"] = state.st_ino, state.st_mtime_ns
    return found


def difference(work, out):
    return load_labels(str(out), Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048))[0]


def test_two_processes_label_to_the_same_bytes(work, tmp_path):
    code, text = call(work, *labelling(work, tmp_path), processes=2)
    assert code == 0, text
    assert labels(tmp_path) == labels(work / "whole")
    assert not (tmp_path / "parts").exists()


@pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
def test_two_processes_that_share_the_model_label_the_same(work, tmp_path):
    code, text = call(work, *labelling(work, tmp_path, "--shard", "yes"), processes=2)
    assert code == 0, text
    ours, expected = torch.tensor(difference(work, tmp_path)), torch.tensor(difference(work, work / "whole"))
    assert relative(ours, expected) < 1e-5


def test_a_run_that_is_killed_again_and_again_labels_to_the_same_bytes(work, tmp_path):
    """Killed once it has finished one to three files more, or at any moment of its first half second."""
    rng, finished, kills = random.Random(0), {}, 0
    while not (tmp_path / "labels.safetensors").exists():
        [process] = start(work, *labelling(work, tmp_path))
        more = rng.randint(0, 3)
        wait_until(lambda: len(left(tmp_path)) >= len(finished) + more, process)
        time.sleep(rng.random() * (0.01 if more else 0.5))
        now = left(tmp_path)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), said(work)
        if not (tmp_path / "labels.safetensors").exists():
            assert finished.items() <= now.items() <= left(tmp_path).items()           # what was there was not made again
            finished, kills = now, kills + 1
    if (tmp_path / "parts").exists():                           # killed after its last part
        code, text = call(work, *labelling(work, tmp_path))
        assert code == 0, text
    assert labels(tmp_path) == labels(work / "whole") and not (tmp_path / "parts").exists()
    assert (tmp_path / "labels.html").exists() and (tmp_path / "summary.json").exists()
    assert len([name for name in finished if name.startswith("base")]) >= 5 and "tuned model/model.safetensors" in finished and kills >= 8


@pytest.fixture
def unfinished(work, tmp_path):
    """A run killed after its third part."""
    [process] = start(work, *labelling(work, tmp_path))
    assert wait_until(lambda: len(left(tmp_path)) >= 3, process), said(work)
    process.kill()
    process.join()
    return tmp_path


def test_parts_of_another_run_are_refused(work, unfinished):
    before = left(unfinished)
    write(work / "other.json", apigen(40))
    for changes, named in ((["--micro-tokens", 100], "another micro_tokens;"), (["--seed", 1, "--lr", 1], "another lr and seed;"),
                           (["--data", work / "other.json"], "another data;")):
        code, text = call(work, *labelling(work, unfinished, *changes))
        assert code == 2 and "Traceback" not in text, text
        sentence = text.strip().split("\n")[-1]
        assert sentence.startswith("shad.py: ") and named in sentence and str(unfinished / "parts") in sentence and "remove it" in sentence
    assert left(unfinished) == before


def test_parts_of_an_unknown_run_are_made_again(work, unfinished):
    """settings.json may be the first to go when a run is killed as it removes its parts."""
    (unfinished / "parts" / "settings.json").unlink()
    code, text = call(work, *labelling(work, unfinished, "--micro-tokens", 100))
    assert code == 0, text
    code, text = call(work, *labelling(work, unfinished / "again", "--micro-tokens", 100))
    assert code == 0 and labels(unfinished) == labels(unfinished / "again"), text
