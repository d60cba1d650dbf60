"""Weighted training, SFT or RFT, on one process or many.

    python train.py                         # no arguments: the whole method on the toy, offline, minutes on a laptop
    torchrun --nproc_per_node 2 train.py    # the same, on two processes
    python train.py --model DIR_OR_HUB_ID --data train.json --method rft --out OUT               # runs SHAD first
    torchrun --nproc_per_node 8 train.py --model DIR --data a.json b.json --method rft --labels DIR --out OUT

Writes OUT/metrics.jsonl, a line a step, and OUT/model, a Hugging Face directory. The loss and the gradient of a global batch do
not depend on how it is cut: ranks and micro-batches each add their share, whose normalisation is known from the whole.
"""
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed.checkpoint as dcp
from tqdm import tqdm

import eval
import shad
from data import (DataError, Dataset, Renderer, collate, copy_tokenizer, epoch_batches, load_labels, micro_batches, option,
                  parse_options, run_script, toy_samples)
from model import (CheckpointError, Transformer, barrier, clip_gradients, compile_blocks, init_distributed, mixed_precision,
                   rank_and_world, resolve, sum_gradients, sum_over_ranks, wants_shards, write_json)
from rft import METHODS, group_losses


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: train.json[:300]", required=True)
    out: str = option("", "directory for metrics.jsonl and model/", required=True)
    # method
    method: str = option("rft", "how tokens are weighted", choices=list(METHODS))
    labels: str = option(None, "labels of shad.py (a directory); rft without them runs SHAD first, into OUT/labels")
    threshold: float = option(None, "loss difference above which a token is reasoning, in nats (default: the labels' own)", type=float)
    tau: float = option(3.0, "temperature of RFT's softmax, in nats", low=0.01)
    scope: str = option("sample", "RFT's weights are made per sample, or once for the global batch", choices=["sample", "batch"])
    reduce: str = option("mean", "a group's loss is its tokens' mean, or their sum as the formula literally says (it saturates)",
                         choices=["mean", "sum"])
    # optimization
    epochs: int = option(1, "passes over the data", low=1)
    steps: int = option(0, "stop after this many steps instead, however many epochs that takes; 0: by --epochs")
    lr: float = option(2e-5, "peak learning rate; linear warm-up, then a cosine down to a tenth")
    warmup: float = option(0.03, "share of the steps that warm up")
    weight_decay: float = option(0.0, "decoupled weight decay of the matrices")
    clip: float = option(1.0, "largest gradient norm")
    batch_tokens: int = option(8192, "tokens of a global batch", low=1)
    micro_tokens: int = option(4096, "tokens of one forward on one rank, padding included", low=1)
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    seed: int = option(0, "seed of the batch order")
    # scale and safety
    checkpoint_every: int = option(500, "steps between checkpoints in OUT/checkpoints; 0: only when told to stop, by SIGTERM or Ctrl-C")
    keep: int = option(2, "checkpoints to keep", low=1)
    resume: bool = option(False, "go on from the newest checkpoint in OUT, on any number of ranks; from the beginning without one")
    shard: str = option("auto", "split weights, gradients and optimizer over the ranks (FSDP2); auto: with several GPUs",
                        choices=["auto", "yes", "no"])
    recompute: bool = option(False, "recompute each block in backward: a third more work, a fraction of the activation memory")
    compile: bool = option(False, "torch.compile each block")


