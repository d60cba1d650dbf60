"""A trainer's memory and start-up time on as many generated samples as you like.

    python -m tests.bench.data
    python -m tests.bench.data --samples 100000

Toy samples as JSON Lines, one thread: a hundredth of them, a tenth, and all, each tokenized and
then found again in the cache. Files and cache lie in a temporary directory.
"""
import json
import os
import tempfile
import time
from dataclasses import dataclass

import torch

import train
from data import Dataset, epoch_batches
from model import CheckpointError, Transformer
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed
from support.readers import toy_samples
from tests.bench import measure
from toy import reproduce


@dataclass
class Options:
    samples: int = option(1_000_000, "samples of the largest file", low=100_000)
    steps: int = option(6, "training steps", low=1)


def write_samples(path: str, count: int) -> None:
    """Toy samples as a file of the user's own would hold them, without their true roles."""
    with open(path, "w", encoding="utf-8") as f:
        for seed in range(1, count // 1000 + 1):
            for sample in toy_samples(1000, seed):
                messages = [{"role": m.role, "content": m.text} for m in sample.messages]
                f.write(json.dumps({"messages": messages}) + "\n")


def start_and_train(path: str, steps: int, out: str) -> list[str]:
    """Load, plan an epoch, train a few steps. The table's cells: counts, seconds, MiB."""
    torch.set_num_threads(1)
    init_distributed()                          # as train.py begins
    imports = measure.memory("RssAnon")
    start = time.perf_counter()
    dataset = Dataset.load([path], reproduce.TOY, "auto", 2048)
    loaded = time.perf_counter() - start
    options = train.Options(model=reproduce.TOY, data=[path], out=out, method="sft", steps=steps,
                            batch_tokens=4096, checkpoint_every=0)
    epoch_batches(dataset.lengths, dataset.kept, options.batch_tokens, options.seed)
    planned = time.perf_counter() - start
    train.train(Transformer.from_pretrained(reproduce.TOY), dataset, None, options)
    megabytes = [measure.memory("VmHWM"), measure.memory("RssAnon"), imports]
    return [f"{len(dataset.kept):,}", f"{dataset.lengths.sum():,}", f"{loaded:.1f}",
            f"{planned:.1f}", *(f"{x:.0f}" for x in megabytes)]


def main():
    options = parse_options(Options, __doc__)
    torch.set_num_threads(1)
    measure.print_heading(f"data: start-up and {options.steps} training steps")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for count in (options.samples // 100, options.samples // 10, options.samples):
            path = os.path.join(folder, f"{count}.jsonl")
            write_samples(path, count)
            for cache in ("built", "found"):
                out = os.path.join(folder, f"{count} {cache}")
                cells = measure.in_own_process(start_and_train, path, options.steps, out)
                rows.append([cache, *cells])
    # RssAnon leaves out the pages of mapped files, which the system can drop at any time.
    header = ["cache", "samples", "tokens", "s to load", "s to first batch", "peak MiB",
              "MiB not of files", "of which imports"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
