"""From files to padded batches: readers, chat rendering with output masks, SHAD's shuffling, labels, batching.
    samples = read_samples("train.json")              # APIGen, ToolBench, ShareGPT or messages, told by their content
    dataset = Dataset(samples, Renderer("model_dir"))  # token ids with a mask of the output tokens
    shuffled = shuffle_outputs(samples, 0.01, seed=0)  # SHAD, step 1: no output stays with its own input

A sample is a conversation. Its input is everything but the assistant's turns; its output is the assistant's turns, each with
the end-of-turn token that the model must emit. Only output tokens carry loss.
"""
import argparse


import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil

import numpy as np
import torch

from support.cli import DataError
from support.readers import Message, Sample, read_samples, split_slice, stream_samples
from support.templates import MARKS, Renderer


ARRAYS = {"tokens": np.int32, "marks": np.uint8, "texts": np.uint8, "index": np.int64}


class Rows:
    """Rows of unequal length in one flat array: rows[i] = view(flat[starts[i]:starts[i + 1]]), or of some of them, in an order."""

    def __init__(self, flat, starts, view=lambda row: row, order=None):
        self.flat, self.starts, self.view, self.order = flat, starts, view, range(len(starts) - 1) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.order[i]
        return self.view(self.flat[self.starts[row]:self.starts[row + 1]])

    def pick(self, order):
        return Rows(self.flat, self.starts, self.view, order)


def pack(sample: Sample) -> bytes:
    return json.dumps([sample.id, [(m.role, m.text, m.parts, m.scored) for m in sample.messages]]).encode()


def unpack(text: np.ndarray) -> Sample:
    name, messages = json.loads(text.tobytes())
    return Sample(name, [Message(*m) for m in messages])


class Dataset:
    """Rendered samples in flat arrays, held in memory or, by `load`, in files mapped into it.

    ids[i] (T_i,) int32, is_output[i] (T_i,) bool and samples[i], a Sample, are made when asked for. Samples longer than
    max_length tokens keep their place with no tokens and are counted in `dropped`, never cut.
    """

    def __init__(self, samples, renderer: Renderer, max_length: int = 2048):
        streams = {name: io.BytesIO() for name in ARRAYS}
        facts = self.write(samples, renderer, max_length, streams)
        self._hold({name: np.frombuffer(streams[name].getbuffer(), dtype) for name, dtype in ARRAYS.items()}, facts, renderer, max_length)

    @staticmethod
    def write(samples, renderer, max_length, streams) -> dict:
        """Render samples one after the other into binary streams; the facts that go with them."""
        data, dropped, ends = hashlib.sha256(), 0, np.zeros(3, np.int64)        # ends: of tokens, of output tokens, of texts
        streams["index"].write(ends.tobytes())
        samples = iter(samples)
        while group := list(itertools.islice(samples, 256)):
            for sample, encodings in zip(group, renderer.encode_texts(group)):
                data.update(json.dumps([(m.role, m.text, m.scored) for m in sample.messages]).encode())
                ids, marks = renderer.render(sample.messages, encodings)
                if len(ids) > max_length:
                    ids, marks, dropped = [], [], dropped + 1
                text, marks = pack(sample), np.array(marks, np.uint8)
                ends += len(ids), np.count_nonzero(marks), len(text)
                for name, row in (("tokens", np.array(ids, np.int32)), ("marks", marks), ("texts", text), ("index", ends)):
                    streams[name].write(row)
        return {"dropped": dropped,
                "fingerprint": {"data": data.hexdigest(), "tokenizer": renderer.fingerprint, "template": renderer.template}}

    def _hold(self, arrays, facts, renderer, max_length):
        self.renderer, self.max_length, self.dropped, self.fingerprint = renderer, max_length, facts["dropped"], facts["fingerprint"]
        starts, self.offsets, texts = arrays["index"].reshape(-1, 3).T             # offsets: of each sample's output tokens
        self.ids, self.is_output = Rows(arrays["tokens"], starts), Rows(arrays["marks"], starts, lambda marks: marks > 0)
        self.marks, self.samples = arrays["marks"], Rows(arrays["texts"], texts, unpack)
        self.lengths, self.outputs = np.diff(starts), np.diff(self.offsets)         # tokens, output tokens of each sample
        self.kept = np.flatnonzero(self.lengths)
        if not len(self.kept):
            raise DataError(f"all {len(self.samples)} samples are longer than {max_length} tokens; raise --max-length.")

    @classmethod
    def load(cls, paths: list[str], model_directory: str, template: str, max_length: int) -> "Dataset":
        """All samples of some files, one file after the other, rendered with the tokenizer of a checkpoint.

        They are rendered once, into files under ~/.cache/shad-rft (or $XDG_CACHE_HOME), and found there again as long as data
        files, tokenizer, template and max_length are the same. Several processes may call this at once: one works, the rest wait.
        """
        renderer = Renderer(model_directory, template)
        samples = itertools.chain.from_iterable(stream_samples(path, progress=True) for path in paths)
        files = [split_slice(path)[0] for path in paths]
        if not all(map(os.path.isfile, files)):
            return cls(samples, renderer, max_length)                   # the toy, or an error that names the missing file
        import fcntl                                                    # here, since Windows lacks it
        key = json.dumps([1, [(os.path.abspath(p), os.stat(f).st_size, os.stat(f).st_mtime_ns) for p, f in zip(paths, files)],
                          renderer.fingerprint, renderer.template, renderer.bos, renderer.vocab_size, renderer.end, max_length])
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shad-rft")
        directory = os.path.join(root, hashlib.sha256(key.encode()).hexdigest()[:16])
        os.makedirs(root, exist_ok=True)
        with open(directory + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                            # the system lets go of it however this process ends
            if not os.path.isdir(directory):
                shutil.rmtree(directory + ".tmp", ignore_errors=True)   # left by a process that was killed
                os.mkdir(directory + ".tmp")
                try:
                    with contextlib.ExitStack() as stack:
                        streams = {name: stack.enter_context(open(os.path.join(directory + ".tmp", name), "wb")) for name in ARRAYS}
                        facts = cls.write(samples, renderer, max_length, streams)
                    with open(os.path.join(directory + ".tmp", "facts.json"), "w") as f:
                        json.dump(facts, f)
                    os.rename(directory + ".tmp", directory)
                finally:
                    shutil.rmtree(directory + ".tmp", ignore_errors=True)
        with open(os.path.join(directory, "facts.json")) as f:
            facts = json.load(f)
        mapped = {name: (np.memmap(file, dtype, "r") if os.path.getsize(file) else np.zeros(0, dtype))
                  for name, dtype in ARRAYS.items() for file in [os.path.join(directory, name)]}
        dataset = cls.__new__(cls)
        dataset._hold(mapped, facts, renderer, max_length)
        return dataset

    def true_roles(self) -> dict[str, np.ndarray] | None:
        """{role: (output tokens,) bool, in data order}, or None where the true role of any output token is unknown."""
        marks = self.marks[self.marks > 0]
        return None if (marks == 1).any() else {role: marks == mark for mark, role in enumerate(MARKS) if mark > 1}

    def describe(self) -> str:
        tokens, outputs = int(self.lengths.sum()), int(self.offsets[-1])
        return (f"{len(self.kept):,} samples, {tokens:,} tokens, {outputs:,} of them output ({outputs / tokens:.0%}); "
                f"template {self.renderer.template}"
                + (f"; {self.dropped:,} longer than {self.max_length} tokens dropped" if self.dropped else ""))


def collate(dataset: Dataset, indices, differences: np.ndarray | None = None, device="cpu"):
    """Right-padded tensors of some samples: tokens (B, T) and targets (B, T) int64, already shifted, -100 where not
    scored; LD (B, T) float32, from `differences`, those of all output tokens in data order (default: 0). Of no samples: one
    token with nothing to score, for a rank that has no work where others do."""
    B, T = max(1, len(indices)), max((int(dataset.lengths[i]) for i in indices), default=2) - 1
    tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), -100, np.int64)
    LD = np.zeros((B, T), np.float32)
    for b, i in enumerate(indices):
        ids, out, n = dataset.ids[i], dataset.is_output[i][1:], int(dataset.lengths[i]) - 1
        tokens[b, :n] = ids[:-1]
        targets[b, :n] = np.where(out, ids[1:], -100)
        if differences is not None:
            LD[b, :n][out] = differences[dataset.offsets[i]:dataset.offsets[i + 1]]
    return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in (tokens, targets, LD))


