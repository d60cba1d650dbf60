"""Short runs of the scripts on a tiny checkpoint, and what they left."""
import os

import pytest

from tiny import apigen, make_checkpoint, write


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/ and data.json."""
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(24))
    return work


def training(work, out, *more, steps=3):
    """The script and its arguments."""
    return ["train", "--model", work / "model", "--data", work / "data.json", "--out", out,
            "--steps", steps, "--lr", "1e-3", "--batch-tokens", 400, "--micro-tokens", 200, *more]


def labelling(work, out, *more):
    """The script and its arguments."""
    return ["shad", "--model", work / "model", "--data", work / "data.json", "--out", out,
            "--shuffle", 12, "--lr", "1e-3", "--batch-tokens", 400, "--micro-tokens", 200, *more]


def content(folder):
    """{path: bytes} of all files in a folder."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found
