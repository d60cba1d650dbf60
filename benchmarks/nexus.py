"""Nexus (NexusRaven V1): one call, right if its name and all its arguments are.

Calls are parsed, never executed.
"""
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
WITH_FUNCTIONS = {"toolalpaca", "toolllm"}      # sets whose records bring their own functions

# a function of ToolAlpaca's docstrings: its signature, and its description in quotes
TOOLALPACA_FUNCTION = re.compile(
    "<func_start>(.*?)<func_end>.*?<docstring_start>(.*?)<docstring_end>", re.DOTALL)


def items(folder: str) -> list[Item]:
    """The items of a folder's SET_queries.json files, each with the functions to choose from.

    The functions of a set are in function_specs.json; ToolAlpaca's and ToolLLM's are in each
    record. An item's id is SET_INDEX, in file order.
    """
    paths = {name: os.path.join(folder, f"{name}_queries.json") for name in SETS}
    paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
    if not paths:
        files = ", ".join(f"{name}_queries.json" for name in SETS)
        raise DataError(f"{folder} holds none of {files}; "
                        "give the folder of NexusRaven's queries with --data.")
    specs = {}
    if paths.keys() - WITH_FUNCTIONS:
        specs = read_object(os.path.join(folder, "function_specs.json"))
    found = []
    for name, path in paths.items():
        for i, (_, record) in enumerate(read_records(path)):
            try:
                query, call, functions = read_query(name, record, specs)
                tools = json.dumps([as_tool(f) for f in functions], ensure_ascii=False)
                messages = [Message("system", TOOL_PROMPT.format(tools)),
                            Message("user", "" + query)]        # TypeError if it is not a text
                reference = read_reference(call, functions)
            except RECORD_FAULTS as e:
                messages = [Message("user", "")]
                reference = {"fault": f"{type(e).__name__}: {e}"}
            found.append(Item(f"{name}_{i}", name, messages, reference))
    if not found:
        raise DataError(f"the files of {folder} hold no records; fetch NexusRaven's queries again.")
    return found


def read_query(name: str, record: dict, specs: dict) -> tuple[str, str, list[dict]]:
    """(query, reference call as text, functions) of one record of the set `name`."""
    if name == "toolalpaca":
        turn = record["turns_1"]                # upstream too asks the first turn only
        query = turn["instruction"]
        call = json.loads(turn["golden_answer"])[0]
        functions = []
        for signature, docstring in TOOLALPACA_FUNCTION.findall(turn["docstring"]):
            functions.append(function_spec(f"{signature}: pass", docstring.strip('" \n')))
        return query, call, functions
    if name == "toolllm":
        return record["Input"], record["Output"], [function_spec(f) for f in record["context"]]
    return record["query"], record["reference"], specs[name]


def read_reference(text: str, functions: list[dict]) -> dict:
    """What the judge needs: the reference call, its function, and its full arguments."""
    name, positional, keywords = parse_call(text)
    function = {f["name"]: f for f in functions}[name]
    full = full_arguments(function, positional, keywords)
    return {"call": text, "function": function, "arguments": full}


def function_spec(source: str, docstring: str | None = None) -> dict:
    """A function given as Python source, described as function_specs.json describes one.

    A default is source text, or None where there is none.
    """
    f = ast.parse(source).body[0]
    required = len(f.args.args) - len(f.args.defaults)
    arguments = []
    for i, argument in enumerate(f.args.args):
        kind = argument.annotation and ast.unparse(argument.annotation)
        default = ast.unparse(f.args.defaults[i - required]) if i >= required else None
        arguments.append({"name": argument.arg, "type": kind, "required": i < required,
                          "default": default})
    docstring = docstring or ast.get_docstring(f) or ""
    return {"name": f.name, "docstring": docstring, "args": arguments}


def as_tool(function: dict) -> dict:
    """A function as APIGen's flat specification: the type of an optional argument says so."""
    parameters = {}
    for a in function["args"]:
        # the types of cve_cpe's arguments are given in its docstrings only: "limit (int): ..."
        documented = re.search(rf"\b{a['name']} \((\w+)", function["docstring"])
        kind = a["type"] or (documented[1] if documented else "str")
        if a["required"]:
            parameters[a["name"]] = {"type": kind}
            continue
        parameters[a["name"]] = {"type": f"{kind}, optional"}
        if default_value(a) is not None:
            parameters[a["name"]]["default"] = default_value(a)
    description = function["docstring"].strip()
    return {"name": function["name"], "description": description, "parameters": parameters}


