"""BFCL: decoding without evaluating, the check of one call, routing, Java and JavaScript, the summary."""
import json
import os

import pytest

from data import DataError
from eval import (bfcl_decode, bfcl_items, bfcl_judge, bfcl_summary, java_value, javascript_value, python_calls, script_call)

BOOK = {"name": "hotel.book", "description": "Book.", "parameters": {"type": "dict", "required": ["city", "nights"], "properties": {
    "city": {"type": "string", "description": "where"}, "nights": {"type": "integer"}, "price": {"type": "float"},
    "pets": {"type": "boolean"}, "rooms": {"type": "array", "items": {"type": "integer"}},
    "corner": {"type": "tuple", "items": {"type": "float"}}, "guest": {"type": "dict"},
    "extras": {"type": "array", "items": {"type": "dict"}}, "names": {"type": "array", "items": {"type": "string"}},
    "note": {"type": "any"}}}}
FIND = {"name": "find", "description": "Find.", "parameters": {"type": "dict", "required": ["q"], "properties": {"q": {"type": "string"}}}}
ACCEPTED = {"city": ["New York, NY", "NYC"], "nights": [2], "price": ["", 99.5], "pets": ["", False], "rooms": [[1, 2], ""],
            "corner": [[1.0, 2.0], ""], "guest": [{"name": ["Ann", "A."], "age": [30, ""]}, ""],
            "extras": [[{"kind": ["bed"]}, {"kind": ["cot"]}], ""], "names": [["Ann", "Bo"], ""], "note": ["late", 5, ""]}


def write(folder, category, functions, truth=None):
    os.makedirs(folder / "possible_answer", exist_ok=True)
    name = f"BFCL_v4_{category}.json"
    question = {"id": f"{category}_0", "question": [[{"role": "user", "content": "Do it."}]], "function": functions}
    (folder / name).write_text(json.dumps(question) + "\n")
    if truth is not None:
        (folder / "possible_answer" / name).write_text(json.dumps({"id": f"{category}_0", "ground_truth": truth}) + "\n")
    return next(i for i in bfcl_items(str(folder)) if i.category == category)


@pytest.fixture
def book(tmp_path):
    return write(tmp_path, "simple_python", [BOOK], [{"hotel.book": ACCEPTED}])


FAILS = object()
GOOD = "hotel.book(city='NYC', nights=2"


@pytest.mark.parametrize("text, said", [
    (f"[{GOOD})]", None),
    (f"{GOOD})", None),
    (f"```\n[{GOOD})]\n```", None),
    (f"```python\n[{GOOD})]\n```", "no calls can be read"),                  # upstream strips the backticks alone
    (f"Sure: {GOOD})", "no calls can be read"),
    (f"[{GOOD}", "no calls can be read"),
    ('[{"name": "hotel.book", "arguments": {"city": "NYC", "nights": 2}}]', None),
    ('```json\n{"name": "hotel.book", "arguments": {"city": "NYC", "nights": 2}}\n```', None),
    ('[{"name": "hotel.book", "arguments": "city"}]', "no calls can be read"),
    ("[]", "0 calls, not 1"),
    (f"[{GOOD}), {GOOD})]", "2 calls, not 1"),
    ("[book(city='NYC', nights=2)]", "function 'book', not hotel.book"),
    ("[hotel.book(city='NYC')]", "required argument nights is missing"),
    (f"{GOOD}, stars=5)", "unexpected argument 'stars'"),
    (f"{GOOD}, **more)", "unexpected argument None"),
    ("hotel.book('ignored', city='NYC', nights=2)", None),                   # upstream ignores positional arguments
    ("hotel.book(city='new york ny', nights=2)", None),                      # case, spaces and punctuation do not count
    ("hotel.book(city='N.Y.C', nights=1+1)", None),
    ("hotel.book(city='Newark', nights=2)", "city = 'Newark' is not among"),
    ("hotel.book(city=['NYC'], nights=2)", "is not of type string"),
    ("hotel.book(city='NYC', nights=2.0)", "is not of type integer"),
    ("hotel.book(city='NYC', nights='2')", "is not of type integer"),
    ("hotel.book(city='NYC', nights=True)", "is not of type integer"),
    ("hotel.book(city='NYC', nights=3)", "nights = 3 is not among"),
    (f"{GOOD}, price=99.5)", None),
    (f"{GOOD}, price=99)", "price = 99 is not among"),                       # an int is taken as a float, here another one
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
    (f"{GOOD}, note=5)", "is not of type any"),                              # any is str; the first accepted value's type too
])
def test_one_call(book, text, said):
    verdict = bfcl_judge(book, text)
    assert verdict["correct"] is (said is None), verdict
    assert verdict["reason"] == "correct" if said is None else said in verdict["reason"]


