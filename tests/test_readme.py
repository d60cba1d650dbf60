"""What the documents say of the code is so: examples run, links lead somewhere, names exist."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "RESULTS.md", "baselines/README.md", "benchmarks/README.md"]


def test_the_example_runs():
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["loss"].isfinite()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    if "/" in document:
        assert not targets                      # they would be relative to the document's folder
    for target in targets:
        assert (ROOT / target).is_file(), target


def test_the_method_names_functions_that_exist():
    found = 0
    for file, names in re.findall(r"\]\((\w+\.py)\): ((?:`\w+`(?:, )?)+)", README):
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert f"\ndef {name}(" in code, (file, name)
            found += 1
    assert found >= 7


@pytest.mark.parametrize("document", DOCUMENTS)
def test_measurements_that_are_named_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"python -m tests\.bench\.(\w+)", text):
        assert (ROOT / "tests" / "bench" / f"{name}.py").is_file(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lines_fit_in_100_columns(document):
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1700
