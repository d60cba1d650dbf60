"""Readers: every format, slices, streaming, and one clear sentence for what cannot be used."""
import json
import re
import time

import pytest
from tqdm import tqdm

from support.cli import DataError
from support.readers import TOOL_PROMPT, Message, call_spans, read_record, read_samples
from support.records import list_elements, read_records
from tiny import apigen, write


def turns(sample):
    return [(m.role, m.text, m.is_output) for m in sample.messages]


# --------------------------------------------------------------------------------------------------
# The formats

def test_apigen(tmp_path):
    records = apigen(3)
    samples = read_samples(write(tmp_path / "a.json", records))
    assert [s.id for s in samples] == ["0", "1", "2"]
    for sample, record in zip(samples, records, strict=True):
        assert [m.role for m in sample.messages] == ["system", "user", "assistant"]
        assert [m.is_output for m in sample.messages] == [False, False, True]
        system, user, assistant = sample.messages
        assert record["tools"] in system.text
        assert user.text == record["query"]
        assert assistant.text == record["answers"]
        assert "".join(text for text, _ in assistant.role_spans) == assistant.text


TOOLBENCH = [
    {"from": "system", "value": "You are AutoGPT."},
    {"from": "user", "value": "\nPaint a wall.\nBegin!\n"},
    {"from": "assistant", "value": "\nThought: \nAction: paint\nAction Input: {}"},
    {"from": "function", "value": "{\"error\": \"\"}"},
    {"from": "assistant", "value": "\nThought: done\nAction: Finish"},
]


def test_toolbench_trajectory(tmp_path):
    record = {"id": "G1/12_CoT@3", "query": "Paint a wall.", "conversations": TOOLBENCH}
    sample, = read_samples(write(tmp_path / "t.json", [record]))
    assert turns(sample) == [
        ("system", "You are AutoGPT.", False),
        ("user", "Paint a wall.\nBegin!", False),
        ("assistant", "Thought: \nAction: paint\nAction Input: {}", True),
        ("tool", "{\"error\": \"\"}", False),
        ("assistant", "Thought: done\nAction: Finish", True),
    ]


def test_toolbench_step_scores_only_its_last_turn(tmp_path):
    record = {"id": "Step 2: Paint a wall.", "conversations": TOOLBENCH}
    sample, = read_samples(write(tmp_path / "t.json", [record]))
    assert [m.is_output for m in sample.messages] == [False, False, False, False, True]
    roles = [m.role for m in sample.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_sharegpt(tmp_path):
    conversations = [
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Me."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "Bye!"},
    ]
    record = {"id": "identity_0", "conversations": conversations}
    sample, = read_samples(write(tmp_path / "s.json", [record]))
    assert sample.id == "identity_0"
    assert turns(sample) == [
        ("user", "Who?", False),
        ("assistant", "Me.", True),
        ("user", "Bye", False),
        ("assistant", "Bye!", True),
    ]


def test_sharegpt_with_tools(tmp_path):
    call = '{"name": "search", "arguments": {"q": "rice"}}'
    tools = '[{"name": "search"}]'
    conversations = [
        {"from": "human", "value": "Cook."},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "[1]"},
        {"from": "gpt", "value": "Rice."},
    ]
    record = {"conversations": conversations, "system": "Be brief.", "tools": tools}
    sample, = read_samples(write(tmp_path / "s.json", [record]))
    system = sample.messages[0]
    assert system.role == "system"
    assert system.text.startswith("Be brief.")
    assert tools in system.text
    assert turns(sample)[1:] == [
        ("user", "Cook.", False),
        ("assistant", call, True),
        ("tool", "[1]", False),
        ("assistant", "Rice.", True),
    ]
    no_tools = record | {"system": "", "tools": "[]"}
    sample, = read_samples(write(tmp_path / "n.json", [no_tools]))
    assert sample.messages[0].role == "user"


