"""The measurements of tests/bench run; what they measure is not tested."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [p.stem for p in (ROOT / "tests" / "bench").glob("*.py") if "__main__" in p.read_text()]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_help_gives_the_command(monkeypatch, capsys, name):
    module = importlib.import_module(f"tests.bench.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert f"python -m tests.bench.{name}" in capsys.readouterr().out


def test_every_row_of_the_gpu_measurement_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "tests.bench.gpu", "--tiny", "--repeats", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    rows = report["head"] + report["step"] + report["decoding"]
    assert [row for row in rows if "failed" in row] == []
    assert {row["head"] for row in report["head"]} >= {"naive", "fused_cross_entropy"}
    assert all(row["error of the gradient"] < 1e-5 for row in report["head"])
    assert all(row["tokens/s"] > 0 and row["MFU"] > 0 for row in report["step"])
    assert [row["prompts"] for row in report["decoding"]] == [1, 8, 64]
    assert "native bf16" in report["machine"]["cpu"]
    assert "## decoding" in (tmp_path / "gpu.md").read_text()


def test_a_training_step_is_compared_with_transformers(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, "-m", "tests.bench.train", "--model", "toy", "--data", "toy[:40]",
               "--steps", "1", "--batch-tokens", "512", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| transformers | " in done.stdout
    assert "x transformers" in done.stdout
    apart = float(done.stdout.split("The losses are at most ")[1].split()[0])
    assert apart < 1e-5
