"""From samples to padded batches: token ids with their roles, the cached dataset, batching.

    samples = read_samples("train.json")                # APIGen, ToolBench, ShareGPT or messages
    dataset = Dataset(samples, Renderer("model_dir"))   # token ids, and which of them are output
    dataset = Dataset.load(["train.json"], "model_dir", "auto", max_length=2048)    # kept on disk

A sample is a conversation. Its input is everything but the assistant's turns; its output is the
assistant's turns, each with the end-of-turn token that the model must emit. Only output tokens
carry loss. To see what is trained on:

    python data.py --model DIR_OR_HUB_ID --data train.json      # samples with their output marked
    python data.py --model DIR_OR_HUB_ID --data train.json --json     # all ids, one line per sample
"""
import contextlib
import datetime
import hashlib
import io
import itertools
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass

if __name__ == "__main__":      # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch

from model import CheckpointError, resolve
from support.chat_template import DATE
from support.cli import HELP, DataError, option, parse_options, run_script
from support.distributed import rank_and_world
from support.files import damaged_file, lock, make_folder, remove_folder, write_checksums
from support.readers import Message, Sample, split_slice, stream_samples
from support.readers import read_samples as read_samples  # data.read_samples is public
from support.templates import TOKEN_ROLES, Renderer, highlighted


class RaggedArray:
    """Rows of unequal length in one flat array: rows[i] = view(flat[starts[i]:starts[i + 1]])."""

    def __init__(self, flat, starts, view=None, order=None):
        self.flat = flat
        self.starts = starts
        self.view = view                        # converts a row when it is read
        self.order = range(len(starts) - 1) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.order[i]
        values = self.flat[self.starts[row]:self.starts[row + 1]]
        return self.view(values) if self.view else values

    def select(self, order):
        """Only the rows with these indices, in this order."""
        return RaggedArray(self.flat, self.starts, self.view, order)


def pack(sample: Sample) -> bytes:
    messages = []
    for m in sample.messages:
        turn = [] if m.turn is None else [m.turn]
        messages.append([m.role, m.text, m.role_spans, m.scored, *turn])
    tools = [] if sample.tools is None else [sample.tools]
    return json.dumps([sample.id, messages, *tools]).encode()


def unpack(text: np.ndarray) -> Sample:
    name, messages, *tools = json.loads(text.tobytes())
    return Sample(name, [Message(*m) for m in messages], *tools)


# the files of a dataset; `index` holds where each sample's tokens, output tokens and text begin
ARRAYS = {"tokens": np.int32, "roles": np.uint8, "texts": np.uint8, "index": np.int64}


