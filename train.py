"""Weighted training, SFT or RFT, on one process or many.

    python train.py                         # no arguments: the whole method on the toy, offline, minutes on a laptop
    torchrun --nproc_per_node 2 train.py    # the same, on two processes
    python train.py --model DIR_OR_HUB_ID --data train.json --method rft --out OUT               # runs SHAD first
    torchrun --nproc_per_node 8 train.py --model DIR --data a.json b.json --method rft --labels DIR --out OUT

Writes OUT/metrics.jsonl, a line a step, and OUT/model, a Hugging Face directory. The loss and the gradient of a global batch do
not depend on how it is cut: ranks and micro-batches each add their share, whose normalisation is known from the whole.
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from tqdm import tqdm

import eval
import shad
from data import (DataError, Dataset, Renderer, collate, copy_tokenizer, epoch_batches, load_labels, micro_batches, option,
                  parse_options, run_script, toy_samples)
from model import (CheckpointError, Transformer, init_distributed, mixed_precision, rank_and_world, resolve, sum_gradients,
                   sum_over_ranks, write_json)
from rft import METHODS, group_losses, group_weights


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: train.json[:300]", required=True)
    out: str = option("", "directory for metrics.jsonl and model/", required=True)
    # method
    method: str = option("rft", "how tokens are weighted", choices=list(METHODS))
    labels: str = option(None, "labels of shad.py (a directory); rft without them runs SHAD first, into OUT/labels")
    tau: float = option(3.0, "temperature of RFT's softmax, in nats")
    scope: str = option("sample", "RFT's weights are made per sample, or once for the global batch", choices=["sample", "batch"])
    reduce: str = option("mean", "a group's loss is its tokens' mean, or their sum as the formula literally says (it saturates)",
                         choices=["mean", "sum"])
    # optimization
    epochs: int = option(1, "passes over the data")
    steps: int = option(0, "stop after this many steps instead, however many epochs that takes; 0: by --epochs")
    lr: float = option(2e-5, "peak learning rate; linear warm-up, then a cosine down to a tenth")
    warmup: float = option(0.03, "share of the steps that warm up")
    weight_decay: float = option(0.0, "decoupled weight decay of the matrices")
    clip: float = option(1.0, "largest gradient norm")
    batch_tokens: int = option(8192, "tokens of a global batch")
    micro_tokens: int = option(4096, "tokens of one forward on one rank, padding included")
    max_length: int = option(2048, "longer samples are dropped, in tokens")
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    seed: int = option(0, "seed of the batch order")


def backward(model, dataset: Dataset, reasoning, batch: list[int], o: Options):
    """Forward and backward of this rank's share of one global batch. Gradients are left in the model, not yet summed over ranks.

    Returns sums over this rank's share: loss (), group losses L (2,) summed over tokens and counts n (2,), the weights
    (2,) summed over samples.
    """
    (rank, world), device = rank_and_world(), model.head.device
    whole = SimpleNamespace(samples=len(batch), tokens=sum(int(dataset.is_output[i].sum()) for i in batch))
    pieces = micro_batches(batch, dataset.lengths, o.micro_tokens, rank, world)
    method, sums = METHODS[o.method], [torch.zeros((), device=device), *torch.zeros(3, 2, device=device)]

    def forward(indices):
        tokens, targets, is_reasoning = collate(dataset, indices, reasoning, device)
        with mixed_precision(device):
            return model(tokens, targets), is_reasoning, targets != -100                        # (B, T) each

    ready = None
    if o.method != "sft" and o.scope == "batch":
        # the weights need the losses of the whole batch before any backward: a pass without gradients,
        # or, where this rank has a single micro-batch, its one forward kept
        L, n = torch.zeros(2, device=device), torch.zeros(2, device=device)
        with torch.set_grad_enabled(len(pieces) == 1):
            for indices in pieces:
                ready = forward(indices)
                more = group_losses(*ready, "sum")
                L, n = L + more[0].detach().sum(-1), n + more[1].sum(-1)
        sum_over_ranks(L, n)
        whole.L, whole.n = (L if o.reduce == "sum" else L / n.clamp(min=1)), n
    for indices in pieces:
        losses, is_reasoning, is_output = ready if ready and len(pieces) == 1 else forward(indices)
        loss = method(losses, is_reasoning, is_output, whole, o)
        loss.backward()
        L, n = group_losses(losses.detach(), is_reasoning, is_output, "sum")                    # (2, B)
        if o.method == "sft":       # the share that each group's mean has in the plain mean
            w = n / whole.tokens
        elif o.scope == "batch":
            w = group_weights(whole.L, whole.n, o.tau)[:, None] / whole.samples * torch.ones_like(L)
        else:
            w = group_weights(L if o.reduce == "sum" else L / n.clamp(min=1), n, o.tau) / whole.samples
        for total, new in zip(sums, (loss.detach(), L.sum(1), n.sum(1), w.sum(1))):
            total += new
    return sums


def learning_rate(step: int, steps: int, o: Options) -> float:
    warm = max(1, round(o.warmup * steps))
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(model: Transformer, dataset: Dataset, reasoning, o: Options) -> list[dict]:
    """Train in place; writes o.out/metrics.jsonl and o.out/model. reasoning: (output tokens,) bool, or None.

    Returns the metrics, one dict a step. Raises DataError on a non-finite loss, naming the samples.
    """
    rank, _ = rank_and_world()
    order = lambda epoch: epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed, epoch)
    batches, epoch = [], 0
    while len(batches) < o.steps if o.steps else epoch < o.epochs:
        batches += order(epoch)
        epoch += 1
    batches = batches[:o.steps or None]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=o.lr, betas=(0.9, 0.95), fused=True)
    metrics, log = [], None
    if rank == 0:
        os.makedirs(o.out, exist_ok=True)
        log = open(os.path.join(o.out, "metrics.jsonl"), "w", encoding="utf-8")
    bar = tqdm(batches, o.method, unit="step", disable=rank > 0)
    for step, batch in enumerate(bar):
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), o)
        sums = backward(model, dataset, reasoning, batch, o)
        sum_gradients(model)
        sum_over_ranks(*sums)
        loss, L, n, w = (x.tolist() for x in sums)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DataError(f"step {step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite; lower --lr, or look at "
                            f"the batch's samples: {', '.join(dataset.samples[i].id for i in batch[:8])}.")
        optimizer.step()
        optimizer.zero_grad()
        known, mean = reasoning is not None, lambda g: L[g] / n[g] if n[g] else None
        metrics.append({
            "step": step + 1, "loss": loss,
            "loss_reasoning": mean(1) if known else None, "loss_boilerplate": mean(0) if known else None,
            "weight_reasoning": w[1] if known else None, "weight_boilerplate": w[0] if known else None,
            "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
            "tokens_per_s": round(float(dataset.lengths[batch].sum()) / (time.perf_counter() - start), 1)})
        if rank == 0:
            log.write(json.dumps(metrics[-1]) + "\n")
            log.flush()
            bar.set_postfix({"loss": f"{loss:.3f}"} | ({"r": f"{mean(1) or 0:.3f}", "b": f"{mean(0) or 0:.3f}"} if known else {}))
    if rank == 0:
        log.close()
        model.save_pretrained(os.path.join(o.out, "model"))
        copy_tokenizer(dataset.renderer.directory, os.path.join(o.out, "model"))
    return metrics


def main():
    o = parse_options(Options, __doc__)
    device, (rank, _) = init_distributed(), rank_and_world()
    o.model = resolve(o.model)
    if os.path.exists(os.path.join(o.out, "model", "config.json")):
        raise DataError(f"{o.out}/model already holds a trained model; choose another --out, or remove it.")
    dataset = Dataset.load(o.data, o.model, o.template, o.max_length)
    if rank == 0:
        print(dataset.describe())
    if o.method != "sft" and not o.labels:
        o.labels = os.path.join(o.out, "labels")
        if not os.path.exists(os.path.join(o.labels, "labels.safetensors")):
            shad.run(shad.Options(model=o.model, data=o.data, out=o.labels, micro_tokens=o.micro_tokens, max_length=o.max_length,
                                  seed=o.seed), dataset, Transformer.from_pretrained(o.model, device=device))
            if rank == 0:
                print(f"wrote {o.labels}/labels.safetensors and labels.html")
            if torch.distributed.is_initialized():
                torch.distributed.barrier()             # the other ranks read what rank 0 wrote
    reasoning = shad.classify(*load_labels(o.labels, dataset)) if o.labels else None
    model = Transformer.from_pretrained(o.model, device=device)
    metrics = train(model, dataset, reasoning, o)
    if rank == 0:
        first, last = metrics[0], metrics[-1]
        groups = f" (reasoning {last['loss_reasoning']:.3f}, boilerplate {last['loss_boilerplate']:.3f})" if reasoning is not None else ""
        print(f"\n{o.method}: {len(metrics)} steps, loss {first['loss']:.3f} -> {last['loss']:.3f}{groups}\n"
              f"wrote {o.out}/model (a Hugging Face directory) and {o.out}/metrics.jsonl. Next:\n"
              f"  python eval.py loss --model {o.out}/model --data HELD_OUT.json --out {o.out}/eval")


# -----------------------------------------------------------------------------------------------------------------
# With no arguments: the method end to end on the toy, whose generator knows every token's true role

TOY_SAMPLES, TOY_EVAL, EVAL_SEED = 4000, 200, 10_000
TOY_SHAD = dict(shuffle=400, epochs=4, lr=1e-3, batch_tokens=1024, micro_tokens=4096)
TOY_TRAINING = dict(steps=400, lr=1e-3, batch_tokens=2048, micro_tokens=4096)
TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "toy")


def reproduce(out: str = "out", seed: int = 0) -> dict:
    """SHAD, then SFT and RFT from the same base with the same seed, then evaluation: a table, and out/report.html."""
    start, device, (rank, _) = time.perf_counter(), init_distributed(), rank_and_world()
    say = print if rank == 0 else lambda *_: None
    dataset = Dataset(toy_samples(TOY_SAMPLES, seed), Renderer(TOY))
    base = lambda: Transformer.from_pretrained(TOY, device=device)
    common = Options(model=TOY, data=["toy"], out=out, seed=seed, **TOY_TRAINING)
    say(f"toy: {dataset.describe()}; base {sum(p.numel() for p in base().parameters()):,} parameters")
    difference = shad.run(shad.Options(model=TOY, data=["toy"], out=os.path.join(out, "labels"), seed=seed, **TOY_SHAD), dataset, base())
    reasoning = shad.classify(difference)

    runs, summaries = {}, {}
    summaries["base"], _ = eval.evaluate_toy(base(), dataset.renderer, TOY_EVAL, seed=EVAL_SEED + seed)
    for method in ("sft", "rft"):
        model = base()
        runs[method.upper()] = train(model, dataset, reasoning, replace(common, method=method, out=os.path.join(out, method)))
        summaries[method.upper()], _ = eval.evaluate_toy(model, dataset.renderer, TOY_EVAL, seed=EVAL_SEED + seed)
    if rank == 0:
        with open(os.path.join(out, "labels", "summary.json"), encoding="utf-8") as f:
            labels = json.load(f)
        body = (f"<pre>{shad.describe(labels)}</pre>" + eval.report_html(runs, summaries) + f"<h2>What SHAD found</h2>{shad.KEY}"
                + "".join(shad.sample_html(dataset, i, difference, 0.0) for i in range(12)))
        shad.write_page(os.path.join(out, "report.html"), "SHAD + RFT on the toy", body)
        write_json(os.path.join(out, "summary.json"), {"seed": seed, "shad": labels, "models": summaries})
        say(f"\n{shad.describe(labels)}\n\n{eval.format_table(eval.comparison_rows(summaries))}\n\n"
            f"{time.perf_counter() - start:.0f} s. Look at {out}/report.html (curves, coloured tokens) and {out}/labels/labels.html. Next, "
            "with your own model and data:\n  python train.py --model DIR_OR_HUB_ID --data train.json --method rft --out OUT")
    return summaries


if __name__ == "__main__":
    run_script(main if len(sys.argv) > 1 else reproduce, CheckpointError)
