"""What the measurements share: time, peak memory, processes that take turns, tables, this CPU.

Peak memory is the high-water mark of a process (Linux: VmHWM), so each variant has its own process.
"""
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

# A forked process would begin with the parent's memory; a spawned one begins with its own.
spawn = multiprocessing.get_context("spawn")
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}       # CPU flags: x86's two, and Arm's


# --------------------------------------------------------------------------------------------------
# Memory and time

def memory(key: str) -> float:
    """A figure of /proc/self/status in MiB: "VmRSS" is held now, "VmHWM" the peak so far."""
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    raise KeyError(key)


def reset_peak() -> None:
    """Let VmHWM start again from what is held now."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def seconds_per_call(f, repeats: int, device: str = "cpu") -> list[float]:
    """The seconds of `repeats` calls of f(), sorted; a first call warms up and is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])


def median_and_range(values) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# --------------------------------------------------------------------------------------------------
# Processes

def in_own_process(f, *args):
    """f(*args), computed by a new process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(f, *args).result()


def in_turns(target, kinds, args, messages) -> dict[str, list]:
    """Start target(kind, *args, pipe) in one process per kind; returns {kind: its answers}.

    Each message goes to one process after the other, and every one answers before the next is
    asked, so that all of them meet the machine in the same state. A process ends when it receives
    None, or by answering None.
    """
    pipes = {}
    for kind in kinds:
        pipes[kind], theirs = spawn.Pipe()
        spawn.Process(target=target, daemon=True, args=(kind, *args, theirs)).start()
        theirs.close()                          # so that recv fails if the process dies
    answers = {kind: [] for kind in kinds}
    running = list(kinds)
    for message in messages:
        for kind in list(running):
            pipes[kind].send(message)
            answer = pipes[kind].recv()
            if answer is None:
                running.remove(kind)
            else:
                answers[kind].append(answer)
        if not running:
            break
    for kind in running:
        pipes[kind].send(None)
    return answers


# --------------------------------------------------------------------------------------------------
# Printing

def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


def product_speed(dtype: torch.dtype, device: str = "cpu", size: int = 2048) -> float:
    """FLOP/s of a plain product of two (size, size) matrices, the fastest of five."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds_per_call(lambda: a @ b, 5, device)[0]


def capability(size: int = 2048) -> str:
    """What the ratios depend on, in one line: CPU, cores, native bf16, speed of plain products."""
    info = {}
    with open("/proc/cpuinfo") as f:
        for line in f:
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    flags = info.get("flags") or info.get("Features") or ""
    native = sorted(NATIVE_BF16 & set(flags.split()))
    bf16 = f"native bf16 ({', '.join(native)})" if native else "no native bf16"
    speeds = [product_speed(dtype, size=size) / 1e9 for dtype in (torch.float32, torch.bfloat16)]
    return (f"{info.get('model name', 'unknown CPU')}, {os.cpu_count()} cores, {bf16}; "
            f"a plain product at {torch.get_num_threads()} thread(s): {speeds[0]:.0f} GFLOP/s in "
            f"float32, {speeds[1]:.0f} in bf16; torch {torch.__version__}")


def print_heading(title: str) -> None:
    """The head lines of a measurement: what is measured, and on what."""
    print(f"\n{title}\n{capability()}\n", flush=True)