class Dataset:
    """Rendered samples in flat arrays, held in memory or, by `load`, in files mapped into it.

    ids[i] (T_i,) int32, is_output[i] (T_i,) bool and samples[i], a Sample, are made when asked for.
    lengths, output_counts: (samples,) tokens and output tokens of each sample; output_starts:
    (samples + 1,) where each sample's output tokens begin among all output tokens. Samples longer
    than max_length tokens keep their place with no tokens and are counted in `dropped`, never cut;
    `kept` holds the indices of the others.
    """

    def __init__(self, samples, renderer: Renderer, max_length: int = 2048):
        streams = {name: io.BytesIO() for name in ARRAYS}
        info = self.write(samples, renderer, max_length, streams)
        arrays = {}
        for name, dtype in ARRAYS.items():
            arrays[name] = np.frombuffer(streams[name].getbuffer(), dtype)
        self._attach(arrays, info, renderer, max_length)

    @staticmethod
    def write(samples, renderer, max_length, streams) -> dict:
        """Render samples group by group into binary streams; returns what info.json holds."""
        digest = hashlib.sha256()
        dropped = 0
        notes = Counter()
        ends = np.zeros(3, np.int64)                # of tokens, of output tokens, of texts
        streams["index"].write(ends.tobytes())
        samples = iter(samples)
        while group := list(itertools.islice(samples, 256)):
            rendered = renderer.render_batch(group)
            for sample, (ids, roles, sample_notes) in zip(group, rendered, strict=True):
                scored_texts = [(m.role, m.text, m.scored) for m in sample.messages]
                digest.update(json.dumps(scored_texts).encode())
                native = [m.turn for m in sample.messages if m.turn is not None]
                if native or sample.tools is not None:
                    digest.update(json.dumps([native, sample.tools]).encode())
                notes.update(sample_notes)
                if len(ids) > max_length:
                    ids = roles = []
                    dropped += 1
                text = pack(sample)
                ends += len(ids), np.count_nonzero(roles), len(text)
                streams["tokens"].write(np.array(ids, np.int32))
                streams["roles"].write(np.array(roles, np.uint8))
                streams["texts"].write(text)
                streams["index"].write(ends)
        fingerprint = {"data": digest.hexdigest(), "tokenizer": renderer.fingerprint,
                       "template": renderer.template, **renderer.dated}
        return {"dropped": dropped, "notes": notes, "fingerprint": fingerprint}

    def _attach(self, arrays, info, renderer, max_length):
        starts, self.output_starts, text_starts = arrays["index"].reshape(-1, 3).T
        self.renderer = renderer
        self.max_length = max_length
        self.dropped = info["dropped"]
        self.notes = info["notes"]                  # {what is odd: the number of such samples}
        self.fingerprint = info["fingerprint"]
        self.roles = arrays["roles"]                # indices into TOKEN_ROLES, of all tokens
        self.ids = RaggedArray(arrays["tokens"], starts)
        self.is_output = RaggedArray(self.roles, starts, view=lambda roles: roles > 0)
        self.samples = RaggedArray(arrays["texts"], text_starts, view=unpack)
        self.lengths = np.diff(starts)
        self.output_counts = np.diff(self.output_starts)
        self.kept = np.flatnonzero(self.lengths)
        if not len(self.samples):
            raise DataError("the data holds no samples.")
        if not len(self.kept):
            raise DataError(f"all {len(self.samples)} samples are longer than {max_length} tokens; "
                            "raise --max-length.")

    @classmethod
    def load(cls, paths, model_directory, template, max_length: int, native_calls=False):
        """All samples of some files, rendered with the tokenizer of a checkpoint.

        They are rendered once, into files under ~/.cache/shad-rft (or $XDG_CACHE_HOME), which are
        reused as long as data files, tokenizer, template and max_length are the same, and rendered
        again where they are damaged. A chat template that prints the date keeps that of the day of
        rendering. Several processes may call this at once: one renders, the others wait. Where
        nothing can be written there, the samples are held in memory.
        """
        renderer = Renderer(model_directory, template, native_calls)
        streams = (stream_samples(path, True, native_calls) for path in paths)
        samples = itertools.chain.from_iterable(streams)
        files = [split_slice(path)[0] for path in paths]
        if not all(os.path.isfile(file) for file in files):
            return cls(samples, renderer, max_length)   # the toy; a missing file raises its error
        directory = cache_directory(paths, files, renderer, max_length)
        if damaged_file(directory):                     # or not there
            try:
                os.makedirs(os.path.dirname(directory), exist_ok=True)
                lock_file = open(directory + ".lock", "w")  # noqa: SIM115 (closed below)
            except OSError as e:
                if rank_and_world()[0] == 0:
                    print(f"{directory} cannot be written ({e.strerror}), so the samples are held "
                          "in memory; XDG_CACHE_HOME names another place for it.", file=sys.stderr)
                return cls(samples, renderer, max_length)
            with lock_file:
                lock(lock_file, wait=True)
                if damaged_file(directory):             # no other process has made it since
                    cls._write_cache(directory, samples, renderer, max_length)
        with open(os.path.join(directory, "info.json"), encoding="utf-8") as file:
            info = json.load(file)
        arrays = {}
        for name, dtype in ARRAYS.items():
            path = os.path.join(directory, name)
            empty = os.path.getsize(path) == 0          # an empty file cannot be mapped
            arrays[name] = np.zeros(0, dtype) if empty else np.memmap(path, dtype, "r")
        if DATE in info["fingerprint"]:                 # for all else that this run renders
            renderer.chat_template.day = datetime.date.fromisoformat(info["fingerprint"][DATE])
        dataset = cls.__new__(cls)
        dataset._attach(arrays, info, renderer, max_length)
        return dataset

    @classmethod
    def _write_cache(cls, directory, samples, renderer, max_length):
        temporary = directory + ".tmp"
        remove_folder(temporary)                        # left by a process that was killed
        remove_folder(directory)
        try:
            make_folder(temporary, "data.py")
            with contextlib.ExitStack() as stack:
                streams = {}
                for name in ARRAYS:
                    path = os.path.join(temporary, name)
                    streams[name] = stack.enter_context(open(path, "wb"))
                info = cls.write(samples, renderer, max_length, streams)
            with open(os.path.join(temporary, "info.json"), "w", encoding="utf-8") as file:
                json.dump(info, file)
            write_checksums(temporary)
            os.rename(temporary, directory)
        except OSError as e:
            raise DataError(f"{directory} could not be written ({e.strerror or e}); make room, or "
                            "let XDG_CACHE_HOME name a folder that has it.") from None
        finally:
            remove_folder(temporary)

    def true_roles(self) -> dict[str, np.ndarray] | None:
        """{role: (output tokens,) bool, in data order}; None where any token's role is unknown."""
        roles = self.roles[self.roles > 0]
        if (roles == TOKEN_ROLES.index("output")).any():
            return None
        return {name: roles == TOKEN_ROLES.index(name) for name in TOKEN_ROLES[2:]}

    def describe(self) -> str:
        tokens = int(self.lengths.sum())
        outputs = int(self.output_starts[-1])
        text = (f"{len(self.kept):,} samples, {tokens:,} tokens, "
                f"{outputs:,} of them output ({outputs / tokens:.0%}); "
                f"template {self.renderer.template}")
        if DATE in self.fingerprint:
            text += f"; {DATE}: {self.fingerprint[DATE]}"
        if self.dropped:
            text += f"; {self.dropped:,} longer than {self.max_length} tokens dropped"
        for note, count in self.notes.items():
            text += f"\n  in {count:,} of them {note}"
        return text


