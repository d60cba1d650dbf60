"""SHAD, the Shuffle-Aware Discriminator: which output tokens are reasoning, which boilerplate?

    python shad.py --model DIR_OR_HUB_ID --data train.json --out labels
    torchrun --nproc_per_node 8 shad.py --model ... --data a.json b.json --out labels
    python shad.py --model toy --data toy[:300] --out labels --shuffle 100 --lr 1e-3 --epochs 4

The last takes seconds, offline. Writes labels.safetensors, labels.html and summary.json.

Ye et al. 2024 (arXiv 2412.14780), three steps:
  1. shuffle   which output belongs to which input, in a small part of the data;
  2. tune      a copy of the model on it: it can now only learn what is predictable without the
               input;
  3. classify  every output token of the unshuffled data by its loss difference
               LD = loss_tuned - loss_base:
               LD <= 0: boilerplate, still predictable without its input;
               LD > 0: reasoning, tied to it.
"""
import itertools
import json
import os
import random
import re
import shlex
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from data import Dataset, collate, epoch_batches, micro_batches
from model import CheckpointError, Transformer, resolve
from support.cli import DataError, option, parse_options, run_script
from support.distributed import (
    all_reduce_gradients,
    barrier,
    clip_gradients,
    init_distributed,
    mixed_precision,
    rank_and_world,
    shard_model,
    should_shard,
    sum_over_ranks,
)
from support.files import replacing, write_json
from support.label_report import format_summary, labels_page, output_pieces, summarize
from support.readers import Sample
from support.report import write_page


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: "
                            "train.json[:300]", required=True)
    out: str = option("", "directory for labels.safetensors and labels.html", required=True)
    # shuffle
    shuffle: float = option(0.01, "share of the samples to shuffle, but no fewer than 96 if there "
                                  "are as many; above 1: how many; at most nine tenths of all")
    # tune
    epochs: int = option(4, "epochs over the shuffled samples", low=1)
    reshuffle: str = option("yes", "shuffle their outputs anew in every epoch, so that none can be "
                                   "learned by heart", choices=["yes", "no"])
    lr: float = option(1e-4, "learning rate of the discriminator, falling linearly to 0")
    batch_tokens: int = option(4096, "tokens per global batch", low=1)
    micro_tokens: int = option(4096, "tokens per forward on one rank, padding included", low=1)
    # classify
    threshold: float = option(0.0, "loss difference above which a token is reasoning, in nats; "
                                   "kept with the labels", low=float("-inf"))
    unit: str = option("token", "what is labelled; word: every token of a word gets the word's "
                                "largest loss difference", choices=["token", "word"])
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", "chat template; auto: the checkpoint's own, else chatml if the "
                                   "tokenizer has its tokens, else plain",
                           choices=["auto", "chatml", "plain"])
    native_calls: bool = option(False, "send APIGen's and ShareGPT's calls through the "
                                       "checkpoint's own chat template, as tool calls; "
                                       "else they are text")
    shard: str = option("auto", "split the model over the ranks (FSDP2); auto: with several GPUs",
                        choices=["auto", "yes", "no"])
    seed: int = option(0, "seed of the shuffle and of the batch order")


# --------------------------------------------------------------------------------------------------
# Step 1: shuffle which output belongs to which input

def shuffle_outputs(samples: list[Sample], fraction: float, seed: int):
    """Draw a fraction of the samples and permute the outputs among them.

    No output stays with its own input; inputs stay where they are. The output turns of a
    conversation move one by one. samples: at least 2. fraction: of the samples, in (0, 1]; at least
    2 are drawn. Returns (the shuffled samples, the indices that were drawn). Raises DataError below
    2 samples.
    """
    if len(samples) < 2:
        raise DataError(f"shuffling outputs needs at least 2 samples, not {len(samples)}.")
    rng = random.Random(seed)
    count = min(len(samples), max(2, round(fraction * len(samples))))
    drawn = rng.sample(range(len(samples)), count)
    chosen = [samples[i] for i in drawn]

    turns_by_sample = []                        # per sample: [(sample, message), ...]
    for s, sample in enumerate(chosen):
        turns = [(s, m) for m, message in enumerate(sample.messages) if message.is_output]
        rng.shuffle(turns)
        turns_by_sample.append(turns)
    source = derange(turns_by_sample, rng)

    shuffled = []
    for s, sample in enumerate(chosen):
        messages = list(sample.messages)
        for _, m in turns_by_sample[s]:
            other, turn = source[s, m]
            messages[m] = replace(chosen[other].messages[turn])
        shuffled.append(replace(sample, messages=messages))
    return shuffled, drawn


