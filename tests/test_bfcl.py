"""BFCL: one call, several or none, hostile outputs, the summary, the real data."""
import json
import os
import subprocess
import sys

import pytest

from benchmarks import bfcl
from benchmarks.bfcl_calls import decode

BOOK = {"name": "hotel.book", "description": "Book.", "parameters": {
    "type": "dict", "required": ["city", "nights"], "properties": {
        "city": {"type": "string", "description": "where"},
        "nights": {"type": "integer"},
        "price": {"type": "float"},
        "pets": {"type": "boolean"},
        "rooms": {"type": "array", "items": {"type": "integer"}},
        "corner": {"type": "tuple", "items": {"type": "float"}},
        "guest": {"type": "dict"},
        "extras": {"type": "array", "items": {"type": "dict"}},
        "names": {"type": "array", "items": {"type": "string"}},
        "note": {"type": "any"},
    }}}
ACCEPTED = {
    "city": ["New York, NY", "NYC"],
    "nights": [2],
    "price": ["", 99.5],
    "pets": ["", False],
    "rooms": [[1, 2], ""],
    "corner": [[1.0, 2.0], ""],
    "guest": [{"name": ["Ann", "A."], "age": [30, ""]}, ""],
    "extras": [[{"kind": ["bed"]}, {"kind": ["cot"]}], ""],
    "names": [["Ann", "Bo"], ""],
    "note": ["late", 5, ""],
}
FIND = {"name": "find", "description": "Find.", "parameters": {
    "type": "dict", "required": ["q"], "properties": {"q": {"type": "string"}}}}


def write(folder, category, functions, truth=None):
    """The item of a folder that holds one record of one category."""
    os.makedirs(folder / "possible_answer", exist_ok=True)
    name = f"BFCL_v4_{category}.json"
    turns = [{"role": "user", "content": "Do it."}]
    question = {"id": f"{category}_0", "question": [turns], "function": functions}
    (folder / name).write_text(json.dumps(question) + "\n")
    if truth is not None:
        answer = {"id": f"{category}_0", "ground_truth": truth}
        (folder / "possible_answer" / name).write_text(json.dumps(answer) + "\n")
    return next(item for item in bfcl.items(str(folder)) if item.category == category)


@pytest.fixture
def book(tmp_path):
    return write(tmp_path, "simple_python", [BOOK], [{"hotel.book": ACCEPTED}])


def test_without_torch():
    code = "import benchmarks.bfcl, sys; assert 'torch' not in sys.modules"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# -------------------------------------------------------------------------------------------------
# One call

GOOD = "hotel.book(city='NYC', nights=2"
AS_JSON = '{"name": "hotel.book", "arguments": {"city": "NYC", "nights": 2}}'