def cache_directory(paths, files, renderer, max_length) -> str:
    """Where the rendered samples are kept; the name is a hash of all that they depend on."""
    states = []
    for path, file in zip(paths, files, strict=True):
        state = os.stat(file)
        states.append((os.path.abspath(path), state.st_size, state.st_mtime_ns))
    key = json.dumps([4, states, renderer.fingerprint, renderer.template, renderer.bos,
                      renderer.vocab_size, renderer.end, max_length,
                      os.environ.get("SHAD_RFT_DATE")])
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "shad-rft", hashlib.sha256(key.encode()).hexdigest()[:16])


# --------------------------------------------------------------------------------------------------
# Batches

def epoch_batches(lengths, indices, batch_tokens: int, seed: int, epoch: int = 0):
    """The global batches of one epoch, a list of arrays of sample indices.

    Each has at most batch_tokens tokens (a longer sample is a batch of its own). They depend only
    on the data, the seed and batch_tokens. Similar lengths go together, to keep padding small: the
    shuffled samples are sorted in pools of 32 batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(indices)
    pool = max(1, int(32 * batch_tokens / lengths[indices].mean()))
    batches = []
    for i in range(0, len(order), pool):
        some = order[i:i + pool]
        by_length = some[np.argsort(-lengths[some], kind="stable")]
        batches += split_by_tokens(by_length, lengths, batch_tokens, padded=False)
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(batch, lengths, micro_tokens: int, rank: int = 0, world: int = 1):
    """This rank's share of a global batch, a list of arrays of sample indices.

    Each has at most micro_tokens tokens, padding included. Every rank gets the same number of them,
    possibly with empty ones at the end: ranks that share a sharded model must run forward together.
    """
    batch = np.sort(np.asarray(batch))
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    shares = [split_by_tokens(by_length[r::world], lengths, micro_tokens) for r in range(world)]
    most = max(len(share) for share in shares)
    return shares[rank] + [by_length[:0]] * (most - len(shares[rank]))


def split_by_tokens(indices, lengths, budget: int, padded: bool = True) -> list[np.ndarray]:
    """Split samples, sorted by falling length, into arrays of at most `budget` tokens each.

    padded: a sample counts as many tokens as the longest in its array.
    """
    if not len(indices):
        return []
    bounds = []
    count = tokens = longest = 0
    for i, length in enumerate(lengths[indices].tolist()):
        count += 1
        tokens += length
        longest = max(longest, length)
        size = count * longest if padded else tokens
        if count > 1 and size > budget:
            bounds.append(i)
            count = 1
            tokens = longest = length
    return np.split(indices, bounds)


def collate(dataset: Dataset, indices, labels=None, device="cpu"):
    """(tokens, targets, the targets' labels) of some samples, right-padded, (B, T) each.

    tokens, targets: int64. targets[b, t] is the token after tokens[b, t], or -100 where that is
    input or padding. labels: of all output tokens; labels[a:b] are those of output tokens a to b
    of the dataset. Where a target has none, its label is False or 0. Without samples: one row of
    one unscored token, for a rank that has no work while others do.
    """
    B = max(1, len(indices))
    T = max((int(dataset.lengths[i]) for i in indices), default=2) - 1
    tokens = np.zeros((B, T), np.int64)
    targets = np.full((B, T), -100, np.int64)
    target_labels = np.zeros((B, T), bool if labels is None else labels[:0].dtype)
    for b, i in enumerate(indices):
        ids = dataset.ids[i]
        is_output = dataset.is_output[i][1:]
        n = len(ids) - 1
        tokens[b, :n] = ids[:-1]
        targets[b, :n] = np.where(is_output, ids[1:], -100)
        if labels is not None:
            first = dataset.output_starts[i]
            end = dataset.output_starts[i + 1]
            target_labels[b, :n][is_output] = labels[first:end]
    arrays = (tokens, targets, target_labels)
    return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in arrays)


# --------------------------------------------------------------------------------------------------
# The script: show what is trained on

@dataclass
class Options:
    model: str = option("", "a Hugging Face directory or hub id, for its tokenizer", required=True)
    data: list = option([], "data files; a slice may follow: train.json[:300]", required=True)
    show: int = option(3, "samples to print")
    json: bool = option(False, "print one line per sample instead: id, token ids, and which of "
                               "them are output")
    template: str = option("auto", HELP["template"], choices=["auto", "chatml", "plain"])
    native_calls: bool = option(False, HELP["native_calls"])
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)


def main():
    options = parse_options(Options, __doc__)
    dataset = Dataset.load(options.data, resolve(options.model), options.template,
                           options.max_length, options.native_calls)
    if options.json:
        for i in dataset.kept:
            row = {"id": dataset.samples[i].id, "ids": dataset.ids[i].tolist(),
                   "output": dataset.is_output[i].tolist()}
            print(json.dumps(row))
        return
    lengths = dataset.lengths[dataset.kept]
    print(dataset.describe())
    print(f"tokens per sample: {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}")
    for i in dataset.kept[:options.show]:
        sample = dataset.samples[i]
        print(f"\n--- {ascii(sample.id)[1:-1]}: {dataset.lengths[i]} tokens, "
              f"{dataset.output_counts[i]} of them output")
        print(highlighted(dataset.renderer, sample, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    run_script(main, CheckpointError)