def default_value(argument: dict):
    """The value of a default; of one that is no literal, such as ((2017 - 12) - 20), its text."""
    try:
        return ast.literal_eval(argument["default"])
    except (ValueError, SyntaxError):
        return argument["default"]


def parse_call(text: str) -> tuple[str, list, dict]:
    """(name, positional arguments, keywords) of the first call in an output.

    A call is JSON, {"name": ..., "arguments": {...}}, or Python, f(...) or r = f(...); either may
    stand in a list or a code block. A name loses its "nvdlib.". Raises ValueError if there is none.
    """
    if "Initial Answer:" in text:                                   # NexusRaven's own wording
        text = text.partition("Initial Answer:")[2].strip().partition("\n")[0]
    text = re.sub(r"\A\s*```(\w*\n)?|```\s*\Z", "", text).strip()
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):                            # not JSON: it may be Python
        call = None
    if isinstance(call, list) and call:
        call = call[0]
    if isinstance(call, dict):
        name = call.get("name")
        keywords = call.get("arguments")
        if isinstance(name, str) and isinstance(keywords, dict):
            return name.removeprefix("nvdlib."), [], keywords
    try:
        call = ast.parse(text).body[0].value
        if isinstance(call, ast.List):
            call = call.elts[0]
        name = ast.unparse(call.func).removeprefix("nvdlib.")
        positional = [ast.literal_eval(argument) for argument in call.args]
        return name, positional, {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    except Exception as e:      # a model can provoke RecursionError, MemoryError and more
        raise ValueError("neither a JSON call nor a Python call with plain values "
                         f"({type(e).__name__})") from None


def full_arguments(function: dict, positional: list, keywords: dict) -> dict:
    """The arguments of a call, bound to names as Python binds them, with defaults filled in.

    Raises ValueError with what does not fit.
    """
    names = [a["name"] for a in function["args"]]
    if len(positional) > len(names):
        raise ValueError(f"{len(positional)} positional arguments, {len(names)} at most")
    given = dict(zip(names, positional, strict=False))
    for name in keywords:
        if name in given or name not in names:
            problem = "given twice" if name in given else "unknown"
            raise ValueError(f"argument {str(name)[:80]!r} is {problem}")
    given |= keywords
    for a in function["args"]:
        if a["name"] in given:
            continue
        if a["required"]:
            raise ValueError(f"argument {a['name']!r} is missing")
        given[a["name"]] = default_value(a)
    try:                                        # NexusRaven compares floats as integers
        for name, value in given.items():
            if isinstance(value, float):
                given[name] = int(value)
    except (ValueError, OverflowError):
        raise ValueError("an argument is NaN or infinite") from None
    return {name: given[name] for name in names}


def judge(item: Item, output: str) -> dict:
    """Right if the first call's name and its full arguments equal the reference's (Python's ==)."""
    if "fault" in item.reference:
        return {"correct": False, "reason": f"{DATA_FAULT} {item.reference['fault']}"}
    function = item.reference["function"]
    try:
        name, positional, keywords = parse_call(output)
        if name != function["name"]:
            raise ValueError(f"function {name[:80]!r}, not {function['name']!r}")
        got = full_arguments(function, positional, keywords)
    except ValueError as e:
        return {"correct": False, "reason": str(e)}
    differs = []
    for argument, value in item.reference["arguments"].items():
        if got[argument] != value:
            differs.append(f"{argument} is not {value!r}")
    return {"correct": not differs, "reason": "; ".join(differs) or "correct"}


def summary(verdicts: list[dict]) -> dict:
    """Accuracy per set, and its average over sets (all weigh the same) and over items."""
    accuracy = {}
    for name in SETS:
        correct = [v["correct"] for v in verdicts if v["category"] == name]
        if correct:
            accuracy[name] = float(np.mean(correct))
    return {"asked": len(verdicts), "accuracy": accuracy,
            "average_over_sets": float(np.mean(list(accuracy.values()))),
            "average_over_items": float(np.mean([v["correct"] for v in verdicts])),
            "data_faults": data_faults(verdicts)}
