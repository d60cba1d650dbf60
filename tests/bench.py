"""Measurements: each row beside what a user would pick instead, alternating in one run. Nothing here is a test.

    python tests/bench.py head                                   # fused_cross_entropy beside naive logits and torch's own
    python tests/bench.py train --model DIR --data train.json    # a training step beside transformers' LlamaForCausalLM
    python tests/bench.py memory                                 # bytes per GPU that sharded training takes, estimated
    python tests/bench.py toy                                    # `python train.py` over 5 seeds: mean and spread

Peak memory is the process's high-water mark above what it held before (Linux: VmHWM), each variant in a process of its own.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import Dataset, collate, epoch_batches
from model import Config, Transformer, _chunk_rows, fused_cross_entropy, memory_per_gpu


def memory(key: str) -> float:
    """A figure of /proc/self/status, in MiB: VmRSS now, VmHWM the peak since the last reset."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


# -----------------------------------------------------------------------------------------------------------------
# head: N = 2048, V = 49152, H = 576, float32, forward and backward with a random gradient per token

def head_variants(rows: int) -> dict:
    def naive(h, w, y):
        return F.cross_entropy(h @ w.T, y, reduction="none")

    def torch_own(h, w, y):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(h, w, y, reduction="none", options=options)

    own = {"torch's F.linear_cross_entropy": torch_own} if hasattr(F, "linear_cross_entropy") else {}
    return {"naive": naive} | own | {"fused_cross_entropy": fused_cross_entropy}


def head_inputs(kept: float, N=2048, V=49152, H=576):
    torch.manual_seed(0)
    h, w = torch.randn(N, H, requires_grad=True), (torch.randn(V, H) * 0.05).requires_grad_()
    y = torch.randint(V, (N,)).masked_fill(torch.rand(N) >= kept, -100)
    return h, w, y, torch.rand(N)


def head_step(f, h, w, y, g):
    h.grad = w.grad = None
    losses = f(h, w, y)
    losses.backward(g)
    return losses


def head_peak(name, kept, pipe):
    h, w, y, g = head_inputs(kept)
    f = head_variants(_chunk_rows(w))[name]
    head_step(f, h[:64], w, y[:64], g[:64])             # first-use buffers; then the gradients, which any way must hold
    h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)
    reset_peak()
    before = memory("VmRSS")
    f(h, w, y).backward(g)
    pipe.send(memory("VmHWM") - before)


def bench_head(repeats: int) -> None:
    for kept in (1.0, 0.4):
        h, w, y, g = head_inputs(kept)
        variants = head_variants(_chunk_rows(w))
        times = {name: [] for name in variants}
        for _ in range(repeats + 1):
            for name, f in variants.items():
                start = time.perf_counter()
                head_step(f, h, w, y, g)
                times[name].append(time.perf_counter() - start)
        peaks = {}
        for name in variants:
            ours, theirs = mp.Pipe()
            process = mp.get_context("spawn").Process(target=head_peak, args=(name, kept, theirs))
            process.start()
            peaks[name] = ours.recv()
            process.join()
        print(f"\nhead, N=2048 V=49152 H=576 float32, {kept:.0%} kept, chunks of {_chunk_rows(w)} rows; median of {repeats}, forward + backward")
        for name in variants:
            t = sorted(times[name][1:])
            print(f"  {name:32} {statistics.median(t):6.2f} s ({t[0]:.2f} to {t[-1]:.2f})   {peaks[name]:7.0f} MiB extra at peak   "
                  f"time {statistics.median(t) / statistics.median(times['naive'][1:]):.2f} x naive, "
                  f"memory {peaks[name] / peaks['naive']:.2f} x naive")


# -----------------------------------------------------------------------------------------------------------------
# train: the same batches, the same padding, the same optimizer; two processes that take turns

def trainer(kind: str, path: str, data: list, batch_tokens: int, max_length: int, pipe) -> None:
    dataset = Dataset.load(data, path, "auto", max_length)
    if kind == "ours":
        model = Transformer.from_pretrained(path)
    else:
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    reset_peak()
    for batch in iter(pipe.recv, None):
        tokens, targets, _ = collate(dataset, sorted(batch, key=lambda i: -dataset.lengths[i]))
        start = time.perf_counter()
        n = (targets != -100).sum()
        if kind == "ours":
            loss = model(tokens, targets).sum() / n
        else:       # shift_labels: transformers' own name for targets that are shifted already
            lengths = torch.tensor(sorted(dataset.lengths[batch] - 1, reverse=True))
            mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
            loss = model(input_ids=tokens, attention_mask=mask, labels=tokens, shift_labels=targets, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - start, loss.item(), memory("VmHWM")))


