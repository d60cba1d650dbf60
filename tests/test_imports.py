"""Imports run one way, from the method's files down to what they stand on, never in a circle."""
import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("support", "benchmarks", "baselines", "toy")


def module_name(path):
    """support/cli.py -> support.cli, benchmarks/__init__.py -> benchmarks"""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


PATHS = [*ROOT.glob("*.py")]
for folder in FOLDERS:
    PATHS += (ROOT / folder).glob("*.py")
MODULES = {module_name(path): path for path in PATHS}


def imports(path):
    """The names of all modules that a file imports, those inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


GRAPH = {name: imports(path) & MODULES.keys() for name, path in MODULES.items()}


def room(name):
    """The folder that a module lies in, or its own name if it lies at the top."""
    return name.split(".")[0]


MAY_IMPORT = {
    "rft": set(),
    "model": set(),
    "data": {"model", "support"},          # to resolve hub ids
    "shad": {"model", "data", "support"},
    "eval": {"model", "data", "shad", "support", "benchmarks"},
    "train": {"rft", "model", "data", "support", "baselines"},
    "baselines": {"rft", "model", "data", "shad", "train", "support", "baselines"},
    "support": {"support"},
    "benchmarks": {"support", "benchmarks"},
    "toy": {"model", "data", "shad", "train", "eval", "support", "toy"},
}


@pytest.mark.parametrize("name", GRAPH)
def test_a_module_imports_only_what_its_room_may(name):
    imported = set(GRAPH[name])
    if name == "support.readers":
        imported.discard("toy.task")        # samples of the toy are read like any others
    assert {room(other) for other in imported} <= MAY_IMPORT[room(name)]


def test_every_module_has_a_room():
    assert {room(name) for name in MODULES} == MAY_IMPORT.keys()


def test_the_generator_of_the_toy_imports_nothing_of_ours():
    assert GRAPH["toy.task"] == set()


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(GRAPH).prepare()      # raises CycleError, naming the circle


@pytest.mark.parametrize("name, packages", [
    ("rft", {"torch"}),
    ("model", {"torch", "safetensors"})])
def test_files_to_copy_need_only_torch_and_its_companions(name, packages):
    needed = {room(imported) for imported in imports(MODULES[name])} - sys.stdlib_module_names
    needed.discard("huggingface_hub")       # imported where a hub id is given
    assert needed == packages


def loaded_modules(name):
    """What a fresh interpreter has loaded after it imported a module."""
    code = f"import {name}, json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) == "benchmarks"])
def test_a_benchmark_runs_without_torch(name):
    assert "torch" not in loaded_modules(name)


def test_training_loads_no_benchmark_and_no_http():
    """torch itself may load http.client; no module of ours that training loads may import it."""
    ours = loaded_modules("train") & MODULES.keys()
    assert not {name for name in ours if room(name) == "benchmarks"}
    for name in ours:
        rooms = {room(imported) for imported in imports(MODULES[name])}
        assert not rooms & {"urllib", "http", "socket", "ast"}, name
