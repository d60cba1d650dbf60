"""Weighted training, by SFT, RFT or the paper's other methods, on one process or many.

    python train.py                         # the whole method on the toy, offline, in minutes
    torchrun --nproc_per_node 2 train.py    # the same, on two processes
    python train.py --model DIR_OR_HUB_ID --data train.json --method rft --out OUT      # SHAD first
    torchrun --nproc_per_node 8 train.py --model DIR --data a.json b.json --method rft \\
             --labels DIR --out OUT
    python train.py --model DIR --data train.json --method regex --out OUT              # no SHAD
    python train.py --model DIR --data train.json --method rho1 --labels DIR --out OUT

The last needs labels by baselines/reference.py, as rewardft does: see METHODS in rft.py.

Writes OUT/metrics.jsonl, one line per step, and OUT/model, a Hugging Face directory. The loss and
the gradient of a global batch do not depend on how it is cut: each micro-batch of each rank adds
its share, normalized by the totals of the whole batch.
"""
import hashlib
import itertools
import json
import math
import os
import runpy
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial

if __name__ == "__main__":      # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
from tqdm import tqdm

import rft
from baselines.labels import check_labels, method_labels, select_tokens
from data import Dataset, collate, epoch_batches, micro_batches
from model import CheckpointError, Transformer, resolve
from rft import METHODS, group_losses
from support.checkpoints import (
    complete_checkpoints,
    exit_stopped,
    finished_before,
    load_checkpoint,
    on_stop,
    open_metrics,
    save_checkpoint,
    save_last,
    stop_after_this_step,
    told_to_stop,
)
from support.cli import HELP, DataError, option, parse_options, run_script
from support.distributed import (
    all_reduce_gradients,
    barrier,
    clip_gradients,
    compile_blocks,
    init_distributed,
    limit_threads,
    mixed_precision,
    on_rank_0,
    rank_and_world,
    shard_model,
    sum_over_ranks,
)
from support.files import claim, release, writing
from support.parts import stop_at_once


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: "
                            "train.json[:300]", required=True)
    out: str = option("", "directory for metrics.jsonl and model/", required=True)
    # method
    method: str = option("rft", "how tokens are weighted", choices=list(METHODS))
    labels: str = option(None, "labels (a directory) of shad.py; alpha and rft without them run "
                               "SHAD first, into OUT/labels; for rho1 and rewardft those of "
                               "baselines.reference; regex makes its own")
    threshold: float = option(None, "loss difference above which a token is reasoning, in nats "
                                    "(default: the labels' own)", low=-2**32, type=float)
    tau: float = option(3.0, "temperature of RFT's softmax, in nats", low=0.01)
    scope: str = option("sample", "one pair of RFT's weights per sample, or one for the global "
                                  "batch", choices=["sample", "batch"])
    reduce: str = option("mean", "a group's loss is its tokens' mean, or their sum as the formula "
                                 "literally says (it saturates)", choices=["mean", "sum"])
    detach: str = option("yes", "no gradient through RFT's weights", choices=["yes", "no"])
    alpha: float = option(0.6, "weight of the reasoning tokens for alpha and regex; the paper's "
                               "value is not public", high=1)
    keep_share: float = option(0.6, "share of a batch's output tokens that rho1 selects", high=1)
    # optimization
    epochs: int = option(1, "passes over the data", low=1, high=1000)
    steps: int = option(0, "stop after this many steps instead, however many epochs that takes; "
                           "0: by --epochs", high=10**6)
    lr: float = option(2e-5, "peak learning rate; linear warm-up, then a cosine down to a tenth")
    warmup: float = option(0.03, "share of the steps that warm up", high=1)
    weight_decay: float = option(0.0, "decoupled weight decay of the matrices")
    clip: float = option(1.0, "largest gradient norm")
    batch_tokens: int = option(8192, "tokens per global batch", low=1)
    micro_tokens: int = option(4096, "tokens per forward on one rank, padding included", low=1)
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", HELP["template"], choices=["auto", "chatml", "plain"])
    native_calls: bool = option(False, HELP["native_calls"])
    dtype: str = option("auto", HELP["dtype"], choices=["auto", "float32", "bfloat16"])
    seed: int = option(0, "seed of the batch order")
    # scale and safety
    checkpoint_every: int = option(500, "steps between checkpoints in OUT/checkpoints; 0: only "
                                        "when told to stop, by SIGTERM or Ctrl-C")
    keep: int = option(2, "checkpoints to keep", low=1)
    resume: bool = option(False, "resume from the newest checkpoint in OUT, on any number of "
                                 "ranks; without one start from the beginning")
    shard: str = option("auto", "split weights, gradients and optimizer over the ranks (FSDP2); "
                                "auto: with several GPUs", choices=["auto", "yes", "no"])
    offload: bool = option(False, "shard, and keep weights, gradients and optimizer on the CPU, "
                                  "which also updates them: slow, but little GPU memory")
    recompute: bool = option(False, "recompute each block in backward: a third more work, "
                                    "a fraction of the activation memory")
    compile: bool = option(False, "torch.compile each block")