def test_argument_without_default(tmp_path):
    item = write(tmp_path, "simple_python", [FIND | {"parameters": FIND["parameters"] | {"required": []}}], [{"find": {"q": ["a"]}}])
    assert bfcl_judge(item, "[find()]")["reason"] == "argument q is missing and has no default"


def test_a_variable_stands_for_a_value(tmp_path):
    item = write(tmp_path, "simple_python", [BOOK], [{"hotel.book": {"city": ["a"], "nights": ["days"], "rooms": ["free"]}}])
    assert bfcl_judge(item, "hotel.book(city='a', nights=days, rooms=free)")["correct"]
    assert not bfcl_judge(item, "hotel.book(city='a', nights=days, rooms=Free)")["correct"]         # not standardized


@pytest.mark.parametrize("text, value", [
    ("-5", -5), ("+5", -5), ("[1, [2]]", [1, [2]]), ("(1, 'a')", (1, "a")), ("{'a': 1}", {"a": 1}), ("...", "..."), ("None", None),
    ("2**3 * 1.5", 12.0), ("'a' + 'b'", "ab"), ("-(1 + 2) + 4", 1), ("name", "name"), ("f(1, x)", "f(1, x)"),
    ("f(x=g(y=1))", {"f": {"x": {"g": {"y": 1}}}}),
    ("x[1:2]", "x[1:2]"), ("m.pi", FAILS), ("lambda: 1", FAILS), ("f'{x}'", FAILS), ("{1, 2}", FAILS),
    ("9**9**9", FAILS), ("'a' * 9", FAILS), ("f(1) + 1", FAILS), ("x if y else z", FAILS)])
def test_python_values_are_parsed_not_run(text, value):
    if value is FAILS:
        with pytest.raises(ValueError):
            python_calls(f"[f(a={text})]")
    else:
        assert python_calls(f"[f(a={text})]") == [("f", {"a": value})]


def test_routing(tmp_path):
    two = [{"find": {"q": ["a"]}}, {"find": {"q": ["b", "a"]}}]
    parallel = write(tmp_path, "live_parallel_multiple", [BOOK, FIND], two)
    assert bfcl_judge(parallel, "[find(q='b'), find(q='a')]")["correct"]                    # any order
    assert "2 calls" not in bfcl_judge(parallel, "[find(q='b'), find(q='b')]")["reason"]
    assert not bfcl_judge(parallel, "[find(q='b'), find(q='b')]")["correct"]
    assert bfcl_judge(parallel, "[find(q='a')]")["reason"] == "1 calls, not 2"
    greedy = write(tmp_path, "parallel", [FIND], two[::-1])
    assert not bfcl_judge(greedy, "[find(q='a'), find(q='b')]")["correct"]                  # the first fit is taken, for good
    assert bfcl_judge(greedy, "[find(q='b'), find(q='a')]")["correct"]
    multiple = write(tmp_path, "multiple", [BOOK, FIND], [{"find": {"q": ["a"]}}])
    assert bfcl_judge(multiple, "[find(q='a')]")["correct"]                                 # against the expected function


@pytest.mark.parametrize("text, calls", [("I cannot.", False), ("", False), ("[]", False), ("None", False), ("[find(q='a')]", True),
                                         ('[{"name": "find", "arguments": {}}]', True), ('[{"function": "find"}]', False)])
def test_irrelevance_and_relevance(tmp_path, text, calls):
    assert bfcl_judge(write(tmp_path, "irrelevance", [FIND]), text)["correct"] is not calls
    assert bfcl_judge(write(tmp_path, "live_relevance", [FIND]), text)["correct"] is calls


# -----------------------------------------------------------------------------------------------------------------
# Java and JavaScript

