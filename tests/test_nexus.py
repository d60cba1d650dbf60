"""Nexus: calls are parsed, bound with their defaults, and compared.

Nothing a model writes is executed, and nothing raises.
"""
import json
import os
import time

import pytest

from benchmarks import nexus
from support.cli import DataError
from tiny import write

DATA = os.environ.get("SHAD_RFT_DATA")
COUNTS = {"cve_cpe": 78, "virustotal": 151, "emailrep": 38, "toolalpaca": 51, "toolllm": 21}
PRICE = {
    "name": "find_price", "args": [
        {"name": "item", "type": None, "required": True, "default": None},
        {"name": "limit", "type": "int", "required": False, "default": "None"},
        {"name": "shop", "type": "str", "required": False, "default": "'any'"},
        {"name": "undocumented", "type": None, "required": False, "default": "None"}],
    "docstring": "\nFind a {price}.\n\nArgs:\n"
                 "item (str): what\nlimit (int): how many\nshop (str): where\n"}
PRICE_RECORDS = [
    {"query": "Prices of tea, five of them?",
     "reference": "r = nvdlib.find_price(item = 'tea', limit=5)"},
    {"query": "a broken reference", "reference": "r = nvdlib.find_price("},
    {"query": None, "reference": "find_price('tea')"},
    {"query": "an unknown function", "reference": "other()"},
    {"query": "a call of the wrong kind", "reference": 7}]
LAMP_RECORD = {"turns_1": {
    "instruction": "Turn the lamp on.",
    "golden_answer": json.dumps(['switch(lamp="desk", on=True, tags=None)']),
    "docstring": '\nOPTION:\n<func_start>def switch(lamp: str, on: bool, tags: list[dict])'
                 '<func_end>\n<docstring_start>\n"""\nSwitch a lamp.\n"""\n<docstring_end>\n'}}
WEATHER_RECORD = {
    "Input": "Weather at 25.3, 55.3?", "Output": "weather(lat= 25.26,  lon= -55.3)", "context": [
        "def weather(lat: int=25.9, lon: int=(- 55.7), day: datetime=((2017 - 12) - 20)):\n"
        "    'The weather.'\n    x()"]}


@pytest.fixture
def folder(tmp_path):
    """Records of each schema: a plain set, ToolAlpaca's turns, ToolLLM's functions as source."""
    write(tmp_path / "function_specs.json", {"cve_cpe": [PRICE]})
    write(tmp_path / "cve_cpe_queries.json", PRICE_RECORDS)
    write(tmp_path / "toolalpaca_queries.json", [LAMP_RECORD, {"turns_1": {}}])
    write(tmp_path / "toolllm_queries.json", [WEATHER_RECORD])
    return str(tmp_path)


def is_right(item, output):
    verdict = nexus.judge(item, output)
    assert set(verdict) == {"correct", "reason"}
    assert isinstance(verdict["correct"], bool)
    assert verdict["reason"]
    return verdict["correct"]


def tools(item):
    """The functions that an item's prompt offers."""
    return json.loads(item.messages[0].text.split("\n")[1])


def test_items(folder):
    items = nexus.items(folder)
    assert [i.id for i in items] == [*(f"cve_cpe_{i}" for i in range(5)),
                                     "toolalpaca_0", "toolalpaca_1", "toolllm_0"]
    assert [m.role for m in items[0].messages] == ["system", "user"]
    assert items[0].messages[1].text == "Prices of tea, five of them?"
    assert tools(items[0]) == [{
        "name": "find_price", "description": PRICE["docstring"].strip(), "parameters": {
            "item": {"type": "str"}, "limit": {"type": "int, optional"},
            "shop": {"type": "str, optional", "default": "any"}}}]
    assert tools(items[5])[0]["parameters"]["tags"] == {"type": "list[dict]"}
    assert tools(items[5])[0]["description"] == "Switch a lamp."
    day = tools(items[7])[0]["parameters"]["day"]
    assert day == {"type": "datetime, optional", "default": "2017 - 12 - 20"}