def bench_train(path: str, data: list, steps: int, batch_tokens: int, max_length: int) -> None:
    dataset = Dataset.load(data, path, "auto", max_length)
    batches = epoch_batches(dataset.lengths, dataset.kept, batch_tokens, seed=0)[:steps + 1]
    pipes, results = {}, {"transformers": [], "ours": []}
    for kind in results:
        pipes[kind], theirs = mp.Pipe()
        mp.get_context("spawn").Process(target=trainer, daemon=True, args=(kind, path, data, batch_tokens, max_length, theirs)).start()
    for batch in batches:
        for kind in results:
            pipes[kind].send([int(i) for i in batch])
            results[kind].append(pipes[kind].recv())
    for kind in results:
        pipes[kind].send(None)
    tokens = [int(dataset.lengths[b].sum()) for b in batches]
    rate = {k: sum(tokens[1:]) / sum(t for t, _, _ in r[1:]) for k, r in results.items()}
    peak = {k: r[-1][2] for k, r in results.items()}
    apart = max(abs(a[1] - b[1]) for a, b in zip(*results.values()))
    print(f"\ntrain, {len(batches) - 1} steps of about {batch_tokens} tokens (first step left out), losses at most {apart:.1e} apart")
    for k in results:
        each = [n / r[0] for n, r in zip(tokens[1:], results[k][1:])]
        print(f"  {k:14} {rate[k]:7.1f} tokens/s ({min(each):.0f} to {max(each):.0f})   peak {peak[k]:6.0f} MiB   "
              f"{rate[k] / rate['transformers']:.2f} x the tokens/s, {peak[k] / peak['transformers']:.2f} x the memory of transformers")


# -----------------------------------------------------------------------------------------------------------------
# memory: GiB on each GPU, of which activations and what they need to be computed again

SHAPES = {  # hidden, intermediate, layers, heads, head_dim, tied
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 64, True), "8B (Llama 3.1)": (4096, 14336, 32, 32, 128, False),
    "70B (Llama 3.1)": (8192, 28672, 80, 64, 128, False)}


def bench_memory(micro_tokens: int) -> None:
    print(f"\nGiB on each GPU, {micro_tokens:,} tokens a micro-batch, recompute off / on")
    for row, name in enumerate(["model", *SHAPES]):
        cells = [name]
        for gpus in (1, 8, 64):
            if row:
                hidden, intermediate, layers, heads, head_dim, tied = SHAPES[name]
                config = Config(128256, hidden, intermediate, layers, heads, 8, head_dim, tie_word_embeddings=tied)
                off, on = (memory_per_gpu(config, gpus, micro_tokens, recompute) for recompute in (False, True))
                state = sum(off[part] for part in ("weights", "gradients", "optimizer"))
                cells += [f"{sum(off.values()) / 2**30:.1f} / {sum(on.values()) / 2**30:.1f} (state {state / 2**30:.1f})"]
            else:
                cells += [f"{gpus} GPU{'s' * (gpus > 1)}"]
        print("| " + " | ".join(cells) + " |" + ("" if row else "\n|" + " --- |" * len(cells)))


# -----------------------------------------------------------------------------------------------------------------
# toy: the whole reproduction, several seeds

def bench_toy(seeds: int, out: str | None) -> None:
    import train
    out, rows = out or tempfile.mkdtemp(), []
    for seed in range(seeds):
        train.reproduce(os.path.join(out, str(seed)), seed)
        with open(os.path.join(out, str(seed), "summary.json")) as f:
            s = json.load(f)
        truth, models = s["shad"]["truth"], s["models"]
        row = {"SHAD error": truth["error"], "SHAD AUC": truth["auc"]}
        for name, m in models.items():
            for kind in ("held_in", "held_out"):
                row |= {f"{name} {kind} {role} loss": m["losses"][kind][role]["loss"] for role in ("reasoning", "boilerplate")}
                row[f"{name} {kind} success"] = m["success"][kind]
        for kind in ("held_in", "held_out"):
            row |= {f"RFT / SFT {kind} {role} loss": row[f"RFT {kind} {role} loss"] / row[f"SFT {kind} {role} loss"]
                    for role in ("reasoning", "boilerplate")}
        rows.append(row)
    print(f"\ntoy, {seeds} seeds: mean, standard deviation, each")
    for key in rows[0]:
        values = [r[key] for r in rows]
        print(f"  {key:36} {statistics.mean(values):7.4f}  {statistics.stdev(values):7.4f}   {'  '.join(f'{v:.4f}' for v in values)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "train", "memory", "toy"])
    parser.add_argument("--model", help="checkpoint for `train`")
    parser.add_argument("--data", nargs="+", help="data for `train`")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of `train`")
    parser.add_argument("--repeats", type=int, default=5, help="measured repeats of `head`")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens of a micro-batch of `memory`")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", help="where `toy` keeps its runs (default: a temporary directory)")
    a = parser.parse_args()
    if a.what == "head":
        bench_head(a.repeats)
    elif a.what == "train":
        bench_train(a.model, a.data, a.steps, a.batch_tokens, a.max_length)
    elif a.what == "memory":
        bench_memory(a.micro_tokens)
    else:
        bench_toy(a.seeds, a.out)