def test_messages(tmp_path):
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    sample, = read_samples(write(tmp_path / "m.json", [{"messages": messages}]))
    assert turns(sample) == [
        ("system", "Be brief.", False),
        ("user", "Weather in Köln?", False),
        ("assistant", '[{"name": "weather", "arguments": {"city": "Köln"}}]', True),
        ("tool", "rain", False),
        ("assistant", "It rains.", True),
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    tool_prompt = TOOL_PROMPT.format(json.dumps(tools))
    for system, own in (("Be brief.\n\n" + tool_prompt, messages), (tool_prompt, messages[1:])):
        record = {"messages": own, "tools": tools}
        sample, = read_samples(write(tmp_path / "t.json", [record]))
        assert sample.messages[0] == Message("system", system)
        roles = [m.role for m in sample.messages]
        assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_parts_give_the_true_roles(tmp_path):
    parts = [["Action: ", "format"], ["find", "reasoning"], [",", "boundary"],
             [" so", "connecting"]]
    turn = {"role": "assistant", "content": "Action: find, so", "parts": parts}
    record = {"messages": [{"role": "user", "content": "Find."}, turn]}
    sample, = read_samples(write(tmp_path / "p.json", [record]))
    assert sample.messages[0].role_spans is None
    assert sample.messages[1].role_spans == [(text, role) for text, role in parts]

    for wrong, said in (([["Action: find", "format"]], "concatenate"),
                        ([["Action: find, so", "input"]], "'input'.*reasoning, format")):
        turn["parts"] = wrong
        with pytest.raises(DataError, match=f"p.json, record 1: .*{said}"):
            read_samples(write(tmp_path / "p.json", [record]))


def test_content_parts_of_text_are_read(tmp_path):
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "world"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
    sample, = read_samples(write(tmp_path / "p.json", [{"messages": messages}]))
    assert turns(sample) == [("user", "Hello world", False), ("assistant", "Hello ", True)]
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(DataError, match="p.json, record 1: .*'image_url'"):
        read_samples(write(tmp_path / "p.json", [{"messages": messages}]))


def test_messages_keep_what_a_chat_template_takes():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "R"}
    result = {"role": "tool", "content": "x", "tool_call_id": "c1"}
    messages = [{"role": "user", "content": "Go."}, answer, result]
    sample = read_record({"messages": messages, "tools": json.dumps(tools)}, 0)
    assert sample.tools == tools
    parsed = call | {"function": {"name": "f", "arguments": {"a": 1}}}
    assert [m.turn for m in sample.messages] == [
        {},
        None,
        {"role": "assistant", "tool_calls": [parsed], "reasoning_content": "R"},
        result,
    ]
    system = {"role": "system", "content": "Be brief."}
    sample = read_record({"messages": [system, *messages], "tools": tools}, 0)
    assert sample.messages[0].turn == system


def native(record):
    sample = read_record(record, 0, native_calls=True)
    return [m.turn for m in sample.messages], sample.tools


def test_native_calls_of_apigen():
    record, = apigen(1)
    turns, tools = native(record)
    tool, = json.loads(record["tools"])
    assert tools == [{"type": "function", "function": tool}]
    assert turns[:2] == [{}, None]
    call, = turns[2]["tool_calls"]
    assert [call["function"]] == json.loads(record["answers"])
    assert len(call["id"]) == 9
    assert read_record(record, 0).tools is None


def test_native_calls_of_sharegpt():
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    conversations = [
        {"from": "human", "value": "Go."},
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": "one"},
        {"from": "observation", "value": "two"},
        {"from": "function_call", "value": json.dumps(calls[0])},
        {"from": "observation", "value": "three"},
        {"from": "gpt", "value": "Done."},
    ]
    record = {"conversations": conversations, "system": "Be brief.", "tools": '[{"name": "f"}]'}
    turns, tools = native(record)
    assert tools == [{"type": "function", "function": {"name": "f"}}]
    assert turns[0] == {"role": "system", "content": "Be brief."}
    assert [call["function"] for call in turns[2]["tool_calls"]] == calls
    asked = [call["id"] for i in (2, 5) for call in turns[i]["tool_calls"]]
    assert asked == [turns[i]["tool_call_id"] for i in (3, 4, 6)]
    assert len(set(asked)) == 3
    with pytest.raises(ValueError):
        conversations[1]["value"] = "search(rice)"
        native(record)

    without = {"conversations": [conversations[0], conversations[-1]]}
    assert read_record(without, 0, native_calls=True) == read_record(without, 0)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(apigen(2)).encode())
    assert len(read_samples(str(tmp_path / "b.json"))) == 2


