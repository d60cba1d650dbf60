"""Runs of the scripts in processes of their own, to be killed, limited, or spread over ranks.

They start at once, since they are forked from a process that has imported torch.
"""
import importlib
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import threading
import time

from tqdm import tqdm

from model import CheckpointError
from support.cli import run_script

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "tokenizers",
    "safetensors.torch", "tqdm"])


def in_float32(script, arguments):
    """The arguments of a run whose figures are compared exactly, on whatever CPU."""
    arguments = [str(argument) for argument in arguments]
    scripts = ("train", "shad", "eval", "baselines.dpo", "baselines.reference")
    takes_it = script in scripts and arguments and "--help" not in arguments
    if takes_it and "--dtype" not in arguments:
        arguments += ["--dtype", "float32"]
    return arguments


def run(script, arguments, log, environment, largest_file):
    """Run a script in this very process; what it prints goes to the file `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8")    # noqa: SIM115 (open to the end)
    tqdm.set_lock(threading.RLock())    # its own is a semaphore, which a killed process leaks
    os.environ.update(environment)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = [f"{script}.py", *arguments]
    run_script(importlib.import_module(script).main, CheckpointError)


def start(folder, script, *arguments, processes=1, largest_file=None):
    """Start "train" or "shad"; returns its processes, one per rank.

    What rank r prints goes to folder/logr. largest_file: bytes, beyond which writing fails.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(processes)}
    arguments = in_float32(script, arguments)
    ranks = []
    for rank in range(processes):
        log = folder / f"log{rank}"
        log.unlink(missing_ok=True)
        of_rank = environment | {"RANK": str(rank)}
        process = fork.Process(
            target=run, args=(script, arguments, str(log), of_rank, largest_file))
        process.start()
        ranks.append(process)
    return ranks


def printed(folder):
    """What rank 0 of the last run printed; nothing if it was killed before it could."""
    log = folder / "log0"
    return log.read_text(encoding="utf-8") if log.exists() else ""


def call(folder, script, *arguments, **settings):
    """(exit code, what rank 0 printed) of a complete run."""
    ranks = start(folder, script, *arguments, **settings)
    for process in ranks:
        process.join()
    return max((process.exitcode for process in ranks), key=abs), printed(folder)


def launch(script, *arguments, processes=1, **settings):
    """Start a script as a user does, in a new interpreter, by torchrun if on several processes.

    settings: of subprocess.Popen. Standard output and errors come through one pipe by default.
    """
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone",
                    "--nproc_per_node", str(processes)]
    command = [sys.executable, *torchrun, os.path.join(ROOT, f"{script}.py"),
               *in_float32(script, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, encoding="utf-8", **(pipes | settings))


def wait_until(condition, process):
    """Wait until condition() holds, and return True, or until the process ends: False."""
    while not condition():
        popen = isinstance(process, subprocess.Popen)
        exit_code = process.poll() if popen else process.exitcode
        if exit_code is not None:
            return False
        time.sleep(0.001)
    return True
