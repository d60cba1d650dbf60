"""BFCL's files: what is read, and one sentence for every record that is not as it should be."""
import json
import random

import pytest

from benchmarks import bfcl
from support.cli import DataError
from test_bfcl import ACCEPTED, AS_JSON, BOOK, FIND, GOOD, write


def test_items(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]
    record = {"id": "x", "question": [turns], "function": [FIND]}
    (tmp_path / "BFCL_v4_live_irrelevance.json").write_text(json.dumps(record))
    (tmp_path / "BFCL_v4_multi_turn_base.json").write_text("not read")
    item, = bfcl.items(str(tmp_path))
    assert [m.role for m in item.messages] == ["system", "user"]
    assert item.category == "live_irrelevance"
    system = item.messages[0].text
    assert '"name": "find"' in system and system.endswith("Be brief.")
    assert '"parameters": {"q": {"type": "' in system               # flat, as in APIGen's data


@pytest.mark.parametrize("file, text, said", [
    ("BFCL_v4_multiple.json", None, "holds no BFCL_v4_"),
    ("BFCL_v4_multiple.json", '{"id": 1}', "BFCL_v4_multiple.json, line 1"),
    ("BFCL_v4_multiple.json", "{oops", "line 1: not JSON"),
    ("possible_answer/BFCL_v4_multiple.json", None, "possible_answer"),
    ("possible_answer/BFCL_v4_multiple.json", "{oops", "line 1: not JSON"),
    ("possible_answer/BFCL_v4_multiple.json", "", "no answer to multiple_0"),
    ("possible_answer/BFCL_v4_multiple.json", '{"id": "multiple_0"}', "line 1 lacks 'ground_"),
    ("BFCL_v4_multiple.json", "", "holds no records"),
    ("BFCL_v4_live_relevance.json", "5", "line 1 does not follow its format")])
def test_bad_folder(tmp_path, file, text, said):
    write(tmp_path, "multiple", [FIND], [{"find": {"q": ["a"]}}])
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=said):
        bfcl.items(str(tmp_path))


@pytest.mark.parametrize("change, said", [
    ({"id": None}, "the id is None, not text"),
    ({"id": 1e999}, "the id is inf, not text"),
    ({"question": []}, "line 1 does not follow"),
    ({"question": [[]]}, "line 1 does not follow"),
    ({"question": None}, "line 1 does not follow"),
    ({"question": [[{"role": "user", "content": None}]]}, "a message of user with NoneType"),
    ({"question": [[{"role": "user", "content": ["Hi."]}]]}, "a message of user with list"),
    ({"question": [[{"role": "nobody", "content": "Hi."}]]}, "a message of nobody"),
    ({"question": [[{"role": "system", "content": "Hi."}]]}, "no message of a user"),
    ({"question": [[{"role": "user", "content": "Hi."}]] * 2}, "several turns"),
    ({"function": None}, "line 1 does not follow"),
    ({"question": [[{"role": "user", "content": "\ud83d"}]]}, "line 1 holds half a character"),
    ({"function": [{"parameters": {"properties": {}}}]}, "lacks 'name'"),
    ({"function": [{"name": "f"}]}, "lacks 'parameters'"),
    ({"function": [{"name": "f", "parameters": {"properties": {"a": {}}}}]}, "lacks 'type'"),
    ({"function": [{"name": "f", "parameters": {"properties": None}}]}, "line 1 does not follow")])
@pytest.mark.parametrize("category", ["live_irrelevance", "simple_java"])
def test_odd_record(tmp_path, category, change, said):
    write(tmp_path, category, [FIND | {"parameters": {"properties": {}}}], [{"find": {}}])
    path = tmp_path / f"BFCL_v4_{category}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=said):
        bfcl.items(str(tmp_path))


def test_an_id_that_was_there_before(tmp_path):
    write(tmp_path, "multiple", [FIND], [{"find": {"q": ["a"]}}])
    for file in ("BFCL_v4_multiple.json", "possible_answer/BFCL_v4_multiple.json"):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text + text)
        with pytest.raises(DataError, match="line 2: the id 'multiple_0' was there .*line 1"):
            bfcl.items(str(tmp_path))
        (tmp_path / file).write_text(text)


@pytest.mark.parametrize("parameter, truth, said", [
    ({"type": "array"}, [{"f": {"a(": [[1]]}}], "f's a( has elements of an unknown type"),
    ({"type": "array", "items": {}}, [{"f": {"a(": [[1]]}}], "has elements of an unknown type"),
    ({"type": "array", "items": {"type": "x"}}, [{"f": {"a(": [[1]]}}], "of an unknown type"),
    ({"type": "x"}, [{"f": {"a(": [1]}}], "f's a( is of the unknown type x"),
    ({"type": "string"}, [{"f": {"a(": "NYC"}}], "f's a( has no accepted value"),
    ({"type": "string"}, [{"f": {"a(": None}}], "f's a( has no accepted value"),
    ({"type": "string"}, [{"f": None}], "f's accepted values are no object"),
    ({"type": "string"}, [{"f": {}, "g": {}}], "an expected call is not one"),
    ({"type": "string"}, [5], "an expected call is not one"),
    ({"type": "string"}, [], "no list of expected calls"),
    ({"type": "string"}, {"f": {}}, "no list of expected calls")])
@pytest.mark.parametrize("category", ["simple_python", "multiple", "parallel"])
def test_odd_answers_are_counted_as_faults(tmp_path, category, parameter, truth, said):
    document = {"name": "f", "parameters": {"properties": {"a(": parameter}}}
    item = write(tmp_path, category, [document], truth)
    for text in ("[]", "[f()]", '[{"name": "f", "arguments": {"a(": [1]}}]'):
        assert said in bfcl.judge(item, text)["fault"]


JUNK = (None, True, 0, -1.5, "", "a(", "string", [], [None], {}, {"type": "array"}, "\ud800", 1e999)


def spots(content):
    """(container, key) of everything inside parsed JSON."""
    found = []
    stack = [content]
    while stack:
        container = stack.pop()
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in pairs:
            found.append((container, key))
            if isinstance(value, (dict, list)):
                stack.append(value)
    return found


def test_damaged_records_are_refused_or_judged(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "BFCL_v4_parallel.json"
    answer_path = tmp_path / "possible_answer" / "BFCL_v4_parallel.json"
    write(tmp_path, "parallel", [BOOK, FIND], [{"hotel.book": ACCEPTED}, {"find": {"q": ["a"]}}])
    texts = (path.read_text(), answer_path.read_text())
    outputs = ("", "[find(q='a')]", f"[{GOOD}), find(q='a')]", f"[{AS_JSON}, {AS_JSON}]")
    judged = 0
    for _ in range(1500):
        contents = [json.loads(text) for text in texts]
        for _ in range(rng.randrange(1, 3)):
            container, key = rng.choice(spots(rng.choice(contents)))
            if rng.random() < 0.3 and isinstance(container, dict):
                container.pop(key)
            elif rng.random() < 0.2 and isinstance(container, dict):
                container["a("] = container.pop(key)
            else:
                container[key] = rng.choice(JUNK)
        path.write_text(json.dumps(contents[0]))
        answer_path.write_text(json.dumps(contents[1]))
        try:
            item, = bfcl.items(str(tmp_path))
        except DataError as e:
            assert "BFCL_v4_parallel.json" in str(e)
            continue
        judged += 1
        assert all(isinstance(message.text, str) for message in item.messages)
        for output in outputs:
            assert json.dumps(bfcl.judge(item, output))
    assert judged > 300
