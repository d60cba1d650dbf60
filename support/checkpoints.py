"""The trained model, and checkpoints that outlive a kill, a full disk, another number of ranks.

OUT/checkpoints/step-00000500 holds torch.distributed.checkpoint's files and state.json. Each rank
writes its own shard, and any number of ranks can read it. A directory of that name is always
complete: it is written under a temporary name and renamed.
"""
import contextlib
import json
import os
import re
import signal
import sys
import threading
import warnings

import torch
import torch.distributed.checkpoint as dcp

from support.cli import DataError
from support.distributed import not_finite, on_rank_0, rank_and_world
from support.files import (
    damaged_file,
    make_folder,
    remove_folder,
    replacing,
    write_checksums,
    write_json,
    writing,
)
from support.templates import copy_tokenizer

# repeated at every checkpoint of a single process
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def complete_checkpoints(root: str) -> list[str]:
    """The names of the complete checkpoints in a directory, oldest first."""
    if not os.path.isdir(root):
        return []
    return sorted(name for name in os.listdir(root) if re.fullmatch(r"step-\d+", name))


def finished_before(out: str, resume: bool) -> bool:
    """True where --resume finds a finished run. Raises DataError for a run that would be harmed."""
    root = os.path.join(out, "checkpoints")
    if os.path.exists(os.path.join(out, "model", "config.json")):
        if resume:
            if rank_and_world()[0] == 0:
                print(f"{out}/model is finished: nothing to resume")
            return True
        raise DataError(f"{out}/model already holds a trained model; "
                        "choose another --out, or remove it.")
    metrics = os.path.join(out, "metrics.jsonl")
    begun = [root] if os.path.isdir(root) and os.listdir(root) else []
    begun += [metrics] if os.path.isfile(metrics) and os.path.getsize(metrics) else []
    if begun and not resume:
        raise DataError(f"{begun[0]} holds an unfinished run; go on with --resume, "
                        "choose another --out, or remove it.")
    return False


def training_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, by name.

    AdamW allocates its moments lazily; allocate them now, so that a checkpoint can be loaded into
    them before the first step.
    """
    state = {"rng": torch.get_rng_state()}
    for name, p in model.named_parameters():
        moments = optimizer.state[p]
        if not moments:
            moments["step"] = torch.zeros((), device=p.device)
            moments["exp_avg"] = torch.zeros_like(p)
            moments["exp_avg_sq"] = torch.zeros_like(p)
        state[name] = p.detach()
        for key, tensor in moments.items():
            state[f"{name} {key}"] = tensor
    return state


def save_checkpoint(out: str, step: int, model, optimizer, settings: dict, keep: int) -> None:
    """Write the checkpoint of a step, and remove all but the newest `keep`.

    settings: what --resume must find unchanged. Raises DataError where it cannot be written.
    """
    root = os.path.join(out, "checkpoints")
    path = os.path.join(root, f"step-{step:08}")
    temporary = path + ".tmp"

    def finish():
        write_json(os.path.join(temporary, "state.json"), {"step": step, "run": settings})
        write_checksums(temporary)
        os.rename(temporary, path)
        for old in complete_checkpoints(root)[:-keep]:
            with contextlib.suppress(DataError):    # another's
                remove_folder(os.path.join(root, old))

    try:
        on_rank_0(begin_folder, temporary)
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary)
        on_rank_0(finish)
    except (dcp.api.CheckpointException, DataError, OSError, RuntimeError) as e:
        give_up_folder(temporary)
        raise DataError(
            f"the checkpoint of step {step} could not be written ({root_cause(e)}); "
            f"the ones before it in {root} are as they were. "
            "Make room, then go on with --resume.") from None


def begin_folder(temporary: str) -> None:
    remove_folder(temporary)                        # left by a run killed while writing
    make_folder(temporary, "train.py")


def give_up_folder(temporary: str) -> None:
    if rank_and_world()[0] == 0:
        with contextlib.suppress(DataError):
            remove_folder(temporary)


def stored_dtype(model) -> torch.dtype | None:
    """The dtype of the base's own files."""
    stored = model.config.extra                         # transformers 5 says dtype, 4 torch_dtype
    return getattr(torch, str(stored.get("dtype") or stored.get("torch_dtype")), None)


def check_weights(model) -> None:
    """Raise DataError for weights that are not finite as they are to be stored."""
    for name in not_finite(model, stored_dtype(model)):
        raise DataError(f"after the last step {name} is not finite; lower --lr. "
                        "The checkpoints made before are as they were.")


def save_model(model, tokenizer: str, path: str) -> None:
    """Write a Hugging Face directory in the dtype of the base's own files.

    tokenizer: the directory to copy it from. Raises DataError, on all ranks, where the model cannot
    be written or is not finite; nothing is left of it then.
    """
    check_weights(model)
    temporary = path + ".tmp"
    failure = None

    def finish():
        if failure:
            raise DataError(failure)
        with writing(path):
            copy_tokenizer(tokenizer, temporary)
            remove_folder(path)
            os.rename(temporary, path)

    try:
        on_rank_0(begin_folder, temporary)
        try:
            model.save_pretrained(temporary, stored_dtype(model))
        except (OSError, ValueError) as e:              # on rank 0; ValueError: CheckpointError
            failure = f"{path}: {e}"
        on_rank_0(finish)
    except DataError:
        give_up_folder(temporary)
        raise


