"""The dataset, its batches, and its cache."""
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from data import Dataset, collate, epoch_batches, micro_batches
from processes import ROOT
from support.chat_template import LEFT_OUT
from support.cli import DataError
from support.readers import read_samples
from support.templates import Renderer
from tiny import apigen, make_checkpoint, talk, write


@pytest.fixture(scope="module")
def dataset(chatml, tmp_path_factory):
    path = write(tmp_path_factory.mktemp("data") / "a.json", apigen(60))
    return Dataset.load([path, path + "[3:9]"], chatml, "auto", 4096)


def same_rows(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


# --------------------------------------------------------------------------------------------------
# The dataset

def test_output_starts(dataset):
    assert len(dataset.samples) == 66
    assert dataset.dropped == 0
    assert dataset.output_starts[0] == 0
    counts = [is_output.sum() for is_output in dataset.is_output]
    assert np.array_equal(np.diff(dataset.output_starts), counts)
    roles = dataset.true_roles()
    assert all(len(is_role) == dataset.output_starts[-1] for is_role in roles.values())
    assert (sum(is_role.astype(int) for is_role in roles.values()) == 1).all()
    assert {name for name, is_role in roles.items() if is_role.any()} == \
        {"reasoning", "format", "boundary"}


def test_over_long_samples_are_dropped_and_counted(dataset):
    limit = int(np.median(dataset.lengths))
    short = Dataset(dataset.samples, dataset.renderer, limit)
    is_long = dataset.lengths > limit
    assert 0 < short.dropped == is_long.sum() < 66
    assert len(short.samples) == 66
    assert np.array_equal(short.kept, np.flatnonzero(~is_long))
    counts = np.where(is_long, 0, np.diff(dataset.output_starts))
    assert np.array_equal(np.diff(short.output_starts), counts)
    assert same_rows([short.ids[i] for i in short.kept], [dataset.ids[i] for i in short.kept])
    assert short.output_starts[-1] == len(short.true_roles()["format"])
    with pytest.raises(DataError, match="--max-length"):
        Dataset(dataset.samples, dataset.renderer, 3)


def test_true_roles_are_unknown_if_any_is(dataset):
    samples = [*dataset.samples[:2], talk(("user", "a"), ("assistant", "b"))]
    assert Dataset(samples, dataset.renderer).true_roles() is None


# --------------------------------------------------------------------------------------------------
# Batches

def test_collate_shifts_right(dataset):
    differences = np.random.default_rng(0).standard_normal(dataset.output_starts[-1], np.float32)
    indices = [5, 0, 17, 40]
    tokens, targets, LD = collate(dataset, indices, differences)
    longest = dataset.lengths[indices].max()
    assert tokens.shape == targets.shape == LD.shape == (4, longest - 1)
    assert tokens.dtype == targets.dtype == torch.int64
    assert LD.dtype == torch.float32
    for b, i in enumerate(indices):
        ids = dataset.ids[i]
        n = len(ids) - 1
        assert tokens[b, :n].tolist() == ids[:-1].tolist()
        following = zip(ids[1:], dataset.is_output[i][1:], strict=True)
        assert targets[b, :n].tolist() == [t if scored else -100 for t, scored in following]
        assert (targets[b, n:] == -100).all()
        assert not LD[b, n:].any()
        scored = targets[b] != -100
        here = slice(dataset.output_starts[i], dataset.output_starts[i + 1])
        assert LD[b][scored].tolist() == differences[here].tolist()
        assert not LD[b][~scored].any()
    assert not collate(dataset, indices)[2].any()
    tokens, targets, _ = collate(dataset, [])            # a rank with no work
    assert tokens.shape == (1, 1)
    assert targets.tolist() == [[-100]]


@pytest.mark.parametrize("batch_tokens", [50, 700, 3000, 10**6])
def test_an_epoch_has_every_sample_once_within_the_budget(dataset, batch_tokens):
    lengths = dataset.lengths
    indices = dataset.kept[::2]
    batches = epoch_batches(lengths, indices, batch_tokens, seed=1)
    assert sorted(np.concatenate(batches)) == indices.tolist()
    assert all(len(batch) == 1 or lengths[batch].sum() <= batch_tokens for batch in batches)
    if batch_tokens == 3000:
        # the budget is used, too: at most one batch has room for the longest sample
        longest = lengths[indices].max()
        assert sum(lengths[batch].sum() + longest <= batch_tokens for batch in batches) <= 1


def test_batches_are_a_function_of_seed_and_epoch(dataset, monkeypatch):
    def batches(seed, epoch):
        return epoch_batches(dataset.lengths, dataset.kept, 1500, seed, epoch)

    first = batches(0, 0)
    np.random.seed(5)
    random.seed(5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert same_rows(batches(0, 0), first)
    assert not same_rows(batches(1, 0), first)
    assert not same_rows(batches(0, 1), first)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_micro_batches_partition_a_batch_over_the_ranks(dataset, world):
    lengths = dataset.lengths
    for batch in [*epoch_batches(lengths, dataset.kept, 2500, 0), [4], [7, 3]]:
        shares = [micro_batches(batch, lengths, 600, rank, world) for rank in range(world)]
        pieces = sum(shares, [])
        assert sorted(np.concatenate(pieces)) == sorted(batch)
        assert all(len(p) <= 1 or len(p) * lengths[p].max() <= 600 for p in pieces)
        # as many for each rank, and no more than the busiest needs
        assert len({len(share) for share in shares}) == 1
        assert any(all(map(len, share)) for share in shares)


# --------------------------------------------------------------------------------------------------
# The cache

def test_the_cache_is_used_while_it_fits_and_made_again_when_not(chatml, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "shad-rft"
    path = write(tmp_path / "a.json", apigen(20))

    def load(max_length=250):
        return Dataset.load([path], chatml, "auto", max_length)

    def folders():
        return [entry.path for entry in os.scandir(root) if entry.is_dir()]

    first = load()
    memory = Dataset(read_samples(path), Renderer(chatml), 250)
    assert len(first.ids) == 20
    assert same_rows(first.ids, memory.ids)
    assert same_rows(first.is_output, memory.is_output)
    assert list(first.samples) == list(memory.samples)
    assert first.dropped == memory.dropped > 0
    assert first.fingerprint == memory.fingerprint
    assert np.array_equal(first.output_starts, memory.output_starts)

    with monkeypatch.context() as patch:        # nothing is rendered a second time
        patch.setattr(Renderer, "render", None)
        assert np.array_equal(load().ids.flat, first.ids.flat)
    assert len(folders()) == 1
    assert load(500).dropped < first.dropped
    assert len(folders()) == 2

    os.mkdir(folders()[0] + "-other.tmp")
    write(tmp_path / "a.json", apigen(21))
    assert len(load().samples) == 21
    assert len(folders()) == 4


def test_the_cache_keeps_what_a_chat_template_takes(tmp_path):
    directory = make_checkpoint(tmp_path)
    write(tmp_path / "chat_template.jinja",
          "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls }}\n{% endfor %}")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [call]}]
    record = {"messages": messages, "tools": [{"name": "find_city"}]}
    path = write(tmp_path / "a.json", [record] * 3)
    for _ in range(2):
        dataset = Dataset.load([path], directory, "auto", 400)
        assert dataset.samples[2].tools == record["tools"]
        assert [m.turn for m in dataset.samples[2].messages] == [{}, None, messages[1]]
        assert dataset.notes == {LEFT_OUT: 3}                   # of tools
    write(tmp_path / "a.json", [record | {"tools": [{"name": "find_road"}]}] * 3)
    assert Dataset.load([path], directory, "auto", 400).fingerprint != dataset.fingerprint


def test_a_file_that_breaks_off_leaves_no_cache(chatml, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "a.json", json.dumps(apigen(20))[:-100])
    with pytest.raises(DataError, match="a.json, line 1"):
        Dataset.load([path], chatml, "auto", 400)
    assert not [entry for entry in os.scandir(tmp_path / "cache" / "shad-rft") if entry.is_dir()]


LOAD = """
import sys, tracemalloc
from data import Dataset
arguments = ([sys.argv[1]], sys.argv[2], "auto", 2048)
made = Dataset.load(*arguments)
tracemalloc.start()
found = Dataset.load(*arguments)
held, _ = tracemalloc.get_traced_memory()
print(held, len(found.roles))
assert (found.ids[-1] == made.ids[-1]).all()
assert found.samples[-1] == made.samples[-1]
"""


def test_a_cached_dataset_is_mapped_and_not_read(chatml, tmp_path):
    """Ten times the samples take only three numbers more per sample: length, outputs and kept.

    That is what is held; while files are checked, each thread has a buffer besides.
    """
    held = []
    counts = (400, 4_000)
    for count in counts:
        path = write(tmp_path / f"{count}.json", apigen(100) * (count // 100))
        done = subprocess.run([sys.executable, "-c", LOAD, str(path), str(chatml)], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        bytes_held, roles = map(int, done.stdout.split())
        held.append(bytes_held)
    numbers = 3 * 8 * (counts[1] - counts[0])
    assert held[1] - held[0] < 1.1 * numbers
    assert roles > 5 * numbers          # reading even the smallest array would show
