"""The outputs of a model on a benchmark, saved as they come, so that a killed run can be resumed.

OUT/outputs.RANK.jsonl is a first line of settings, then one {"id", "output"} line per item.
"""
import json
import os
import re

from tqdm import tqdm

from support.cli import DataError
from support.distributed import barrier, rank_and_world
from support.files import writing


def ask_saving(items: list, folder: str, settings: dict, run) -> dict:
    """{item id: output} of all items. run(items) yields (item, output); the ranks share the items.

    Each output is appended to folder/outputs.RANK.jsonl as it comes; those that are already there,
    made under the same settings, are not asked again.
    """
    os.makedirs(folder, exist_ok=True)
    rank, world = rank_and_world()
    done = read_outputs(folder, settings)
    barrier()                                           # every rank has read before any writes
    mine = [item for item in items if item.id not in done][rank::world]
    bar = tqdm(total=len(mine), desc="generate", unit="item", disable=rank > 0)
    path = os.path.join(folder, f"outputs.{rank}.jsonl")
    begin_log(path, settings)
    with bar:
        for item, output in run(mine):
            bar.update()
            with writing(path), open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"id": item.id, "output": output}) + "\n")
    barrier()
    return read_outputs(folder, settings)


def read_outputs(folder: str, settings: dict) -> dict:
    """{item id: output} of all folder/outputs.RANK.jsonl.

    A file is a first line of settings, then {"id", "output"} lines; the last one may be incomplete.
    Raises DataError, naming what differs, where a file was begun with other settings.
    """
    outputs = {}
    for name in sorted(os.listdir(folder)):
        if not re.fullmatch(r"outputs\.\d+\.jsonl", name):
            continue
        path = os.path.join(folder, name)
        differing = []
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n")[:-1]        # after the last newline: cut short
        for n, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if n == 1:
                    differing = [key for key in settings if record.get(key) != settings[key]]
                elif not isinstance(record["output"], (str, list, type(None))):
                    raise TypeError
                else:
                    outputs[record["id"]] = record["output"]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                rest = " and the rest" if n == 1 else ""
                raise DataError(f"{path}, line {n}, is damaged; remove it{rest}, "
                                "to ask again.") from None
        if differing:
            verb = "differs" if len(differing) == 1 else "differ"
            raise DataError(f"{path} was made with other settings ({', '.join(differing)} {verb}); "
                            "choose another --out, or remove the file to start over.")
    return outputs


def begin_log(path: str, settings: dict) -> None:
    """Make a file that outputs are appended to; its first line is the settings.

    One that is there is kept, but for an incomplete last line.
    """
    with writing(path), open(path, "ab+") as log:
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)
        if not log.seek(0, os.SEEK_END):
            log.write(json.dumps(settings).encode() + b"\n")
