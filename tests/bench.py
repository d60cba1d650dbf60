"""Measurements: each row beside what a user would pick instead, alternating in one run. Nothing here is a test.

    python tests/bench.py head                                   # fused_cross_entropy beside naive logits and torch's own
    python tests/bench.py train --model DIR --data train.json    # a training step beside transformers' LlamaForCausalLM
    python tests/bench.py memory                                 # bytes per GPU that sharded training takes, estimated
    python tests/bench.py generate --model DIR --data train.json # greedy decoding beside transformers' generate
    python tests/bench.py trl --model DIR --data train.json --max-length 768 --batch 4     # beside TRL's SFTTrainer
    python tests/bench.py flags --model DIR --data train.json --batch-tokens 1024          # --recompute and --compile
    python tests/bench.py data --samples 1000000                 # memory and start-up on generated samples
    python tests/bench.py scope                                  # what exact weights cost in scope "batch"
    python tests/bench.py toy                                    # `python train.py` over 5 seeds: mean and spread
    python tests/bench.py gpu                                    # head, step and label pass on CUDA

Peak memory is the process's high-water mark above what it held before (Linux: VmHWM), each variant in a process of its own.
"""
import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train
from data import Dataset, Renderer, collate, epoch_batches, micro_batches, read_samples, toy_samples
from model import Config, Transformer, _chunk_rows, compile_blocks, fused_cross_entropy, generate, init_distributed, memory_per_gpu, mixed_precision
from rft import rft_loss