# options that may differ on --resume; data and labels are compared by their content instead
MAY_CHANGE = {"model", "data", "out", "labels", "micro_tokens", "checkpoint_every", "keep",
              "resume", "shard", "offload", "recompute", "compile", "threshold"}

FILES = ("metrics.jsonl", "model")          # what train() makes in OUT, besides checkpoints/


# --------------------------------------------------------------------------------------------------
# One training step

def backward(model, dataset: Dataset, labels, batch, options: Options) -> dict:
    """Forward and backward of this rank's share of one global batch.

    batch: indices of samples. labels: what the method's labels say of all output tokens (see
    collate), or None. Gradients are left in the model, not yet summed over ranks. Returns sums over
    this rank's share: "loss" (), group losses "L" (2,) summed over tokens, counts "n" (2,), the
    groups' weights "w" (2,); zeros where the labels know no groups.
    """
    rank, world = rank_and_world()
    device = model.device
    batch = np.asarray(batch)
    pieces = micro_batches(batch, dataset.lengths, options.micro_tokens, rank, world)
    single = len(pieces) == 1                               # on every rank

    def forward(indices):
        tokens, targets, target_labels = collate(dataset, indices, labels, device)
        with mixed_precision(device):
            return model(tokens, targets), target_labels, targets != -100           # (B, T) each

    # Some weights need the losses of the whole batch before any backward. That is one more pass,
    # without gradients; a single micro-batch is passed once and its graph kept.
    first_pass = []
    if needs_all_losses(options):
        with torch.set_grad_enabled(single):
            first_pass = [forward(indices) for indices in pieces]
    totals = batch_totals(first_pass, dataset, labels, batch, options, device)
    selected = []
    if options.method == "rho1":
        selected = select_tokens(first_pass, pieces, totals, dataset, batch, options)

    # Each micro-batch's share of the loss goes backward by itself.
    loss_function, _ = METHODS[options.method]
    sums = {"loss": torch.zeros((), device=device)}
    for name in ("L", "n", "w"):
        sums[name] = torch.zeros(2, device=device)
    for k, indices in enumerate(pieces):
        reuse = single and first_pass
        losses, target_labels, is_output = first_pass[0] if reuse else forward(indices)
        if selected:
            target_labels = selected[k]
        loss, w = loss_function(losses, target_labels, is_output, totals, options)
        loss.backward()
        sums["loss"] += loss.detach()
        sums["w"] += w
        if has_groups(labels):
            L, n = group_losses(losses.detach(), target_labels, is_output, "sum")       # (2, B)
            sums["L"] += L.sum(1)
            sums["n"] += n.sum(1)
    return sums


def has_groups(labels) -> bool:
    """False for the labels of rho1 and rewardft: losses or rewards, instead of two groups."""
    return labels is None or labels[:0].dtype == bool


def needs_all_losses(options: Options) -> bool:
    """Does a token's weight depend on the losses of its whole global batch?"""
    is_rft = METHODS[options.method][0] is rft.rft
    return options.method == "rho1" or (is_rft and options.scope == "batch")


def batch_totals(first_pass, dataset, labels, batch, options: Options, device) -> rft.Totals:
    """What rft.py must know of a global batch; every rank reads the labels of all of it.

    first_pass: (losses, labels, is_output) per micro-batch of this rank; [] where none is needed.
    """
    totals = rft.Totals(len(batch), int(dataset.output_counts[batch].sum()))
    _, kind = METHODS[options.method]
    by_batch = options.scope == "batch" and kind in ("shad", "regex")
    if kind == "reward" or by_batch:
        starts = dataset.output_starts
        batch_labels = np.concatenate([labels[starts[i]:starts[i + 1]] for i in batch])
        batch_labels = torch.from_numpy(batch_labels).to(device)                    # (tokens,)
    if kind == "reward":
        totals.weight = rft.reward_weights(batch_labels).sum()
    if by_batch:
        totals.n = torch.stack([(~batch_labels).sum(), batch_labels.sum()])
    if by_batch and first_pass:
        totals.L = torch.zeros(2, device=device)
        for losses, is_reasoning, is_output in first_pass:
            L, _ = group_losses(losses.detach(), is_reasoning, is_output, "sum")    # (2, B)
            totals.L += L.sum(-1)
        sum_over_ranks(totals.L)
        if options.reduce == "mean":
            totals.L /= totals.n.clamp(min=1)
    return totals


