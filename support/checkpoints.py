"""Checkpoints: OUT/checkpoints/step-00000500, torch.distributed.checkpoint's files plus state.json. Each rank writes its own
shard; any number of ranks can read it. Whatever ends a run, a directory of that name is whole: it is renamed when it is."""
import json
import os
import re
import shutil
import warnings

import torch
import torch.distributed.checkpoint as dcp

from support.cli import DataError
from support.distributed import barrier, rank_and_world
from support.files import write_json


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