def epoch_batches(lengths: np.ndarray, indices: np.ndarray, batch_tokens: int, seed: int, epoch: int = 0) -> list[np.ndarray]:
    """The global batches of one epoch: arrays of sample indices, at most batch_tokens tokens each (a longer sample stands alone).

    A function of the data, the seed and batch_tokens alone. Similar lengths go together, to keep padding small: the shuffled
    samples are sorted in pools of 32 batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(indices)
    pool = max(1, int(32 * batch_tokens / lengths[indices].mean()))
    batches = []
    for i in range(0, len(order), pool):
        some = order[i:i + pool]
        batches += cut(some[np.argsort(-lengths[some], kind="stable")], lengths, batch_tokens, padded=False)
    return [batches[i] for i in rng.permutation(len(batches))]


def cut(indices: np.ndarray, lengths: np.ndarray, budget: int, padded: bool = True) -> list[np.ndarray]:
    """Cut samples, sorted by falling length, into arrays of at most `budget` tokens each, counted with their padding or without."""
    bounds, used, count, widest = [0], 0, 0, 0
    for i, length in enumerate(lengths[indices].tolist()):
        count, used, widest = count + 1, used + length, max(widest, length)
        if count > 1 and (count * widest if padded else used) > budget:
            bounds.append(i)
            count, used, widest = 1, length, length
    return [indices[a:b] for a, b in zip(bounds, [*bounds[1:], len(indices)])] if len(indices) else []


def micro_batches(batch, lengths, micro_tokens: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches of at most micro_tokens tokens, padding included.

    Every rank gets as many of them, some perhaps empty: ranks that hold a model together must go through it together.
    """
    batch = np.sort(np.asarray(batch))
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    shares = [cut(by_length[r::world], lengths, micro_tokens) for r in range(world)]
    return shares[rank] + [by_length[:0]] * (max(map(len, shares)) - len(shares[rank]))