def learning_rate(step: int, steps: int, options: Options) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak."""
    warm = max(1, round(options.warmup * steps))
    if step < warm:
        return options.lr * (step + 1) / warm
    angle = math.pi * (step - warm) / max(1, steps - warm)      # from 0 to pi
    return options.lr * (0.1 + 0.45 * (1 + math.cos(angle)))


def metrics_row(step: int, sums: dict, grouped: bool, lr, norm, tokens_per_s) -> dict:
    """One line of metrics.jsonl. sums: over all ranks. Figures of groups are None without them."""
    L = sums["L"].tolist()
    n = sums["n"].tolist()
    w = sums["w"].tolist()
    boilerplate, reasoning = (L[g] / n[g] if grouped and n[g] else None for g in (0, 1))
    return {"step": step, "loss": sums["loss"].item(),
            "loss_reasoning": reasoning, "loss_boilerplate": boilerplate,
            "weight_reasoning": w[1] if grouped else None,
            "weight_boilerplate": w[0] if grouped else None,
            "lr": lr, "grad_norm": norm, "tokens_per_s": round(tokens_per_s, 1)}


@torch.no_grad()
def samples_not_finite(model, dataset: Dataset, batch, options: Options) -> list[str]:
    """The ids of the samples of a batch whose loss is not finite."""
    rank, world = rank_and_world()
    device = model.device
    bad = torch.zeros(len(dataset.lengths), device=device)
    for indices in micro_batches(batch, dataset.lengths, options.micro_tokens, rank, world):
        tokens, targets, _ = collate(dataset, indices, device=device)
        with mixed_precision(device):
            losses = model(tokens, targets).sum(1)                                  # (B,)
        for i, loss in zip(indices, losses, strict=False):      # an empty micro-batch has one row
            bad[i] = not loss.isfinite()
    sum_over_ranks(bad)
    return [dataset.samples[int(i)].id for i in bad.nonzero()]


def check_finite(loss, norm, step, model, dataset, batch, options) -> None:
    """Raise DataError, naming the samples, for a loss or a gradient that is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "gradient" if math.isfinite(loss) else "loss"
    ids = samples_not_finite(model, dataset, batch, options)
    ids = ids or [dataset.samples[int(i)].id for i in batch]
    plural = "s" if len(ids) > 1 else ""
    others = " and others" if len(ids) > 8 else ""
    raise DataError(f"step {step}: the {what} is not finite; lower --lr, or look at "
                    f"sample{plural} {', '.join(ids[:8])}{others}. "
                    "The checkpoints made before are as they were.")


# --------------------------------------------------------------------------------------------------
# The training loop

def train(model: Transformer, dataset: Dataset, labels, options: Options, watch=None) -> list[dict]:
    """Train in place; writes metrics.jsonl, checkpoints and model into options.out.

    labels: of the method's kind, or None; see baselines/labels.py. watch(step) is called after each
    step, counted from 1. Returns the metrics, one dict per step. SIGTERM ends it with a checkpoint
    and exit code 0. Raises DataError on a loss or gradient that is not finite, naming the samples,
    and where a checkpoint cannot be written or read.
    """
    rank, _ = rank_and_world()
    on_rank_0(claim, options.out, FILES, "train.py")
    batches = plan_batches(dataset, options)
    optimizer = make_optimizer(model, options)
    settings = run_settings(model, dataset, labels, options)
    grouped = labels is not None and has_groups(labels)
    first = load_checkpoint(options.out, model, optimizer, settings) if options.resume else 0
    metrics = []
    if rank == 0:
        metrics, log = open_metrics(os.path.join(options.out, "metrics.jsonl"), first)
    bar = tqdm(range(first, len(batches)), options.method, unit="step", initial=first,
               total=len(batches), disable=rank > 0)
    for step in bar:
        start = time.perf_counter()
        batch = batches[step]

        # set the learning rate of this step
        lr = learning_rate(step, len(batches), options)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # forward and backward of this rank's share, then the sum over ranks: one global batch
        sums = backward(model, dataset, labels, batch, options)
        all_reduce_gradients(model)
        stop = torch.tensor(float(told_to_stop.is_set()), device=model.device)
        sum_over_ranks(*sums.values(), stop)

        # clip, and update the weights
        norm = clip_gradients(model, options.clip)
        check_finite(sums["loss"].item(), norm, step + 1, model, dataset, batch, options)
        optimizer.step()
        optimizer.zero_grad()

        # log
        tokens_per_s = float(dataset.lengths[batch].sum()) / (time.perf_counter() - start)
        row = metrics_row(step + 1, sums, grouped, lr, norm, tokens_per_s)
        metrics.append(row)
        if rank == 0:
            log_step(log, bar, row, grouped)
        if watch:
            watch(step + 1)

        # save a checkpoint, and stop after it if told to
        if stop or (options.checkpoint_every and (step + 1) % options.checkpoint_every == 0):
            save_checkpoint(options.out, step + 1, model, optimizer, settings, options.keep)
        if stop:
            exit_stopped(step + 1, len(batches), options.out)
    bar.close()
    if rank == 0:
        log.close()
    save_last(options.out, len(batches), model, optimizer, settings, options.keep,
              dataset.renderer.directory)
    release(options.out)
    return metrics


