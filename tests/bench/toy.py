"""The whole small reproduction, `python train.py`, over several seeds: mean and spread.

    python -m tests.bench.toy
    python -m tests.bench.toy --seeds 2 --out toy_runs
"""
import os
import statistics
import tempfile
from dataclasses import dataclass

from model import CheckpointError
from support.cli import option, parse_options, run_script
from support.readers import read_object
from tests.bench import measure
from toy import reproduce


@dataclass
class Options:
    seeds: int = option(5, "number of seeds", low=2)
    out: str = option(None, "where to keep the runs (default: a temporary directory)")


def figures(summary: dict) -> dict[str, float]:
    """The figures of one run's summary.json, by name."""
    truth = summary["shad"]["truth"]
    row = {"SHAD error": truth["error"], "SHAD AUC": truth["auc"]}
    for name, model in summary["models"].items():
        for kind in ("held_in", "held_out"):
            for role in ("reasoning", "boilerplate"):
                row[f"{name} {kind} {role} loss"] = model["losses"][kind][role]["loss"]
            row[f"{name} {kind} success"] = model["success"][kind]
    for kind in ("held_in", "held_out"):
        for role in ("reasoning", "boilerplate"):
            name = f"{kind} {role} loss"
            row[f"RFT / SFT {name}"] = row[f"RFT {name}"] / row[f"SFT {name}"]
    return row


def main():
    options = parse_options(Options, __doc__)
    out = options.out or tempfile.mkdtemp()
    runs = []
    for seed in range(options.seeds):
        folder = os.path.join(out, str(seed))
        reproduce.reproduce(folder, seed)
        runs.append(figures(read_object(os.path.join(folder, "summary.json"))))

    rows = []
    for name in runs[0]:
        values = [run[name] for run in runs]
        each = " ".join(f"{value:.4f}" for value in values)
        spread = statistics.stdev(values)
        rows.append([name, f"{statistics.mean(values):.4f}", f"{spread:.4f}", each])
    measure.print_heading(f"toy: {options.seeds} seeds")
    print(measure.table(["", "mean", "standard deviation", "each"], rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