RAVEN = '''
<human>:

OPTION:
<func_start>def find_price(item, limit: int = None, shop: str = 'any')<func_end>
<docstring_start>
"""
Find a price.

Args:
item (str): what
limit (int): how many
shop (str): where
"""
<docstring_end>

User Query: Question: Prices of tea, five of them?

Please pick a function from the above options that best answers the user query and fill in the \
appropriate arguments.<human_end>'''


def test_the_prompt_of_nexusraven(folder):
    items = nexus.items(folder, prompt="raven")
    [message] = items[0].messages
    assert message.role == "user"
    assert message.text == RAVEN
    assert "def switch(lamp: str, on: bool, tags: list)<func_end>" in items[5].messages[0].text
    weather = "def weather(lat: int = 25.9, lon: int = -55.7, day: datetime.datetime = "
    assert weather in items[7].messages[0].text
    tool_items = nexus.items(folder)
    assert [i.id for i in items] == [i.id for i in tool_items]
    assert [i.reference for i in items] == [i.reference for i in tool_items]


@pytest.mark.parametrize("output", [
    "find_price(item='tea', limit=5)", 'find_price("tea", 5)',
    "r = nvdlib.find_price('tea', limit=5, shop='any')",
    "```python\nfind_price(limit=5, item='tea')\n```", "[find_price(item='tea', limit=5)]",
    "find_price(item='tea', limit=5.9)",
    "\nInitial Answer: find_price(item='tea', limit=5)\nReflection: none",
    "find_price('tea', 5)\nfind_price('milk')",
    '[{"name": "find_price", "arguments": {"item": "tea", "limit": 5}}]',
    '{"name": "find_price", "arguments": {"item": "tea", "limit": 5.0}}',
    '```json\n[{"name": "find_price", "arguments": {"item": "tea", "limit": 5, "shop": "any"}}]'
    '\n```'])
def test_right(folder, output):
    assert is_right(nexus.items(folder)[0], output)


@pytest.mark.parametrize("output", [
    "find_price(item='Tea', limit=5)", "find_price(item='tea')", "find_price(item='tea', limit=6)",
    "find_price('tea', 5.9)", "find_price(item='tea', limit='5')",
    "find_price(item='tea', limit=5, shop='other')",
    "find_price(item='tea', limit=5, colour='green')",
    "find_price(item='tea', limit=5, undocumented=None)", "find_price('tea', item='tea', limit=5)",
    "find_price('tea', 5, 'any', 1)", "find_price(limit=5)", "other(item='tea', limit=5)",
    "find_price(item=tea, limit=5)", "find_price", "find_price(**{'item': 'tea', 'limit': 5})",
    "find_price(*['tea', 5])", "I cannot help.", "", "[]", "null",
    '[{"name": "find_price", "arguments": {"item": "tea"}}]',
    '[{"name": "find_price", "arguments": ["tea", 5]}]', '[{"name": ["find_price"]}]',
    '{"name": "find_price", "arguments": {"item": "tea", "limit": NaN}}',
    '{"name": "find_price", "arguments": {"item": "tea", "limit": 1e999}}'])
def test_wrong(folder, output):
    assert not is_right(nexus.items(folder)[0], output)


def test_a_required_argument_of_none_must_be_given(folder):
    item = nexus.items(folder)[5]
    assert is_right(item, "switch('desk', True, None)")
    assert not is_right(item, "switch('desk', True)")


def test_floats_and_defaults_of_toolllm(folder):
    item = nexus.items(folder)[-1]
    assert is_right(item, "weather(25, -55)")
    assert is_right(item, "weather(25.3, lon=-55.1)")
    assert is_right(item, "weather()")
    assert is_right(item, '{"name": "weather", "arguments": {"lon": -55.99}}')
    assert not is_right(item, "weather(24.99, -55)")
    assert not is_right(item, "weather(day='2017-12-20')")


