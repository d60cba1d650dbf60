"""The toy: the call must have the right tool and exactly the right arguments."""
import json
import re

from benchmarks import Item
from support.readers import toy_samples

MAX_NEW_TOKENS = 96
MAX_CHARACTERS = 10_000     # of an output; the pattern's time grows with the square of its length


def items(count: int, seed: int) -> list[Item]:
    """`count` fresh samples of each kind: held-in, and held-out (other words, other wordings)."""
    asked = []
    for kind in ("held_in", "held_out"):
        for sample in toy_samples(count, seed, held_out=kind == "held_out"):
            *prompt, answer = sample.messages
            asked.append(Item(sample.id, kind, prompt, answer.text))
    return asked


def parse_call(text: str):
    """(tool, arguments) of a Thought / Action / Action Input turn. Nothing is executed.

    Raises ValueError, saying what is missing.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
    match = re.search(r"Action: *(\S+)\s+Action Input: *(\{.*\})", text, re.DOTALL)
    if not match:
        raise ValueError("no 'Action: ... Action Input: {...}'")
    return match[1], json.loads(match[2])


def judge(item: Item, output: str) -> dict:
    """Exact match of tool and arguments with the reference turn."""
    tool, arguments = parse_call(item.reference)
    try:
        got_tool, got_arguments = parse_call(output)
        got = json.dumps(got_arguments)
    except (ValueError, RecursionError) as e:
        return {"correct": False, "reason": f"not a call: {e}"}
    if got_tool != tool:
        return {"correct": False, "reason": f"tool {got_tool}, not {tool}"}
    if got_arguments != arguments:
        return {"correct": False, "reason": f"arguments {got}, not {json.dumps(arguments)}"}
    return {"correct": True, "reason": "correct"}


def summary(verdicts: list[dict]) -> dict:
    """The share of right calls of each kind."""
    success = {}
    for kind in dict.fromkeys(v["category"] for v in verdicts):
        correct = [v["correct"] for v in verdicts if v["category"] == kind]
        success[kind] = sum(correct) / len(correct)
    return {"success": success}
