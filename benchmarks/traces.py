"""Traces of StableToolBench's agent: how they end, files of them, and ToolEval's form.

A trace is the list of an agent's steps, one per call: {"thought", "action", "input",
"observation"}, with "source" or "fault" of the environment's response (see servers.py). The input
is a dict, or the text that it was where that is not a JSON object.
"""
import functools
import glob
import json
import os
import re

from benchmarks import Item
from benchmarks.servers import parse_input, parse_object
from support.cli import DataError
from support.files import replacing
from support.readers import as_json, read_records

# of a trace in ToolEval's form, which nests: readers of JSON go only some hundred levels deep
MAX_STEPS = 100
NO_SUCH_FUNCTION = '{"error": "No such function name: '     # so the observation begins


def final_answer(trace: list[dict]) -> tuple[str | None, str]:
    """How the last step ends the trace.

    Returns ("give_answer", the answer), ("give_up_and_restart", "") or (None, what is missing).
    """
    if not trace or trace[-1].get("action") != "Finish":
        return None, "no Finish"
    raw_input = trace[-1].get("input", "")
    fields = raw_input if isinstance(raw_input, dict) else finish_fields(raw_input)
    kind = fields.get("return_type")
    answer = fields.get("final_answer")
    if kind == "give_up_and_restart":
        return kind, ""
    if kind != "give_answer":
        return None, 'must have "return_type"'
    if answer is None:
        return None, 'must have "final_answer"'
    if not isinstance(answer, str):
        answer = json.dumps(answer)
    return kind, answer.encode("utf-8", "replace").decode()     # files take no lone surrogates


def finish_fields(text: str) -> dict:
    """The fields of a Finish that is not plain JSON, read as upstream's agent reads them.

    Line breaks within strings are allowed; in broken JSON, perhaps cut short, the fields are
    searched for.
    """
    value = parse_object(text, functools.partial(json.loads, strict=False))
    if isinstance(value, dict):
        return value
    fields = {}
    for name, content in (("return_type", r"\w+"), ("final_answer", ".*")):
        found = re.search(f'"{name}": "({content})', text, re.DOTALL)
        if found:
            fields[name] = found[1]
    return fields


# --------------------------------------------------------------------------------------------------
# Files

def read_predictions(path: str) -> dict[str, list[dict]]:
    """{item id: trace} of {"id", "trace": [{"action", "input", "observation"}, ...]} lines.

    Also of a run's own files, verdicts.jsonl or outputs.RANK.jsonl, or of its whole folder. Where
    the steps are unknown {"id", "output": "the final answer"} will do. A later line with the same
    id replaces an earlier one.
    """
    if not os.path.isdir(path):
        return read_traces(path)
    files = glob.glob(os.path.join(glob.escape(path), "outputs.*.jsonl"))
    if not files:
        raise DataError(f"{path} holds no outputs.*.jsonl; give a run's --out, or a file.")
    traces = {}
    for file in sorted(files):
        traces |= read_traces(file)
    return traces


def read_traces(path: str) -> dict[str, list[dict]]:
    traces = {}
    for where, record in read_records(path):
        try:
            if "id" not in record and "bench" in record:
                continue                            # the settings, first line of outputs.RANK.jsonl
            traces[str(record["id"])] = [read_step(step) for step in steps_of(record)]
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f'{where}: expected {{"id", "trace": [{{"action": "...", "input": ...}}]}} '
                'or {"id", "output": "..."}.') from None
    return traces


def steps_of(record: dict) -> list[dict]:
    if "trace" in record:
        return record["trace"]
    if isinstance(record["output"], list):          # outputs.RANK.jsonl
        return record["output"]
    answer = {"return_type": "give_answer", "final_answer": record["output"] or ""}
    return [{"action": "Finish", "input": answer}]


def read_step(step: dict) -> dict:
    action = step["action"].strip()
    tool_input = step["input"]
    if action:                                      # else the turn held no call
        tool_input = parse_input(as_json(tool_input))
    return step | {"action": action, "input": tool_input}


# --------------------------------------------------------------------------------------------------
# ToolEval's converted form

def converted_answer(trace: list[dict]) -> dict:
    """What ToolEval knows of a trace: {"method", "total_steps", "final_answer", "answer_details"}.

    final_answer is the whole input of the Finish, or "" where no answer was given. The details are
    a chain of nodes {"role", "message", "next": [node]}: system and user, whose messages are left
    out, then a tool node per call. Thoughts are nodes where they came without a call, and in traces
    without an answer.
    """
    has_answer = final_answer(trace)[0] == "give_answer"
    nodes = [{"role": "system", "message": ""}, {"role": "user", "message": ""}]
    for step in trace[-MAX_STEPS:]:
        if step.get("thought") and not (has_answer and step["action"]):
            nodes.append({"role": "assistant", "message": step["thought"]})
        if step["action"]:
            nodes.append({"role": "tool", "message": tool_message(step, has_answer)})
    chain = []
    for node in reversed(nodes):
        chain = [node | {"next": chain}]
    text = nodes[-1]["message"]["arguments"] if has_answer else ""
    return {"method": "CoT@1", "total_steps": len(nodes), "final_answer": text,
            "answer_details": chain}


def tool_message(step: dict, has_answer: bool) -> dict:
    name = step["action"]
    response = step.get("observation", "")
    if has_answer:      # then upstream leaves out what a Finish returned, and made-up names
        if name == "Finish":
            response = ""
        elif response.startswith(NO_SUCH_FUNCTION):
            name = "invalid_hallucination_function_name"
    return {"name": name, "arguments": as_json(step["input"]), "response": response}


def save_converted(items: list[Item], traces: dict[str, list[dict]], folder: str) -> None:
    """Write folder/tooleval/CATEGORY.json, which upstream's convert_to_answer_format.py would make.

    Its eval_pass_rate.py reads them as --converted_answer_path FOLDER --reference_model tooleval.
    Every item is in, with or without a trace: upstream's denominator is what the file holds.
    """
    files = {}
    for item in items:
        if "fault" not in item.reference:
            records = files.setdefault(item.category, {})
            records[item.id] = {"query": item.reference["query"],
                                "available_tools": item.reference["tools"],
                                "answer": converted_answer(traces.get(item.id, []))}
    os.makedirs(os.path.join(folder, "tooleval"), exist_ok=True)
    for category, records in files.items():
        with replacing(os.path.join(folder, "tooleval", f"{category}.json")) as file:
            json.dump(records, file)
