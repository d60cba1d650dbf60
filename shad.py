"""SHAD, the Shuffle-Aware Discriminator: which output tokens are reasoning, which boilerplate?

    python shad.py --model DIR_OR_HUB_ID --data train.json --out labels
    torchrun --nproc_per_node 8 shad.py --model ... --data a.json b.json --out labels
    python shad.py --model toy --data toy[:300] --out labels --shuffle 100 --lr 1e-3 --epochs 4

The last takes seconds, offline. Writes labels.safetensors, labels.html and summary.json; with
--export also a JSON Lines file for other trainers.

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
import math
import os
import random
import re
import shlex
import signal
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

if __name__ == "__main__":      # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
from tqdm import tqdm

from data import Dataset, collate, epoch_batches, micro_batches
from model import CheckpointError, Transformer, resolve
from support.checkpoints import on_stop
from support.cli import HELP, DataError, option, parse_options, run_script
from support.distributed import (
    all_reduce_gradients,
    barrier,
    clip_gradients,
    init_distributed,
    limit_threads,
    mixed_precision,
    not_finite,
    on_rank_0,
    rank_and_world,
    shard_model,
    sum_over_ranks,
)
from support.export import claim_export, export_labels
from support.files import claim, damaged_file, release, remove_folder, write_json
from support.label_file import read_labels
from support.label_file import save_labels as save_labels  # shad.save_labels is public
from support.label_report import format_summary, labels_page, output_pieces, summarize
from support.parts import (
    load_part,
    missing_parts,
    open_work_dir,
    save_part,
    save_tuned_model,
    stop_at_once,
)
from support.readers import Sample
from support.report import write_page


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: "
                            "train.json[:300]", required=True)
    out: str = option("", "directory for labels.safetensors and labels.html", required=True)
    export: str = option(None, "also write the labels to this JSON Lines file, for other trainers; "
                               "labels that --out holds already are exported as they are")
    # shuffle
    shuffle: float = option(0.01, "share of the samples to shuffle, but no fewer than 96 if there "
                                  "are as many; above 1: how many; at most nine tenths of all")
    # tune
    epochs: int = option(4, "epochs over the shuffled samples", low=1, high=1000)
    reshuffle: str = option("yes", "shuffle their outputs again in every epoch, so that none can "
                                   "be learned by heart", choices=["yes", "no"])
    lr: float = option(1e-4, "learning rate of the discriminator, falling linearly to 0")
    batch_tokens: int = option(4096, "tokens per global batch", low=1)
    micro_tokens: int = option(4096, "tokens per forward on one rank, padding included", low=1)
    # classify
    threshold: float = option(0.0, "loss difference above which a token is reasoning, in nats; "
                                   "kept with the labels", low=-2**32)
    unit: str = option("token", "what is labelled; word: every token of a word gets the word's "
                                "largest loss difference", choices=["token", "word"])
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", HELP["template"], choices=["auto", "chatml", "plain"])
    native_calls: bool = option(False, HELP["native_calls"])
    shard: str = option("auto", "split the model over the ranks (FSDP2); auto: with several GPUs",
                        choices=["auto", "yes", "no"])
    dtype: str = option("auto", HELP["dtype"], choices=["auto", "float32", "bfloat16"])
    seed: int = option(0, "seed of the shuffle and of the batch order")


FILES = ("labels.safetensors", "labels.html", "summary.json", "parts")      # what is made in OUT


# --------------------------------------------------------------------------------------------------
# Step 1: shuffle which output belongs to which input

def shuffle_outputs(samples: list[Sample], fraction: float, seed: int):
    """Draw a fraction of the samples and permute the outputs among them.

    No output stays with its own input; inputs stay where they are. The output turns of one
    conversation may go to different ones. fraction: in (0, 1]; at least 2 samples are drawn.
    Returns (the shuffled samples, the indices that were drawn). Raises DataError for fewer than
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
    """{turn: the turn of another sample that takes its place}; a turn is (sample, message).

    Lay all N turns in a row, sample after sample, and let the longest sample have m of them.
    Rotating the row by m to N - m places moves every turn to another sample. Where m > N / 2 there
    is no such rotation; the longest sample then gets the other samples' turns more than once.
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
    """Yield the Dataset of each epoch of tuning; --reshuffle shuffles the outputs again in each."""
    samples = dataset.samples.select(drawn)
    for epoch in range(options.epochs):
        reshuffle = epoch > 0 and options.reshuffle == "yes"
        if reshuffle:
            shuffled, _ = shuffle_outputs(samples, 1.0, options.seed + epoch)
        if epoch == 0 or reshuffle:
            # a shuffled sample can be longer: its output now follows another input
            current = Dataset(shuffled, dataset.renderer, 2 * dataset.max_length)
        yield current


# --------------------------------------------------------------------------------------------------
# Step 2: tune a copy of the model on the shuffled samples

def tune(model: Transformer, datasets, options: Options) -> None:
    """Ordinary fine-tuning, in place: all parameters, mean loss of the output tokens.

    datasets: one per epoch.
    """
    rank, world = rank_and_world()
    device = model.device
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
    for name in not_finite(model):
        raise DataError(f"the tuned model's {name} is not finite; lower --lr.")


# --------------------------------------------------------------------------------------------------
# Step 3: classify every output token by its loss difference

def loss_difference(tuned_losses, base_losses):
    """LD = loss_tuned - loss_base of every token, in nats.

    How much harder a token is to predict for a model tuned on outputs that do not follow from
    their inputs.
    """
    return tuned_losses - base_losses


def classify(loss_difference, threshold: float = 0.0):
    """True for reasoning tokens (LD > threshold), False for boilerplate (LD <= threshold)."""
    return loss_difference > threshold


@dataclass
class Labels:
    """SHAD's labels; labels[a:b], (b - a,) bool, is True for the reasoning tokens among a to b.

    difference: LD of all output tokens, float32 in data order: an array, or a slice of a file that
    is read only where it is asked for. The threshold is applied when the labels are read.
    """
    difference: np.ndarray
    threshold: float = 0.0

    def __getitem__(self, tokens: slice) -> np.ndarray:
        return classify(self.difference[tokens], self.threshold)


def load_labels(path: str, dataset: Dataset, kind="shad"):
    """The labels in a file, or in the directory that holds it.

    kind "shad": a Labels. "reference" and "reward": values[a:b], (b - a,) float32, are the
    reference model's losses, or the rewards, of the output tokens a to b. Raises DataError, naming
    what differs, for labels of another kind, or of other data, another tokenizer or template.
    """
    values, threshold = read_labels(path, dataset, kind)
    return Labels(values, threshold) if kind == "shad" else values


# --------------------------------------------------------------------------------------------------
# The three steps together

def run(options: Options, dataset: Dataset, model: Transformer):
    """SHAD on a dataset; writes options.out and returns (LD (output tokens,) float32, summary).

    `model` ends as the discriminator: since the base losses are taken before it is tuned, one copy
    is enough. A run that was killed resumes from the losses and the tuned model that it left in
    options.out/parts.
    """
    on_rank_0(claim, options.out, FILES, "shad.py")
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
    drawn = dataset.kept[drawn]                         # indices of the dataset's samples
    open_work_dir(work_dir, run_settings(options, dataset))

    # 2. Tune the model on them. Its own losses are taken first.
    base_losses = token_losses(model, dataset, options.micro_tokens, "losses of the base model",
                               os.path.join(work_dir, "base losses"))
    times.append(time.perf_counter())
    tuned_model = os.path.join(work_dir, "tuned model")
    if on_rank_0(damaged_file, tuned_model):            # or not there
        tune(model, shuffled_datasets(dataset, drawn, shuffled, options), options)
        save_tuned_model(model, tuned_model)
    else:
        model.load_weights(tuned_model)
    times.append(time.perf_counter())
    tuned_losses = token_losses(model, dataset, options.micro_tokens, "losses of the tuned model",
                                os.path.join(work_dir, "tuned losses"))
    times.append(time.perf_counter())
    check = check_tuning(model, dataset, drawn, tuned_losses, options)

    # 3. Classify: a token that became harder to predict depends on its input; LD > 0 is reasoning.
    summary = on_rank_0(write_results, options, dataset, base_losses, tuned_losses, drawn, check,
                        times)
    release(options.out)
    return load_labels(options.out, dataset).difference[:], summary


def run_settings(options: Options, dataset: Dataset) -> dict:
    """What must be the same for a run that resumes."""
    # data files may move: what counts is their content, which the fingerprint holds
    may_change = ("out", "export", "data", "threshold", "unit", "shard")
    settings = {k: value for k, value in asdict(options).items() if k not in may_change}
    return settings | dataset.fingerprint


def write_results(options, dataset: Dataset, base_losses, tuned_losses, drawn, check, times):
    """Write labels, page and summary into options.out; returns the summary.

    drawn: indices of the shuffled samples. check: by check_tuning. times: of the start and of the
    end of each step, in seconds.
    """
    difference = loss_difference(tuned_losses, base_losses)
    if options.unit == "word":
        difference = largest_per_word(difference, dataset)
    unshuffled = ~tokens_of(drawn, dataset)                                 # (output tokens,)
    is_reasoning = classify(difference, options.threshold)
    summary = summarize(difference, is_reasoning, base_losses, tuned_losses, unshuffled,
                        dataset.true_roles())
    seconds = np.diff(times).round(1).tolist()
    summary |= check
    summary |= {"samples": len(dataset.kept), "shuffled": len(drawn),
                "dropped": dataset.dropped,
                "seconds": dict(zip(("base", "tune", "tuned"), seconds, strict=True))}
    write_json(os.path.join(options.out, "summary.json"), summary)
    losses = {"base": base_losses, "tuned": tuned_losses}
    page = labels_page(dataset, difference, is_reasoning, options.threshold, losses, summary)
    write_page(os.path.join(options.out, "labels.html"),
               "SHAD: reasoning and boilerplate tokens", page)
    # last, since the presence of the labels says that everything is there
    save_labels(options.out, difference, dataset, {
        "base_model": options.model, "threshold": options.threshold, "seed": options.seed})
    remove_folder(os.path.join(options.out, "parts"))
    print(format_summary(summary))
    return summary


# --------------------------------------------------------------------------------------------------
# The loss of every output token, by the base model and by the tuned one

def token_losses(model, dataset: Dataset, micro_tokens: int, title: str, directory=None):
    """The loss of every output token of a dataset: (output tokens,) float32 in nats, in data order.

    The ranks share the work. The data is cut into parts that do not depend on the number of ranks,
    so neither do the losses. With a directory every finished part becomes a file there, parts that
    already exist are skipped, and only rank 0 is given the losses. Raises DataError, naming a
    sample, for a loss that is not finite.
    """
    parts = label_parts(dataset, micro_tokens)
    if directory:
        missing = on_rank_0(missing_parts, len(parts), directory)
        for p, losses in run_parts(model, dataset, parts, missing, micro_tokens, title):
            save_part(directory, p, losses)
        barrier()                       # all parts are written
        if rank_and_world()[0] > 0:
            return None
        return np.concatenate([load_part(directory, p) for p in range(len(parts))])

    all_losses = np.zeros(dataset.output_starts[-1], np.float32)
    for p, losses in run_parts(model, dataset, parts, range(len(parts)), micro_tokens, title):
        start = dataset.output_starts[parts[p][0]]
        all_losses[start:start + len(losses)] = losses
    summed = torch.from_numpy(all_losses).to(model.device)
    sum_over_ranks(summed)              # each token is filled in by one rank and 0 on the others
    return summed.cpu().numpy()


def run_parts(model, dataset: Dataset, parts: list, todo, micro_tokens: int, title: str):
    """Yield (part, the losses of its output tokens, float32) for this rank's share of the parts.

    todo: the parts to run, as indices into `parts`. They run one per rank at a time.
    """
    rank, world = rank_and_world()
    total = int(dataset.lengths.sum())
    left = sum(int(dataset.lengths[parts[p]].sum()) for p in todo)
    bar = tqdm(desc=title, total=total, initial=total - left, unit="token", unit_scale=True,
               leave=None, disable=rank > 0)
    for first in range(0, len(todo), world):
        numbers = todo[first:first + world]
        by_sample = part_losses(model, dataset, [parts[p] for p in numbers], micro_tokens, bar)
        check_finite(by_sample, dataset, title, model.device)
        if by_sample:
            yield numbers[rank], np.concatenate([by_sample[i] for i in sorted(by_sample)])
    bar.close()
    if hasattr(model, "reshard"):
        # FSDP keeps the root gathered until a backward; an optimizer made now would hold the
        # gathered copies instead of the shards
        model.reshard()


def part_losses(model, dataset: Dataset, parts: list, micro_tokens: int, bar) -> dict:
    """{sample: the losses of its output tokens, float32} of parts[rank]; {} if there is none.

    Ranks that share a sharded model must all run the same number of forward passes. Each rank
    therefore plans every rank's part, and fills up its own plan with empty micro-batches.
    """
    rank, world = rank_and_world()
    plans = [micro_batches(part, dataset.lengths, micro_tokens) for part in parts]
    plans += [[]] * (world - len(plans))
    by_sample = {}
    for k in range(max(len(plan) for plan in plans)):
        indices = plans[rank][k] if k < len(plans[rank]) else []
        by_sample |= sample_losses(model, dataset, indices)
        on_all_ranks = [plan[k] for plan in plans if k < len(plan)]
        bar.update(int(dataset.lengths[np.concatenate(on_all_ranks)].sum()))
    return by_sample


@torch.no_grad()
def sample_losses(model, dataset: Dataset, indices) -> dict[int, np.ndarray]:
    """{sample: the losses of its output tokens, float32} of one micro-batch."""
    device = model.device
    tokens, targets, _ = collate(dataset, indices, device=device)                   # (B, T)
    with mixed_precision(device):
        losses = model(tokens, targets)                                             # (B, T)
    scored = targets != -100
    return {int(i): losses[b][scored[b]].cpu().numpy() for b, i in enumerate(indices)}


def label_parts(dataset: Dataset, micro_tokens: int) -> list[np.ndarray]:
    """The kept samples in at most about 1,000 parts, each of several micro-batches."""
    ends = np.cumsum(dataset.lengths[dataset.kept])
    part_tokens = max(8 * micro_tokens, ends[-1] // 1000)
    # a part ends where the running count of tokens passes a multiple of part_tokens
    bounds = np.flatnonzero(np.diff(ends // part_tokens)) + 1
    return np.split(dataset.kept, bounds)


def check_finite(by_sample: dict, dataset: Dataset, title: str, device) -> None:
    """Raise DataError on all ranks if a loss is not finite on any."""
    bad = torch.zeros(len(dataset.lengths), device=device)
    bad[[i for i, losses in by_sample.items() if not np.isfinite(losses).all()]] = 1
    sum_over_ranks(bad)
    for i in bad.nonzero():
        raise DataError(f"{title}: not finite for sample {dataset.samples[int(i)].id!r}; the model "
                        "was tuned too fast (lower --lr), or its weights are damaged.")


# --------------------------------------------------------------------------------------------------
# Beyond the paper: was the tuning enough, and labels by word

def check_tuning(model, dataset: Dataset, drawn, tuned_losses, options: Options) -> dict:
    """Has the tuned model unlearned to use its input?

    Compares its mean loss, in nats, on the outputs of at most 32 samples that were not drawn: with
    their own inputs, of which tuned_losses has the losses (only rank 0 is given them), and shuffled
    among each other. Returns {"check": the figures}, or {} on other ranks and below 2 such samples.
    Raises DataError for a model that has lost all that it knew.
    """
    rest = np.setdiff1d(dataset.kept, drawn)
    left_out = np.random.default_rng(options.seed).permutation(rest)[:32]
    if len(left_out) < 2:
        return {}
    shuffled, _ = shuffle_outputs(dataset.samples.select(left_out), 1.0, options.seed)
    swapped = Dataset(shuffled, dataset.renderer, 2 * dataset.max_length)
    losses = token_losses(model, swapped, options.micro_tokens, "losses with wrong inputs")
    wrong = float(losses.mean())
    if wrong > 2 * math.log(model.config.vocab_size):
        raise DataError(f"the tuned model's loss is {wrong:.2f} nats, twice that of a blind guess; "
                        f"lower --lr, and remove {options.out}/parts.")
    if tuned_losses is None:
        return {}
    right = float(tuned_losses[tokens_of(left_out, dataset)].mean())
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


def largest_per_word(difference, dataset: Dataset) -> np.ndarray:
    """LD by word: every token is given the largest LD of its word; both (output tokens,) float32.

    Later tokens of a word follow from its first ones, with or without the input, so that their own
    LD is near 0. A token continues a word where two of its letters, digits or _ meet.
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


