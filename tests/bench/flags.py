"""What --recompute and --compile do to a training step, and how its peak memory was estimated.

    python -m tests.bench.flags --model DIR --data train.json --batch-tokens 1024

Three processes of one thread take turns. The estimate is that of tests/bench/memory.py.
"""
import json
import os
import time
from dataclasses import dataclass

import torch

import train
from data import Dataset, epoch_batches
from model import CheckpointError, Config, Transformer
from support.cli import option, parse_options, run_script
from support.distributed import compile_blocks, init_distributed
from tests.bench import measure
from tests.bench.memory import memory_per_gpu


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory", required=True)
    data: list = option([], "training data, one or more files", required=True)
    steps: int = option(6, "measured steps", low=1)
    batch_tokens: int = option(4096, "tokens of a batch, which is one micro-batch", low=1)


def trainer(flag: str, path: str, data: list[str], batch_tokens: int, pipe) -> None:
    """Train on each batch received. Sends (seconds, peak MiB above what was held at the start)."""
    torch.set_num_threads(1)
    init_distributed()                          # as train.py begins
    before = measure.memory("VmRSS")
    dataset = Dataset.load(data, path, "auto", batch_tokens)
    model = Transformer.from_pretrained(path)
    model.recompute = flag == "--recompute"
    if flag == "--compile":
        compile_blocks(model)
    options = train.Options(model=path, data=data, method="sft", micro_tokens=2 * batch_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    measure.reset_peak()
    while True:
        batch = pipe.recv()
        if batch is None:
            return
        start = time.perf_counter()
        train.backward(model, dataset, None, batch, options)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - start, measure.memory("VmHWM") - before))


def main():
    options = parse_options(Options, __doc__)
    torch.set_num_threads(1)
    dataset = Dataset.load(options.data, options.model, "auto", options.batch_tokens)
    batches = epoch_batches(dataset.lengths, dataset.kept, options.batch_tokens, seed=0)
    batches = batches[:options.steps + 1]
    with open(os.path.join(options.model, "config.json"), encoding="utf-8") as f:
        config = Config.from_hf(json.load(f))
    padded = max(len(batch) * int(dataset.lengths[batch].max()) for batch in batches)

    measure.print_heading(
        f"flags: steps of about {options.batch_tokens} tokens in float32, one and then "
        f"{options.steps} more; peak above the start")
    results = measure.in_turns(trainer, ("", "--recompute", "--compile"),
                               (options.model, options.data, options.batch_tokens), batches)
    plain = [seconds for seconds, _ in results[""]]
    rows = []
    for flag, result in results.items():
        times = [seconds for seconds, _ in result]
        ratios = [a / b for a, b in zip(times[1:], plain[1:], strict=True)]
        estimate = memory_per_gpu(config, 1, padded, flag == "--recompute", "cpu")
        rows.append([
            flag or "neither",
            f"{times[0]:.1f}",
            measure.median_and_range(times[1:]),
            measure.median_and_range(ratios),
            f"{result[-1][1]:.0f}",
            f"{sum(estimate.values()) / 2**20:.0f}"])
    header = ["", "first step, s", "step, s", "x neither", "peak MiB", "estimated MiB"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