def run_settings(model: Transformer, dataset: Dataset, labels, options: Options) -> dict:
    """What --resume must find unchanged: options, config, hashes of the data and of the labels."""
    settings = {k: v for k, v in asdict(options).items() if k not in MAY_CHANGE}
    settings["config"] = {k: v for k, v in asdict(model.config).items() if k != "extra"}
    settings |= dataset.fingerprint
    if labels is not None:
        settings["labels"] = hashlib.sha256(labels[:]).hexdigest()
    return settings


def plan_batches(dataset: Dataset, options: Options) -> list:
    """The global batches of all steps."""
    batches = []
    for epoch in itertools.count() if options.steps else range(options.epochs):
        batches += epoch_batches(
            dataset.lengths, dataset.kept, options.batch_tokens, options.seed, epoch)
        if options.steps and len(batches) >= options.steps:
            break
    return batches[:options.steps or None]


def make_optimizer(model: Transformer, options: Options) -> torch.optim.Optimizer:
    """AdamW, with weight decay for the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay},
              {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def log_step(log, bar, row: dict, grouped: bool) -> None:
    """Append a step to metrics.jsonl, and show its losses at the progress bar."""
    with writing(log.name):
        log.write(json.dumps(row) + "\n")
        log.flush()
    shown = {"loss": row["loss"]}
    if grouped:
        shown |= {"r": row["loss_reasoning"] or 0, "b": row["loss_boilerplate"] or 0}
    bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})


def main():
    options = parse_options(Options, __doc__)
    check_labels(options)
    device = init_distributed(options.dtype)
    rank, _ = rank_and_world()

    # refuse at once what could not be written in the end
    on_rank_0(claim, options.out, FILES, "train.py", False)
    if finished_before(options.out, options.resume):
        return
    barrier()                                   # every rank has looked before one begins to write

    # the data
    options.model = resolve(options.model)
    on_stop(stop_at_once(os.path.join(options.out, "labels")))
    dataset = Dataset.load(options.data, options.model, options.template, options.max_length,
                           options.native_calls)
    if rank == 0:
        print(dataset.describe())
    shard = partial(
        shard_model, device=device, choice=options.shard, offload=options.offload)

    # what the method must know of each token; SHAD keeps what it has done as it goes
    labels = method_labels(options, dataset, device, shard)

    # train; from here on a checkpoint can be written
    on_stop(stop_after_this_step, signal.SIGINT)
    model = Transformer.from_pretrained(options.model, device=device, shard=shard)
    limit_threads(model)
    model.recompute = options.recompute
    if options.compile:
        compile_blocks(model)
    metrics = train(model, dataset, labels, options)
    if rank == 0:
        print_result(metrics, options)


def print_result(metrics: list[dict], options: Options) -> None:
    """Say what was written, and what to run next."""
    text = f"{options.method}: {len(metrics)} steps"
    if metrics:
        last = metrics[-1]
        text += f", loss {metrics[0]['loss']:.3f} -> {last['loss']:.3f}"
        if None not in (last["loss_reasoning"], last["loss_boilerplate"]):
            text += (f" (reasoning {last['loss_reasoning']:.3f}, "
                     f"boilerplate {last['loss_boilerplate']:.3f})")
    root = os.path.join(options.out, "checkpoints")
    leftover = f"; {root} is no longer needed" if complete_checkpoints(root) else ""
    arguments = ["--model", os.path.join(options.out, "model"), "--data", "HELD_OUT.json",
                 "--template", options.template,
                 *(["--native-calls"] if options.native_calls else []),
                 "--out", os.path.join(options.out, "eval")]
    print(f"\n{text}\nwrote {options.out}/model (a Hugging Face directory) and "
          f"{options.out}/metrics.jsonl{leftover}. Next:\n"
          f"  python eval.py loss {shlex.join(arguments)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_script(main, CheckpointError)
    else:
        runpy.run_module("toy.reproduce", run_name="__main__")      # the whole method on the toy