@pytest.mark.parametrize("text, said", [
    (f"[{GOOD})]", None),
    (f"{GOOD})", None),
    (f"```\n[{GOOD})]\n```", None),
    (f"```python\n[{GOOD})]\n```", "no calls can be read"),         # upstream strips only backticks
    (f"Sure: {GOOD})", "no calls can be read"),
    (f"[{GOOD}", "no calls can be read"),
    (f"[{AS_JSON}]", None),
    (f"```json\n{AS_JSON}\n```", None),
    ('[{"name": "hotel.book", "arguments": "city"}]', "no calls can be read"),
    ("[]", "0 calls, not 1"),
    (f"[{GOOD}), {GOOD})]", "2 calls, not 1"),
    ("[book(city='NYC', nights=2)]", "function 'book', not hotel.book"),
    ("[hotel.book(city='NYC')]", "required argument nights is missing"),
    (f"{GOOD}, stars=5)", "unexpected argument 'stars'"),
    (f"{GOOD}, **more)", "unexpected argument None"),
    ("hotel.book('ignored', city='NYC', nights=2)", None),          # positional, as upstream
    ("hotel.book(city='new york ny', nights=2)", None),             # case, spaces, punctuation
    ("hotel.book(city='N.Y.C', nights=1+1)", None),
    ("hotel.book(city='Newark', nights=2)", "city = 'Newark' is not among"),
    ("hotel.book(city=['NYC'], nights=2)", "is not of type string"),
    ("hotel.book(city='NYC', nights=2.0)", "is not of type integer"),
    ("hotel.book(city='NYC', nights='2')", "is not of type integer"),
    ("hotel.book(city='NYC', nights=True)", "is not of type integer"),
    ("hotel.book(city='NYC', nights=3)", "nights = 3 is not among"),
    (f"{GOOD}, price=99.5)", None),
    (f"{GOOD}, price=99)", "price = 99 is not among"),              # an int passes as a float
    (f"{GOOD}, pets=0)", "is not of type boolean"),
    (f"{GOOD}, rooms=[1, 2])", None),
    (f"{GOOD}, rooms=[2, 1])", "rooms = [2, 1] is not among"),
    (f"{GOOD}, rooms=(1, 2))", "is not of type array"),
    (f"{GOOD}, corner=(1.0, 2.0))", None),
    (f"{GOOD}, names=['ANN', 'b.o'])", None),
    (f"{GOOD}, names=['Ann'])", "names = ['Ann'] is not among"),
    (f"{GOOD}, guest={{'name': 'a', 'age': 30}})", None),
    (f"{GOOD}, guest={{'name': 'ann'}})", None),
    (f"{GOOD}, guest={{'age': 30}})", "guest = {'age': 30} is not among"),
    (f"{GOOD}, guest={{'name': 'Ann', 'x': 1}})", "is not among"),
    (f"{GOOD}, extras=[{{'kind': 'bed'}}, {{'kind': 'cot'}}])", None),
    (f"{GOOD}, extras=[{{'kind': 'cot'}}, {{'kind': 'bed'}}])", "is not among"),
    (f"{GOOD}, extras=[1, 2])", "is not among"),
    (f"{GOOD}, note='LATE')", None),
    (f"{GOOD}, note=5)", "is not of type any"),     # any is text, like the first accepted value
])
def test_one_call(book, text, said):
    verdict = bfcl.judge(book, text)
    assert verdict["correct"] is (said is None), verdict
    assert verdict["reason"] == "correct" if said is None else said in verdict["reason"]


def test_argument_without_default(tmp_path):
    document = FIND | {"parameters": FIND["parameters"] | {"required": []}}
    item = write(tmp_path, "simple_python", [document], [{"find": {"q": ["a"]}}])
    assert bfcl.judge(item, "[find()]")["reason"] == "argument q is missing and has no default"


def test_a_variable_stands_for_a_value(tmp_path):
    truth = [{"hotel.book": {"city": ["a"], "nights": ["days"], "rooms": ["free"]}}]
    item = write(tmp_path, "simple_python", [BOOK], truth)
    assert bfcl.judge(item, "hotel.book(city='a', nights=days, rooms=free)")["correct"]
    # a variable is not normalized
    assert not bfcl.judge(item, "hotel.book(city='a', nights=days, rooms=Free)")["correct"]


# -------------------------------------------------------------------------------------------------
# Several calls, or none

def test_routing(tmp_path):
    two = [{"find": {"q": ["a"]}}, {"find": {"q": ["b", "a"]}}]
    parallel = write(tmp_path, "live_parallel_multiple", [BOOK, FIND], two)
    assert bfcl.judge(parallel, "[find(q='b'), find(q='a')]")["correct"]            # any order
    twice_b = bfcl.judge(parallel, "[find(q='b'), find(q='b')]")
    assert "2 calls" not in twice_b["reason"]
    assert not twice_b["correct"]
    assert bfcl.judge(parallel, "[find(q='a')]")["reason"] == "1 calls, not 2"

    greedy = write(tmp_path, "parallel", [FIND], two[::-1])
    assert not bfcl.judge(greedy, "[find(q='a'), find(q='b')]")["correct"]      # no backtracking
    assert bfcl.judge(greedy, "[find(q='b'), find(q='a')]")["correct"]

    multiple = write(tmp_path, "multiple", [BOOK, FIND], [{"find": {"q": ["a"]}}])
    assert bfcl.judge(multiple, "[find(q='a')]")["correct"]         # against the expected function


