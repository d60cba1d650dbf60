"""Nexus (NexusRaven V1): one call, right if its name and all its arguments are.

Calls are parsed, never executed.
"""
import ast
import json
import os
import re

import numpy as np

from benchmarks import DATA_FAULT, RECORD_FAULTS, Item, data_faults
from benchmarks.native_calls import native_calls
from support.cli import DataError
from support.readers import TOOL_PROMPT, Message, read_object, read_records

MAX_NEW_TOKENS = 512
MAX_CHARACTERS = 10_000         # of a call; the longest reference has 210
SETS = ("cve_cpe", "virustotal", "emailrep", "toolalpaca", "toolllm")
WITH_FUNCTIONS = {"toolalpaca", "toolllm"}      # sets whose records bring their own functions

# What the model NexusRaven was trained on, to the letter: each function as an option, then the
# question. It is to be rendered without a chat template.
RAVEN_OPTION = """
OPTION:
<func_start>def {signature}<func_end>
<docstring_start>
\"""
{docstring}
\"""
<docstring_end>
"""
RAVEN_PROMPT = """
<human>:
{options}
User Query: Question: {query}

Please pick a function from the above options that best answers the user query and fill in the \
appropriate arguments.<human_end>"""


def items(folder: str, prompt: str = "tools") -> list[Item]:
    """The items of a folder's SET_queries.json files, each with the functions to choose from.

    The functions of a set are in function_specs.json; ToolAlpaca's and ToolLLM's are in each
    record. An item's id is SET_INDEX, in file order. prompt: "tools", which asks for a JSON list
    of calls as the training data do, or "raven", NexusRaven's own.
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
    make_messages = raven_messages if prompt == "raven" else tool_messages
    found = []
    for name, path in paths.items():
        for i, (_, record) in enumerate(read_records(path)):
            try:
                query, call, functions = read_query(name, record, specs)
                messages = make_messages("" + query, functions)     # TypeError if it is no text
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
        for part in turn["docstring"].split("<func_start>")[1:]:
            signature, _, rest = part.partition("<func_end>")
            docstring = rest.partition("<docstring_start>")[2].partition("<docstring_end>")[0]
            functions.append(function_spec(f"{signature}: pass", docstring.strip('" \n')))
        return query, call, functions
    if name == "toolllm":
        # upstream replaces these functions' bodies by one that makes every float an integer
        functions = [function_spec(f) | {"integers": True} for f in record["context"]]
        return record["Input"], record["Output"], functions
    functions = specs[name]
    if name == "cve_cpe":           # upstream knows the arguments that a docstring describes, only
        functions = [without_undocumented(f) for f in functions]
    return record["query"], record["reference"], functions


def read_reference(text: str, functions: list[dict]) -> dict:
    """What the judge needs: the reference call, its function, and its full arguments."""
    name, positional, keywords = parse_call(text)
    function = {f["name"]: f for f in functions}[name]
    full = full_arguments(function, positional, keywords)
    return {"call": text, "function": function, "arguments": full}


def without_undocumented(function: dict) -> dict:
    """A function without the arguments that its docstring does not describe."""
    return function | {"args": [a for a in function["args"] if documented_type(function, a)]}


def documented_type(function: dict, argument: dict) -> str | None:
    """The type that a docstring gives an argument, as in "limit (int): ..."."""
    match = re.search(rf"\b{re.escape(argument['name'])} \((\w+)", function["docstring"])
    return match and match[1]


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
    docstring = docstring or ast.get_docstring(f, clean=False) or ""
    return {"name": f.name, "docstring": docstring, "args": arguments}


def tool_messages(query: str, functions: list[dict]) -> list[Message]:
    """The prompt of the training data: the functions as JSON, and the query."""
    tools = json.dumps([as_tool(f) for f in functions], ensure_ascii=False)
    return [Message("system", TOOL_PROMPT.format(tools)), Message("user", query)]


def as_tool(function: dict) -> dict:
    """A function as APIGen's flat specification: the type of an optional argument says so."""
    parameters = {}
    for a in function["args"]:
        kind = a["type"] or documented_type(function, a) or "str"
        if a["required"]:
            parameters[a["name"]] = {"type": kind}
            continue
        parameters[a["name"]] = {"type": f"{kind}, optional"}
        if default_value(a) is not None:
            parameters[a["name"]]["default"] = default_value(a)
    description = function["docstring"].strip()
    return {"name": function["name"], "description": description, "parameters": parameters}


def raven_messages(query: str, functions: list[dict]) -> list[Message]:
    """NexusRaven's prompt, in one text."""
    options = ""
    for function in functions:
        # upstream drops the braces here, and halves double ones in the whole
        docstring = function["docstring"].strip().replace("{", "").replace("}", "")
        options += RAVEN_OPTION.format(signature=python_signature(function), docstring=docstring)
    text = RAVEN_PROMPT.format(options=options, query=query)
    return [Message("user", text.replace("{{", "{").replace("}}", "}"))]


def python_signature(function: dict) -> str:
    """A function's signature as Python prints it: "search(query: str, limit: int = 5)"."""
    arguments = []
    for a in function["args"]:
        text = a["name"]
        if a["type"]:
            kind = a["type"].partition("[")[0]          # list[dict] is a list
            text += ": " + {"datetime": "datetime.datetime", "ENUM": "enum.Enum"}.get(kind, kind)
        if not a["required"]:
            equals = " = " if a["type"] else "="
            text += f"{equals}{default_value(a)!r}"
        arguments.append(text)
    return f"{function['name']}({', '.join(arguments)})"


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
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS:,} characters")
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
        for name, keywords in native_calls(text) or []:
            return name.removeprefix("nvdlib."), [], keywords
        raise ValueError("neither a JSON call nor a Python call with plain values "
                         f"({type(e).__name__})") from None


def full_arguments(function: dict, positional: list, keywords: dict) -> dict:
    """The arguments of a call, bound to names as Python binds them, with defaults filled in.

    As upstream does, floats given by keyword are made integers, those given by position are not.
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
    given |= without_floats(keywords)
    for a in function["args"]:
        if a["name"] in given:
            continue
        if a["required"]:
            raise ValueError(f"argument {a['name']!r} is missing")
        given[a["name"]] = default_value(a)
    if function.get("integers"):
        given = without_floats(given)
    return {name: given[name] for name in names}


def without_floats(arguments: dict) -> dict:
    """Arguments with floats cut to integers, since a model may print 3.33 as 3.3299999."""
    try:
        return {name: int(v) if isinstance(v, float) else v for name, v in arguments.items()}
    except (ValueError, OverflowError):
        raise ValueError("an argument is NaN or infinite") from None


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