def backward(model, dataset: Dataset, labels, batch, o: Options):
    """Forward and backward of this rank's share of one global batch. Gradients are left in the model, not yet summed over ranks.

    labels: (LD of all output tokens, threshold), or None. Returns sums over this rank's share: loss (), group losses L (2,)
    summed over tokens and counts n (2,), the groups' weights (2,).
    """
    (rank, world), device = rank_and_world(), model.head.device
    whole = SimpleNamespace(samples=len(batch), tokens=int(dataset.outputs[batch].sum()))
    pieces = micro_batches(batch, dataset.lengths, o.micro_tokens, rank, world)
    differences, threshold = labels or (None, 0.0)
    only_one = len(pieces) == 1                             # micro-batch, on every rank
    total = {"loss": torch.zeros((), device=device)} | {name: torch.zeros(2, device=device) for name in ("L", "n", "w")}

    def forward(indices):
        tokens, targets, LD = collate(dataset, indices, differences, device)
        with mixed_precision(device):
            return model(tokens, targets), shad.classify(LD, threshold), targets != -100        # (B, T) each

    kept = None                                             # a forward whose graph can still be used
    if o.method != "sft" and o.scope == "batch":
        # the weights need the losses of the whole batch before any backward: a pass without gradients,
        # or, where there is a single micro-batch, its one forward kept
        L, n = torch.zeros(2, device=device), torch.zeros(2, device=device)
        with torch.set_grad_enabled(only_one):
            for indices in pieces:
                kept = losses, is_reasoning, is_output = forward(indices)
                L_piece, n_piece = group_losses(losses.detach(), is_reasoning, is_output, "sum")
                L, n = L + L_piece.sum(-1), n + n_piece.sum(-1)
        sum_over_ranks(L, n)
        whole.L, whole.n = (L if o.reduce == "sum" else L / n.clamp(min=1)), n
    for indices in pieces:
        losses, is_reasoning, is_output = kept if kept and only_one else forward(indices)
        loss, w = METHODS[o.method](losses, is_reasoning, is_output, whole, o)
        loss.backward()
        L, n = group_losses(losses.detach(), is_reasoning, is_output, "sum")                    # (2, B)
        for name, share in (("loss", loss.detach()), ("L", L.sum(1)), ("n", n.sum(1)), ("w", w)):
            total[name] += share
    return total["loss"], total["L"], total["n"], total["w"]


@torch.no_grad()
def not_finite(model, dataset: Dataset, batch, o: Options) -> list[str]:
    """The ids of the samples of a batch whose loss is not finite."""
    (rank, world), device = rank_and_world(), model.head.device
    bad = torch.zeros(len(dataset.lengths), device=device)
    for indices in micro_batches(batch, dataset.lengths, o.micro_tokens, rank, world):
        tokens, targets, _ = collate(dataset, indices, device=device)
        with mixed_precision(device):
            rows = model(tokens, targets).sum(1)                                                # (B,)
        for i, row in zip(indices, rows):
            bad[i] = not row.isfinite()
    sum_over_ranks(bad)
    return [dataset.samples[int(i)].id for i in bad.nonzero()]


