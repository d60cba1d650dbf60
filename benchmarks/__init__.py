"""What the benchmarks share. A benchmark is a module without torch, and has

    MAX_NEW_TOKENS                                      the longest output that it needs
    items(folder) -> [Item]                             what is asked
    judge(item, output) -> {"correct", "reason", ...}   a verdict on one output
    summary(verdicts) -> figures                        what is reported

One with several turns per item, like StableToolBench, also has its own `run`, `read_predictions`
and `judge_outputs`.
"""
import math
import warnings
from dataclasses import dataclass

from support.cli import DataError
from support.readers import Message, read_records
from support.records import reading

# Python's parser warns about odd escapes and numbers in what a model wrote, and quotes them
warnings.filterwarnings("ignore", module="<unknown>")


@dataclass
class Item:
    """One question of a benchmark."""
    id: str
    category: str
    messages: list[Message]         # what the model is given
    reference: object = None        # what the judge needs


# what a broken record of a benchmark's own data can raise, and how its verdict's reason begins
RECORD_FAULTS = (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError,
                 OverflowError, RecursionError)
DATA_FAULT = "fault of the benchmark's own record:"
# the reasons of verdicts on what was not answered
NO_OUTPUT = "no output"
TOO_LONG = "prompt too long for the model"


def data_faults(verdicts: list[dict]) -> list[str]:
    """The ids of the items whose own record is broken; they count as wrong."""
    return [v["id"] for v in verdicts if v["reason"].startswith(DATA_FAULT)]


def read_predictions(path: str) -> dict[str, str]:
    """{item id: output} of a file of {"id", "output"} lines made elsewhere."""
    outputs = {}
    for where, record in read_records(path):
        with reading(where, 'every line must be {"id": ..., "output": "text"}'):
            name = str(record["id"])
            if not isinstance(record["output"], str):
                raise TypeError("its output is no text")
            if name in outputs:
                raise DataError(f"the id {name!r} was there before; keep one output per item.")
            outputs[name] = record["output"]
    return outputs


def judge_outputs(bench, items: list[Item], outputs: dict[str, str | None], **options):
    """A verdict on every item, a list of dicts; an item without output is wrong.

    An output is None where the prompt left no room for it. options: of the benchmark's judge.
    """
    verdicts = []
    for item in items:
        output = outputs.get(item.id)
        if output is not None:
            verdict = bench.judge(item, output, **options)
        elif item.id in outputs:
            verdict = {"correct": False, "reason": TOO_LONG}
        else:
            verdict = {"correct": False, "reason": NO_OUTPUT}
        verdicts.append({"id": item.id, "category": item.category, **verdict, "output": output})
    return verdicts


def wilson(correct: int, asked: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson 1927): honest for small counts and near 0 and 1."""
    p = correct / asked
    center = p + z * z / (2 * asked)
    half = z * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return [max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)]


def count_verdicts(verdicts: list[dict]) -> dict:
    """Items asked, answered, missing; and accuracy by category with its 95 % interval."""
    categories = {}
    for name in dict.fromkeys(v["category"] for v in verdicts):
        correct = [v["correct"] for v in verdicts if v["category"] == name]
        categories[name] = {"asked": len(correct), "correct": sum(correct),
                            "accuracy": sum(correct) / len(correct),
                            "interval": wilson(sum(correct), len(correct))}
    reasons = [v["reason"] for v in verdicts if v["output"] is None]
    return {"asked": len(verdicts), "answered": len(verdicts) - len(reasons),
            "missing": reasons.count(NO_OUTPUT), "too_long": reasons.count(TOO_LONG),
            "categories": categories}
