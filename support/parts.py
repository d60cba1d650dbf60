"""What a run of SHAD keeps in OUT/parts as it goes, so that one that was killed goes on from there.

settings.json, "base losses" and "tuned losses" in parts, "tuned model". A file that was damaged
since is noticed by its checksum, and made again.
"""
import contextlib
import io
import json
import os
import shutil
import sys
import zlib

import numpy as np

from support.checkpoints import root_cause
from support.cli import DataError
from support.distributed import barrier, on_rank_0, rank_and_world
from support.files import make_folder, remove_folder, replacing, write_checksums, write_json


def open_work_dir(path: str, settings: dict) -> None:
    """Create the working directory, or resume the one that a run with the same settings left.

    Raises DataError where the settings differ.
    """
    file = os.path.join(path, "settings.json")
    rank, _ = rank_and_world()
    found = None
    with contextlib.suppress(OSError, ValueError, RecursionError), open(file) as f:
        found = json.load(f)
    if isinstance(found, dict):
        differing = [key for key, value in found.items() if settings.get(key) != value]
        if differing:
            raise DataError(f"{path} was left by an unfinished run with another "
                            f"{' and '.join(differing)}; remove it, or choose another --out.")
    barrier()                                       # every rank has looked

    def create():
        if not isinstance(found, dict):
            remove_folder(path)                     # a run was killed while it removed it
        make_folder(path, "shad.py")
        write_json(file, settings)

    on_rank_0(create)


def part_file(directory: str, part: int) -> str:
    return os.path.join(directory, f"{part:04}.npy")


def save_part(directory: str, part: int, losses: np.ndarray) -> None:
    """Write a part as .npy, followed by its CRC-32."""
    stream = io.BytesIO()
    np.save(stream, losses)
    content = stream.getvalue()
    with replacing(part_file(directory, part), "wb") as file:
        file.write(content + zlib.crc32(content).to_bytes(4, "big"))


def load_part(directory: str, part: int) -> np.ndarray | None:
    """The losses of a part; None where its file is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, EOFError):
        with open(part_file(directory, part), "rb") as file:
            content = file.read()
        if zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "big"):
            return np.load(io.BytesIO(content[:-4]))
    return None


def missing_parts(count: int, directory: str) -> list[int]:
    """The numbers of the parts that have no sound file yet."""
    os.makedirs(directory, exist_ok=True)
    return [p for p in range(count) if load_part(directory, p) is None]


def save_tuned_model(model, path: str) -> None:
    """Save the tuned model for a run that resumes. Where that fails, say so and go on."""
    temporary = path + ".tmp"
    failure = None

    def clear():
        of_another_model = os.path.join(os.path.dirname(path), "tuned losses")
        for folder in (path, temporary, of_another_model):
            shutil.rmtree(folder, ignore_errors=True)

    def finish():
        if failure:
            raise DataError(failure)
        write_checksums(temporary)
        os.rename(temporary, path)

    on_rank_0(clear)
    try:
        model.save_pretrained(temporary)
    except (OSError, ValueError) as e:              # on rank 0; ValueError: CheckpointError
        failure = root_cause(e)
    try:
        on_rank_0(finish)
    except DataError as e:
        if rank_and_world()[0] == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            print(f"the tuned model could not be kept for a run that resumes: {e}")


def stop_at_once(out: str):
    """A signal handler that says what SHAD keeps in OUT, and exits."""
    def stop(*_):
        parts = os.path.join(out, "parts")
        if rank_and_world()[0] == 0:
            kept = f"{parts} keeps what SHAD has done" if os.path.isdir(parts) else "SHAD not begun"
            print(f"\ntold to stop: {kept}; the same command goes on.", flush=True)
        sys.exit(0)
    return stop