@pytest.mark.parametrize("value, type_name, inner, expected", [
    ("5", "integer", None, 5), ("5.0", "integer", None, "5.0"), ("5L", "long", None, 5), ("5", "long", None, "5"),
    ("1.5f", "float", None, 1.5), ("1.5", "float", None, "1.5"), ("-1e3", "double", None, -1000.0), ("true", "boolean", None, True),
    ("True", "boolean", None, "True"), ("new int[]{1, 2}", "Array", "integer", [1, 2]), ("{1, 2}", "Array", "integer", "{1, 2}"),
    ('new ArrayList<>(Arrays.asList("a", "b"))', "ArrayList", "String", ["a", "b"]),
    ("new ArrayList<Long>() {{ add(1L); add(2L); }}", "ArrayList", "long", [1, 2]), ("new ArrayList<>()", "ArrayList", "long", []),
    ('new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); put("c", 2.5f); put("d", true); }}', "HashMap", None,
     {"a": 1, "b": "x", "c": 2.5, "d": True}), ("new HashMap<>()", "HashMap", None, {}), ("map", "HashMap", None, "map")])
def test_java_values(value, type_name, inner, expected):
    got = java_value(value, type_name, inner)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("value, type_name, inner, expected", [
    ("5", "integer", None, 5), ("5n", "Bigint", None, 5), ("5", "Bigint", None, "5"), ("1.5", "float", None, 1.5),
    ("1e3", "float", None, "1e3"), ("'a'", "String", None, "a"), ("false", "Boolean", None, False), ("5", "any", None, "5"),
    ("['a', \"b\"]", "array", "String", ["a", "b"]), ("new Array(1, 2)", "array", "integer", [1, 2]), ("[]", "array", "String", []),
    ("[[1, 2], [3]]", "array", "array", [[1, 2], [3]]), ("x", "array", "String", "x"),
    ("{a: 1, 'b': [1, \"x\"], c: {d: true}}", "dict", None, {"a": 1, "b": [1, "x"], "c": "{d: true"}), ("{}", "dict", None, {})])
def test_javascript_values(value, type_name, inner, expected):
    got = javascript_value(value, type_name, inner)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("language, text, arguments", [
    ("java", "a.b.f(x=1, y = \"a, b\", z=new int[] { 1, 2 })", {"x": "1", "y": "a, b", "z": "new int[]{1,2}"}),
    ("java", "f(x=new HashMap<String, Object>() {{ put(\"a\", 1); }}, y=A::b)", {"x": "new HashMap<String,Object>()", "y": "A::b"}),
    ("java", "f(x=new ArrayList<>(Arrays.asList(1, 2)), y=5L);", {"x": "new ArrayList<>(Arrays.asList(1, 2))", "y": "5L"}),
    ("java", "f(x=(Foo) a, y=g(1,  2).h, z=(a) -> { go(); })", {"x": "(Foo)a", "y": "g(1,  2).h", "z": "(a)->{go();}"}),
    ("java", "f(x=new Date(a), y=b == c, z=i++)", {"x": "new Date(a)", "y": "b==c", "z": "i++"}),
    ("java", "f(x=new A[]{new B() { int c; }, new D()})", {"x": "new A[]{new B(),new D()}"}),
    ("java", "f(name)", {None: "name"}), ("java", "f()", {}),
    ("javascript", "f(x={a: 1, b: [1, 2]}, y='q', z=[ 1,2 ],)", {"x": "{a: 1, b: [1, 2]}", "y": "q", "z": "[ 1,2 ]"}),
    ("javascript", "f(x=(a) => a + 1, y=5n)", {"x": "(a) => a + 1", "y": "5n"}),
    ("javascript", "javascript\nf(x=[...a])", {"x": "[...a]"}), ("javascript", "f('ignored', x=1)", {"x": "1"}),
    *((language, text, None) for language in ("java", "javascript") for text in (
        "f(x=1", "f(x=1))", "f(x=\"a)", "f(x='a)", "f(x=1 y=2)", "f(x=)", "f(x=1, x=2)", "f(x=a b)", "f(x=1) then", "f(x=1), g(y=1)",
        "x = 1", "(f(x=1))", "f(x=#a)", "f(x=a:b)", "f(x=a+)", "f(x=*a)", "f(x=1;)", "f(x=[1})", "f(x:1)", "f(x 1)", "f(=1)", "f('x'=1)",
        "return f(x=1)", "new F(x=1)", "I cannot do that.")),
    ("java", "f(x=1,)", None), ("java", "f(x=[1, 2])", None), ("java", "f(x={1, 2})", None), ("javascript", "f(x=5L)", None)])
