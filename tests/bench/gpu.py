"""One CUDA GPU: the head, a training step with its label pass, decoding.

    python -m tests.bench.gpu --out DIR             # at most 9 minutes, no network
    python -m tests.bench.gpu --out DIR --tiny      # every row at toy sizes, on the CPU, in seconds

Models have the shapes of Llama and random weights. Liger (liger-kernel) and cut-cross-entropy are
measured where they are installed. Writes DIR/gpu.json and DIR/gpu.md after every row.
"""
import functools
import gc
import importlib.util
import os
import platform
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import Config, Transformer
from support.cli import DataError, option, parse_options, run_script
from support.distributed import mixed_precision
from support.files import replacing, write_json
from support.generate import generate
from tests.bench import measure
from tests.bench.head import HEADS
from tests.bench.memory import SHAPES

LAST_START = 7 * 60             # seconds after which no further row begins
TINY = Config(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)


@dataclass
class Options:
    out: str = option("", "directory for gpu.json and gpu.md", required=True)
    tiny: bool = option(False, "toy sizes on the CPU, to try the code")
    repeats: int = option(5, "measured repeats", low=1)


# --------------------------------------------------------------------------------------------------
# The head

OTHER_HEADS = {
    "Liger": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
    "cut-cross-entropy": ("cut_cross_entropy", "linear_cross_entropy")}


def head_names() -> list[str]:
    """Ours, torch's, and those of installed packages."""
    others = []
    for name, (module, _) in OTHER_HEADS.items():
        if importlib.util.find_spec(module.split(".")[0]):
            others.append(name)
    return [*HEADS, *others]


def find_head(name: str):
    """The function head(hidden, weight, targets) -> losses (N,)."""
    if name in HEADS:
        return HEADS[name]
    module, function = OTHER_HEADS[name]
    return functools.partial(getattr(importlib.import_module(module), function), reduction="none")


def head_inputs(N: int, V: int, H: int, scored: float, device: str):
    """hidden (N, H), weight (V, H), targets (N,), a share of them scored, and a gradient (N,)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(N, H, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, device=device, dtype=dtype) * 0.05).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    targets[torch.rand(N, device=device) >= scored] = -100
    return hidden, weight, targets, torch.rand(N, device=device)


def exact_gradient(hidden, weight, targets, gradient):
    """The gradient of some rows of `hidden`, in float64."""
    rows = hidden.detach().double().requires_grad_()
    losses = F.cross_entropy(rows @ weight.detach().double().T, targets, reduction="none")
    return torch.autograd.grad(losses, rows, gradient.double())[0]


def measure_head(name: str, N: int, V: int, H: int, scored: float, device: str, repeats: int):
    """Time and extra memory of forward and backward, and the error of the gradient."""
    head = find_head(name)
    hidden, weight, targets, gradient = head_inputs(N, V, H, scored, device)
    few = slice(0, min(N, 256))
    exact = exact_gradient(hidden[few], weight, targets[few], gradient[few])
    hidden.grad = torch.zeros_like(hidden)
    weight.grad = torch.zeros_like(weight)
    before = start_peak(device)

    def forward_and_backward():
        losses = head(hidden, weight, targets)
        losses.backward(gradient.to(losses.dtype))
        return losses

    losses = forward_and_backward()
    extra = peak(device) - before
    error = (hidden.grad[few].double() - exact).norm() / exact.norm()
    times = measure.seconds_per_call(forward_and_backward, repeats, device)
    return {"ms": 1e3 * statistics.median(times), "MiB extra at peak": extra / 2**20,
            "error of the gradient": error.item(), "losses": str(losses.dtype)}


def start_peak(device: str) -> int:
    """Bytes held now, from which peak() starts again; nothing is counted on CPUs."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated()


# --------------------------------------------------------------------------------------------------
# Models

def make_model(config: Config, device: str) -> Transformer:
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(config)


def flops_per_token(config: Config, model: Transformer, length: int) -> int:
    """Of forward and backward: 6 per parameter in a product, and causal attention's."""
    parameters = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size        # the embedding is a lookup
    width = config.num_attention_heads * config.head_dim
    return 6 * parameters + 6 * config.num_hidden_layers * width * length


