"""The head: fused_cross_entropy compared with naive logits and with torch's own chunked loss.

    python -m tests.bench.head
    python -m tests.bench.head --repeats 3

Forward and backward with a random gradient per token; all tokens scored, and then 40 % of them.
The variants take turns. The extra peak memory of each is measured in a process of its own.
"""
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import _chunk_rows, fused_cross_entropy
from support.cli import option, parse_options, run_script
from tests.bench import measure

N, V, H = 2048, 49152, 576      # tokens, vocabulary, hidden size: the head of SmolLM2-135M


@dataclass
class Options:
    repeats: int = option(5, "measured repeats", low=1)


def naive(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def torch_own(hidden, weight, targets):
    chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_chunk_rows(weight))
    return F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=chunks)


HEADS = {"naive": naive, "fused_cross_entropy": fused_cross_entropy}
if hasattr(F, "linear_cross_entropy"):                  # torch >= 2.13
    HEADS["torch's F.linear_cross_entropy"] = torch_own


def make_inputs(scored: float):
    """hidden (N, H), weight (V, H), targets (N,), a share of them scored, and a gradient (N,)."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) * 0.05).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) >= scored] = -100
    return hidden, weight, targets, torch.rand(N)


def extra_memory(name: str, scored: float) -> float:
    """MiB at the peak of forward and backward, above what the inputs and their gradients hold."""
    head = HEADS[name]
    hidden, weight, targets, gradient = make_inputs(scored)
    head(hidden[:64], weight, targets[:64]).backward(gradient[:64])     # first-use buffers
    hidden.grad = torch.zeros_like(hidden)
    weight.grad = torch.zeros_like(weight)
    measure.reset_peak()
    before = measure.memory("VmRSS")
    head(hidden, weight, targets).backward(gradient)
    return measure.memory("VmHWM") - before


def bench(scored: float, repeats: int) -> None:
    hidden, weight, targets, gradient = make_inputs(scored)
    measure.print_heading(
        f"head: N={N} V={V} H={H} float32, {scored:.0%} of the tokens scored, chunks of "
        f"{_chunk_rows(weight)} rows; forward and backward, median of {repeats}")
    times = {name: [] for name in HEADS}
    for _ in range(repeats + 1):
        for name, head in HEADS.items():
            hidden.grad = None
            weight.grad = None
            start = time.perf_counter()
            head(hidden, weight, targets).backward(gradient)
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[name][1:]) for name in HEADS}
    extra = {name: measure.in_own_process(extra_memory, name, scored) for name in HEADS}

    rows = []
    for name in HEADS:
        rows.append([
            name,
            measure.median_and_range(times[name][1:]),
            f"{seconds[name] / seconds['naive']:.2f}",
            f"{extra[name]:.0f}",
            f"{extra[name] / extra['naive']:.2f}"])
    print(measure.table(["", "seconds", "x naive", "MiB extra at peak", "x naive"], rows))


def main():
    options = parse_options(Options, __doc__)
    for scored in (1.0, 0.4):
        bench(scored, options.repeats)


if __name__ == "__main__":
    run_script(main)