@pytest.mark.parametrize("text, calls", [
    ("I cannot.", False), ("", False), ("[]", False), ("None", False), ("[find(q='a')]", True),
    ('[{"name": "find", "arguments": {}}]', True), ('[{"function": "find"}]', False)])
def test_irrelevance_and_relevance(tmp_path, text, calls):
    irrelevance = write(tmp_path, "irrelevance", [FIND])
    relevance = write(tmp_path, "live_relevance", [FIND])
    assert bfcl.judge(irrelevance, text)["correct"] is not calls
    assert bfcl.judge(relevance, text)["correct"] is calls


def test_java_item(tmp_path):
    document = {"name": "A.f", "description": "F.", "parameters": {
        "type": "dict", "required": ["ids"], "properties": {
            "ids": {"type": "ArrayList", "items": {"type": "long"}, "description": "Ids."},
            "on": {"type": "boolean"}}}}
    truth = [{"A.f": {"ids": [[1, 2]], "on": ["", True]}}]
    item = write(tmp_path, "simple_java", [document], truth)

    def judge(ids, on=""):
        return bfcl.judge(item, f"[A.f(ids=new ArrayList<Long>(Arrays.asList({ids})){on})]")
    assert judge("1L, 2L", ", on=true")["correct"]
    assert not judge("1, 2")["correct"]                                 # no longs
    assert not judge("1L, 2L", ", on=True")["correct"]
    source = "new ArrayList<>(Arrays.asList(1L, 2L))"
    text = json.dumps([{"name": "A.f", "arguments": {"ids": source}}])
    assert bfcl.judge(item, text)["correct"]
    text = json.dumps([{"name": "A.f", "arguments": {"ids": [1, 2]}}])
    assert "written as strings" in bfcl.judge(item, text)["reason"]

    # the prompt's document says so, and the item's own is as it was
    shown = json.loads(item.messages[0].text.split("\n")[1])[0]["parameters"]
    note = "Ids. Written as a string: Java source text of type ArrayList of long."
    assert shown["ids"] == {"type": "string", "description": note}
    assert document["parameters"]["properties"]["ids"]["type"] == "ArrayList"


# -------------------------------------------------------------------------------------------------
# Whatever a model writes; the summary

HOSTILE_TYPES = (
    ("simple_python", "integer"), ("simple_python", "float"),
    ("simple_javascript", "dict"), ("simple_javascript", "array"),
    ("simple_java", "HashMap"), ("simple_java", "ArrayList"))


@pytest.mark.parametrize("value", [
    "[" * 5000, "-" * 5000 + "1", "a" + ".a" * 4000, "f" + "()" * 4000, "0x" + "f" * 8000,
    "9" * 5000, "9**9**9**9", "1e999", "\x00", "\ud800", "{[]: 1}", "{**x}", "1/0",
    "{" + "a:" * 4000 + "}", "[" + "[1]," * 2000, "new HashMap<" * 700, "'" * 8000, "a" * 20_000])
def test_hostile_output(tmp_path, value):
    for category, type_name in HOSTILE_TYPES:
        parameter = {"type": type_name, "items": {"type": "integer"}}
        document = {"name": "f", "description": "", "parameters": {
            "type": "dict", "required": ["a"], "properties": {"a": parameter}}}
        item = write(tmp_path, category, [document], [{"f": {"a": [1]}}])
        as_json = json.dumps([{"name": "f", "arguments": {"a": value}}])
        for text in (f"[f(a={value})]", value, as_json):
            verdict = bfcl.judge(item, text)
            assert verdict["correct"] is False and verdict["reason"]