def test_script_calls(language, text, arguments):
    if arguments is None:
        with pytest.raises(ValueError):
            script_call(text, language)
    else:
        assert [a for _, a in script_call(text, language)] == [arguments]


def test_java_item(tmp_path):
    document = {"name": "A.f", "description": "F.", "parameters": {"type": "dict", "required": ["ids"], "properties": {
        "ids": {"type": "ArrayList", "items": {"type": "long"}, "description": "Ids."}, "on": {"type": "boolean"}}}}
    item = write(tmp_path, "simple_java", [document], [{"A.f": {"ids": [[1, 2]], "on": ["", True]}}])
    assert bfcl_judge(item, "[A.f(ids=new ArrayList<Long>(Arrays.asList(1L, 2L)), on=true)]")["correct"]
    assert bfcl_judge(item, '[{"name": "A.f", "arguments": {"ids": "new ArrayList<>(Arrays.asList(1L, 2L))"}}]')["correct"]
    assert "written as strings" in bfcl_judge(item, '[{"name": "A.f", "arguments": {"ids": [1, 2]}}]')["reason"]
    assert not bfcl_judge(item, "[A.f(ids=new ArrayList<Long>(Arrays.asList(1, 2)))]")["correct"]           # no longs
    assert not bfcl_judge(item, "[A.f(ids=new ArrayList<Long>(Arrays.asList(1L, 2L)), on=True)]")["correct"]
    shown = json.loads(item.messages[0].text.split("\n")[1])[0]["parameters"]
    assert shown["ids"] == {"type": "string", "description": "Ids. Written as a string: Java source text of type ArrayList of long."}
    assert document["parameters"]["properties"]["ids"]["type"] == "ArrayList"


# -----------------------------------------------------------------------------------------------------------------
# Whatever a model writes, a folder holds or a run leaves out

@pytest.mark.parametrize("value", [
    "[" * 5000, "-" * 5000 + "1", "a" + ".a" * 4000, "f" + "()" * 4000, "0x" + "f" * 8000, "9" * 5000, "9**9**9**9", "1e999", "\x00",
    "\ud800", "{[]: 1}", "{**x}", "1/0", "{" + "a:" * 4000 + "}", "[" + "[1]," * 2000, "new HashMap<" * 700, "'" * 8000, "a" * 20_000])
def test_hostile_output(tmp_path, value):
    for category, type_name in (("simple_python", "integer"), ("simple_python", "float"), ("simple_javascript", "dict"),
                                ("simple_javascript", "array"), ("simple_java", "HashMap"), ("simple_java", "ArrayList")):
        document = {"name": "f", "description": "", "parameters": {"type": "dict", "required": ["a"], "properties": {
            "a": {"type": type_name, "items": {"type": "integer"}}}}}
        item = write(tmp_path, category, [document], [{"f": {"a": [1]}}])
        for text in (f"[f(a={value})]", value, json.dumps([{"name": "f", "arguments": {"a": value}}])):
            verdict = bfcl_judge(item, text)
            assert verdict["correct"] is False and verdict["reason"]


def test_faults_are_named(tmp_path):
    item = write(tmp_path, "simple_python", [FIND], [{"find": {"q": ["a"], "page": [1, ""]}}])
    verdict = bfcl_judge(item, "[find(q='a')]")
    assert verdict["correct"] and "page" in verdict["fault"]
    summary = bfcl_summary([{"id": item.id, "category": item.category, "output": "", **verdict}])
    assert summary["data_faults"] == {"simple_python_0": verdict["fault"]}
    assert "fault" not in bfcl_judge(write(tmp_path, "multiple", [FIND], [{"find": {"q": ["a"]}}]), "")


