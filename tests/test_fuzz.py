"""Seeded mutations of every kind of file that is read: an error is one sentence, and comes soon."""
import json
import random
import time

import pytest

from support.cli import DataError
from support.readers import read_samples
from support.templates import Renderer, highlighted
from test_chat_template import TEMPLATES, make_chat_checkpoint
from tiny import apigen, make_checkpoint, write

SECONDS = 0.2       # of processor time, per case
BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
ODD_BYTES = [b"", b"\0", b"\xff", BOM, b'"', b"\\", b"\\ud83d", b"[", b"]]", b"{", b"}", b",", b":",
             b"\n", b"null", b"NaN", b"-", b"1e999", b"9" * 5000, b"[" * 5000, b" " * 999]
ODD_VALUES = [None, True, -1, 1.5, 10**30, float("inf"), "", "\ud83d", "x" * 999, "[1", "{}", [],
              {}, [[]], [None], {"type": "text"}, [{"type": "image"}], {"function": None}]

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
MESSAGES = {"tools": [{"type": "function", "function": {"name": "f"}}], "messages": [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Go."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "1"},
    {"role": "assistant", "content": "a: b", "parts": [["a: ", "format"], ["b", "reasoning"]]}]}
SHAREGPT = {"tools": '[{"name": "f"}]', "system": "Be brief.", "conversations": [
    {"from": "human", "value": "Go."},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "1"},
    {"from": "gpt", "value": "Done."}]}
TOOLBENCH = {"id": "Step 1: Go.", "conversations": [
    {"from": "user", "value": "\nGo."},
    {"from": "assistant", "value": "\nThought: \nAction: f\nAction Input: {}"}]}
RECORDS = {"apigen": apigen(3), "messages": [MESSAGES], "sharegpt": [SHAREGPT, SHAREGPT],
           "toolbench": [TOOLBENCH] * 3}


def mutated_bytes(content: bytes, rng, odd=ODD_BYTES) -> bytes:
    """One to three odd things put somewhere, or pieces cut out or doubled."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randint(0, len(content)) for _ in range(2))
        kind = rng.random()
        if kind < 0.5:
            content = content[:a] + rng.choice(odd) + content[a:]
        elif kind < 0.7:
            content = content[:a] + rng.choice(odd) + content[a + 1:]
        elif kind < 0.9:
            content = content[:a] + content[a + (b - a) // 8:]
        else:
            content = content[:b] + content[a:]
    return content


def mutated_value(value, rng):
    """The same value with one odd value somewhere in it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutated_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        i = rng.randrange(len(value))
        return [*value[:i], mutated_value(value[i], rng), *value[i + 1:]]
    return rng.choice(ODD_VALUES)


def as_list(value) -> bytes:
    return json.dumps(value).encode()


def as_lines(value) -> bytes:
    return "\n".join(map(json.dumps, value if isinstance(value, list) else [value])).encode()


def mutations(value, rng, count, write=as_list):
    """JSON files of a value, odd in their bytes or in their structure."""
    for i in range(count):
        if i % 2:
            yield mutated_bytes(write(value), rng)
        else:
            yield write(mutated_value(value, rng))


def check(function, *arguments, case):
    """Run it: nothing but a DataError of one line, and within the time. Returns what it returns."""
    start = time.process_time()
    result = None
    try:
        result = function(*arguments)
    except DataError as e:
        assert "\n" not in str(e), case
    assert time.process_time() - start < SECONDS, case
    return result


@pytest.fixture(scope="module")
def renderers(tmp_path_factory, chatml):
    checkpoint = make_chat_checkpoint(tmp_path_factory.mktemp("own"),
                                      TEMPLATES["drops earlier reasoning"])
    return [Renderer(chatml), Renderer(checkpoint)]


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("write", [as_list, as_lines])
def test_mutated_data(tmp_path, renderers, kind, write):
    rng = random.Random(f"{kind} {write.__name__}")
    path = tmp_path / "data.json"
    read = 0
    for case in mutations(RECORDS[kind], rng, 100, write):
        path.write_bytes(case)
        native_calls = rng.random() < 0.5
        samples = check(read_samples, str(path), native_calls, case=case)
        for sample in samples or []:
            read += 1
            for renderer in renderers:
                check(highlighted, renderer, sample, False, case=case)
    assert read > 20        # what is odd only in a place that does not matter is read


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json",
                                  "generation_config.json", "chat_template.jinja"])
def test_mutated_files_of_a_checkpoint(tmp_path, name):
    rng = random.Random(name)
    directory = make_chat_checkpoint(tmp_path, TEMPLATES["drops earlier reasoning"])
    path = tmp_path / name
    original = path.read_bytes() if path.exists() else b'{"eos_token_id": [1, 2]}'
    sample, = read_samples(write(tmp_path / "data.json", [MESSAGES]))
    cases = [b"", POINTER, BOM + original]
    if name.endswith(".jinja"):
        cases += [mutated_bytes(original, rng) for _ in range(60)]
    else:
        cases += mutations(json.loads(original), rng, 60)
    for case in cases:
        path.write_bytes(case)
        for template in ("auto", "chatml", "plain"):
            renderer = check(Renderer, directory, template, case=case)
            if renderer:
                check(highlighted, renderer, sample, False, case=case)


@pytest.mark.parametrize("name, content, said", [
    ("tokenizer.json", b"", "tokenizer.json does not follow its format"),
    ("tokenizer.json", POINTER, "git-lfs pointer.*git lfs pull"),
    ("config.json", b"", "config.json is not JSON"),
    ("config.json", POINTER, "git-lfs pointer"),
    ("config.json", b"\xff", "config.json cannot be read .not UTF-8"),
    ("config.json", b'{"vocab_size": "many"}', "config.json: vocab_size is 'many'"),
    ("config.json", b"[1]", "config.json holds no JSON object"),
    ("generation_config.json", b'{"eos_token_id": [1, null]}', "config.json: eos_token_id"),
    ("generation_config.json", b'{"a":' * 100_000, "config.json is nested too deeply"),
])
def test_broken_files_of_a_checkpoint_are_named(tmp_path, name, content, said):
    directory = make_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        Renderer(directory)


def test_a_byte_order_mark_in_a_file_of_a_checkpoint(tmp_path):
    directory = make_checkpoint(tmp_path)
    before = Renderer(directory)
    for name in ("config.json", "tokenizer.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(BOM + content)
    after = Renderer(directory)
    assert after.vocab_size == before.vocab_size
    assert after.tokenizer.to_str() == before.tokenizer.to_str()