def measure_step(config, master, recompute, batch, length, device, repeats, ceiling):
    """A training step on random tokens, all scored, and the label pass: forward only.

    master: "float32" (with AdamW) or "bfloat16" (with plain SGD, for what does not fit otherwise).
    ceiling: FLOP/s of a plain bf16 product, of which the step's model FLOPs are a share (MFU).
    """
    start_peak(device)
    model = make_model(config, device).to(getattr(torch, master))
    model.recompute = recompute
    if master == "float32":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (batch, length), device=device)
    targets = tokens.roll(-1, 1)

    def step():
        with mixed_precision(torch.device(device)):
            loss = model(tokens, targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def label_pass():
        with mixed_precision(torch.device(device)):
            model(tokens, targets)

    trained = statistics.median(measure.seconds_per_call(step, repeats, device))
    most = peak(device)
    labelled = statistics.median(measure.seconds_per_call(label_pass, repeats, device))
    flops = tokens.numel() * flops_per_token(config, model, length)
    return {"tokens/s": tokens.numel() / trained, "MFU": flops / trained / ceiling,
            "peak GiB": most / 2**30, "label pass, tokens/s": tokens.numel() / labelled,
            "label pass, x training": trained / labelled}


def measure_decoding(config, prompts, length, new, device, repeats):
    """Greedy decoding of random prompts of equal length, in eval.py's precision."""
    model = make_model(config, device)
    ids = torch.randint(config.vocab_size, (prompts, length)).tolist()

    def decode(count):
        with mixed_precision(torch.device(device)):
            generate(model, ids, count, set(), cache_tokens=prompts * (length + new))

    first = statistics.median(measure.seconds_per_call(lambda: decode(1), repeats, device))
    whole = statistics.median(measure.seconds_per_call(lambda: decode(new), repeats, device))
    return {"prefill, tokens/s": prompts * length / first,
            "decoding, tokens/s": prompts * (new - 1) / (whole - first),
            "ms per step": 1e3 * (whole - first) / (new - 1)}


# --------------------------------------------------------------------------------------------------
# All rows

def plan_heads(tiny: bool, device: str, repeats: int) -> list:
    """[(what is measured, a function, its arguments)]"""
    sizes = [(8192, 49152, 576), (32768, 49152, 576),
             (8192, 128256, 4096), (16384, 128256, 4096), (32768, 128256, 4096)]
    rows = []
    for N, V, H in [(64, 96, 32)] if tiny else sizes:
        for scored in (1.0, 0.4):
            for name in head_names():
                what = {"N": N, "V": V, "H": H, "scored": scored, "head": name}
                rows.append((what, measure_head, (name, N, V, H, scored, device, repeats)))
    return rows


def plan_steps(tiny: bool, device: str, repeats: int, ceiling: float) -> list:
    settings = [("1B (Llama 3.2)", "float32", False), ("1B (Llama 3.2)", "float32", True),
                ("8B (Llama 3.1)", "float32", True), ("8B (Llama 3.1)", "bfloat16", True)]
    batch, length = (2, 32) if tiny else (4, 2048)
    rows = []
    for name, master, recompute in settings:
        config = TINY if tiny else SHAPES[name]
        what = {"model": "tiny" if tiny else name, "master weights": master, "recompute": recompute,
                "batch": f"{batch} x {length}"}
        arguments = (config, master, recompute, batch, length, device, repeats, ceiling)
        rows.append((what, measure_step, arguments))
    return rows


def plan_decoding(tiny: bool, device: str, repeats: int) -> list:
    length, new = (16, 4) if tiny else (512, 128)
    name = "1B (Llama 3.2)"
    config = TINY if tiny else SHAPES[name]
    rows = []
    for prompts in (1, 8, 64):
        what = {"model": "tiny" if tiny else name, "prompts": prompts,
                "prompt tokens": length, "new tokens": new}
        rows.append((what, measure_decoding, (config, prompts, length, new, device, repeats)))
    return rows


def attempt(function, arguments) -> dict:
    """What the function measures, or why it could not."""
    try:
        return function(*arguments)
    except Exception as e:      # no memory left, or a package that cannot do this
        lines = str(e).strip().splitlines() or [type(e).__name__]
        return {"failed": lines[0][:100]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def describe_machine(tiny: bool, device: str) -> dict:
    machine = {"cpu": measure.capability(256 if tiny else 2048), "torch": torch.__version__,
               "python": platform.python_version()}
    size = 256 if tiny else 8192
    for dtype in (torch.float32, torch.bfloat16):
        speed = measure.product_speed(dtype, device, size)
        machine[f"TFLOP/s of a plain product, {dtype}"] = speed / 1e12
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["GiB"] = torch.cuda.get_device_properties(0).total_memory / 2**30
        machine["cuda"] = torch.version.cuda
    return machine


def to_markdown(report: dict) -> str:
    """The report as a list and one table per part; empty cells where a row has no such figure."""
    lines = [f"- {key}: {rounded(value)}" for key, value in report["machine"].items()]
    for part in ("head", "step", "decoding"):
        header = list(dict.fromkeys(key for row in report[part] for key in row))
        rows = [[rounded(row.get(key, "")) for key in header] for row in report[part]]
        lines += ["", f"## {part}", "", measure.table(header, rows)]
    return "\n".join(lines) + "\n"


def rounded(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def main():
    start = time.perf_counter()
    options = parse_options(Options, __doc__)
    if not options.tiny and not torch.cuda.is_available():
        raise DataError("no CUDA device is at hand; --tiny tries the code on the CPU.")
    device = "cpu" if options.tiny else "cuda"
    os.makedirs(options.out, exist_ok=True)
    machine = describe_machine(options.tiny, device)
    ceiling = 1e12 * machine["TFLOP/s of a plain product, torch.bfloat16"]
    report = {"machine": machine, "head": [], "step": [], "decoding": []}
    plan = {"head": plan_heads(options.tiny, device, options.repeats),
            "step": plan_steps(options.tiny, device, options.repeats, ceiling),
            "decoding": plan_decoding(options.tiny, device, options.repeats)}
    for part in ("step", "decoding", "head"):           # the longest last
        for what, function, arguments in plan[part]:
            late = time.perf_counter() - start > LAST_START
            result = {"failed": "no time left"} if late else attempt(function, arguments)
            report[part].append(what | result)
            print(part, report[part][-1], flush=True)
            write_json(os.path.join(options.out, "gpu.json"), report)
            with replacing(os.path.join(options.out, "gpu.md")) as file:
                file.write(to_markdown(report))
    print(f"\n{to_markdown(report)}\nwrote {options.out}/gpu.json and gpu.md")


if __name__ == "__main__":
    run_script(main)
