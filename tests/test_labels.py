"""Labels: the same bytes from any number of processes, and from a run killed again and again."""
import contextlib
import os
import random
import signal
import time

import pytest
import torch

from data import Dataset
from processes import call, printed, start, wait_until
from shad import load_labels
from tiny import CAN_SHARD, apigen, make_checkpoint, relative, write


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/, data.json, and whole/, the labels of an uninterrupted run."""
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model", hidden_size=64, intermediate_size=128)
    write(work / "data.json", apigen(96))
    code, text = call(work, *labelling(work, work / "whole"))
    assert code == 0, text
    return work


def labelling(work, out, *more):
    """The script and its arguments.

    A batch is one sample, so that no sum over ranks has two terms and even tuning is the same to
    the bit. Parts are so small that there are more than 5.
    """
    return ["shad", "--model", work / "model", "--data", work / "data.json", "--out", out,
            "--shuffle", 10, "--lr", "1e-3", "--batch-tokens", 1, "--micro-tokens", 150, *more]


def labels(out):
    return (out / "labels.safetensors").read_bytes()


def finished_files(out):
    """{file: (inode, time of writing)} of the parts and the model that an unfinished run has."""
    found = {}
    for folder in ("base losses", "tuned model", "tuned losses"):
        with contextlib.suppress(FileNotFoundError):            # the run removes it right now
            for name in os.listdir(out / "parts" / folder):
                if name.endswith((".npy", ".safetensors")):
                    state = os.stat(out / "parts" / folder / name)
                    found[f"{folder}/{name}"] = (state.st_ino, state.st_mtime_ns)
    return found


def difference(work, out):
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    return torch.tensor(load_labels(str(out), dataset).difference[:])


def test_two_processes_label_to_the_same_bytes(work, tmp_path):
    code, text = call(work, *labelling(work, tmp_path), processes=2)
    assert code == 0, text
    assert labels(tmp_path) == labels(work / "whole")
    assert not (tmp_path / "parts").exists()


@pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot shard on CPUs")
def test_two_processes_that_share_the_model_label_the_same(work, tmp_path):
    code, text = call(work, *labelling(work, tmp_path, "--shard", "yes"), processes=2)
    assert code == 0, text
    assert relative(difference(work, tmp_path), difference(work, work / "whole")) < 1e-5


def run_and_kill(work, out, count, delay):
    """Start a run and kill it `delay` seconds after it has finished `count` files, or has ended.

    Returns the files that it had finished just before.
    """
    [process] = start(work, *labelling(work, out))
    wait_until(lambda: len(finished_files(out)) >= count, process)
    time.sleep(delay)
    files = finished_files(out)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), printed(work)
    return files


def test_a_run_that_is_killed_again_and_again_labels_to_the_same_bytes(work, tmp_path):
    """Killed once it has finished one to three more files, or within its first half second."""
    rng = random.Random(0)
    finished = {}
    kills = 0
    while not (tmp_path / "labels.safetensors").exists():
        more = rng.randint(0, 3)
        delay = rng.random() * (0.01 if more else 0.5)
        now = run_and_kill(work, tmp_path, len(finished) + more, delay)
        if not (tmp_path / "labels.safetensors").exists():
            # what was there has not been made again
            assert finished.items() <= now.items() <= finished_files(tmp_path).items()
            finished = now
            kills += 1
    if (tmp_path / "parts").exists():                           # killed after its last part
        code, text = call(work, *labelling(work, tmp_path))
        assert code == 0, text
    assert labels(tmp_path) == labels(work / "whole")
    assert not (tmp_path / "parts").exists()
    assert (tmp_path / "labels.html").exists()
    assert (tmp_path / "summary.json").exists()
    assert len([name for name in finished if name.startswith("base")]) >= 5
    assert "tuned model/model.safetensors" in finished
    assert kills >= 8


@pytest.fixture
def unfinished(work, tmp_path):
    """A run killed after its third part."""
    [process] = start(work, *labelling(work, tmp_path))
    three_parts = wait_until(lambda: len(finished_files(tmp_path)) >= 3, process)
    assert three_parts, printed(work)
    process.kill()
    process.join()
    return tmp_path


def test_parts_of_another_run_are_refused(work, unfinished):
    before = finished_files(unfinished)
    other_data = write(work / "other.json", apigen(40))
    for changes, named in ((["--micro-tokens", 100], "another micro_tokens;"),
                           (["--seed", 1, "--lr", 1], "another lr and seed;"),
                           (["--data", other_data], "another data;")):
        code, text = call(work, *labelling(work, unfinished, *changes))
        assert code == 2, text
        assert "Traceback" not in text, text
        sentence = text.strip().split("\n")[-1]
        assert sentence.startswith("shad.py: ")
        assert named in sentence
        assert str(unfinished / "parts") in sentence
        assert "remove it" in sentence
    assert finished_files(unfinished) == before


def test_parts_of_an_unknown_run_are_made_again(work, unfinished):
    """settings.json may be the first to go when a run is killed as it removes its parts."""
    (unfinished / "parts" / "settings.json").unlink()
    code, text = call(work, *labelling(work, unfinished, "--micro-tokens", 100))
    assert code == 0, text
    again = unfinished / "again"
    code, text = call(work, *labelling(work, again, "--micro-tokens", 100))
    assert code == 0, text
    assert labels(unfinished) == labels(again)
