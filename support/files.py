"""Writing files so that none is ever seen half written: to a temporary name, then renamed."""
import contextlib
import json
import os


@contextlib.contextmanager
def replacing(path: str, mode: str = "w"):
    """Open path + ".tmp" for writing and rename it to `path` at the end; on an error remove it."""
    temporary = path + ".tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_json(path: str, content) -> None:
    with replacing(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
