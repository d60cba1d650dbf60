"""SHAD judged against the structure of the calls, by how its discriminator is tuned.

    python -m tests.bench.shad --model DIR --data train.json
    python -m tests.bench.shad --model DIR --data train.json --marked tool_use.jsonl --out losses
    python -m tests.bench.shad --model toy --data toy[:400] --shuffle 100 --lr 1e-3

The data's last samples are held out; of the others some are shuffled. One row per number of
shuffled samples, learning rate, number of epochs and seed, with labels as the paper makes them (by
token), then by word, and by the mean LD of all seeds.
"""
import itertools
import os
import tempfile
from dataclasses import dataclass

import numpy as np

import shad
from data import Dataset
from model import CheckpointError, Transformer, resolve
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed
from support.label_report import judge
from support.readers import SPAN_ROLES, TOOL_PROMPT, Message, Sample, call_spans, read_samples
from support.records import read_records
from support.templates import Renderer
from tests.bench import measure

OTHER_ROLES = SPAN_ROLES[1:]
FIGURES = ["error", "error, clear", "AUC, clear", "precision", "recall",
           *(f"{role} called so" for role in OTHER_ROLES)]
HEADER = ["held out", "shuffled", "lr", "epochs", "seed", "labels", *FIGURES,
          "loss, right input", "loss, wrong input", "loss of reasoning"]


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: str = option("", "training data, of which the end is held out", required=True)
    marked: str = option(None, "JSON Lines of conversations whose turns are lists of spans, some "
                               "of them tool_call; judged too")
    held_out: int = option(80, "held-out samples", low=2)
    max_length: int = option(640, "longer samples are dropped, in tokens", low=2)
    shuffle: list = option(["96", "300", "1000"], "how many samples to shuffle")
    lr: list = option(["1e-4", "3e-4"], "learning rates")
    epochs: list = option(["4"], "epochs over them")
    reshuffle: str = option("yes", "shuffle them again in every epoch", choices=["yes", "no"])
    seeds: int = option(1, "seeds of each row", low=1)
    batch_tokens: int = option(4096, "tokens per global batch", low=1)
    micro_tokens: int = option(2048, "tokens per forward", low=1)
    dtype: str = option("auto", "precision of matrix products, as for shad.py",
                        choices=["auto", "float32", "bfloat16"])
    out: str = option(None, "keep the losses of this model and data here, and resume from them "
                            "(default: a temporary directory)")


# --------------------------------------------------------------------------------------------------
# Samples

def marked_samples(path: str) -> list[Sample]:
    """Conversations with marked spans: the roles in a call are read off it, prose is connecting."""
    samples = []
    for where, record in read_records(path, False, 2**24):
        messages = [Message("system", TOOL_PROMPT.format(record.get("tools")))]
        for turn in record["messages"]:
            spans = []
            for part in turn["content"]:
                if part["type"] == "tool_call":
                    spans += call_spans(f"[{part['value']}]")
                else:
                    spans.append((part["value"], "connecting"))
                spans.append(("\n", "format"))
            text = "".join(text for text, _ in spans)
            messages.append(Message(turn["role"], text, spans))
        samples.append(Sample(where, messages))
    return samples


def split_end(samples, renderer, options) -> tuple[Dataset, Dataset | None]:
    """(those before, the last `held_out` samples) of those that are short enough."""
    kept = Dataset(samples, renderer, options.max_length).kept
    cut = max(0, len(kept) - options.held_out)
    before = [samples[i] for i in kept[:cut]]
    held_out = Dataset([samples[i] for i in kept[cut:]], renderer, options.max_length)
    return Dataset(before, renderer, options.max_length) if before else None, held_out


# --------------------------------------------------------------------------------------------------
# Losses

def losses_of(model, dataset: Dataset, options) -> tuple[np.ndarray, np.ndarray]:
    """(output tokens,) each: the losses with their own inputs, and with each other's."""
    shuffled, _ = shad.shuffle_outputs(dataset.samples, 1.0, 0)
    swapped = Dataset(shuffled, dataset.renderer, 2 * dataset.max_length)
    return (shad.token_losses(model, dataset, options.micro_tokens, "right inputs"),
            shad.token_losses(model, swapped, options.micro_tokens, "wrong inputs"))


