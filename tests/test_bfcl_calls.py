"""Reading calls and their values from text, without evaluating: Python, Java and JavaScript."""
import contextlib
import itertools
import re
import time

import pytest

from benchmarks.bfcl_calls import LONGEST, decode, python_calls, script_call
from benchmarks.bfcl_values import java_value, javascript_value, put_calls

FAILS = object()


@pytest.mark.parametrize("text, value", [
    ("-5", -5), ("+5", -5), ("[1, [2]]", [1, [2]]), ("(1, 'a')", (1, "a")), ("{'a': 1}", {"a": 1}),
    ("...", "..."), ("None", None), ("2**3 * 1.5", 12.0), ("'a' + 'b'", "ab"), ("-(1 + 2) + 4", 1),
    ("name", "name"), ("f(1, x)", "f(1, x)"), ("f(x=g(y=1))", {"f": {"x": {"g": {"y": 1}}}}),
    ("x[1:2]", "x[1:2]"), ("m.pi", FAILS), ("lambda: 1", FAILS), ("f'{x}'", FAILS),
    ("{1, 2}", FAILS), ("9**9**9", FAILS), ("'a' * 9", FAILS), ("f(1) + 1", FAILS),
    ("x if y else z", FAILS)])
def test_python_values_are_parsed_not_run(text, value):
    if value is FAILS:
        with pytest.raises(ValueError):
            python_calls(f"[f(a={text})]")
    else:
        assert python_calls(f"[f(a={text})]") == [("f", {"a": value})]


# -------------------------------------------------------------------------------------------------
# Java and JavaScript

@pytest.mark.parametrize("value, type_name, inner, expected", [
    ("5", "integer", None, 5), ("5.0", "integer", None, "5.0"),
    ("5L", "long", None, 5), ("5", "long", None, "5"),
    ("1.5f", "float", None, 1.5), ("1.5", "float", None, "1.5"),
    ("-1e3", "double", None, -1000.0),
    ("true", "boolean", None, True), ("True", "boolean", None, "True"),
    ("new int[]{1, 2}", "Array", "integer", [1, 2]), ("{1, 2}", "Array", "integer", "{1, 2}"),
    ('new ArrayList<>(Arrays.asList("a", "b"))', "ArrayList", "String", ["a", "b"]),
    ("new ArrayList<Long>() {{ add(1L); add(2L); }}", "ArrayList", "long", [1, 2]),
    ("new ArrayList<>()", "ArrayList", "long", []),
    ('new HashMap<String, Object>() {{ put("a", 1); put("b", "x"); put("c", 2.5f); '
     'put("d", true); }}', "HashMap", None, {"a": 1, "b": "x", "c": 2.5, "d": True}),
    ("new HashMap<>()", "HashMap", None, {}), ("map", "HashMap", None, "map")])
def test_java_values(value, type_name, inner, expected):
    got = java_value(value, type_name, inner)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("value, type_name, inner, expected", [
    ("5", "integer", None, 5), ("5n", "Bigint", None, 5), ("5", "Bigint", None, "5"),
    ("1.5", "float", None, 1.5), ("1e3", "float", None, "1e3"), ("'a'", "String", None, "a"),
    ("false", "Boolean", None, False), ("5", "any", None, "5"),
    ("['a', \"b\"]", "array", "String", ["a", "b"]),
    ("new Array(1, 2)", "array", "integer", [1, 2]), ("[]", "array", "String", []),
    ("[[1, 2], [3]]", "array", "array", [[1, 2], [3]]), ("x", "array", "String", "x"),
    ("{a: 1, 'b': [1, \"x\"], c: {d: true}}", "dict", None,
     {"a": 1, "b": [1, "x"], "c": "{d: true"}), ("{}", "dict", None, {})])
def test_javascript_values(value, type_name, inner, expected):
    got = javascript_value(value, type_name, inner)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize("language, text, arguments", [
    ("java", "a.b.f(x=1, y = \"a, b\", z=new int[] { 1, 2 })",
     {"x": "1", "y": "a, b", "z": "new int[]{1,2}"}),
    ("java", "f(x=new HashMap<String, Object>() {{ put(\"a\", 1); }}, y=A::b)",
     {"x": "new HashMap<String,Object>()", "y": "A::b"}),
    ("java", "f(x=new ArrayList<>(Arrays.asList(1, 2)), y=5L);",
     {"x": "new ArrayList<>(Arrays.asList(1, 2))", "y": "5L"}),
    ("java", "f(x=(Foo) a, y=g(1,  2).h, z=(a) -> { go(); })",
     {"x": "(Foo)a", "y": "g(1,  2).h", "z": "(a)->{go();}"}),
    ("java", "f(x=new Date(a), y=b == c, z=i++)", {"x": "new Date(a)", "y": "b==c", "z": "i++"}),
    ("java", "f(x=new A[]{new B() { int c; }, new D()})", {"x": "new A[]{new B(),new D()}"}),
    ("java", "f(name)", {None: "name"}),
    ("java", "f()", {}),
    ("javascript", "f(x={a: 1, b: [1, 2]}, y='q', z=[ 1,2 ],)",
     {"x": "{a: 1, b: [1, 2]}", "y": "q", "z": "[ 1,2 ]"}),
    ("javascript", "f(x=(a) => a + 1, y=5n)", {"x": "(a) => a + 1", "y": "5n"}),
    ("javascript", "javascript\nf(x=[...a])", {"x": "[...a]"}),
    ("javascript", "f('ignored', x=1)", {"x": "1"})])