def derange(turns_by_sample: list[list], rng: random.Random) -> dict:
    """{turn: another sample's turn that takes its place}.

    Lay all turns in a row, each sample's side by side. Rotating the row by at least the longest
    sample's number of turns, and at most all minus that number, moves every turn to another sample.
    Where one sample has more than half of all turns no rotation does; it then gets the others'
    turns more than once.
    """
    turns = list(itertools.chain(*turns_by_sample))
    longest = max(turns_by_sample, key=len)
    N = len(turns)
    if 2 * len(longest) <= N:
        shift = rng.randint(len(longest), N - len(longest))
        return {turn: turns[(i + shift) % N] for i, turn in enumerate(turns)}
    others = [turn for turn in turns if turn not in longest]
    source = dict(zip(longest, itertools.cycle(others), strict=False))
    return source | dict(zip(others, longest, strict=False))


def shuffled_datasets(dataset: Dataset, drawn, shuffled: list[Sample], options):
    """Yield one Dataset per epoch of tuning; in later epochs the drawn samples are reshuffled."""
    samples = dataset.samples.select(drawn)
    for epoch in range(options.epochs):
        if epoch and options.reshuffle == "yes":
            shuffled, _ = shuffle_outputs(samples, 1.0, options.seed + epoch)
        if not epoch or options.reshuffle == "yes":
            # an output may now follow a longer input
            current = Dataset(shuffled, dataset.renderer, 2 * dataset.max_length)
        yield current


# --------------------------------------------------------------------------------------------------
# The loss of every output token, by the base model and by the tuned one

def token_losses(model, dataset: Dataset, micro_tokens: int, title: str, directory=None):
    """The loss of every output token of a dataset: (output tokens,) float32 in nats, in data order.

    The ranks share the work. The data is cut into parts that do not depend on the number of ranks,
    so neither do the losses. With a directory every finished part becomes a file there, parts that
    already exist are skipped, and only rank 0 is given the losses.
    """
    rank, world = rank_and_world()
    parts = label_parts(dataset, micro_tokens)
    todo = missing_parts(len(parts), directory, model.head.device)
    losses = np.zeros(0 if directory else dataset.output_starts[-1], np.float32)
    total = int(dataset.lengths.sum())
    left = sum(int(dataset.lengths[parts[p]].sum()) for p in todo)
    bar = tqdm(desc=title, total=total, initial=total - left, unit="token", unit_scale=True,
               disable=rank > 0)
    for first in range(0, len(todo), world):
        # One part per rank at a time. Ranks that share a model must make the same number of
        # forwards, so each knows the plans of all and fills up with empty micro-batches.
        plans = []
        for p in todo[first:first + world]:
            plans.append(micro_batches(parts[p], dataset.lengths, micro_tokens))
        plans += [[]] * (world - len(plans))
        by_sample = {}
        for k in range(max(len(plan) for plan in plans)):
            together = [plan[k] for plan in plans if k < len(plan)]
            indices = plans[rank][k] if k < len(plans[rank]) else []
            by_sample |= sample_losses(model, dataset, indices)
            bar.update(int(dataset.lengths[np.concatenate(together)].sum()))
        if by_sample:
            p = todo[first + rank]
            part_losses = np.concatenate([by_sample[i] for i in sorted(by_sample)])
            if directory:
                with replacing(part_file(directory, p), "wb") as file:
                    np.save(file, part_losses)
            else:
                start = dataset.output_starts[parts[p][0]]
                end = dataset.output_starts[parts[p][-1] + 1]
                losses[start:end] = part_losses
    bar.close()
    if hasattr(model, "reshard"):
        # FSDP's root stays whole until a backward; an optimizer made now would hold copies of its
        # parameters, not the shards
        model.reshard()
    if directory:
        barrier()                       # all parts are written
        files = [part_file(directory, p) for p in range(len(parts))]
        return np.concatenate([np.load(file) for file in files]) if rank == 0 else None
    summed = torch.from_numpy(losses).to(model.head.device)
    sum_over_ranks(summed)              # each token is filled in by one rank and 0 on the others
    return summed.cpu().numpy()


@torch.no_grad()
def sample_losses(model, dataset: Dataset, indices) -> dict[int, np.ndarray]:
    """{sample: the losses of its output tokens, float32} of one micro-batch."""
    device = model.head.device
    tokens, targets, _ = collate(dataset, indices, device=device)                   # (B, T)
    with mixed_precision(device):
        losses = model(tokens, targets)                                             # (B, T)
    scored = targets != -100
    return {int(i): losses[b][scored[b]].cpu().numpy() for b, i in enumerate(indices)}


