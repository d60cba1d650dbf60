"""A training step compared with transformers' LlamaForCausalLM; and the label pass beside it.

    python -m tests.bench.train --model DIR --data train.json
    python -m tests.bench.train --model DIR --data train.json --steps 2

Both train on the same batches with the same padding and the same fused AdamW, in two processes
that take turns. The first step is not counted. What our step does in matrix products, what it
recomputes included, is also given as a share of the speed of a plain product.
"""
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from data import Dataset, collate, epoch_batches
from model import CheckpointError, Transformer
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed, mixed_precision, uses_bf16
from tests.bench import measure


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory", required=True)
    data: list = option([], "training data, one or more files", required=True)
    steps: int = option(6, "measured steps", low=1)
    batch_tokens: int = option(4096, "tokens of a batch", low=1)
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    dtype: str = option("auto", "precision of matrix products, in all",
                        choices=["auto", "float32", "bfloat16"])


def our_loss(model, tokens, targets, lengths):
    return model(tokens, targets).sum() / (targets != -100).sum()


def transformers_loss(model, tokens, targets, lengths):
    mask = torch.arange(tokens.shape[1])[None] < torch.from_numpy(lengths)[:, None]     # (B, T)
    # shift_labels is transformers' own name for targets that are already shifted
    return model(input_ids=tokens, attention_mask=mask.long(), labels=tokens, shift_labels=targets,
                 use_cache=False).loss


def trainer(kind: str, path: str, data: list[str], max_length: int, precision: str, pipe) -> None:
    """Train on each batch received.

    Sends (seconds, loss, peak MiB, seconds of a label pass, share of a plain product's speed).
    """
    dataset = Dataset.load(data, path, "auto", max_length)
    device = init_distributed(precision)        # as train.py begins
    if kind == "ours":
        model = Transformer.from_pretrained(path)
        loss_of = our_loss
    else:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        model.train()
        loss_of = transformers_loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    measure.reset_peak()

    while True:
        batch = pipe.recv()
        if batch is None:
            return
        batch = batch[np.argsort(-dataset.lengths[batch], kind="stable")]
        tokens, targets, _ = collate(dataset, batch)
        start = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            with mixed_precision(device):
                loss = loss_of(model, tokens, targets, dataset.lengths[batch] - 1)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = time.perf_counter() - start
        dtype = torch.bfloat16 if uses_bf16(device) else torch.float32
        share = counter.get_total_flops() / trained / measure.product_speed(dtype)
        peak = measure.memory("VmHWM")

        start = time.perf_counter()
        if kind == "ours":
            with torch.no_grad(), mixed_precision(device):
                model(tokens, targets)
        pipe.send((trained, loss.item(), peak, time.perf_counter() - start, share))


def main():
    options = parse_options(Options, __doc__)
    dataset = Dataset.load(options.data, options.model, "auto", options.max_length)
    batches = epoch_batches(dataset.lengths, dataset.kept, options.batch_tokens, seed=0)
    batches = batches[:options.steps + 1]
    tokens = [int(dataset.lengths[batch].sum()) for batch in batches]
    measure.print_heading(
        f"train: {len(batches) - 1} steps of about {options.batch_tokens} tokens, "
        "after one that is not counted")
    results = measure.in_turns(trainer, ("transformers", "ours"),
                               (options.model, options.data, options.max_length, options.dtype),
                               batches)

    speed = {}
    peak = {}
    for kind, result in results.items():
        speed[kind] = sum(tokens[1:]) / sum(seconds for seconds, *_ in result[1:])
        peak[kind] = result[-1][2]
    rows = []
    for kind, result in results.items():
        each = [n / step[0] for n, step in zip(tokens[1:], result[1:], strict=True)]
        rows.append([
            kind,
            f"{speed[kind]:.1f} ({min(each):.0f} to {max(each):.0f})",
            f"{speed[kind] / speed['transformers']:.2f}",
            f"{peak[kind]:.0f}",
            f"{peak[kind] / peak['transformers']:.2f}"])
    header = ["", "tokens/s", "x transformers", "peak MiB", "x transformers"]
    print(measure.table(header, rows))

    pairs = zip(results["ours"], results["transformers"], strict=True)
    apart = max(abs(ours[1] - theirs[1]) for ours, theirs in pairs)
    training = sum(step[0] for step in results["ours"][1:])
    labelling = sum(step[3] for step in results["ours"][1:])
    shares = [step[4] for step in results["ours"][1:]]
    print(f"\nThe losses are at most {apart:.1e} apart. Our label pass: "
          f"{sum(tokens[1:]) / labelling:.1f} tokens/s; SHAD's two passes take "
          f"{2 * labelling / training:.0%} of the time of one epoch of training. Our steps ran at "
          f"{statistics.mean(shares):.0%} of a plain product's speed.")


if __name__ == "__main__":
    run_script(main, CheckpointError)