def test_faults_are_named(tmp_path):
    item = write(tmp_path, "simple_python", [FIND], [{"find": {"q": ["a"], "page": [1, ""]}}])
    verdict = bfcl.judge(item, "[find(q='a')]")
    assert verdict["correct"] and "page" in verdict["fault"]
    row = {"id": item.id, "category": item.category, "output": "", **verdict}
    assert bfcl.summary([row])["data_faults"] == {"simple_python_0": verdict["fault"]}
    sound = write(tmp_path, "multiple", [FIND], [{"find": {"q": ["a"]}}])
    assert "fault" not in bfcl.judge(sound, "")


def verdicts_of(category, right, count):
    verdicts = []
    for i in range(count):
        verdicts.append({"id": f"{category}_{i}", "category": category, "correct": i < right,
                         "reason": "", "output": ""})
    return verdicts


def test_summary():
    summary = bfcl.summary([
        *verdicts_of("simple_python", 4, 4), *verdicts_of("simple_java", 1, 2),
        *verdicts_of("parallel", 1, 4), *verdicts_of("irrelevance", 0, 2),
        *verdicts_of("live_simple", 3, 3), *verdicts_of("live_multiple", 0, 1)])
    assert summary["categories"]["simple_java"] == {"accuracy": 0.5, "count": 2}
    groups = summary["groups"]
    # equal parts, except that the live categories go by their counts
    assert groups["simple"] == {"accuracy": 0.75, "over": ["simple_python", "simple_java"]}
    assert groups["non_live_ast"] == {"accuracy": 0.5, "over": ["simple", "parallel"]}
    assert groups["live_ast"] == {"accuracy": 0.75, "over": ["live_simple", "live_multiple"]}
    assert groups["overall_of_present"]["accuracy"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert summary["all_items"] == {"accuracy": 9 / 16, "count": 16}
    assert "live_ast" not in bfcl.summary(verdicts_of("parallel", 1, 2))["groups"]


# -------------------------------------------------------------------------------------------------
# The real data

@pytest.fixture(scope="module")
def real():
    if "SHAD_RFT_DATA" not in os.environ:
        pytest.skip("set SHAD_RFT_DATA")
    return bfcl.items(os.path.join(os.environ["SHAD_RFT_DATA"], "bfcl"))


def realise(value):
    """A value from an accepted one: a dictionary's are lists of alternatives, "" for none."""
    if isinstance(value, dict):
        return {k: choices[0] for k, choices in value.items() if choices[0] != ""}
    return [realise(x) for x in value] if isinstance(value, list) else value


def accepted_calls(item):
    """JSON calls of an item's first accepted values, without what may be left out."""
    required = {d["name"]: d["parameters"]["required"] for d in item.reference["documents"]}
    calls = []
    for call in item.reference["truth"]:
        for name, arguments in call.items():
            given = {}
            for argument, values in arguments.items():
                if "" not in values or argument in required[name]:
                    given[argument] = realise(next((v for v in values if v != ""), ""))
            calls.append({"name": name, "arguments": given})
    return json.dumps(calls)


def test_real_items(real):
    counts = {}
    for item in real:
        counts[item.category] = counts.get(item.category, 0) + 1
    assert counts["simple_python"] == 400 and counts["parallel_multiple"] == 200
    assert counts["irrelevance"] == 240
    faulty = {item.id for item in real if item.reference.get("fault")}
    assert faulty >= {"parallel_multiple_12", "parallel_multiple_26"}
    for item in real:
        if "truth" in item.reference and "java" not in item.category:
            calls = accepted_calls(item)
            assert bfcl.judge(item, calls)["correct"], item.id
            renamed = calls.replace('"name": "', '"name": "x', 1)
            assert not bfcl.judge(item, renamed)["correct"]
            assert len(decode(calls, "python")) == len(item.reference["truth"])