def test_json_lines_and_slices(tmp_path):
    records = apigen(7)
    lines = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    array = write(tmp_path / "a.json", records)

    def ids(name):
        return [sample.id for sample in read_samples(name)]

    assert ids(lines) == ids(array) == list("0123456")
    assert ids(array + "[2:5]") == ["2", "3", "4"]
    assert ids(lines + "[:2]") == ["0", "1"]
    assert ids(array + "[5:]") == ["5", "6"]
    assert ids("toy[100:103]") == ids("toy")[100:103]


# --------------------------------------------------------------------------------------------------
# What cannot be used

USER = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello"}
GOOD = {"conversations": [USER, GPT]}
NO_TEXT = {"from": "gpt", "value": None}
EMPTY_TEXT = {"from": "gpt", "value": ""}
MARTIAN = {"from": "martian", "value": "?"}
IMAGE = {"role": "assistant", "content": [{"type": "image"}]}
good = json.dumps(GOOD)


@pytest.mark.parametrize("name, content, said", [
    ("u.json", [GOOD, {"text": "no known keys"}], ["u.json, record 2", "unknown format", "text"]),
    ("u.jsonl", good + '\n{"conversations": [}\n', ["u.jsonl, line 2", "not JSON"]),
    ("u.json", f'[{good},\n\n {{"query" oops]', ["u.json, line 3", "not JSON"]),
    ("u.json", f"[{good},\n {good}", ["u.json, line 2", "not JSON"]),
    ("u.json", f"[{good}\n {good}]", ["u.json, line 2", "delimiter"]),
    ("u.json", [GOOD, GOOD, {"conversations": [USER]}], ["u.json, record 3", "no assistant turn"]),
    ("u.json", [{"conversations": [USER, EMPTY_TEXT]}], ["u.json, record 1", "no assistant turn"]),
    ("u.json", [{"conversations": [MARTIAN, GPT]}], ["u.json, record 1", "martian"]),
    ("u.json", [{"messages": [IMAGE]}], ["u.json, record 1", "list"]),
    ("u.json", [{"query": "q", "answers": "[]"}], ["u.json, record 1", "tools"]),
    ("u.json", [{"query": "q", "answers": None, "tools": []}], ["u.json, record 1", "answers is"]),
    ("u.json", [GOOD, {"conversations": [USER, NO_TEXT]}], ["u.json, record 2"]),
    ("u.json", [GOOD, 7], ["u.json, record 2"]),
    ("u.json", f"[{good}]\n[{good}]", ["u.json, line 2", "after the end of the list"]),
    ("u.json", f"[{good}] and more", ["u.json, line 1", "after the end of the list"]),
    ("u.json", f"[{good}]" + " " * 20 + "\n" * 2**20 + "]", ["after the end of the list"]),
    ("u.json", "{\n" + good[1:] + good, ["u.json, line 2", "not JSON"]),
    ("u.json", [{"messages": [], "tools": [{}]}], ["u.json, record 1", "no assistant turn"]),
    ("u.json", [GOOD, {"messages": [{"role": "assistant", "content": "a\ud83d"}]}],
     ["u.json, record 2", "'\\ud83d'"]),
    ("u.json", [GOOD | {"id": "\ud83d"}], ["u.json, record 1", "surrogate"]),
    ("u.json", [{"query": "q", "tools": [], "answers": ["\udc00"]}], ["record 1", "surrogate"]),
    ("u.json", f'[{good},\n{{"query": {"9" * 5000}}}]', ["u.json, line 2", "digits"]),
    ("u.jsonl", f'{good}\n{{"query": {"9" * 5000}}}', ["u.jsonl, line 2", "digits"]),
    ("u.json", f"[{good},\n{'[' * 100_000}", ["u.json, line 2", "nested too deeply"]),
    ("u.jsonl", f"{good}\n{{\"a\": {'[' * 100_000}", ["u.jsonl, line 2", "nested too deeply"]),
    ("u.json", "{\n\"a\": " + "[" * 100_000, ["u.json, line 1", "nested too deeply"]),
    ("u.jsonl", "version https://git-lfs.github.com/spec/v1\noid x", ["line 1", "git lfs pull"]),
    ("u.json", [], ["u.json", "no samples"]),
    ("u.json", "", ["u.json", "no samples"]),
    ("u.json[5:]", [GOOD], ["u.json[5:]", "no samples"]),
])
def test_errors_name_the_file_and_the_record(tmp_path, name, content, said):
    path = write(tmp_path / name.split("[")[0], content)
    if name.endswith("[5:]"):
        path += "[5:]"
    with pytest.raises(DataError) as error:
        read_samples(path)
    assert all(word in str(error.value) for word in said), str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="nowhere.json"):
        read_samples(str(tmp_path / "nowhere.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"query": "\xe9"}]')
    with pytest.raises(DataError, match="latin.json.*UTF-8"):
        read_samples(str(tmp_path / "latin.json"))


TOO_LONG = ['[{}, {"query": "%s"}]', '{}\n{"query": "%s"}\n', '{\n"q": "%s"}']


@pytest.mark.parametrize("text", TOO_LONG)
def test_a_record_that_is_too_long_is_not_read(tmp_path, text):
    path = write(tmp_path / "l.json", text % ("x" * 3 * 2**20))
    assert len(list(read_records(path))) in (1, 2)
    with pytest.raises(DataError, match=r"l.json, line \d: .*1,000,000 characters"):
        list(read_records(path, longest=10**6))


# --------------------------------------------------------------------------------------------------
# Token roles, read off the structure of calls

def test_call_spans():
    arguments = {"name": 'a"b: {x}, [', "n": [1, -2500.5, {"arguments": None}], "ключ": "",
                 "e": True}
    calls = [{"name": "name", "arguments": arguments}, {"name": "g.h", "arguments": {}}]
    text = json.dumps(calls)
    spans = call_spans(text)
    assert "".join(t for t, _ in spans) == text
    assert {role for _, role in spans} == {"reasoning", "format", "boundary"}

    reasoning = [t for t, role in spans if role == "reasoning"]
    assert reasoning == ["name", "name", r'a\"b: {x}, [', "n", "1", "-2500.5", "arguments", "null",
                         r"\u043a\u043b\u044e\u0447", "e", "true", "g.h"]
    fixed = "".join(t for t, role in spans if role == "format")
    assert fixed.count("name") == 2
    assert fixed.count("arguments") == 2
    assert re.sub(r'name|arguments|[\s\[{:"]', "", fixed) == ""
    assert call_spans('[{"name": "never closed}]') is None


def test_what_ends_a_value_or_decides_what_follows_is_boundary():
    text = '[ {"name": "f", "arguments": {"a": "x", "b": [1, 2], "c": {}, "d": 3}}]'
    right = "............rbb................rb...rbb..rb...rbbrbb..rb...bb..rb.brbbb"
    marks = ""
    for part, role in call_spans(text):
        marks += {"reasoning": "r", "format": ".", "boundary": "b"}[role] * len(part)
    assert f"{text}\n{marks}" == f"{text}\n{right}"


@pytest.mark.parametrize("text", [r'"\" b ', '"a', "\\", "[{ x", " ", '"": {'])
def test_call_spans_take_linear_time(text):
    start = time.perf_counter()
    call_spans('[{"name": "' + text * (200_000 // len(text)))
    assert time.perf_counter() - start < 2


# --------------------------------------------------------------------------------------------------
# Files that do not fit in memory

class Drops:
    """A file that gives few characters at a time, whatever is asked for."""
    def __init__(self, text, size):
        self.pieces = iter([text[i:i + size] for i in range(0, len(text), size)])

    def read(self, _):
        return next(self.pieces, "")


@pytest.mark.parametrize("size", [1, 7, 64, 10**6])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_streamed_element_by_element(size, indent):
    records = [*apigen(9), {"long": "x, ] \\" * 300, "ü": [[], {}, "\u2028\n"]}, 12345, "a", [],
               None, True]
    with tqdm(disable=True) as bar:
        text = json.dumps(records, indent=indent) + " \n"
        assert list(list_elements(Drops(text, size), bar)) == records
        assert list(list_elements(Drops(" [ \n] ", size), bar)) == []


@pytest.mark.parametrize("text, line", [
    ('[{"a": 1},\n\n{"b": oops}, {"c": 1}]', 3),
    ('[{"a": 1}\n{"b": 1}]', 2),
    ("[1,\n2", 2),
    ("[", 1),
    ("[1, ]", 1),
])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_broken_list_says_in_which_line(text, line, size):
    with tqdm(disable=True) as bar, pytest.raises(json.JSONDecodeError) as error:
        list(list_elements(Drops(text, size), bar))
    assert error.value.lineno == line