def label_parts(dataset: Dataset, micro_tokens: int) -> list[np.ndarray]:
    """The kept samples in at most about 1,000 parts, each of several micro-batches."""
    ends = np.cumsum(dataset.lengths[dataset.kept])
    part_tokens = max(8 * micro_tokens, ends[-1] // 1000)
    bounds = np.flatnonzero(np.diff(ends // part_tokens)) + 1   # where `ends` passes a multiple
    return np.split(dataset.kept, bounds)


def part_file(directory: str, part: int) -> str:
    return os.path.join(directory, f"{part:04}.npy")


def missing_parts(count: int, directory, device) -> np.ndarray:
    """The numbers of the parts that have no file yet. Rank 0 looks, or the ranks might differ."""
    exists = torch.zeros(count, device=device)
    if directory and rank_and_world()[0] == 0:
        os.makedirs(directory, exist_ok=True)
        for p in range(count):
            exists[p] = os.path.exists(part_file(directory, p))
    sum_over_ranks(exists)
    return np.flatnonzero(exists.cpu().numpy() == 0)


# --------------------------------------------------------------------------------------------------
# Step 2: tune a copy of the model on the shuffled samples

def tune(model: Transformer, datasets, options: Options) -> None:
    """Ordinary fine-tuning, in place: all parameters, mean loss of the output tokens.

    datasets: those of the epochs, options.epochs of them.
    """
    rank, world = rank_and_world()
    device = model.head.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    for epoch, dataset in enumerate(datasets):
        batches = epoch_batches(
            dataset.lengths, dataset.kept, options.batch_tokens, options.seed, epoch)
        bar = tqdm(batches, f"tune on shuffled, epoch {epoch + 1}", unit="step", disable=rank > 0)
        for step, batch in enumerate(bar):
            progress = (epoch + step / len(batches)) / options.epochs
            optimizer.param_groups[0]["lr"] = options.lr * (1 - progress)
            n = dataset.output_counts[batch].sum()
            for indices in micro_batches(batch, dataset.lengths, options.micro_tokens, rank, world):
                tokens, targets, _ = collate(dataset, indices, device=device)       # (B, T)
                with mixed_precision(device):
                    loss = model(tokens, targets).sum() / n
                loss.backward()
            all_reduce_gradients(model)
            clip_gradients(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def check_tuning(model, dataset: Dataset, drawn, tuned_losses, options: Options) -> dict:
    """Has the tuned model unlearned to use its input?

    Compares its mean loss, in nats, on the outputs of at most 32 samples that were not drawn: with
    their own inputs, of which tuned_losses has the losses (only rank 0 is given them), and shuffled
    among each other. Returns {"check": the figures}, or {} on other ranks and below 2 such samples.
    """
    rest = np.setdiff1d(dataset.kept, drawn)
    left_out = np.random.default_rng(options.seed).permutation(rest)[:32]
    if len(left_out) < 2:
        return {}
    shuffled, _ = shuffle_outputs(dataset.samples.select(left_out), 1.0, options.seed)
    swapped = Dataset(shuffled, dataset.renderer, 2 * dataset.max_length)
    losses = token_losses(model, swapped, options.micro_tokens, "losses with wrong inputs")
    if tuned_losses is None:
        return {}
    right = float(tuned_losses[tokens_of(left_out, dataset)].mean())
    wrong = float(losses.mean())
    return {"check": {"samples": len(left_out), "loss_right_input": right,
                      "loss_wrong_input": wrong, "uses_input": uses_input(right, wrong)}}


def uses_input(right: float, wrong: float) -> bool:
    """Whether the right inputs save a discriminator more than a fifth of its loss.

    On the toy those tuned well (1.1 to 1.8 % error over the clear roles) were saved 9 to 19 %;
    those with 3 % error or more 20 to 36 %, and one between them (1.8 %) 25 %.
    """
    return wrong - right > 0.2 * wrong


def tokens_of(indices, dataset: Dataset) -> np.ndarray:
    """True for the output tokens of some samples: (output tokens,) bool."""
    chosen = np.zeros(len(dataset.samples), bool)
    chosen[indices] = True
    return np.repeat(chosen, dataset.output_counts)


# --------------------------------------------------------------------------------------------------
# Step 3: classify every output token by its loss difference

def loss_difference(tuned_losses, base_losses):
    """LD = loss_tuned - loss_base of every token, in nats.

    It is what is lost when outputs may no longer depend on inputs.
    """
    return tuned_losses - base_losses


def classify(loss_difference, threshold: float = 0.0):
    """True for reasoning tokens (LD > threshold), False for boilerplate (LD <= threshold)."""
    return loss_difference > threshold


def largest_per_word(difference, dataset: Dataset) -> np.ndarray:
    """LD by word: every token is given the largest LD of its word; both (output tokens,) float32.

    Later tokens of a word follow from its first ones, with or without the input, so that their own
    LD is near 0. A token goes on with a word where a letter, digit or _ meets another.
    """
    starts = []                             # whether a word starts at each token
    for i in dataset.kept:
        before = ""
        for text, _ in output_pieces(dataset, i):
            starts.append(not (re.match(r"\w", text) and re.search(r"\w$", before)))
            before = text
    starts = np.array(starts)
    largest = np.maximum.reduceat(difference, np.flatnonzero(starts))       # (words,)
    return largest[np.cumsum(starts) - 1]


@dataclass
class Labels:
    """SHAD's labels; labels[a:b], (b - a,) bool, is True for the reasoning tokens among a to b.

    difference: LD of all output tokens, float32 in data order: an array, or a slice of a file that
    is read where it is asked for. The threshold is applied when the labels are read.
    """
    difference: np.ndarray
    threshold: float = 0.0

    def __getitem__(self, tokens: slice) -> np.ndarray:
        return classify(self.difference[tokens], self.threshold)


def save_labels(directory, difference, dataset: Dataset, base_model, threshold, seed) -> None:
    """Write labels.safetensors.

    loss_difference: (output tokens,) float32 in data order. offsets: (samples + 1,) int64, where
    the output tokens of each sample begin.
    """
    made_from = {"base_model": base_model, "threshold": threshold, "seed": seed}
    metadata = {"shad": json.dumps(dataset.fingerprint | made_from)}
    arrays = {"loss_difference": difference.astype(np.float32),
              "offsets": dataset.output_starts.astype(np.int64)}
    path = os.path.join(directory, "labels.safetensors")
    save_file(arrays, path + ".tmp", metadata)
    os.chmod(path + ".tmp", 0o644)              # safetensors makes it readable by its owner alone
    os.replace(path + ".tmp", path)


def load_labels(path: str, dataset: Dataset) -> Labels:
    """The labels of a file or of the directory it lies in; losses are read as they are asked for.

    Raises DataError, naming what differs, when they were not made from this data with this
    tokenizer and template.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "labels.safetensors")
    try:
        file = safe_open(path, framework="numpy")
        made_from = json.loads(file.metadata()["shad"])
        threshold = float(made_from["threshold"])
        difference = file.get_slice("loss_difference")
        starts = file.get_tensor("offsets")
        if difference.get_dtype() != "F32" or difference.get_shape() != [starts[-1]]:
            raise ValueError("loss_difference is not float32 of as many tokens as offsets say")
    except Exception as e:                      # safetensors raises its own type, and others
        raise DataError(f"{path} cannot be read as labels ({type(e).__name__}: {e}); "
                        "make it with shad.py.") from None
    differing = [k for k, value in dataset.fingerprint.items() if made_from.get(k) != value]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise DataError(f"{path} does not fit: its {' and '.join(differing)} {verb} from this "
                        "run's; run shad.py again with the same --data, --model and --template.")
    if not np.array_equal(starts, dataset.output_starts):
        i = int(np.flatnonzero(np.diff(starts) != dataset.output_counts)[0])
        raise DataError(f"{path} does not fit: sample {dataset.samples[i].id!r} is in only one of "
                        "the two; use the --max-length that shad.py was run with.")
    return Labels(difference, threshold)


# --------------------------------------------------------------------------------------------------
# The three steps

def run(options: Options, dataset: Dataset, model: Transformer):
    """SHAD on a dataset; writes options.out and returns (LD (output tokens,) float32, summary).

    `model` ends as the discriminator: since the base losses are taken before it is tuned, one copy
    is enough. A run that was killed resumes from the losses and the tuned model that it left in
    options.out/parts. The summary is None on all ranks but the first.
    """
    rank, _ = rank_and_world()
    work_dir = os.path.join(options.out, "parts")
    times = [time.perf_counter()]

    # 1. Shuffle: outputs change places among a few samples, so that none follows from its input.
    # With fewer than 96 samples the discriminator learns nothing; a tenth stays as it is, to check
    # what it has learned.
    kept = len(dataset.kept)
    count = options.shuffle if options.shuffle > 1 else max(96, options.shuffle * kept)
    fraction = min(count, kept - kept // 10) / kept
    samples = dataset.samples.select(dataset.kept)
    shuffled, drawn = shuffle_outputs(samples, fraction, options.seed)
    drawn = dataset.kept[drawn]
    open_work_dir(work_dir, dataset, options)

    # 2. Tune the model on them. Its own losses are taken first.
    base_losses = token_losses(model, dataset, options.micro_tokens, "losses of the base model",
                               os.path.join(work_dir, "base losses"))
    times.append(time.perf_counter())
    tuned_model = os.path.join(work_dir, "tuned model")
    if os.path.isdir(tuned_model):
        model.load_weights(tuned_model)
    else:
        tune(model, shuffled_datasets(dataset, drawn, shuffled, options), options)
        model.save_pretrained(tuned_model + ".tmp")
        if rank == 0:
            os.rename(tuned_model + ".tmp", tuned_model)
    times.append(time.perf_counter())
    tuned_losses = token_losses(model, dataset, options.micro_tokens, "losses of the tuned model",
                                os.path.join(work_dir, "tuned losses"))
    times.append(time.perf_counter())
    check = check_tuning(model, dataset, drawn, tuned_losses, options)

    # 3. Classify: a token that became harder to predict depends on its input; LD > 0 is reasoning.
    summary = None
    if rank == 0:
        difference = loss_difference(tuned_losses, base_losses)
        if options.unit == "word":
            difference = largest_per_word(difference, dataset)
        unshuffled = ~tokens_of(drawn, dataset)
        is_reasoning = classify(difference, options.threshold)
        summary = summarize(difference, is_reasoning, base_losses, tuned_losses, unshuffled,
                            dataset.true_roles())
        seconds = np.diff(times).round(1).tolist()
        summary |= check
        summary |= {"samples": len(dataset.kept), "shuffled": len(shuffled),
                    "dropped": dataset.dropped,
                    "seconds": dict(zip(("base", "tune", "tuned"), seconds, strict=True))}
        write_json(os.path.join(options.out, "summary.json"), summary)
        losses = {"base": base_losses, "tuned": tuned_losses}
        page = labels_page(dataset, difference, is_reasoning, options.threshold, losses, summary)
        write_page(os.path.join(options.out, "labels.html"),
                   "SHAD: reasoning and boilerplate tokens", page)
        # last, since the presence of the labels says that everything is there
        save_labels(options.out, difference, dataset, options.model, options.threshold,
                    options.seed)
        shutil.rmtree(work_dir)
        print(format_summary(summary))
    barrier()                                   # the other ranks read what rank 0 wrote
    return load_labels(options.out, dataset).difference[:], summary


def open_work_dir(path: str, dataset: Dataset, options: Options) -> None:
    """Create the working directory, or resume the one that a run with the same settings left.

    Raises DataError where the settings differ.
    """
    may_change = ("out", "data", "threshold", "unit", "shard")  # data is compared by its content
    settings = {k: value for k, value in asdict(options).items() if k not in may_change}
    settings |= dataset.fingerprint
    file = os.path.join(path, "settings.json")
    rank, _ = rank_and_world()
    if os.path.exists(file):
        with open(file, encoding="utf-8") as f:
            found = json.load(f)
        differing = [key for key, value in found.items() if settings.get(key) != value]
        if differing:
            raise DataError(f"{path} was left by an unfinished run with another "
                            f"{' and '.join(differing)}; remove it, or choose another --out.")
    elif rank == 0:
        shutil.rmtree(path, ignore_errors=True)     # a run was killed while it removed it
    barrier()                                       # every rank has looked
    if rank == 0:
        os.makedirs(path, exist_ok=True)
        write_json(file, settings)


def main():
    options = parse_options(Options, __doc__)
    device = init_distributed()
    rank, _ = rank_and_world()
    options.model = resolve(options.model)
    if os.path.exists(os.path.join(options.out, "labels.safetensors")):
        raise DataError(f"{options.out}/labels.safetensors is there already; "
                        "choose another --out, or remove it.")
    barrier()                                       # every rank has looked
    dataset = Dataset.load(options.data, options.model, options.template, options.max_length,
                           options.native_calls)
    if rank == 0:
        print(dataset.describe())
    shard = partial(shard_model, device=device) if should_shard(options.shard, device) else None
    run(options, dataset, Transformer.from_pretrained(options.model, device=device, shard=shard))
    if rank == 0:
        data = " ".join(shlex.quote(path) for path in options.data)
        native = "--native-calls " if options.native_calls else ""
        print(f"\nwrote {options.out}/labels.safetensors, summary.json and labels.html "
              "(open it in a browser). Next:\n"
              f"  python train.py --model {options.model} --data {data} "
              f"--max-length {options.max_length} --template {options.template} {native}"
              f"--method rft --labels {options.out} --out OUT")


if __name__ == "__main__":
    run_script(main, CheckpointError)