def memory(key: str) -> float:
    """A figure of /proc/self/status, in MiB: VmRSS now, VmHWM the peak since the last reset."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def in_turns(target, kinds, args, messages) -> dict[str, list]:
    """A process for each kind, target(kind, *args, pipe), which answers every message until None; its answers, made in turns."""
    pipes, answers = {}, {kind: [] for kind in kinds}
    for kind in kinds:
        pipes[kind], theirs = mp.Pipe()
        mp.get_context("spawn").Process(target=target, daemon=True, args=(kind, *args, theirs)).start()
    for message in messages:
        for kind in kinds:
            pipes[kind].send(message)
            answers[kind].append(pipes[kind].recv())
    for pipe in pipes.values():
        pipe.send(None)
    return answers


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
        init_distributed()                          # as train.py begins
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
        trained, peak = time.perf_counter() - start, memory("VmHWM")
        start = time.perf_counter()
        if kind == "ours":
            with torch.no_grad():
                model(tokens, targets)
        pipe.send((trained, loss.item(), peak, time.perf_counter() - start))


def bench_train(path: str, data: list, steps: int, batch_tokens: int, max_length: int) -> None:
    dataset = Dataset.load(data, path, "auto", max_length)
    batches = epoch_batches(dataset.lengths, dataset.kept, batch_tokens, seed=0)[:steps + 1]
    results = in_turns(trainer, ("transformers", "ours"), (path, data, batch_tokens, max_length), [list(map(int, b)) for b in batches])
    tokens = [int(dataset.lengths[b].sum()) for b in batches]
    rate = {k: sum(tokens[1:]) / sum(x[0] for x in r[1:]) for k, r in results.items()}
    peak = {k: r[-1][2] for k, r in results.items()}
    apart = max(abs(a[1] - b[1]) for a, b in zip(*results.values()))
    print(f"\ntrain, {len(batches) - 1} steps of about {batch_tokens} tokens (first step left out), losses at most {apart:.1e} apart")
    for k in results:
        each = [n / r[0] for n, r in zip(tokens[1:], results[k][1:])]
        print(f"  {k:14} {rate[k]:7.1f} tokens/s ({min(each):.0f} to {max(each):.0f})   peak {peak[k]:6.0f} MiB   "
              f"{rate[k] / rate['transformers']:.2f} x the tokens/s, {peak[k] / peak['transformers']:.2f} x the memory of transformers")
    label, train_time = sum(x[3] for x in results["ours"][1:]), sum(x[0] for x in results["ours"][1:])
    print(f"  our label pass {sum(tokens[1:]) / label:7.1f} tokens/s; SHAD's two take {2 * label / train_time:.0%} of the time of one epoch of training")


# -----------------------------------------------------------------------------------------------------------------
# memory: GiB on each GPU, of which activations and what they need to be computed again

SHAPES = {  # hidden, intermediate, layers, heads, head_dim, tied
    "1B (Llama 3.2)": (2048, 8192, 16, 32, 64, True), "8B (Llama 3.1)": (4096, 14336, 32, 32, 128, False),
    "70B (Llama 3.1)": (8192, 28672, 80, 64, 128, False)}


def bench_memory(micro_tokens: int) -> None:
    parts = ("weights", "gradients", "optimizer", "gathered", "activations", "temporaries", "head")
    print(f"\nGiB on each GPU, {micro_tokens:,} tokens a micro-batch; of activations and total: without / with --recompute\n")
    print("| model | GPUs | " + " | ".join(parts) + " | total |\n|" + " --- |" * (len(parts) + 3))
    for name, (hidden, intermediate, layers, heads, head_dim, tied) in SHAPES.items():
        config = Config(128256, hidden, intermediate, layers, heads, 8, head_dim, tie_word_embeddings=tied)
        for gpus in (1, 8, 64):
            off, on = (memory_per_gpu(config, gpus, micro_tokens, recompute) for recompute in (False, True))
            cells = [f"{off[p] / 2**30:.1f}" + (f" / {on[p] / 2**30:.1f}" if off[p] != on[p] else "") for p in parts]
            print(f"| {name} | {gpus} | " + " | ".join(cells) + f" | {sum(off.values()) / 2**30:.0f} / {sum(on.values()) / 2**30:.0f} |")


# -----------------------------------------------------------------------------------------------------------------
# generate: the same prompts, weights, stop token and number of new tokens; greedy; group by group, the variants taking turns

def bench_generate(path: str, data: list, count: int, batch: int, new: int, max_length: int) -> None:
    import transformers
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hf = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = Transformer(Config.from_hf(json.load(open(os.path.join(path, "config.json")))))
    ours.load_state_dict(hf.state_dict(), assign=True, strict=False)            # one copy of the weights for both
    renderer = Renderer(path)
    prompts = [renderer.prompt([m for m in s.messages if not m.is_output]) for f in data for s in read_samples(f)]
    prompts = [p for p in prompts if len(p) <= max_length][:count]

    @torch.no_grad()
    def theirs(group, new):
        width = max(map(len, group))
        tokens = torch.tensor([[renderer.end] * (width - len(p)) + p for p in group])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in group])
        out = hf.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=renderer.end,
                          pad_token_id=renderer.end)[:, width:].tolist()
        return [ids[:ids.index(renderer.end)] if renderer.end in ids else ids for ids in out]

    def our(group, new):
        return generate(ours, group, new, {renderer.end})

    one_by_one = lambda f: lambda group, new: [f([prompt], new)[0] for prompt in group]
    variants = {"transformers, one by one": one_by_one(theirs), "transformers, batched": theirs,
                "ours, one by one": one_by_one(our), "ours, batched": our}
    seconds, prefill, outputs = ({name: [] for name in variants} for _ in range(3))
    for f in (theirs, our):                             # first-use buffers
        f([prompts[0][:16]], 2)
    for i in range(0, len(prompts), batch):
        for name, f in variants.items():
            for n, times in ((1, prefill), (new, seconds)):
                start = time.process_time()             # one thread's CPU time: other processes disturb it less
                out = f(prompts[i:i + batch], n)
                times[name].append(time.process_time() - start)
            outputs[name] += out
    lengths = sorted(map(len, prompts))
    print(f"\ngenerate, {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens ({sum(lengths) / len(lengths):.0f} on average), "
          f"{new} new ones at most, batches of {batch}; CPU time of one thread")
    base = next(iter(variants))
    rate = {name: sum(map(len, outputs[name])) / sum(seconds[name]) for name in variants}
    # decoding alone: the time past that of one new token
    decode = {name: (sum(map(len, outputs[name])) - len(prompts)) / (sum(seconds[name]) - sum(prefill[name])) for name in variants}
    for name in variants:
        same = sum(a == b for a, b in zip(outputs[name], outputs[base])) / len(prompts)
        print(f"  {name:26} {rate[name]:6.1f} new tokens/s, {rate[name] / rate[base]:.2f} x   prefill {sum(prefill[name]):6.1f} s, "
              f"{sum(prefill[name]) / sum(prefill[base]):.2f} x   decoding alone {decode[name]:6.1f} tokens/s, {decode[name] / decode[base]:.2f} x   "
              f"{same:.0%} of the outputs as {base}")


# -----------------------------------------------------------------------------------------------------------------
# trl: TRL's SFTTrainer and ours on the same samples and the same number of tokens a step, in turns

def trl_trainer(kind: str, path: str, data: list, count: int, batch: int, max_length: int, pipe) -> None:
    """Train on the first `count` samples, a step whenever the pipe says so; sends (seconds, real tokens, peak MiB) after each."""
    import logging
    dataset = Dataset.load(data, path, "auto", max_length)
    kept, clock = dataset.kept[:count], []

    def tick(tokens):
        clock.append(time.perf_counter())
        if len(clock) > 1:
            pipe.send((clock[-1] - clock[-2], tokens, memory("VmHWM")))
        pipe.recv()
        clock[-1] = time.perf_counter()

    if kind.startswith("ours"):
        init_distributed()                          # as train.py begins
        model = Transformer.from_pretrained(path)
        o = train.Options(model=path, data=data, method="sft", micro_tokens=batch * max_length if kind == "ours" else 1024)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        reset_peak()
        tick(0)
        for some in epoch_batches(dataset.lengths, kept, int(batch * dataset.lengths[kept].mean()), seed=0):
            train.backward(model, dataset, None, some, o)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tick(int(dataset.lengths[some].sum()))
        return pipe.send(None)
    import datasets
    import transformers
    import trl
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"input_ids": dataset.ids[i].tolist(),
                                        "labels": np.where(dataset.is_output[i], dataset.ids[i], -100).tolist()} for i in kept])
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    arguments = trl.SFTConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_length=max_length, num_train_epochs=1,
                              learning_rate=1e-5, lr_scheduler_type="constant", bf16=False, use_cpu=True, report_to=[], save_strategy="no",
                              logging_strategy="no", disable_tqdm=True, include_num_input_tokens_seen="non_padding", dataset_kwargs={"skip_prepare_dataset": True},
                              gradient_checkpointing=kind == "TRL, recomputing (its default)")

    class Turns(transformers.TrainerCallback):
        seen = 0

        def on_train_begin(self, *_, **__):
            reset_peak()
            tick(0)

        def on_step_end(self, _, state, *__, **___):
            tick(state.num_input_tokens_seen - self.seen)
            self.seen = state.num_input_tokens_seen

    trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[Turns()],
                             processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=dataset.renderer.tokenizer,
                                                                                   pad_token="<|im_end|>", eos_token="<|im_end|>"))
    trainer.train()
    pipe.send(None)


def bench_trl(path: str, data: list, count: int, batch: int, max_length: int) -> None:
    import transformers
    import trl
    kinds = ["TRL, recomputing (its default)", "TRL, not recomputing", "ours", "ours, micro-batches of 1,024"]
    dataset = Dataset.load(data, path, "auto", max_length)
    total = int(dataset.lengths[dataset.kept[:count]].sum())
    pipes, results = {}, {kind: [] for kind in kinds}
    for kind in kinds:
        pipes[kind], theirs = mp.Pipe()
        mp.get_context("spawn").Process(target=trl_trainer, daemon=True, args=(kind, path, data, count, batch, max_length, theirs)).start()
    running = list(kinds)
    while running:
        for kind in list(running):
            pipes[kind].send(True)
            result = pipes[kind].recv()
            if result is None:
                running.remove(kind)
            else:
                results[kind].append(result)
    print(f"\ntrl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}: {count} samples of at most {max_length} "
          f"tokens, {total} real tokens, {batch} samples a step (ours: as many tokens a step), float32; the first step left out of the speed")
    rate = {k: sum(n for _, n, _ in r[1:]) / sum(t for t, _, _ in r[1:]) for k, r in results.items()}
    peak = {k: max(m for _, _, m in r) for k, r in results.items()}
    for k in kinds:
        beside = "; ".join(f"{rate[k] / rate[trl_kind]:.2f} x the tokens/s and {peak[k] / peak[trl_kind]:.2f} x the memory of {trl_kind}"
                           for trl_kind in kinds[:2])
        first, n = results[k][0][:2]
        print(f"  {k:32} {rate[k]:7.1f} tokens/s in {len(results[k])} steps, {sum(n for _, n, _ in results[k])} tokens (the first: {n / first:.1f})   peak {peak[k]:6.0f} MiB   {beside}")


# -----------------------------------------------------------------------------------------------------------------
# flags: what --recompute and --compile do to a training step, and the peak beside the estimate of memory_per_gpu

def flags_main(flag: str, path: str, data: list, micro_tokens: int, pipe) -> None:
    torch.set_num_threads(1)
    init_distributed()                              # as train.py begins
    before = memory("VmRSS")
    dataset, model = Dataset.load(data, path, "auto", micro_tokens), Transformer.from_pretrained(path)
    model.recompute = flag == "--recompute"
    if flag == "--compile":
        compile_blocks(model)
    o = train.Options(model=path, data=data, method="sft", micro_tokens=2 * micro_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    reset_peak()
    for batch in iter(pipe.recv, None):
        start = time.perf_counter()
        train.backward(model, dataset, None, batch, o)
        optimizer.step()
        optimizer.zero_grad()
        pipe.send((time.perf_counter() - start, memory("VmHWM") - before))


def bench_flags(path: str, data: list, micro_tokens: int, steps: int) -> None:
    dataset = Dataset.load(data, path, "auto", micro_tokens)
    batches = epoch_batches(dataset.lengths, dataset.kept, micro_tokens, seed=0)[:steps + 1]
    config = Config.from_hf(json.load(open(os.path.join(path, "config.json"))))
    padded = max(len(batch) * int(dataset.lengths[batch].max()) for batch in batches)
    results = in_turns(flags_main, ("", "--recompute", "--compile"), (path, data, micro_tokens), batches)
    print(f"\nflags, steps of about {micro_tokens} tokens in turns, one thread; the first step, median of {steps} more, peak above the start, estimate")
    for flag, r in results.items():
        times = sorted(t / base[0] for (t, _), base in zip(r[1:], results[""][1:]))
        estimate = sum(memory_per_gpu(config, 1, padded, flag == "--recompute", "cpu").values()) / 2**20
        print(f"  {flag or 'neither':12} {r[0][0]:6.1f} s, then {statistics.median(t for t, _ in r[1:]):6.2f} s, {statistics.median(times):.2f} x "
              f"({times[0]:.2f} to {times[-1]:.2f})   peak {r[-1][1]:6.0f} MiB   estimated {estimate:6.0f} MiB")


# -----------------------------------------------------------------------------------------------------------------
# data: a trainer's memory and start-up on as many generated samples as you like

def data_main(path: str, steps: int, out: str, pipe) -> None:
    torch.set_num_threads(1)
    init_distributed()                              # as train.py begins
    before, start = memory("RssAnon"), time.perf_counter()
    dataset = Dataset.load([path], train.TOY, "auto", 2048)
    loaded = time.perf_counter() - start
    o = train.Options(model=train.TOY, data=[path], out=out, method="sft", steps=steps, batch_tokens=4096, checkpoint_every=0)
    epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed)
    ready = time.perf_counter() - start
    model = Transformer.from_pretrained(train.TOY)
    train.train(model, dataset, None, o)
    pipe.send({"samples": len(dataset.kept), "tokens": int(dataset.lengths.sum()), "load": loaded, "ready": ready,
               "peak": memory("VmHWM"), "anonymous": memory("RssAnon"), "before": before})


def bench_data(samples: int, steps: int) -> None:
    folder = tempfile.mkdtemp()
    os.environ["XDG_CACHE_HOME"] = folder
    for count in (samples // 100, samples // 10, samples):
        path = os.path.join(folder, f"{count}.jsonl")
        with open(path, "w") as f:
            for seed in range(count // 1000):
                f.writelines(json.dumps({"messages": [{"role": m.role, "content": m.text} for m in s.messages]}) + "\n"
                             for s in toy_samples(1000, seed + 1))
        for how in ("built", "found"):
            ours, theirs = mp.Pipe()
            process = mp.get_context("spawn").Process(target=data_main, args=(path, steps, os.path.join(folder, f"{count} {how}"), theirs))
            process.start()
            r = ours.recv()
            process.join()
            print(f"{r['samples']:>10,} samples, {r['tokens']:>12,} tokens, cache {how}: {r['load']:7.1f} s to load, {r['ready']:7.1f} s to the first "
                  f"batch; {steps} steps: peak {r['peak']:5.0f} MiB, {r['anonymous']:5.0f} MiB of it not file pages (imports: {r['before']:.0f})", flush=True)
    shutil.rmtree(folder)


# -----------------------------------------------------------------------------------------------------------------
# scope: what the exact weights of scope "batch" cost, and how far off weights per micro-batch are

def bench_scope(repeats: int) -> None:
    dataset = Dataset(toy_samples(400, 0), Renderer(train.TOY))
    model = Transformer.from_pretrained(train.TOY)
    roles = dataset.true_roles()
    labels = roles["reasoning"].astype(np.float32), 0.0
    batch = epoch_batches(dataset.lengths, dataset.kept, 8192, 0)[0]
    o = train.Options(model="", data=[], out="", tau=3.0, micro_tokens=1024)

    def gradient(make):
        model.zero_grad()
        start = time.perf_counter()
        make()
        return time.perf_counter() - start, torch.cat([p.grad.flatten() for p in model.parameters()])

    def per_micro_batch():
        for piece in micro_batches(batch, dataset.lengths, o.micro_tokens):
            tokens, targets, LD = collate(dataset, piece, labels[0])
            losses, is_output = model(tokens, targets), targets != -100
            share = dataset.outputs[piece].sum() / dataset.outputs[batch].sum()
            (rft_loss(losses.flatten(), (LD > 0).flatten(), o.tau, is_output=is_output.flatten()) * share).backward()

    ways = {"sample": lambda: train.backward(model, dataset, labels, batch, o),
            "batch, exact": lambda: train.backward(model, dataset, labels, batch, replace(o, scope="batch")),
            "batch, weights per micro-batch": per_micro_batch}
    times, gradients = {name: [] for name in ways}, {}
    for _ in range(repeats + 1):
        for name, make in ways.items():
            t, gradients[name] = gradient(make)
            times[name].append(t)
    exact = gradients["batch, exact"]
    print(f"\nscope, one batch of {len(batch)} toy samples in {len(micro_batches(batch, dataset.lengths, o.micro_tokens))} micro-batches; median of {repeats}")
    for name in ways:
        print(f"  {name:32} {statistics.median(times[name][1:]):6.3f} s, {statistics.median(times[name][1:]) / statistics.median(times['sample'][1:]):.2f} x scope "
              f"sample; gradient {float((gradients[name] - exact).norm() / exact.norm()):.2%} off scope batch's")


# -----------------------------------------------------------------------------------------------------------------
# toy: the whole reproduction, several seeds

def bench_toy(seeds: int, out: str | None) -> None:
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


# -----------------------------------------------------------------------------------------------------------------
# gpu: the head beside what one would pick instead; a whole step; the label pass. Needs CUDA; --tiny tries the code on a CPU

def gpu_heads() -> dict:
    """Every exact way at hand, f(h, w, y) -> losses (N,)."""
    ways = {"naive": lambda h, w, y: F.cross_entropy((h @ w.T).float(), y, reduction="none"), "fused_cross_entropy": fused_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        ways["torch's F.linear_cross_entropy"] = lambda h, w, y: F.linear_cross_entropy(
            h, w, y, reduction="none", options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_chunk_rows(w)))
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
        ways["Liger"] = lambda h, w, y: liger(h, w, y, reduction="none")
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
        ways["cut-cross-entropy"] = lambda h, w, y: cut(h, w, y, reduction="none")
    except ImportError:
        pass
    return ways


def seconds_of(f, device, repeats: int) -> float:
    """Median seconds of f(), the first run left out."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def bench_gpu(repeats: int, tiny: bool) -> None:
    device, dtype = ("cpu", torch.float32) if tiny else ("cuda", torch.bfloat16)
    peak = lambda: torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else 0
    sizes = [(64, 96, 32)] if tiny else [(8192, 49152, 576), (32768, 49152, 576), (8192, 128256, 4096), (16384, 128256, 4096), (32768, 128256, 4096)]
    for N, V, H in sizes:
        for kept in (1.0, 0.4):
            torch.manual_seed(0)
            h, w = torch.randn(N, H, device=device, dtype=dtype), torch.randn(V, H, device=device, dtype=dtype) * 0.05
            y, g = torch.randint(V, (N,), device=device), torch.rand(N, device=device)
            y[torch.rand(N, device=device) >= kept] = -100
            few = slice(0, min(N, 256))                     # the exact gradient, in float64, of these rows
            exact = h[few].double().requires_grad_()
            (F.cross_entropy(exact @ w.double().T, y[few], reduction="none") * g[few]).sum().backward()
            print(f"\nhead, N={N} V={V} H={H} {dtype}, {kept:.0%} kept, forward + backward, median of {repeats}")
            for name, f in gpu_heads().items():
                hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
                hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
                try:
                    before = peak() if device == "cpu" else (torch.cuda.reset_peak_memory_stats(), torch.cuda.memory_allocated() / 2**20)[1]
                    losses = f(hidden, weight, y)
                    losses.backward(g.to(losses.dtype))
                    error = (hidden.grad[few].double() - exact.grad).norm() / exact.grad.norm()
                    extra = peak() - before
                    t = seconds_of(lambda: f(hidden, weight, y).backward(g.to(losses.dtype)), device, repeats)
                    print(f"  {name:32} {1e3 * t:9.1f} ms   {extra:8.0f} MiB extra at peak   gradient error {error:.1e}   losses {losses.dtype}", flush=True)
                except (RuntimeError, TypeError) as e:      # out of memory; a way that takes no gradient per token
                    print(f"  {name:32} {str(e).strip().splitlines()[0][:100]}")
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for n in [256 if tiny else 8192] * 2)
    ceiling = 2 * len(a)**3 / seconds_of(lambda: a @ b, device, repeats)
    shapes = {"tiny": Config(96, 64, 128, 2, 4, 2, tie_word_embeddings=True)} if tiny else {
        name: Config(128256, *SHAPES[name][:4], 8, SHAPES[name][4], tie_word_embeddings=SHAPES[name][5]) for name in list(SHAPES)[:2]}
    for name, config in shapes.items():
        B, T = (2, 32) if tiny else (4, 2048)
        try:
            model = None
            with torch.device(device):
                model = Transformer(config)
            model.recompute = not tiny and config.num_hidden_layers > 16
            # a model of 8B does not fit with float32 masters and AdamW's moments: there bf16 weights and plain SGD are tried
            big = sum(p.numel() for p in model.parameters()) > 5e9
            model = model.bfloat16() if big else model
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4) if big else torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            tokens = torch.randint(config.vocab_size, (B, T), device=device)
            targets = tokens.roll(-1, 1)

            def label():
                with torch.no_grad(), mixed_precision(torch.device(device)):
                    return model(tokens, targets)

            def step():
                with mixed_precision(torch.device(device)):
                    loss = model(tokens, targets).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            trained, labelled = seconds_of(step, device, repeats), seconds_of(label, device, repeats)
            n = sum(p.numel() for p in model.parameters()) - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
            flops = B * T * (6 * n + 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * T)   # causal attention
            print(f"\nstep, {name}, {B} x {T} tokens, {'bf16 weights, SGD' if big else 'float32 weights, AdamW'}{', recompute' * model.recompute}: "
                  f"{B * T / trained:,.0f} tokens/s, {flops / trained / ceiling:.0%} of the {ceiling / 1e12:.0f} TFLOP/s that a plain product reaches, "
                  f"peak {peak() / 1024:.1f} GiB; label pass {B * T / labelled:,.0f} tokens/s, {trained / labelled:.2f} x training's", flush=True)
        except torch.OutOfMemoryError as e:
            print(f"\nstep, {name}: does not fit ({str(e).splitlines()[0][:120]})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["head", "train", "trl", "generate", "flags", "data", "scope", "memory", "toy", "gpu"])
    parser.add_argument("--model", help="checkpoint for `train`, `trl`, `generate` and `flags`")
    parser.add_argument("--data", nargs="+", help="data for the same")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of `train`, `flags` and `data`")
    parser.add_argument("--repeats", type=int, default=5, help="measured repeats of `head`, `scope` and `gpu`")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens of a micro-batch of `memory`")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of `data`")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of `generate`, the first that fit --max-length; samples of `trl`")
    parser.add_argument("--batch", type=int, default=8, help="prompts that `generate` continues together; samples of a step of `trl`")
    parser.add_argument("--new", type=int, default=48, help="most new tokens of a prompt in `generate`")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="`gpu` on a CPU at toy sizes, to try the code")
    parser.add_argument("--out", help="where `toy` keeps its runs (default: a temporary directory)")
    a = parser.parse_args()
    if a.what == "gpu" and not a.tiny and not torch.cuda.is_available():
        sys.exit("bench.py gpu: no CUDA device is at hand.")
    {"head": lambda: bench_head(a.repeats),
     "train": lambda: bench_train(a.model, a.data, a.steps, a.batch_tokens, a.max_length),
     "trl": lambda: bench_trl(a.model, a.data, a.prompts, a.batch, a.max_length),
     "generate": lambda: bench_generate(a.model, a.data, a.prompts, a.batch, a.new, a.max_length),
     "flags": lambda: bench_flags(a.model, a.data, a.batch_tokens, a.steps),
     "data": lambda: bench_data(a.samples, a.steps),
     "scope": lambda: bench_scope(a.repeats),
     "memory": lambda: bench_memory(a.micro_tokens),
     "toy": lambda: bench_toy(a.seeds, a.out),
     "gpu": lambda: bench_gpu(a.repeats, a.tiny)}[a.what]()
