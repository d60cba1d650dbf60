r"""Calls in a model's own tool-call form, as its chat template writes them.

    Llama 3.1       <|python_tag|>{"name": "f", "parameters": {...}}; {"name": "g", ...}
    Hermes, Qwen    <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>
    Mistral         [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
                    [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}
"""
import json
import re

END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>")
NAMED_ARGUMENTS = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\[ARGS\]")
SEPARATOR = re.compile(r"[\s;,]*")
OTHER_KEYS = {"name", "type", "id"}


def native_calls(text: str) -> list[tuple[str, dict]] | None:
    """The calls [(name, arguments)] of a text in one of these forms; None for any other text.

    Skipped are thoughts up to </think>, words before the first tag, and the tokens that end a turn.
    A text with a call that cannot be read is not read at all.
    """
    text = without_end_tokens(text.rpartition("</think>")[2])
    calls = []
    try:
        if "<tool_call>" in text:
            for part in text.split("<tool_call>")[1:]:
                calls += calls_in_json(part.partition("</tool_call>")[0], "arguments")
        elif "[TOOL_CALLS]" in text:
            for part in text.split("[TOOL_CALLS]")[1:]:
                calls += mistral_calls(part)
        else:                       # "arguments" without a tag is what the benchmarks ask for
            calls = calls_in_json(text.replace("<|python_tag|>", ""), "parameters")
    except (ValueError, RecursionError):
        return None
    return calls or None


def without_end_tokens(text: str) -> str:
    text = text.strip()
    end = len(text)
    while text.endswith(END_TOKENS, 0, end):
        end = text.rfind("<", 0, end)
        while end > 0 and text[end - 1].isspace():
            end -= 1
    return text[:end]


def mistral_calls(text: str) -> list[tuple[str, dict]]:
    """The calls after one [TOOL_CALLS]: name[ARGS]{...}, or JSON."""
    named = NAMED_ARGUMENTS.match(text)
    if not named:
        return calls_in_json(text, "arguments")
    call = {"name": named[1], "arguments": json.loads(text[named.end():])}
    return [as_call(call, "arguments")]


def calls_in_json(text: str, key: str) -> list[tuple[str, dict]]:
    """The calls of JSON objects, or lists of them, one after another."""
    decoder = json.JSONDecoder()
    calls = []
    position = SEPARATOR.match(text).end()
    while position < len(text):
        value, position = decoder.raw_decode(text, position)
        values = value if isinstance(value, list) else [value]
        calls += [as_call(v, key) for v in values]
        position = SEPARATOR.match(text, position).end()
    return calls


def as_call(value, key: str) -> tuple[str, dict]:
    """(name, arguments) of a parsed call, its arguments under `key`. Raises ValueError for others.

    A function's own document, with name and parameters, is told by its further keys. Arguments may
    be JSON in a string, as in OpenAI's format.
    """
    if not isinstance(value, dict) or not value.keys() <= {key, *OTHER_KEYS}:
        raise ValueError("not a call")
    name = value.get("name")
    arguments = value.get(key)
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("not a call")
    return name, arguments
