"""One thread per process (small matrices), the repository's root on sys.path, no network."""
# ruff: noqa: E402 (torch and the project are imported once the environment is set)
import os
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"                         # subprocesses inherit all of these
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="shad-rft-tests-")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import torch

import tiny
from support import distributed

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")


@pytest.fixture(autouse=True)
def _reset():
    torch.manual_seed(0)
    distributed.precision = None        # a main() run in this process has set it


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    """A tiny random checkpoint whose tokenizer has the ChatML tokens."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A tiny random checkpoint whose tokenizer has an eos token and no ChatML tokens."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("plain"), chatml=False)
