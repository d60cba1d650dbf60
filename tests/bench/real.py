"""The methods on a real model, over several seeds; with SHAD's labels and with the true roles.

    python -m tests.bench.real --model DIR --data train.json --out runs
    python -m tests.bench.real --model DIR --data train.json --out runs --methods sft --seeds 1

Data in APIGen's schema. Of the functions offered to a sample those are kept that it calls, and
--functions more: a small machine would spend most of its time on reading the others. The last
samples are held out. SHAD labels the rest once; each method then trains as often as there are
seeds, from the same model, a seed being an order of the batches. "rft, by word" takes SHAD's labels
by word; "rft, true roles" takes the JSON's structure for labels, which tells the method from SHAD.
Runs that runs/SEED METHOD.json holds already are not made again; runs/SEED METHOD/model is for
eval.py.
"""
import json
import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np
import torch

import eval
import shad
import train
from baselines.regex_labels import regex_labels
from data import Dataset
from model import CheckpointError, Transformer, resolve
from rft import METHODS
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed
from support.figures import mean_interval
from support.files import write_json
from support.readers import read_samples
from support.records import read_object, read_records
from support.templates import Renderer
from tests.bench import measure
from tests.bench.shad import FIGURES, figures_of

BY_WORD = "rft, by word"
TRUE_ROLES = "rft, true roles"
THRESHOLDS = (-0.05, 0.0, 0.02, 0.1)        # of LD, in nats; the paper's is 0
NAMES = ["sft", "regex+rft", "alpha", "rft", BY_WORD, TRUE_ROLES]


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: str = option("", "training data in APIGen's schema", required=True)
    out: str = option("", "directory for the runs", required=True)
    methods: list = option(NAMES, "which of " + ", ".join(NAMES))
    seeds: int = option(3, "seeds of each method, from 0", low=1)
    processes: int = option(2, "runs at a time, with one thread each", low=1)
    functions: int = option(0, "functions that a sample is offered beside those it calls", low=0)
    held_out: int = option(80, "held-out samples", low=2)
    max_length: int = option(256, "longer samples are dropped, in tokens", low=2)
    # SHAD's
    shuffle: int = option(200, "samples to shuffle", low=2)
    shad_epochs: int = option(4, "epochs over them", low=1)
    shad_lr: float = option(1e-4, "learning rate of the discriminator")
    # the methods'
    steps: int = option(45, "steps of each method", low=1)
    lr: float = option(1e-4, "peak learning rate of each method")
    batch_tokens: int = option(4096, "tokens per global batch", low=1)
    micro_tokens: int = option(1024, "tokens per forward", low=1)
    dtype: str = option("auto", "precision of matrix products",
                        choices=["auto", "float32", "bfloat16"])


# --------------------------------------------------------------------------------------------------
# Data and labels

def offer_fewer(record: dict, functions: int, rng: random.Random) -> dict:
    """An APIGen record that offers only the functions it calls and `functions` others."""
    called = {call["name"] for call in json.loads(record["answers"])}
    tools = json.loads(record["tools"])
    others = [tool for tool in tools if tool["name"] not in called]
    others = rng.sample(others, min(functions, len(others)))
    offered = [tool for tool in tools if tool["name"] in called or tool in others]
    return record | {"tools": json.dumps(offered)}


def load_data(options: Options) -> tuple[Dataset, Dataset]:
    """(training data, held-out data)."""
    path = os.path.join(options.out, f"data, {options.functions} others.json")
    if not os.path.exists(path):
        rng = random.Random(0)
        records = [offer_fewer(record, options.functions, rng)
                   for _, record in read_records(options.data)]
        write_json(path, records)
    renderer = Renderer(options.model)
    samples = read_samples(path)
    kept = Dataset(samples, renderer, options.max_length).kept
    cut = max(1, len(kept) - options.held_out)
    return (Dataset([samples[i] for i in kept[:cut]], renderer, options.max_length),
            Dataset([samples[i] for i in kept[cut:]], renderer, options.max_length))


def make_labels(dataset: Dataset, options: Options) -> None:
    """SHAD's labels, in runs/labels."""
    folder = os.path.join(options.out, "labels")
    if os.path.exists(os.path.join(folder, "labels.safetensors")):
        return
    settings = shad.Options(model=options.model, data=[options.data], out=folder,
                            shuffle=options.shuffle, epochs=options.shad_epochs, lr=options.shad_lr,
                            micro_tokens=options.micro_tokens)
    shad.run(settings, dataset, Transformer.from_pretrained(options.model))