def test_script_calls(language, text, arguments):
    assert [given for _, given in script_call(text, language)] == [arguments]


@pytest.mark.parametrize("language", ["java", "javascript"])
@pytest.mark.parametrize("text", [
    "f(x=1", "f(x=1))", "f(x=\"a)", "f(x='a)", "f(x=1 y=2)", "f(x=)", "f(x=1, x=2)", "f(x=a b)",
    "f(x=1) then", "f(x=1), g(y=1)", "x = 1", "(f(x=1))", "f(x=#a)", "f(x=a:b)", "f(x=a+)",
    "f(x=*a)", "f(x=1;)", "f(x=[1})", "f(x:1)", "f(x 1)", "f(=1)", "f('x'=1)", "return f(x=1)",
    "new F(x=1)", "I cannot do that."])
def test_no_call_of_either_language(language, text):
    with pytest.raises(ValueError):
        script_call(text, language)


@pytest.mark.parametrize("language, text", [
    ("java", "f(x=1,)"), ("java", "f(x=[1, 2])"), ("java", "f(x={1, 2})"),
    ("javascript", "f(x=5L)")])
def test_call_of_the_other_language(language, text):
    with pytest.raises(ValueError):
        script_call(text, language)


# -------------------------------------------------------------------------------------------------
# Bounded time on whatever a model writes

def longest(head, unit, tail=""):
    """A text of the greatest length that is read, most of it a repeated unit."""
    room = LONGEST - len(head) - len(tail)
    return head + unit * (room // len(unit)) + tail


def seconds(function, *arguments):
    start = time.process_time()
    with contextlib.suppress(Exception):
        function(*arguments)
    return time.process_time() - start


# On the longest text these would take up to a minute if patterns went back and forth in it. The
# bounds are a hundred times what an idle machine takes.
@pytest.mark.parametrize("head, unit, tail", [
    ("", "new HashMap<>(){", ""), ("", "new HashMap<>() {{", "x"), ("new HashMap<", ">() ", "x"),
    ("new HashMap<>(){{", 'put("",', "}}"), ("new HashMap<>(){{", 'put("', "}}"),
    ("new HashMap<>(){{", 'put("a", ', "}}"), ("new HashMap<>(){{", 'put("",', "\n)}}")])
def test_long_java_map(head, unit, tail):
    assert seconds(java_value, longest(head, unit, tail), "HashMap") < 1


@pytest.mark.parametrize("head, unit, tail", [
    ("new ArrayList<>(){{", "add(", "}}"), ("", "new ArrayList<>() {{", ""),
    ("", "new ArrayList<>(Arrays.asList(", ")"), ("new ArrayList<>(){{", "add(1", "}}")])
def test_long_java_list(head, unit, tail):
    assert seconds(java_value, longest(head, unit, tail), "ArrayList", "String") < 1


@pytest.mark.parametrize("head, unit, tail", [
    ("{", "a", "}"), ("{", ", ", "}"), ("{a:1,", " ", "}"), ("{", "a:1, ", "}"), ("{", "a:,", "}")])
def test_long_javascript_object(head, unit, tail):
    assert seconds(javascript_value, longest(head, unit, tail), "dict") < 1


@pytest.mark.parametrize("language", ["python", "java", "javascript"])
@pytest.mark.parametrize("head, unit, tail", [
    ("", "\t", "1(x=1)"), ("js", "\n", "1(x=1)"), ("js\n", "\t", "1(x=1)"), ("", "a.", "(x=1)"),
    ("f(x=", "/*", ")"), ("f(x=", "new a<", ")"), ("f(x=255**512", "*255**512", ")")])
def test_long_call(head, unit, tail, language):
    assert seconds(decode, longest(head, unit, tail), language) < 1


def test_patterns_in_two_steps_match_as_one():
    one_step = re.compile(r'put\("(.*?)",\s*(.*?)\)')
    for pieces in itertools.product(['put("', '",', '"', ")", "\n", " ", "a"], repeat=5):
        body = "".join(pieces)
        assert put_calls(body) == one_step.findall(body)

    one_step = re.compile(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?([^}]*)\}", re.S)
    for pieces in itertools.product([">", "()", " ", "{", "}", 'put("a",1)'], repeat=5):
        text = "new HashMap<>()" + "".join(pieces)
        match = one_step.search(text)
        expected = match and dict.fromkeys(re.findall("a", match[1]), 1)
        assert java_value(text, "HashMap") == (expected or {})

    one_step = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")
    for pieces in itertools.product("ab:, ", repeat=6):
        content = "".join(pieces)
        expected = {key.strip(): value.strip() for key, value in one_step.findall(content)}
        assert javascript_value("{" + content + "}", "dict") == expected
