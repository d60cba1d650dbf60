"""Nexus (NexusRaven V1): one call, right if its name and its full arguments are. Calls are parsed, never executed."""
import ast
import json
import os
import re

import numpy as np

from benchmarks import DATA_FAULT, RECORD_FAULTS, Item, data_faults
from support.cli import DataError
from support.readers import TOOL_PROMPT, Message, read_object, read_records


MAX_NEW_TOKENS = 512


SETS = ("cve_cpe", "virustotal", "emailrep", "toolalpaca", "toolllm")


def items(folder: str) -> list[Item]:
    """The items of the SET_queries.json files in a folder, each asked with the functions of its own set or record."""
    paths = {name: os.path.join(folder, f"{name}_queries.json") for name in SETS}
    paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
    if not paths:
        raise DataError(f"{folder} holds none of {', '.join(f'{name}_queries.json' for name in SETS)}; "
                        "give the folder of NexusRaven's queries with --data.")
    specs = read_object(os.path.join(folder, "function_specs.json")) if paths.keys() - {"toolalpaca", "toolllm"} else {}
    items = []
    for name, path in paths.items():
        for i, (_, record) in enumerate(read_records(path)):
            try:
                if name == "toolalpaca":                            # of a record's turns only the first is asked, as upstream
                    turn = record["turns_1"]
                    query, call = turn["instruction"], json.loads(turn["golden_answer"])[0]
                    functions = [function(f"{signature}: pass", text.strip('" \n')) for signature, text in re.findall(
                        "<func_start>(.*?)<func_end>.*?<docstring_start>(.*?)<docstring_end>", turn["docstring"], re.DOTALL)]
                elif name == "toolllm":
                    query, call, functions = record["Input"], record["Output"], [function(f) for f in record["context"]]
                else:
                    query, call, functions = record["query"], record["reference"], specs[name]
                tools = json.dumps([tool(f) for f in functions], ensure_ascii=False)
                messages = [Message("system", TOOL_PROMPT.format(tools)), Message("user", "" + query)]
                called, *arguments = call(call)
                function = {f["name"]: f for f in functions}[called]
                reference = {"call": call, "function": function, "arguments": arguments(function, *arguments)}
            except RECORD_FAULTS as e:
                messages, reference = [Message("user", "")], {"fault": f"{type(e).__name__}: {e}"}
            items.append(Item(f"{name}_{i}", name, messages, reference))
    if not items:
        raise DataError(f"the files of {folder} hold no records; fetch NexusRaven's queries again.")
    return items


def function(source: str, docstring: str | None = None) -> dict:
    """A function given as Python source, described as function_specs.json describes one; a default is source text."""
    f = ast.parse(source).body[0]
    defaults = [None] * (len(f.args.args) - len(f.args.defaults)) + f.args.defaults
    return {"name": f.name, "docstring": docstring or ast.get_docstring(f) or "",
            "args": [{"name": a.arg, "type": a.annotation and ast.unparse(a.annotation), "required": d is None,
                      "default": d and ast.unparse(d)} for a, d in zip(f.args.args, defaults)]}


def tool(function: dict) -> dict:
    """A function as APIGen's flat specification: an argument that may be left out says so in its type."""
    parameters = {}
    for a in function["args"]:
        documented = re.search(rf"\b{a['name']} \((\w+)", function["docstring"])        # cve_cpe's types stand there alone
        kind = a["type"] or (documented[1] if documented else "str")
        parameters[a["name"]] = {"type": kind + ", optional" * (not a["required"])}
        if not a["required"] and default(a) is not None:
            parameters[a["name"]]["default"] = default(a)
    return {"name": function["name"], "description": function["docstring"].strip(), "parameters": parameters}


def default(argument: dict):
    """The value of a default; where that is no literal, such as ((2017 - 12) - 20), its text stands for it."""
    try:
        return ast.literal_eval(argument["default"])
    except (ValueError, SyntaxError):
        return argument["default"]


def call(text: str) -> tuple[str, list, dict]:
    """(name, positional arguments, keywords) of the first call of an output: a JSON call {"name", "arguments"} or Python's
    f(...), r = f(...), nvdlib.f(...), or a list of either. ValueError if there is none."""
    if "Initial Answer:" in text:                                   # NexusRaven's own wording
        text = text.partition("Initial Answer:")[2].strip().partition("\n")[0]
    text = re.sub(r"\A\s*```(\w*\n)?|```\s*\Z", "", text).strip()
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):                            # not JSON: Python, then
        call = None
    call = call[0] if isinstance(call, list) and call else call
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
        return call["name"].removeprefix("nvdlib."), [], call["arguments"]
    try:
        call = ast.parse(text).body[0].value
        call = call.elts[0] if isinstance(call, ast.List) else call
        return (ast.unparse(call.func).removeprefix("nvdlib."), [ast.literal_eval(a) for a in call.args],
                {k.arg: ast.literal_eval(k.value) for k in call.keywords})
    except Exception as e:                              # no call; and a model can provoke Syntax-, Recursion-, MemoryError and more
        raise ValueError(f"neither a JSON call nor a Python call with plain values ({type(e).__name__})") from None


def arguments(function: dict, positional: list, keywords: dict) -> dict:
    """The full arguments of a call, bound as Python binds them, defaults filled in. ValueError says what does not fit."""
    names = [a["name"] for a in function["args"]]
    if len(positional) > len(names):
        raise ValueError(f"{len(positional)} positional arguments, {len(names)} at most")
    given = dict(zip(names, positional))
    for name in keywords:
        if name in given or name not in names:
            raise ValueError(f"argument {str(name)[:80]!r} is {'given twice' if name in given else 'unknown'}")
    given |= keywords
    missing = [a["name"] for a in function["args"] if a["required"] and a["name"] not in given]
    if missing:
        raise ValueError(f"argument {missing[0]!r} is missing")
    full = {a["name"]: given[a["name"]] if a["name"] in given else default(a) for a in function["args"]}
    try:                                                            # NexusRaven compares floats as integers
        return {k: int(v) if isinstance(v, float) else v for k, v in full.items()}
    except (ValueError, OverflowError):
        raise ValueError("an argument is NaN or infinite") from None


def judge(item: Item, output: str) -> dict:
    """Right if the first call's name equals the reference's and so do the full arguments, each by Python's =="""
    if "fault" in item.reference:
        return {"correct": False, "reason": f"{DATA_FAULT} {item.reference['fault']}"}
    function, expected = item.reference["function"], item.reference["arguments"]
    try:
        name, *arguments = call(output)
        if name != function["name"]:
            return {"correct": False, "reason": f"function {name[:80]!r}, not {function['name']!r}"}
        got = arguments(function, *arguments)
    except ValueError as e:
        return {"correct": False, "reason": str(e)}
    differs = [f"{k} is not {v!r}" for k, v in expected.items() if got[k] != v]
    return {"correct": not differs, "reason": "; ".join(differs) or "correct"}


def summary(verdicts: list[dict]) -> dict:
    """Accuracy of each set, and its average over sets (each set weighs the same) and over items."""
    sets = {name: [v["correct"] for v in verdicts if v["category"] == name] for name in SETS}
    accuracy = {name: float(np.mean(correct)) for name, correct in sets.items() if correct}
    return {"asked": len(verdicts), "accuracy": accuracy, "average_over_sets": float(np.mean(list(accuracy.values()))),
            "average_over_items": float(np.mean([v["correct"] for v in verdicts])), "data_faults": data_faults(verdicts)}
