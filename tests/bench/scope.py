"""What the exact weights of scope "batch" cost, and how far off weights per micro-batch are.

    python -m tests.bench.scope

One batch of toy samples, their true roles as labels, in several micro-batches.
"""
import statistics
import time
from dataclasses import dataclass, replace

import torch

import train
from data import Dataset, collate, epoch_batches, micro_batches
from model import CheckpointError, Transformer
from rft import rft_loss
from support.cli import option, parse_options, run_script
from support.readers import toy_samples
from support.templates import Renderer
from tests.bench import measure
from toy import reproduce


@dataclass
class Options:
    repeats: int = option(5, "measured repeats", low=1)


def main():
    repeats = parse_options(Options, __doc__).repeats

    # one global batch, whose true roles are the labels, cut into micro-batches
    dataset = Dataset(toy_samples(400, 0), Renderer(reproduce.TOY))
    model = Transformer.from_pretrained(reproduce.TOY)
    labels = dataset.true_roles()["reasoning"]                          # (output tokens,) bool
    batch = epoch_batches(dataset.lengths, dataset.kept, 8192, 0)[0]
    per_sample = train.Options(model="", data=[], out="", tau=3.0, micro_tokens=1024)
    per_batch = replace(per_sample, scope="batch")
    pieces = micro_batches(batch, dataset.lengths, per_sample.micro_tokens)

    # the ways of weighting it
    def sample():
        train.backward(model, dataset, labels, batch, per_sample)

    def exact():
        train.backward(model, dataset, labels, batch, per_batch)

    def per_micro_batch():
        for piece in pieces:
            tokens, targets, is_reasoning = collate(dataset, piece, labels)
            losses = model(tokens, targets)                                             # (B, T)
            is_output = (targets != -100).flatten()
            loss = rft_loss(losses.flatten(), is_reasoning.flatten(), is_output=is_output)
            share = dataset.output_counts[piece].sum() / dataset.output_counts[batch].sum()
            (loss * share).backward()

    ways = {"sample": sample, "batch, exact": exact, "batch, per micro-batch": per_micro_batch}

    # time and gradient of each
    times = {name: [] for name in ways}
    gradients = {}
    for _ in range(repeats + 1):
        for name, backward in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            backward()
            times[name].append(time.perf_counter() - start)
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])

    # how far each gradient is from the exact one of scope "batch"
    seconds = {name: statistics.median(times[name][1:]) for name in ways}
    target = gradients["batch, exact"]
    rows = []
    for name in ways:
        error = float((gradients[name] - target).norm() / target.norm())
        ratio = seconds[name] / seconds["sample"]
        rows.append([name, f"{seconds[name]:.3f}", f"{ratio:.2f}", f"{error:.2%}"])
    measure.print_heading(f"scope: one batch of {len(batch)} toy samples in {len(pieces)} "
                          f"micro-batches; median of {repeats}")
    header = ["scope", "seconds", "x scope sample", "gradient's distance from the exact one"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
