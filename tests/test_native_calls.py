"""Calls in the forms of the models' own chat templates, alone and as outputs of BFCL."""
import json
import random
import time

import pytest

from benchmarks.bfcl_calls import decode
from benchmarks.native_calls import native_calls

F = '{"name": "a.f", "parameters": {"x": 1}}'
G = '{"name": "g", "parameters": {"y": ["; ", {"z": null}]}}'
TAGGED_F = '<tool_call>\n{"name": "a.f", "arguments": {"x": 1}}\n</tool_call>'
TAGGED_G = '<tool_call>\n{"name": "g", "arguments": {"y": ["; ", {"z": null}]}}\n</tool_call>'
LIST = ('[{"name": "a.f", "arguments": {"x": 1}, "id": "abcdefghi"}, '
        '{"name": "g", "arguments": {"y": ["; ", {"z": null}]}}]')
ONE = [("a.f", {"x": 1})]
TWO = [("a.f", {"x": 1}), ("g", {"y": ["; ", {"z": None}]})]

FORMS = [
    # Llama 3.1
    (F, ONE),
    (f"<|python_tag|>{F}", ONE),
    (f"<|python_tag|>{F}; {G}", TWO),
    (f"{F}\n{G}", TWO),
    (f"{F};\n{G};", TWO),
    (f"[{F}, {G}]", TWO),
    ('{"type": "function", "name": "a.f", "parameters": {"x": 1}}', ONE),
    # Hermes, Qwen
    (TAGGED_F, ONE),
    (f"{TAGGED_F}\n{TAGGED_G}", TWO),
    (TAGGED_F.replace("\n", ""), ONE),
    (TAGGED_F.removesuffix("\n</tool_call>"), ONE),             # stopped before the closing tag
    (f"<think>\nWhich <tool_call>?\n</think>\n\n{TAGGED_F}", ONE),
    (f"I will look.\n{TAGGED_F}\nAnd then:\n{TAGGED_G}", TWO),
    ('<tool_call>{"name": "a.f", "arguments": "{\\"x\\": 1}"}</tool_call>', ONE),
    # Mistral
    (f"[TOOL_CALLS] {LIST}", TWO),
    (f"[TOOL_CALLS]{LIST}", TWO),
    ('[TOOL_CALLS]a.f[ARGS]{"x": 1}', ONE),
    ('[TOOL_CALLS]a.f[CALL_ID]abcdefghi[ARGS]{"x": 1}', ONE),
    ('[TOOL_CALLS]a.f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{"y": ["; ", {"z": null}]}', TWO),
]


@pytest.mark.parametrize("end", ["", "<|eot_id|>", "<|im_end|>", "</s>", " <|eom_id|>\n</s>\n"])
@pytest.mark.parametrize("text, calls", FORMS)
def test_each_form_is_read(text, calls, end):
    assert native_calls(text + end) == calls


@pytest.mark.parametrize("language", ["python", "java", "javascript"])
@pytest.mark.parametrize("text, calls", FORMS)
def test_bfcl_reads_each_form(text, calls, language):
    assert decode(text, language) == calls


@pytest.mark.parametrize("text", [
    "", "I cannot.", "</s>", "[]", "{}", "5", '"a"', "[f(x=1)]", f"Sure: {F}", f"{F} it is", F[:-1],
    '{"name": "f"}', '{"name": 1, "parameters": {}}', '{"name": "f", "parameters": [1]}',
    '{"name": "f", "description": "F.", "parameters": {"type": "dict"}}',       # a document
    "<tool_call>", "<tool_call></tool_call>", "Use <tool_call> tags.", "<tool_call>\nf(x=1)\n",
    f"{TAGGED_F}\n<tool_call>\n{{oops", "<tool_call>" * 9, "[TOOL_CALLS]", "[TOOL_CALLS] f(x=1)",
    "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS]1", "[ARGS]{}", "[" * 9000,
    '{"name": "f", "parameters": ' + "[" * 9000])
def test_other_text_has_no_calls(text):
    assert native_calls(text) is None


def test_what_was_read_before_is_read_as_before():
    # a call whose argument quotes another form, and statements that Java and JavaScript leave aside
    text = f"f(a='''{TAGGED_F}''')"
    assert decode(text, "python") == [("f", {"a": TAGGED_F})]
    assert decode(f"f(x=1); {TAGGED_F.replace(chr(10), '')}", "java") == [("f", {"x": "1"})]
    both = '{"name": "f", "arguments": {"x": 1}, "parameters": {"x": 2}}'
    assert decode(both, "python") == [("f", {"x": 1})]

    # what is almost the requested form stays unread, and with the same message
    for text in (f"{LIST}{LIST}", f"{LIST}<|im_end|>", f"{LIST};"):
        assert native_calls(text) is None
    with pytest.raises(ValueError, match="JSON, but not a list"):
        decode('{"name": "f"}', "python")


def test_damaged_forms_never_fail():
    rng = random.Random(0)
    for _ in range(3000):
        text, _ = rng.choice(FORMS)
        for _ in range(rng.randrange(1, 4)):
            start = rng.randrange(len(text))
            end = start + rng.randrange(8)
            piece = rng.choice(["", "{", '"', "]", "\\", "<tool_call>", "</s>"])
            text = text[:start] + piece + text[end:]
        calls = native_calls(text)
        assert calls is None or calls
        for name, arguments in calls or []:
            assert isinstance(name, str) and isinstance(arguments, dict)
            json.dumps(arguments)


@pytest.mark.parametrize("unit", [
    "</s>", " </s>", "<tool_call>", "</tool_call>", "</think>", "[TOOL_CALLS]", f"{F};", TAGGED_F,
    "[TOOL_CALLS]f[ARGS]{}", "<|python_tag|>", "<|eot_id|", " ", ";", "a", "[ARGS]", "{", '{"a":'])
def test_long_text(unit):
    start = time.process_time()
    native_calls(unit * (200_000 // len(unit)))
    assert time.process_time() - start < 2
