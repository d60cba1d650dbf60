"""Files that are never seen half written, and folders in which nothing of others is harmed.

An output folder may be the user's own. What a run makes in it is listed in its MARKER, a line of
JSON per file: [name, what made it]. In a folder that this project made as a whole the name is ".".
Nothing else is ever replaced or removed.
"""
import contextlib
import json
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

from support.cli import DataError

MARKER = ".shad-rft"
CHECKSUMS = "checksums.json"


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def writing(path: str):
    """Turn the system's error on a write, such as a full disk, into a sentence with the path."""
    try:
        yield
    except OSError as e:
        raise DataError(f"{path} could not be written ({e.strerror or e}); make room or give "
                        "access, then run it again.") from None


@contextlib.contextmanager
def replacing(path: str, mode: str = "w"):
    """Open path + ".tmp" for writing and rename it to `path` at the end; on an error remove it."""
    temporary = path + ".tmp"
    try:
        with writing(path):
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path: str, content) -> None:
    """Write JSON; NaN and infinity, which it does not have, become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with replacing(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


# --------------------------------------------------------------------------------------------------
# Whose a file or a folder is

held_locks = {}         # {folder: its marker, open and locked until released or the process ends}


def claim(folder: str, names, maker: str, create: bool = True) -> None:
    """Take an output folder for this run, which may then write and replace `names` in it.

    create=False: only look, if no run has taken it before. Raises DataError where one of `names` is
    there and `maker` has not made it, and where another run is writing to the folder now.
    """
    if not os.path.isdir(folder) and (os.path.lexists(folder) or not folder):
        raise DataError(f"{folder!r} is no folder; choose another --out.")
    marker = os.path.join(folder, MARKER)
    if os.path.islink(marker):
        raise DataError(f"{marker} is a link, so not made here; move it away.")
    known = read_marker(folder)
    for name in names:
        for path in (os.path.join(folder, name), os.path.join(folder, name + ".tmp")):
            made_by = read_marker(path).get(".") if os.path.isdir(path) else known.get(name)
            if not os.path.lexists(path) or made_by == maker or is_empty(path):
                continue
            if made_by is None:
                raise DataError(f"{path} is there already, and was not made by {maker}; "
                                "choose another --out, or move it away.")
            raise DataError(f"{path} was made by another run ({made_by}); "
                            "choose another --out, or remove it.")
    if not create and not os.path.exists(marker):
        return
    with writing(marker):
        os.makedirs(folder, exist_ok=True)
        if os.path.realpath(folder) not in held_locks:
            file = open(marker, "a", encoding="utf-8")      # noqa: SIM115 (open to the end)
            if not lock(file, wait=False):
                raise DataError(f"another run is writing to {folder} now; "
                                "wait until it has ended, or choose another --out.")
            held_locks[os.path.realpath(folder)] = file
        file = held_locks[os.path.realpath(folder)]
        new = [name for name in names if known.get(name) != maker]
        file.writelines(json.dumps([name, maker]) + "\n" for name in new)
        file.flush()


def release(folder: str) -> None:
    """Let other runs write to a folder that was claimed, if it was."""
    file = held_locks.pop(os.path.realpath(folder), None)
    if file:
        file.close()


def lock(file, wait: bool) -> bool:
    """Lock an open file until it is closed, at the latest when this process ends, however it does.

    False where another process has it locked. Where there are no locks (Windows, some network
    disks) all goes on without.
    """
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True


def read_marker(folder: str) -> dict[str, str]:
    """{name: what made it} of what this project made in a folder."""
    made = {}
    with contextlib.suppress(OSError), open(os.path.join(folder, MARKER), "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                name, maker = json.loads(line)          # the last line may be cut short
                made[name] = maker
    return made


def is_empty(path: str) -> bool:
    """Is it a folder with nothing in it, but perhaps the marker, which a kill can cut short?"""
    return os.path.isdir(path) and not os.path.islink(path) and set(os.listdir(path)) <= {MARKER}


def make_folder(path: str, maker: str) -> None:
    """Create a folder that is this project's as a whole, or go on with one."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
        if is_empty(path):
            with open(os.path.join(path, MARKER), "w", encoding="utf-8") as file:
                file.write(json.dumps([".", maker]) + "\n")
    if "." not in read_marker(path):
        raise DataError(f"{path} was not made by {maker}; choose another --out, or move it away.")


def remove_folder(path: str) -> None:
    """Remove a folder, if there is one. Raises DataError for one that is not this project's."""
    if not os.path.lexists(path):
        return
    if os.path.islink(path) or ("." not in read_marker(path) and not is_empty(path)):
        raise DataError(f"{path} is in the way, and was not made here; move it away.")
    with writing(path):
        for name in sorted(os.listdir(path), key=MARKER.__eq__):        # the marker is the last
            entry = os.path.join(path, name)
            if os.path.isdir(entry) and not os.path.islink(entry):
                shutil.rmtree(entry)
            else:
                os.remove(entry)
        os.rmdir(path)


# --------------------------------------------------------------------------------------------------
# Damage: CRC-32 finds it, and is the fastest checksum that Python has

def checksum(path: str) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**15):
            crc = zlib.crc32(block, crc)
    return crc


def checksums(folder: str) -> dict[str, int]:
    """{name: its CRC-32} of the files of a folder."""
    names = sorted(set(os.listdir(folder)) - {MARKER, CHECKSUMS})
    paths = [os.path.join(folder, name) for name in names]
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(checksum, paths), strict=True))


def write_checksums(folder: str) -> None:
    write_json(os.path.join(folder, CHECKSUMS), checksums(folder))


def damaged_file(folder: str) -> str | None:
    """The first file of a folder that is not as write_checksums found it; None if all are."""
    try:
        with open(os.path.join(folder, CHECKSUMS), encoding="utf-8") as file:
            expected = json.load(file)
        found = checksums(folder)
        differing = (name for name in expected if found.get(name) != expected[name])
        return next(differing, None if expected else CHECKSUMS)
    except (OSError, ValueError, TypeError, RecursionError):
        return CHECKSUMS