def save_last(out: str, step: int, model, optimizer, settings: dict, keep: int, tokenizer) -> None:
    """Save OUT/model or, where there is no room for it, a checkpoint of the last step.

    Raises DataError then.
    """
    check_weights(model)
    try:
        save_model(model, tokenizer, os.path.join(out, "model"))
        return
    except DataError as e:
        failure = str(e)
    if f"step-{step:08}" not in complete_checkpoints(os.path.join(out, "checkpoints")):
        try:
            save_checkpoint(out, step, model, optimizer, settings, keep)
        except DataError as e:
            raise DataError(f"{failure} And {e}") from None
    raise DataError(f"{failure} Nothing is lost: {out}/checkpoints keeps step {step}. Make room, "
                    "then go on with --resume.")


def load_checkpoint(out: str, model, optimizer, settings: dict) -> int:
    """Load the newest checkpoint of `out` in place; returns the number of steps it has behind it.

    0 where there is none. Raises DataError where it is damaged or of a run with other settings.
    """
    root = os.path.join(out, "checkpoints")
    rank, _ = rank_and_world()
    names = complete_checkpoints(root)
    if not names:
        if rank == 0:
            print(f"{out} holds no checkpoint: starting from the beginning")
        return 0
    path = os.path.join(root, names[-1])
    try:
        damaged = on_rank_0(damaged_file, path)
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            saved = json.load(file)
        if f"step-{saved['step']:08}" != names[-1]:
            raise ValueError(f"its state.json is of step {saved['step']}")
        keys = settings.keys() | saved["run"].keys()
        differing = sorted(key for key in keys if settings.get(key) != saved["run"].get(key))
        if differing:
            raise DataError(
                f"{path} is of a run with another {' and '.join(differing)}; "
                "give the options it was started with, or choose another --out.")
        state = training_state(model, optimizer)
        dcp.load(state, checkpoint_id=path)
    except DataError:
        raise
    # damaged files raise almost anything, and this one is no Exception
    except (Exception, dcp.api.CheckpointException) as e:
        previous = names[-2] if len(names) > 1 else "the beginning"
        raise DataError(f"{path} cannot be read ({root_cause(e)}); "
                        f"remove it, and --resume goes on from {previous}.") from None
    torch.set_rng_state(state["rng"])
    if rank == 0:
        print(f"resumed from {path}")
    return saved["step"]


def root_cause(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    cause = error
    while cause:
        error = cause
        failures = getattr(cause, "failures", None)     # {rank: (its error, its stack)}
        if failures:
            cause = next(iter(failures.values()))[0]
        elif cause.__suppress_context__:
            break
        else:
            cause = cause.__context__
    return (str(error) or type(error).__name__).strip().split("\n")[0]


def open_metrics(path: str, steps: int):
    """The metrics of the first `steps` steps, and the file open for appending the next ones.

    Later lines belong to steps that no checkpoint has kept; they are removed. Without a file the
    earlier metrics are lost, and that is all. Raises DataError where it does not hold the steps.
    """
    metrics = []
    if steps and os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                metrics = [json.loads(line) for line, _ in zip(file, range(steps), strict=False)]
            if [row["step"] for row in metrics] != list(range(1, steps + 1)):
                raise ValueError("a step is missing")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
            raise DataError(f"{path} does not hold the metrics of the first {steps} steps ({e}); "
                            "put it back, or move it away to go on without them.") from None
    with replacing(path) as file:
        file.writelines(json.dumps(m) + "\n" for m in metrics)
    return metrics, open(path, "a", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# Told to stop: by SIGTERM, which schedulers send before they take the machine away, by SIGHUP, when
# the terminal is closed, or by Ctrl-C

told_to_stop = threading.Event()


def on_stop(handler, *signals) -> None:
    """Have SIGTERM, SIGHUP and other signals handled, but for those ignored, as under nohup."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM), *signals):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def stop_after_this_step(number, _) -> None:
    """A signal handler: train.py finishes its step, writes a checkpoint and exits."""
    told_to_stop.set()
    if number == signal.SIGINT:
        print("\nstopping after this step, with a checkpoint; Ctrl-C again to stop at once",
              file=sys.stderr)
        signal.signal(number, signal.default_int_handler)


def exit_stopped(step: int, steps: int, out: str) -> None:
    """End the process with exit code 0, after a checkpoint at `step` of `steps`."""
    if rank_and_world()[0] == 0:
        print(f"\ntold to stop: {out}/checkpoints holds step {step} of "
              f"{steps}; the same command with --resume goes on.")
    sys.exit(0)
