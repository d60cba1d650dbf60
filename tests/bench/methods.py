"""The paper's comparison on the toy: all methods, and settings of RFT, over several seeds.

    python -m tests.bench.methods --out runs            # 5 seeds, two processes: half an hour
    python -m tests.bench.methods --out runs --seeds 8  # the first five are found in runs again

Each seed has its own samples, SHAD labels, reference model (Rho-1) and DPO model (RewardFT); all
methods start from the same base and see the same batches. Writes runs/SEED.json, runs/methods.json
and runs/methods.html, and prints tables of mean +- 95 % interval and of paired differences.
"""
import multiprocessing
import os
from dataclasses import dataclass, replace
from functools import partial

import torch

import shad
import train
from baselines import dpo
from baselines.regex_labels import regex_labels
from data import Dataset, Renderer
from model import CheckpointError, Transformer
from rft import METHODS
from support import report
from support.checkpoints import save_model
from support.cli import option, parse_options, run_script
from support.files import write_json
from support.readers import read_object, read_record, toy_samples
from tests.bench import measure, methods_page
from toy import reproduce
from toy.task import toy_pairs


@dataclass
class Options:
    out: str = option("", "directory for the runs", required=True)
    seeds: int = option(5, "number of seeds, from 0", low=2)
    processes: int = option(2, "seeds run at a time, with one thread each", low=1)


WATCH_EVERY = 40        # steps between evaluations in training ...
WATCH_SAMPLES = 50      # ... of each kind, held-in and held-out

# settings of RFT besides the default: the paper's sweep of 1/tau, and what its formula leaves open
VARIANTS = {
    "rft, 1/tau 0.2": {"tau": 5.0},
    "rft, 1/tau 0.5": {"tau": 2.0},
    "rft, scope batch": {"scope": "batch"},
    "rft, sums": {"reduce": "sum"},
    "rft, not detached": {"detach": "no"},
}


def base():
    return Transformer.from_pretrained(reproduce.TOY)


def make_labels(dataset: Dataset, seed: int, out: str) -> dict:
    """{kind: labels of all output tokens}, as METHODS names them."""
    labels = {"regex": regex_labels(dataset)}

    # SHAD; SFT does not use its labels, but reports the losses of their groups
    options = shad.Options(model=reproduce.TOY, data=["toy"], out=os.path.join(out, "labels"),
                           seed=seed, **reproduce.SHAD)
    difference, _ = shad.run(options, dataset, base())
    labels["shad"] = labels[None] = shad.Labels(difference)

    # Rho-1: a reference model, fine-tuned on 1,000 other samples
    def losses(model, title):
        return shad.token_losses(model, dataset, 4096, title)

    other = Dataset(toy_samples(1000, seed + 1000), dataset.renderer)
    model = base()
    options = train.Options(model=reproduce.TOY, data=["toy"], out=os.path.join(out, "reference"),
                            method="sft", seed=seed, **reproduce.TRAINING)
    train.train(model, other, None, options)
    labels["reference"] = losses(model, "losses of the reference model")

    # RewardFT: a model tuned on 1,000 pairs, and what it has gained on each token
    pairs = []
    for pair in toy_pairs(1000, seed + 2000):
        for answer in ("chosen", "rejected"):
            turn = {"role": "assistant", "content": pair[answer]}
            pairs.append(read_record({"messages": [*pair["messages"], turn]}, 0))
    model = base()
    base_losses = losses(model, "losses of the base model")
    options = dpo.Options(model=reproduce.TOY, data="toy", out=out, lr=1e-4, seed=seed)
    dpo.train_dpo(model, Dataset(pairs, dataset.renderer), options)
    save_model(model, reproduce.TOY, os.path.join(out, "dpo"))      # for the page
    labels["reward"] = base_losses - losses(model, "losses of the model tuned by DPO")
    return labels


def run_seed(seed: int, out: str) -> None:
    """Train and evaluate every method on one seed; writes out/SEED.json."""
    torch.set_num_threads(1)
    path = os.path.join(out, f"{seed}.json")
    if os.path.exists(path):
        return
    dataset = Dataset(toy_samples(reproduce.SAMPLES, seed), Renderer(reproduce.TOY))
    labels = make_labels(dataset, seed, os.path.join(out, str(seed)))
    common = train.Options(model=reproduce.TOY, data=["toy"], seed=seed, **reproduce.TRAINING)
    results = {"base": {"summary": reproduce.evaluate(base(), dataset.renderer, seed)}}
    start = reproduce.evaluate(base(), dataset.renderer, seed, WATCH_SAMPLES)
    settings = {name: {"method": name} for name in METHODS}
    settings |= {name: {"method": "rft"} | variant for name, variant in VARIANTS.items()}
    for name, setting in settings.items():
        folder = os.path.join(out, str(seed), name.replace(" ", "_").replace("/", "_"))
        options = replace(common, out=folder, **setting)
        _, kind = METHODS[options.method]
        model = base()
        history = {0: start}
        watch = partial(keep_history, model, dataset.renderer, seed, history)
        if name in VARIANTS:
            watch = None
        metrics = train.train(model, dataset, labels[kind], options, watch)
        summary = reproduce.evaluate(model, dataset.renderer, seed)
        results[name] = {"summary": summary, "metrics": metrics}
        if watch:
            results[name]["history"] = history | {len(metrics): summary}
    write_json(path, results)


def keep_history(model, renderer, seed: int, history: dict, step: int) -> None:
    """Every WATCH_EVERY steps put an evaluation into history; it takes 2 s."""
    if step % WATCH_EVERY == 0:
        history[step] = reproduce.evaluate(model, renderer, seed, WATCH_SAMPLES)


def main():
    options = parse_options(Options, __doc__)
    os.makedirs(options.out, exist_ok=True)
    seeds = range(options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.starmap(run_seed, [(seed, options.out) for seed in seeds], chunksize=1)
    runs = [read_object(os.path.join(options.out, f"{seed}.json")) for seed in seeds]
    tables = methods_page.tables(runs, VARIANTS)
    write_json(os.path.join(options.out, "methods.json"), tables)
    command = f"python -m tests.bench.methods --out runs --seeds {options.seeds}"
    body = methods_page.runs_html(runs, VARIANTS, command)
    dataset = Dataset(toy_samples(reproduce.SAMPLES, 0), Renderer(reproduce.TOY))
    folders = [os.path.join(options.out, str(seed)) for seed in seeds]
    body += methods_page.labels_html(folders, dataset, command)
    report.write_page(os.path.join(options.out, "methods.html"), "All methods on the toy", body)
    measure.print_heading(f"toy: all methods, {options.seeds} seeds")
    for header, *rows in tables.values():
        print(f"{measure.table(header, rows)}\n")


if __name__ == "__main__":
    run_script(main, CheckpointError)
