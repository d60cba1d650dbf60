"""Runs of the scripts in processes of their own, to be killed, limited, or spread over ranks; they start at once, since they are
forked from one that has imported torch."""
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

from data import run_script
from model import CheckpointError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "tokenizers",
                             "safetensors.torch", "tqdm"])


def run(script, arguments, log, environment, largest_file):
    """A script in the process that calls this; what it says goes to a file."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1), os.dup2(fd, 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8")
    tqdm.set_lock(threading.RLock())                        # its own is a semaphore, which a killed process leaves behind
    os.environ.update(environment)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.argv = [f"{script}.py", *arguments]
    run_script(importlib.import_module(script).main, CheckpointError)


def start(folder, script, *arguments, processes=1, largest_file=None):
    """The processes of a run of "train" or "shad", one a rank. largest_file: bytes, beyond which writing fails."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(processes):
        log = folder / f"log{rank}"
        log.unlink(missing_ok=True)
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank)}
        ranks.append(fork.Process(target=run, args=(script, [*map(str, arguments)], str(log), environment, largest_file)))
        ranks[-1].start()
    return ranks


def said(folder):
    """What rank 0 of the last run said; nothing if it was killed before it could."""
    return (folder / "log0").read_text(encoding="utf-8") if (folder / "log0").exists() else ""


def call(folder, script, *arguments, **settings):
    """(the exit code, what it said) of a run."""
    ranks = start(folder, script, *arguments, **settings)
    for process in ranks:
        process.join()
    return max((process.exitcode for process in ranks), key=abs), said(folder)


def as_a_user(script, *arguments):
    """A run in a new interpreter."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, f"{script}.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_until(true, process):
    """Until true() or the process ends; True in the first case."""
    while not true():
        if (process.poll() if isinstance(process, subprocess.Popen) else process.exitcode) is not None:
            return False
        time.sleep(0.001)
    return True