def test_items(tmp_path):
    question = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}]]
    (tmp_path / "BFCL_v4_live_irrelevance.json").write_text(json.dumps({"id": "x", "question": question, "function": [FIND]}))
    (tmp_path / "BFCL_v4_multi_turn_base.json").write_text("not read")
    item, = bfcl_items(str(tmp_path))
    assert [m.role for m in item.messages] == ["system", "user"] and item.category == "live_irrelevance"
    assert '"name": "find"' in item.messages[0].text and item.messages[0].text.endswith("Be brief.")
    assert '"parameters": {"q": {"type": "' in item.messages[0].text            # flat, as in APIGen's data


@pytest.mark.parametrize("file, text, said", [
    ("BFCL_v4_multiple.json", None, "holds no BFCL_v4_"),
    ("BFCL_v4_multiple.json", '{"id": 1}', "BFCL_v4_multiple.json, line 1"),
    ("BFCL_v4_multiple.json", "{oops", "line 1: not JSON"),
    ("possible_answer/BFCL_v4_multiple.json", None, "possible_answer"),
    ("possible_answer/BFCL_v4_multiple.json", "{oops", "line 1: not JSON"),
    ("possible_answer/BFCL_v4_multiple.json", "", "no answer to multiple_0")])
def test_bad_folder(tmp_path, file, text, said):
    write(tmp_path, "multiple", [FIND], [{"find": {"q": ["a"]}}])
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(DataError, match=said):
        bfcl_items(str(tmp_path))


def test_summary():
    def verdicts(category, right, n):
        return [{"id": f"{category}_{i}", "category": category, "correct": i < right, "reason": "", "output": ""} for i in range(n)]
    summary = bfcl_summary(verdicts("simple_python", 4, 4) + verdicts("simple_java", 1, 2) + verdicts("parallel", 1, 4) +
                           verdicts("irrelevance", 0, 2) + verdicts("live_simple", 3, 3) + verdicts("live_multiple", 0, 1))
    assert summary["categories"]["simple_java"] == {"accuracy": 0.5, "count": 2}
    groups = summary["groups"]
    assert groups["simple"] == {"accuracy": 0.75, "over": ["simple_python", "simple_java"]}                 # equal parts
    assert groups["non_live_ast"] == {"accuracy": 0.5, "over": ["simple", "parallel"]}
    assert groups["live_ast"] == {"accuracy": 0.75, "over": ["live_simple", "live_multiple"]}               # by count
    assert groups["overall_of_present"]["accuracy"] == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert summary["all_items"] == {"accuracy": 9 / 16, "count": 16}
    assert "live_ast" not in bfcl_summary(verdicts("parallel", 1, 2))["groups"]


# -----------------------------------------------------------------------------------------------------------------
# The real data

@pytest.fixture(scope="module")
def real():
    if "SHAD_RFT_DATA" not in os.environ:
        pytest.skip("set SHAD_RFT_DATA")
    return bfcl_items(os.path.join(os.environ["SHAD_RFT_DATA"], "bfcl"))


def accepted_calls(item):
    """JSON calls of an item's first accepted values, what may be left out left out."""
    def plain(value):
        if isinstance(value, dict):
            return {k: alternatives[0] for k, alternatives in value.items() if alternatives[0] != ""}
        return [plain(x) for x in value] if isinstance(value, list) else value

    needed = {d["name"]: d["parameters"]["required"] for d in item.reference["documents"]}
    return json.dumps([{"name": name, "arguments": {a: plain(next((v for v in values if v != ""), ""))
                                                    for a, values in arguments.items() if "" not in values or a in needed[name]}}
                       for call in item.reference["truth"] for name, arguments in call.items()])


def test_real_items(real):
    counts = {c: sum(i.category == c for i in real) for c in {i.category for i in real}}
    assert counts["simple_python"] == 400 and counts["parallel_multiple"] == 200 and counts["irrelevance"] == 240
    assert {i.id for i in real if i.reference.get("fault")} >= {"parallel_multiple_12", "parallel_multiple_26"}
    for item in real:
        if "truth" in item.reference and "java" not in item.category:
            assert bfcl_judge(item, accepted_calls(item))["correct"], item.id
            assert not bfcl_judge(item, accepted_calls(item).replace('"name": "', '"name": "x', 1))["correct"]
            assert len(bfcl_decode(accepted_calls(item), "python")) == len(item.reference["truth"])