def label_rows(dataset: Dataset, options: Options) -> list[list[str]]:
    """SHAD's labels against the true roles, on the samples that were not shuffled."""
    labels = shad.load_labels(os.path.join(options.out, "labels"), dataset)
    fraction = options.shuffle / len(dataset.kept)
    _, drawn = shad.shuffle_outputs(dataset.samples, fraction, seed=0)      # as shad.run has drawn
    rest = np.setdiff1d(dataset.kept, drawn)
    unshuffled = Dataset(dataset.samples.select(rest), dataset.renderer, options.max_length)
    is_unshuffled = shad.tokens_of(rest, dataset)                           # (output tokens,)
    by_token = labels.difference[:]
    rows = [["labels", "threshold", *FIGURES]]
    for unit, difference in {"by token": by_token,
                             "by word": shad.largest_per_word(by_token, dataset)}.items():
        for threshold in THRESHOLDS:
            above = difference[is_unshuffled] - threshold
            rows.append([unit, threshold, *figures_of(unshuffled, above, has_prose=False)])
    return rows


def labels_for(name: str, dataset: Dataset, options: Options):
    if name == TRUE_ROLES:
        return dataset.true_roles()["reasoning"]
    if name == "regex+rft":
        return regex_labels(dataset)
    labels = shad.load_labels(os.path.join(options.out, "labels"), dataset)
    if name == BY_WORD:
        labels = shad.Labels(shad.largest_per_word(labels.difference[:], dataset))
    return labels


# --------------------------------------------------------------------------------------------------
# Runs and the table

def run(name: str, seed: int, options: Options) -> None:
    """Train one method on one seed, or with name "base" nothing; writes runs/SEED NAME.json."""
    folder = os.path.join(options.out, f"{seed} {name}")
    if os.path.exists(folder + ".json"):
        return
    torch.set_num_threads(1)
    init_distributed(options.dtype)
    dataset, held_out = load_data(options)
    model = Transformer.from_pretrained(options.model)
    metrics = []
    if name != "base":
        method = name if name in METHODS else "rft"
        settings = train.Options(
            model=options.model, data=[options.data], out=folder, method=method, seed=seed,
            steps=options.steps, lr=options.lr, batch_tokens=options.batch_tokens,
            micro_tokens=options.micro_tokens)
        metrics = train.train(model, dataset, labels_for(name, dataset, options), settings)
    losses = eval.role_losses(model, held_out, options.micro_tokens)
    write_json(folder + ".json", {"losses": losses, "metrics": metrics})


def rows_of(names, options: Options) -> list[list[str]]:
    """The held-out losses: mean +- 95 % interval over seeds, and minus SFT's, seed by seed."""
    rows = [["", "seeds", "reasoning", "boilerplate", "reasoning - SFT", "boilerplate - SFT"]]
    sft = {}
    for name in names:
        by_seed = {}
        for seed in range(options.seeds):
            path = os.path.join(options.out, f"{seed} {name}.json")
            if os.path.exists(path):
                losses = read_object(path)["losses"]
                by_seed[seed] = [losses[role]["loss"] for role in ("reasoning", "boilerplate")]
        if name == "sft":
            sft = by_seed
        paired = [np.subtract(by_seed[seed], sft[seed]) for seed in by_seed if seed in sft]
        row = [name, str(len(by_seed))]
        for values in (list(by_seed.values()), paired):
            columns = np.transpose(mean_interval(values)) if values else []
            row += [f"{mean:.3f} ± {half:.3f}" for mean, half in columns]
        rows.append(row)
    return rows


def main():
    options = parse_options(Options, __doc__)
    init_distributed(options.dtype)
    options.model = resolve(options.model)
    os.makedirs(options.out, exist_ok=True)
    dataset, held_out = load_data(options)
    if set(options.methods) - {"sft", "regex+rft", TRUE_ROLES}:
        make_labels(dataset, options)
        rows = label_rows(dataset, options)
        measure.print_heading(f"SHAD: {options.shuffle} of {dataset.describe()}")
        print(measure.table(rows[0], rows[1:]))
    tasks = [("base", 0, options)]
    for seed in range(options.seeds):
        tasks += [(name, seed, options) for name in options.methods]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.starmap(run, tasks, chunksize=1)
    measure.print_heading(
        f"{options.steps} steps on {dataset.describe()}\nheld out: {held_out.describe()}")
    rows = rows_of(["base", *NAMES], options)
    print(measure.table(rows[0], rows[1:]))


if __name__ == "__main__":
    run_script(main, CheckpointError)
