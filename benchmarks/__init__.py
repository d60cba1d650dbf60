"""What the benchmarks share. A benchmark is a module of three functions, and needs no torch:

    items(folder) -> [Item]                      what is asked
    judge(item, output) -> {"correct", "reason"} what an output is worth
    summary(verdicts) -> figures                 what is reported

One whose asking takes more than one turn also has `run`.
"""
import math
from dataclasses import dataclass

from support.readers import Message


@dataclass
class Item:
    """One asked question of a benchmark."""
    id: str
    category: str
    messages: list[Message]         # what the model is given
    reference: object = None        # what the judge needs


RECORD_FAULTS = (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError)     # of a benchmark's own broken record
DATA_FAULT = "fault of the benchmark's own record:"                                             # so its verdict's reason begins


def data_faults(verdicts: list[dict]) -> list[str]:
    """The ids of the items whose own record is broken; they count as wrong."""
    return [v["id"] for v in verdicts if v["reason"].startswith(DATA_FAULT)]


def wilson(correct: int, asked: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson 1927): honest for small counts and near 0 and 1."""
    p, n = correct / asked, asked
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def count_verdicts(verdicts: list[dict]) -> dict:
    """The counts that every benchmark has: asked, answered, and accuracy by category with its 95 % interval."""
    categories = {}
    for name in dict.fromkeys(v["category"] for v in verdicts):
        correct = [v["correct"] for v in verdicts if v["category"] == name]
        categories[name] = {"asked": len(correct), "correct": sum(correct), "accuracy": sum(correct) / len(correct),
                            "interval": wilson(sum(correct), len(correct))}
    answered = sum(v["output"] is not None for v in verdicts)
    return {"asked": len(verdicts), "answered": answered, "missing": sum(v["reason"] == "no output" for v in verdicts),
            "too_long": sum(v["output"] is None and v["reason"] != "no output" for v in verdicts), "categories": categories}