def discriminator_losses(pool: Dataset, held_out, setting, options) -> dict[str, np.ndarray]:
    """{"<held-out data> right" and "... wrong": losses} of one tuned model; (): of the base."""
    name = "-".join(map(str, setting)) or "base"
    kind = "reshuffled" if options.reshuffle == "yes" else "shuffled once"
    path = os.path.join(options.out, f"{name} {kind}.npz")
    if os.path.exists(path):
        return dict(np.load(path))
    model = Transformer.from_pretrained(options.model)
    if setting:
        count, lr, epochs, seed = setting
        tuning = shad.Options(
            model="", data=[], out="", lr=lr, epochs=epochs, reshuffle=options.reshuffle, seed=seed,
            batch_tokens=options.batch_tokens, micro_tokens=options.micro_tokens)
        fraction = min(1.0, count / len(pool.samples))
        shuffled, drawn = shad.shuffle_outputs(pool.samples, fraction, seed)
        shad.tune(model, shad.shuffled_datasets(pool, drawn, shuffled, tuning), tuning)
    losses = {}
    for name, dataset in held_out.items():
        losses[f"{name} right"], losses[f"{name} wrong"] = losses_of(model, dataset, options)
    np.savez(path, **losses)
    return losses


# --------------------------------------------------------------------------------------------------
# The table

def rows_of(dataset: Dataset, difference, head, losses=("", "", "")) -> list[list[str]]:
    """The rows of one LD, by token and by word. head: the cells before; losses: those after."""
    by_word = shad.largest_per_word(difference, dataset)
    has_prose = head[0] == "marked"
    return [[*head, "token", *figures_of(dataset, difference, has_prose), *losses],
            [*head, "word", *figures_of(dataset, by_word, has_prose), *losses]]


def figures_of(dataset: Dataset, difference, has_prose: bool) -> list[str]:
    """has_prose: connecting tokens are prose, of which nobody knows what is reasoning."""
    roles = dataset.true_roles()
    is_reasoning = shad.classify(difference)
    called = judge(difference, is_reasoning, roles)["called_reasoning"]
    if has_prose:
        calls = ~roles["connecting"]
        roles = {role: is_role[calls] for role, is_role in roles.items()}
        difference = difference[calls]
        is_reasoning = is_reasoning[calls]
    figures = judge(difference, is_reasoning, roles)
    clear = figures["clear"]
    called = [called.get(role) for role in OTHER_ROLES]
    shares = [figures["error"], clear["error"], clear["precision"], clear["recall"], *called]
    texts = ["-" if share is None else f"{share:.1%}" for share in shares]
    return [*texts[:2], f"{clear['auc']:.3f}", *texts[2:]]


def main():
    options = parse_options(Options, __doc__)
    init_distributed(options.dtype)
    options.model = resolve(options.model)
    options.out = options.out or tempfile.mkdtemp()
    os.makedirs(options.out, exist_ok=True)
    renderer = Renderer(options.model)
    held_out = {}
    pool, held_out["calls"] = split_end(read_samples(options.data), renderer, options)
    if options.marked:
        _, held_out["marked"] = split_end(marked_samples(options.marked), renderer, options)
    seeds = range(options.seeds)
    settings = itertools.product(
        map(int, options.shuffle), map(float, options.lr), map(int, options.epochs))

    base = discriminator_losses(pool, held_out, (), options)
    rows = []
    for setting in settings:
        tuned = [discriminator_losses(pool, held_out, (*setting, s), options) for s in seeds]
        for name, dataset in held_out.items():
            is_reasoning = dataset.true_roles()["reasoning"]
            differences = [losses[f"{name} right"] - base[f"{name} right"] for losses in tuned]
            for seed, losses, difference in zip(seeds, tuned, differences, strict=True):
                right = losses[f"{name} right"]
                ends = [right.mean(), losses[f"{name} wrong"].mean(), right[is_reasoning].mean()]
                ends = [f"{loss:.2f}" for loss in ends]
                rows += rows_of(dataset, difference, [name, *setting, seed], ends)
            if len(differences) > 1:
                mean = np.mean(differences, axis=0)
                rows += rows_of(dataset, mean, [name, *setting, "mean LD"])
    measure.print_heading(f"SHAD: {len(pool.samples)} samples to shuffle from; held out: "
                          + ", ".join(f"{name} {d.describe()}" for name, d in held_out.items()))
    print(measure.table(HEADER, rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