def learning_rate(step: int, steps: int, o: Options) -> float:
    warm = max(1, round(o.warmup * steps))
    if step < warm:
        return o.lr * (step + 1) / warm
    return o.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def train(model: Transformer, dataset: Dataset, labels, o: Options) -> list[dict]:
    """Train in place; writes o.out/metrics.jsonl, o.out/checkpoints and o.out/model. labels: (LD, threshold), or None.

    Returns the metrics, one dict a step. SIGTERM ends it with a checkpoint and exit code 0. Raises DataError on a non-finite
    loss or gradient, naming the samples, and CheckpointError where a checkpoint cannot be written or read.
    """
    rank, _ = rank_and_world()
    batches, epoch = [], 0
    while (len(batches) < o.steps) if o.steps else (epoch < o.epochs):
        batches += epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed, epoch)
        epoch += 1
    batches = batches[:o.steps or None]
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=o.lr, betas=(0.9, 0.95), fused=True)
    run = {key: value for key, value in asdict(o).items() if key not in MAY_CHANGE} | dataset.fingerprint
    if labels:
        run["labels"] = hashlib.sha256(labels[0]).hexdigest() + f" > {labels[1]}"
    first = load_checkpoint(o.out, model, optimizer, run) if o.resume else 0
    metrics, log = [], None
    if rank == 0:
        os.makedirs(o.out, exist_ok=True)
        metrics, log = open_metrics(os.path.join(o.out, "metrics.jsonl"), first)
    bar = tqdm(range(first, len(batches)), o.method, unit="step", initial=first, total=len(batches), disable=rank > 0)
    for step in bar:
        start, batch = time.perf_counter(), batches[step]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), o)
        sums = backward(model, dataset, labels, batch, o)
        sum_gradients(model)
        stop = torch.tensor(float(told_to_stop.is_set()), device=model.head.device)
        sum_over_ranks(*sums, stop)
        loss, L, n, w = (x.tolist() for x in sums)
        norm = clip_gradients(model, o.clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            ids = not_finite(model, dataset, batch, o) or [dataset.samples[int(i)].id for i in batch]
            raise DataError(f"step {step + 1}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite; lower --lr, or look at "
                            f"sample{'s' * (len(ids) > 1)} {', '.join(ids[:8])}{' and others' * (len(ids) > 8)}. "
                            "The checkpoints made before are as they were.")
        optimizer.step()
        optimizer.zero_grad()
        known = labels is not None
        boilerplate, reasoning = (L[g] / n[g] if n[g] else None for g in (0, 1))
        metrics.append({
            "step": step + 1, "loss": loss,
            "loss_reasoning": reasoning if known else None, "loss_boilerplate": boilerplate if known else None,
            "weight_reasoning": w[1] if known else None, "weight_boilerplate": w[0] if known else None,
            "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm,
            "tokens_per_s": round(float(dataset.lengths[batch].sum()) / (time.perf_counter() - start), 1)})
        if rank == 0:
            log.write(json.dumps(metrics[-1]) + "\n")
            log.flush()
            bar.set_postfix({"loss": f"{loss:.3f}"} | (
                {"r": f"{reasoning or 0:.3f}", "b": f"{boilerplate or 0:.3f}"} if known else {}))
        if stop or o.checkpoint_every and (step + 1) % o.checkpoint_every == 0:
            save_checkpoint(o.out, step + 1, model, optimizer, run, o.keep)
        if stop:
            if rank == 0:
                print(f"\ntold to stop: {o.out}/checkpoints holds step {step + 1} of {len(batches)}; the same command with --resume goes on.")
            sys.exit(0)
    bar.close()
    final, stored = os.path.join(o.out, "model"), model.config.other                 # transformers 5 says dtype, 4 torch_dtype
    model.save_pretrained(final + ".tmp", getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype")), None))
    if rank == 0:
        log.close()
        copy_tokenizer(dataset.renderer.directory, final + ".tmp")
        shutil.rmtree(final, ignore_errors=True)
        os.rename(final + ".tmp", final)
    return metrics


# -----------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/checkpoints/step-00000500, torch.distributed.checkpoint's files plus state.json. Each rank writes its own
# shard; any number of ranks can read it. Whatever ends a run, a directory of that name is whole: it is renamed when it is.

told_to_stop = threading.Event()            # by SIGTERM, with which schedulers announce that they take the machine away, or Ctrl-C


def stop_after_this_step(number, _) -> None:
    told_to_stop.set()
    if number == signal.SIGINT:
        print("\nstopping after this step, with a checkpoint; Ctrl-C again to stop at once", file=sys.stderr)
        signal.signal(number, signal.default_int_handler)


# options that may differ on --resume; data and labels are compared by their content instead
MAY_CHANGE = {"model", "data", "out", "labels", "micro_tokens", "checkpoint_every", "keep", "resume", "shard", "recompute", "compile", "threshold"}
warnings.filterwarnings("ignore", "torch.distributed is disabled")      # said at every checkpoint of a single process


def checkpoints(root: str) -> list[str]:
    """The names of the whole checkpoints in a directory, oldest first."""
    return sorted(name for name in os.listdir(root) if re.fullmatch(r"step-\d+", name)) if os.path.isdir(root) else []


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes. AdamW makes its own at the first step; here they are made before, to be loaded into."""
    state = {"rng": torch.get_rng_state()}
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        if not moments:
            moments |= {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state |= {name: p.detach()} | {f"{name} {key}": tensor for key, tensor in moments.items()}
    return state


def save_checkpoint(out: str, step: int, model, optimizer, run: dict, keep: int) -> None:
    """Write the checkpoint of a step aside, rename it, and remove all but the last `keep`. Raises CheckpointError."""
    root, (rank, _) = os.path.join(out, "checkpoints"), rank_and_world()
    aside = os.path.join(root, f"step-{step:08}.tmp")
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)            # left by a run that was killed while it wrote
    barrier()
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=aside)
        if rank == 0:
            sizes = {name: os.path.getsize(os.path.join(aside, name)) for name in sorted(os.listdir(aside))}
            write_json(os.path.join(aside, "state.json"), {"step": step, "run": run, "files": sizes})
            os.rename(aside, aside.removesuffix(".tmp"))
            for old in checkpoints(root)[:-keep]:
                shutil.rmtree(os.path.join(root, old))
    except (dcp.api.CheckpointException, OSError, RuntimeError) as e:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} could not be written ({reason(e)}); the ones before it in {root} are as they "
                              "were. Make room, then go on with --resume.") from None


def load_checkpoint(out: str, model, optimizer, run: dict) -> int:
    """Load the newest checkpoint of `out` in place; the number of steps done, 0 where there is none. Raises CheckpointError."""
    root, (rank, _) = os.path.join(out, "checkpoints"), rank_and_world()
    names = checkpoints(root)
    if not names:
        if rank == 0:
            print(f"{out} holds no checkpoint: starting from the beginning")
        return 0
    path = os.path.join(root, names[-1])
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as f:
            try:
                saved = json.load(f)
            except ValueError as e:
                raise OSError(f"state.json is not JSON: {e}") from None
        short = [name for name, size in saved["files"].items() if os.path.getsize(os.path.join(path, name)) != size]
        if short:
            raise OSError(f"{short[0]} is cut short")
        differs = [key for key in run.keys() | saved["run"].keys() if run.get(key) != saved["run"].get(key)]
        if differs:
            raise CheckpointError(f"{path} is of a run with another {' and '.join(sorted(differs))}; give the options it was "
                                  "started with, or choose another --out.")
        state = training_state(model, optimizer)
        dcp.load(state, checkpoint_id=path)
    except CheckpointError:
        raise
    except Exception as e:                                  # a damaged file surfaces as almost any error
        raise CheckpointError(f"{path} cannot be read ({reason(e)}); remove it, and --resume goes on from "
                              + (names[-2] if len(names) > 1 else "the beginning") + ".") from None
    torch.set_rng_state(state["rng"])
    if rank == 0:
        print(f"resumed from {path}")
    return saved["step"]


def reason(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    cause = error
    while cause:
        error, failures = cause, getattr(cause, "failures", None)       # {rank: (its error, its stack)}
        if failures:
            cause = next(iter(failures.values()))[0]
        elif cause.__suppress_context__:
            break
        else:
            cause = cause.__context__
    return (str(error) or type(error).__name__).strip().split("\n")[0]


def open_metrics(path: str, steps: int):
    """The metrics of the first `steps` steps, and the file to append more to, from which later lines are removed: those are of
    steps that no checkpoint has kept."""
    metrics = []
    if steps:
        with open(path, encoding="utf-8") as f:
            metrics = [json.loads(line) for line, _ in zip(f, range(steps))]
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(m) + "\n" for m in metrics)
    os.replace(path + ".tmp", path)
    return metrics, open(path, "a", encoding="utf-8")


def main():
    o = parse_options(Options, __doc__)
    device, (rank, _) = init_distributed(), rank_and_world()
    o.model = resolve(o.model)
    if os.path.exists(os.path.join(o.out, "model", "config.json")):
        if o.resume:
            if rank == 0:
                print(f"{o.out}/model is finished: nothing to resume")
            return
        raise DataError(f"{o.out}/model already holds a trained model; choose another --out, or remove it.")
    if os.path.isdir(os.path.join(o.out, "checkpoints")) and os.listdir(os.path.join(o.out, "checkpoints")) and not o.resume:
        raise DataError(f"{o.out}/checkpoints holds an unfinished run; go on with --resume, choose another --out, or remove it.")
    barrier()                                               # every rank has looked before one begins to write
    dataset = Dataset.load(o.data, o.model, o.template, o.max_length)
    if rank == 0:
        print(dataset.describe())
    sharded = wants_shards(o.shard, device)
    base = lambda: Transformer.from_pretrained(o.model, device=device, sharded=sharded)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))    # SHAD keeps what it has done as it goes
    if o.method != "sft" and not o.labels:
        o.labels = os.path.join(o.out, "labels")
        if not os.path.exists(os.path.join(o.labels, "labels.safetensors")):
            shad.run(shad.Options(model=o.model, data=o.data, out=o.labels, micro_tokens=o.micro_tokens, max_length=o.max_length,
                                  seed=o.seed), dataset, base())
            if rank == 0:
                print(f"wrote {o.labels}/labels.safetensors and labels.html")
    labels = load_labels(o.labels, dataset) if o.labels else None
    if labels and o.threshold is not None:
        labels = labels[0], o.threshold
    for number in (signal.SIGTERM, signal.SIGINT):          # from here on a checkpoint can be written
        signal.signal(number, stop_after_this_step)
    model = base()
    model.recompute = o.recompute
    if o.compile:
        compile_blocks(model)
    metrics = train(model, dataset, labels, o)
    if rank == 0:
        first, last = metrics[0], metrics[-1]
        groups = f" (reasoning {last['loss_reasoning']:.3f}, boilerplate {last['loss_boilerplate']:.3f})" if labels else ""
        print(f"\n{o.method}: {len(metrics)} steps, loss {first['loss']:.3f} -> {last['loss']:.3f}{groups}\n"
              f"wrote {o.out}/model (a Hugging Face directory) and {o.out}/metrics.jsonl"
              + (f"; {o.out}/checkpoints is of no more use" if checkpoints(os.path.join(o.out, "checkpoints")) else "") + ". Next:\n"
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

    runs, summaries = {}, {}
    summaries["base"], _ = eval.evaluate_toy(base(), dataset.renderer, TOY_EVAL, seed=EVAL_SEED + seed)
    for method in ("sft", "rft"):
        model = base()
        runs[method.upper()] = train(model, dataset, (difference, 0.0), replace(common, method=method, out=os.path.join(out, method)))
        summaries[method.upper()], _ = eval.evaluate_toy(model, dataset.renderer, TOY_EVAL, seed=EVAL_SEED + seed)
    if rank == 0:
        with open(os.path.join(out, "labels", "summary.json"), encoding="utf-8") as f:
            labels = json.load(f)
        body = (f"<pre>{shad.describe(labels)}</pre>" + eval.report_html(runs, summaries) + f"<h2>What SHAD found</h2>{shad.KEY}"
                + "".join(shad.sample_html(dataset, i, difference, 0.0) for i in range(12)))
        shad.write_page(os.path.join(out, "report.html"), "SHAD + RFT on the toy", body)
        write_json(os.path.join(out, "summary.json"), {"seed": seed, "shad": labels, "models": summaries})
        say(f"\n{eval.format_table(eval.comparison_rows(summaries))}\n\n"
            f"{time.perf_counter() - start:.0f} s. Look at {out}/report.html (curves, coloured tokens) and {out}/labels/labels.html. Next, "
            "with your own model and data:\n  python train.py --model DIR_OR_HUB_ID --data train.json --method rft --out OUT")
    return summaries


if __name__ == "__main__":
    run_script(main if len(sys.argv) > 1 else reproduce, CheckpointError)