def main():
    options = parse_options(Options, __doc__)
    device = init_distributed(options.dtype)
    rank, _ = rank_and_world()

    # refuse at once what could not be written in the end
    labelled = os.path.exists(os.path.join(options.out, "labels.safetensors"))
    if labelled and not options.export:
        raise DataError(f"{options.out}/labels.safetensors is there already; "
                        "choose another --out, or remove it.")
    barrier()                                       # every rank has looked
    if not labelled:
        on_rank_0(claim, options.out, FILES, "shad.py", False)
    if options.export:
        on_rank_0(claim_export, options.export, False)

    # label
    options.model = resolve(options.model)
    on_stop(stop_at_once(options.out))
    dataset = Dataset.load(options.data, options.model, options.template, options.max_length,
                           options.native_calls)
    if rank == 0:
        print(dataset.describe())
    if not labelled:
        shard = partial(shard_model, device=device, choice=options.shard)
        model = Transformer.from_pretrained(options.model, device=device, shard=shard)
        limit_threads(model)
        run(options, dataset, model)

    # export, and say what to run next
    if options.export and rank == 0:
        export_labels(options.export, dataset, load_labels(options.out, dataset))
    if rank == 0 and not labelled:
        print_result(options)


def print_result(options: Options) -> None:
    """Say what was written, and what to run next."""
    arguments = ["--model", options.model, "--data", *options.data,
                 "--max-length", str(options.max_length), "--template", options.template,
                 *(["--native-calls"] if options.native_calls else []),
                 "--method", "rft", "--labels", options.out]
    print(f"\nwrote {options.out}/labels.safetensors, summary.json and labels.html "
          "(open it in a browser). Next:\n"
          f"  python train.py {shlex.join(arguments)} --out OUT")


if __name__ == "__main__":
    run_script(main, CheckpointError)