def test_broken_records_are_named(folder):
    verdicts = []
    for item in nexus.items(folder):
        verdict = nexus.judge(item, "find_price('tea', 5)")
        verdicts.append({"id": item.id, "category": item.category, **verdict})
    summary = nexus.summary(verdicts)
    assert summary["data_faults"] == ["cve_cpe_1", "cve_cpe_2", "cve_cpe_3", "cve_cpe_4",
                                      "toolalpaca_1"]
    assert summary["accuracy"] == {"cve_cpe": 0.2, "toolalpaca": 0, "toolllm": 0}
    assert summary["average_over_sets"] == pytest.approx(0.2 / 3)
    assert summary["average_over_items"] == pytest.approx(1 / 8)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="cve_cpe_queries.json"):
        nexus.items(str(tmp_path))
    write(tmp_path / "emailrep_queries.json", [])
    with pytest.raises(DataError, match="function_specs.json"):
        nexus.items(str(tmp_path))
    write(tmp_path / "function_specs.json", [])
    with pytest.raises(DataError, match="one JSON object"):
        nexus.items(str(tmp_path))
    write(tmp_path / "function_specs.json", {})
    with pytest.raises(DataError, match="no records"):
        nexus.items(str(tmp_path))


HUGE = "0x" + "f" * 10_000             # an integer that Python refuses to print
DEEP = "[" * 900 + "]" * 900
HOSTILE = [
    "[" * 100_000, "(" * 100_000, "-" * 100_000 + "1", "f(" * 5000,
    "f(x=" + "[" * 5000 + "]" * 5000 + ")", "f(x=" + "+".join("1" * 20_000) + ")",
    '{"name": ' * 5000, "f" + "()" * 20_000, "f" + ".a" * 20_000 + "()",
    '[{"name": "find_price", "arguments": {"item": ' + DEEP + "}}]",
    "f(x=" + "9" * 10_000 + ")", f"f(x={HUGE})", f"find_price({HUGE}, 5)", f"weather({HUGE})",
    '{"name": "f", "arguments": {"x": ' + "9" * 10_000 + "}}", "\0", "f(\0)", "f(x='\ud800')",
    '[{"name": "find_price", "arguments": {"\\ud800": 1}}]', "f(x={[]: 1})", "find_price({[]: 1})",
    "```" * 50_000, "`" * 100_000, "lambda: 1", "x" * 1_000_000,
    "__import__('os').system('touch hacked')",
    "find_price(item=__import__('os').system('touch hacked'))", "Initial Answer:", "x = y",
    "def f(): pass", "import os", "pass", "x: int", "f(x=b'a', y={1, 2}, z=1j)",
    "find_price('tea', 5" + " " * 10_000 + ")", "find_price('tea', 5" + ", " * 500_000 + ")"]


@pytest.mark.parametrize("output", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_outputs_are_wrong(folder, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for item in nexus.items(folder):
        assert not is_right(item, output)
        json.dumps(nexus.judge(item, output), ensure_ascii=False).encode()
    assert not (tmp_path / "hacked").exists()


def test_only_the_call_counts_towards_the_longest_output(folder):
    item = nexus.items(folder)[0]
    assert is_right(item, "Initial Answer: find_price('tea', 5)\nReflection: " + "x" * 1_000_000)
    assert "10,000" in nexus.judge(item, "find_price('tea', 5)" + "\n" + "x" * 10_000)["reason"]


def test_a_broken_docstring_is_read_in_linear_time(tmp_path):
    turn = LAMP_RECORD["turns_1"] | {"docstring": "<func_start>" * 100_000}
    write(tmp_path / "toolalpaca_queries.json", [{"turns_1": turn}])
    start = time.perf_counter()
    [item] = nexus.items(str(tmp_path))
    assert time.perf_counter() - start < 2
    assert "fault" in item.reference


@pytest.mark.skipif(not DATA, reason="set SHAD_RFT_DATA to a folder with nexus/")
def test_every_reference_is_right():
    items = nexus.items(os.path.join(DATA, "nexus"))
    assert {name: sum(i.category == name for i in items) for name in COUNTS} == COUNTS
    for item in items:
        call = item.reference["call"]
        name, _, arguments = nexus.parse_call(call)
        assert is_right(item, call), item.id
        assert is_right(item, json.dumps([{"name": name, "arguments": arguments}])), item.id
        assert not is_right(item, call.replace("(", "_(", 1)), item.id
        assert item.messages[1].text
        assert len(item.messages[0].text) < 14_000
