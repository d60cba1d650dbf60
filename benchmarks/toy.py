"""The toy: the call must have the right tool and exactly the right arguments."""
import json
import re

import numpy as np

from benchmarks import Item
from support.readers import toy_samples


MAX_NEW_TOKENS = 96


def items(count: int, seed: int) -> list[Item]:
    return [Item(s.id, kind, s.messages[:-1], s.messages[-1].text) for kind in ("held_in", "held_out")
            for s in toy_samples(count, seed, held_out=kind == "held_out")]


def parse_call(text: str):
    """(tool, arguments) of a Thought / Action / Action Input turn; ValueError says what is missing. Nothing is executed."""
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
    kinds = dict.fromkeys(v["category"] for v in verdicts)
    return {"success": {k: float(np.mean([v["correct"] for v in verdicts if v["category"] == k])) for k in kinds}}
