"""StableToolBench: reading the queries, the agent's turns, and its loop."""
import ast
import json
import os

import pytest

from benchmarks import stabletoolbench as bench
from benchmarks.servers import recorded_file
from benchmarks.traces import final_answer
from stable import (
    GIVE_UP,
    LIST,
    PRICE,
    always_ok,
    answered,
    api,
    finish,
    query,
    say,
    turn,
    turns_taken,
)
from support.cli import DataError
from tiny import write

DATA = os.environ.get("SHAD_RFT_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="set SHAD_RFT_DATA to a folder with stabletoolbench/ and toolbench/")


@pytest.fixture
def items(tmp_path):
    write(tmp_path / "G1_tool.json", [query(7), query(8, "Second?")])
    write(tmp_path / "G2_category.json", [query(9, "Third?")])
    return bench.items(str(tmp_path))


def run(items, respond, call, max_steps=17):
    """{item id: trace}"""
    return {item.id: trace for item, trace in bench.run_agent(items, respond, call, max_steps)}


def solved(question, **fields):
    """A judge."""
    return "Solved", ""


def unsure(question, **fields):
    """A judge."""
    return "Unsure", ""


# --------------------------------------------------------------------------------------------------
# Reading and names

def test_items(items, tmp_path):
    assert [(i.id, i.category) for i in items] == [
        ("7", "G1_tool"), ("8", "G1_tool"), ("9", "G2_category")]
    assert items[0].reference == {
        "query": "Which soup is cheap?", "relevant": [LIST],
        "tools": ast.literal_eval(items[0].messages[0].text.split("following APIs: ")[1]),
        "functions": {LIST: ("Food, Drink", "soup_finder", "list_soups"),
                      PRICE: ("Food, Drink", "soup_finder", "price")}}
    system, user = items[0].messages
    assert (system.role, user.role) == ("system", "user")
    assert user.text == "Which soup is cheap?\nBegin!"
    assert "\nThought:\nAction\nAction Input:\n" in system.text
    assert "tools:\n1.soup_finder: None\n\nSpecifically" in system.text
    soups, price, end = ast.literal_eval(system.text.split("following APIs: ")[1])
    assert soups["name"] == LIST and end["name"] == "Finish"
    assert soups["parameters"] == {
        "type": "object", "required": ["town", "count"], "optional": ["is_id"],
        "properties": {"town": {"type": "string", "description": "the town"},
                       "count": {"type": "integer", "description": "the count"},
                       "is_id": {"type": "string", "description": "the id"}}}
    # optional parameters stand only beside required ones
    assert price["parameters"]["properties"] == {}

    folder = tmp_path / "up" / "solvable_queries" / "test_instruction"
    folder.mkdir(parents=True)
    write(folder / "G3_instruction.json", [query()])
    assert [i.category for i in bench.items(str(tmp_path / "up"))] == ["G3_instruction"]


@pytest.mark.parametrize("text, name", [
    ("Soup of today", "soup_of_today"), ("/soups/List/", "soups_list"),
    ("24 Soups", "get_24_soups"), ("👋 My  Soup", "my_soup"), ("A--B__c", "a_b_c"),
    ("查询", "查询"), ("", ""), ("ID", "id")])
def test_names(text, name):
    assert bench.standard_name(text) == name
    reserved = "is_id" if name == "id" else name
    assert bench.standard_name(text, reserved=True) == reserved


def test_function_names_are_cut_at_the_front_and_the_last_of_two_equal_ones_is_called(tmp_path):
    tool = "t" * 60
    write(tmp_path / "G1_tool.json", [query(apis=[api(tool, "one same"), api(tool, "two same")])])
    item, = bench.items(str(tmp_path))
    assert bench.function_name("x", "y") == "y_for_x"
    assert len(bench.function_name(tool, "one")) == 64
    assert item.reference["functions"] == {
        f"for_{tool}"[-64:]: ("Food, Drink", tool, "two_same")}


def test_bad_folders_and_records(tmp_path):
    with pytest.raises(DataError, match="holds no solvable_queries"):
        bench.items(str(tmp_path))
    broken = query(1)
    del broken["api_list"][0]["tool_name"]
    write(tmp_path / "G1_tool.json", [broken, "text", query(2)])
    items = bench.items(str(tmp_path))
    traces = run(items, say(finish("soup")), always_ok)
    summary = bench.summary([bench.judge(i, traces[i.id], solved) for i in items])
    assert summary["asked"] == 3 and summary["Solved"] == 1
    assert summary["pass_rate"] == pytest.approx(1 / 3)
    assert len(summary["broken_queries"]) == 2
    assert summary["broken_queries"][0].endswith(
        "G1_tool.json, record 1: the query is broken: KeyError: 'tool_name'")


# --------------------------------------------------------------------------------------------------
# One turn

@pytest.mark.parametrize("output, calls", [
    (turn("f", '{"a": 1}'), ("hm", [("f", {"a": 1})])),
    ("Thought: \nAction:f\nAction Input:{'a': True}", ("", [("f", "{'a': True}")])),
    (turn("f", '{"a": "b\nc"}'), ("hm", [("f", '{"a": "b\nc"}')])),
    (turn("f", ""), ("hm", [("f", {})])),
    (turn("f", "not json"), ("hm", [("f", "not json")])),
    (turn("f", "[1]"), ("hm", [("f", "[1]")])),
    ('I call: [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{}"}]',
     ("I call:", [("f", {"a": 1}), ("g", {})])),
    ("Here is your soup.", ("Here is your soup.", [])),
    ("", ("", [])),
    ('["f"]', ('["f"]', [])),
    ("Action Input: {}", ("Action Input: {}", []))])
def test_calls(output, calls):
    assert bench.parse_turn(output) == calls


@pytest.mark.parametrize("given", [
    "[" * 9999, '{"a":' * 9999, '{"a":' * 120 + "1" + "}" * 120, '{"a": ' + "9" * 9999 + "}",
    "{'a': {1, 2}}", "{1: 2, 'b': 3}", "{'a': b'x'}", "-" * 9999 + "1", "\0", '{"a": NaN}',
    '{"a": 1e999}', '{"a": "\ud800"}', '{"a": "\\ud800"}'])
def test_hostile_inputs(items, given, tmp_path):
    seen = {LIST: {"{}": {"error": "", "response": 1}}}
    call = recorded_file(write(tmp_path / "seen.json", seen))
    for action in (LIST, "Finish", given):
        trace = run(items[:1], say(turn(action, given), *[GIVE_UP] * 9), call)["7"]
        for t in (trace, trace[:1]):
            verdict = bench.judge(items[0], t, solved)
            assert verdict["status"] == "Unsolved"
            json.dumps([verdict, t])
    answer = final_answer(answered("a\ud800" + given))[1]
    answer.encode("utf-8")


def test_no_depth_of_nesting_runs_out_of_stack(items, tmp_path):
    seen = {LIST: {"{}": {"error": "", "response": 1}}}
    call = recorded_file(write(tmp_path / "seen.json", seen))
    for depth in range(100, 1200, 20):
        given = '{"a":' * depth + "1" + "}" * depth
        trace = run(items[:1], say(turn(LIST, given), finish("leek")), call)["7"]
        assert bench.judge(items[0], trace, unsure)["valid_json"] == (depth <= 300)
        answer = finish(0).partition("Action Input: ")[2]
        answer = f'[{{"name": "Finish", "arguments": {answer.replace("0", given)}}}]'
        trace = run(items[:1], say(answer, *[GIVE_UP] * 9), call)["7"]
        status = bench.judge(items[0], trace, solved)["status"]
        assert status == ("Solved" if depth < 300 else "Unsolved")


@pytest.mark.parametrize("given, end", [
    ({"return_type": "give_answer", "final_answer": "soup"}, ("give_answer", "soup")),
    ({"return_type": "give_answer", "final_answer": ["soup"]}, ("give_answer", '["soup"]')),
    ({"return_type": "give_up_and_restart", "final_answer": "soup"}, ("give_up_and_restart", "")),
    ({"return_type": "give_answer"}, (None, 'must have "final_answer"')),
    ("", (None, 'must have "return_type"')),
    ({"final_answer": "soup"}, (None, 'must have "return_type"')),
    ({"return_type": ["give_answer"]}, (None, 'must have "return_type"')),
    ('{"return_type": "give_answer", "final_answer": "so\nup"}', ("give_answer", "so\nup")),
    ('{"return_type": "give_answer", "final_answer": "so\nup', ("give_answer", "so\nup")),
    ("{'return_type': 'give_answer', 'final_answer': 'soup'}",
     (None, 'must have "return_type"')),
    ('{"return_type": "give_up_and_restart", ', ("give_up_and_restart", ""))])
def test_end(given, end):
    assert final_answer([{"action": LIST}, {"action": "Finish", "input": given}]) == end
    not_last = [{"action": "Finish", "input": given}, {"action": LIST, "input": {}}]
    assert final_answer(not_last)[0] is None


# --------------------------------------------------------------------------------------------------
# The loop

def test_loop(items):
    calls = []
    spoken = []
    script = {items[0].messages[1].text: [turn(LIST, '{"town": "Bern"}'), turn("soups", "{}"),
                                          finish("leek")],
              items[1].messages[1].text: [finish("none")],
              items[2].messages[1].text: ["no call", turn("Finish", "{}"), "still", "none"]}

    def respond(conversations):
        spoken.append([(len(c), c[-1].role) for c in conversations])
        return [script[c[1].text][turns_taken(c)] for c in conversations]

    def call(*arguments):
        calls.append(arguments)
        return {"error": "", "response": "x" * 2000, "source": "test"}

    finished = [(i.id, trace) for i, trace in bench.run_agent(items, respond, call, max_steps=4)]
    traces = dict(finished)
    # side by side
    assert spoken == [[(2, "user")] * 3, [(4, "tool")] * 2, [(6, "tool")] * 2, [(8, "tool")]]
    assert [(id, len(trace)) for id, trace in finished] == [("8", 1), ("7", 3), ("9", 4)]
    assert calls == [("Food, Drink", "soup_finder", "list_soups", {"town": "Bern"})]
    first, second, last = traces["7"]
    assert {k: first[k] for k in first if k != "observation"} == {
        "thought": "hm", "action": LIST, "input": {"town": "Bern"}, "source": "test"}
    assert first["observation"].startswith('{"error": "", "response": "xxx')
    assert len(first["observation"]) == 1024 + len("...")
    unknown = '{"error": "No such function name: soups", "response": ""}'
    assert second["observation"] == unknown and "source" not in second
    assert json.loads(traces["9"][1]["observation"])["error"] == 'must have "return_type"'
    assert len(items[0].messages) == 2                      # the items stay as they were
    assert run([], None, None) == {}


def test_two_calls_in_a_turn_and_a_conversation_too_long(items):
    both = json.dumps([{"name": LIST, "arguments": {}},
                       {"name": PRICE, "arguments": {"soup": "leek"}}])
    roles = []

    def respond(conversations):
        roles.append([m.role for m in conversations[0]])
        return [both if len(roles) == 1 else None]

    trace = run(items[:1], respond, always_ok)["7"]
    assert roles[1] == ["system", "user", "assistant", "tool", "tool"]
    assert [step["action"] for step in trace] == [LIST, PRICE, ""]
    verdict = bench.judge(items[0], trace, solved)
    assert verdict["reason"] == "the conversation grew too long"
    assert verdict["status"] == "Unsolved" and verdict["steps"] == 2


def test_a_model_that_leaves_out_an_answer_is_an_error(items):
    with pytest.raises(ValueError):
        run(items, lambda conversations: [GIVE_UP], always_ok)


def test_a_prompt_too_long_is_told_from_a_conversation_that_grew_too_long(items):
    trace = run(items[:1], say(None), always_ok)["7"]
    assert bench.judge(items[0], trace)["reason"] == "prompt too long for the model"
    trace = run(items[:1], say("no call", None), always_ok)["7"]
    assert bench.judge(items[0], trace)["reason"] == "the conversation grew too long"


def test_an_action_calls_the_first_function_that_ends_with_it_as_upstream(tmp_path):
    apis = [api("Soup", "advanced search"), api("Soup", "search"), api("Soup", "price")]
    write(tmp_path / "G1_tool.json", [query(apis=apis)])
    item, = bench.items(str(tmp_path))
    called = []

    def call(category, tool, name, tool_input):
        called.append(name)
        return always_ok()

    actions = ["search_for_soup", "ce_for_soup", "soup", "Soup", ""]
    steps = []
    for action in actions:
        steps += bench.run_turn(item, turn(action, "{}"), call)
    assert called == ["advanced_search", "price", "advanced_search"]
    assert bench.judge(item, steps)["valid_actions"] == 3


# --------------------------------------------------------------------------------------------------
# Real data

@needs_data
def test_the_765_queries_and_the_loop_on_recorded_responses():
    folder = os.path.join(DATA, "stabletoolbench")
    items = bench.items(folder)
    counts = {}
    for item in items:
        counts[item.category] = counts.get(item.category, 0) + 1
    assert counts == {"G1_category": 153, "G1_instruction": 163, "G1_tool": 158,
                      "G2_category": 124, "G2_instruction": 106, "G3_instruction": 61}
    assert not [i for i in items if "fault" in i.reference]
    assert len({i.id for i in items}) == 765
    assert all(set(i.reference["relevant"]) <= set(i.reference["functions"]) for i in items)
    path = os.path.join(folder, "observed_tool_responses.json")
    with open(path, encoding="utf-8") as f:
        recorded = json.load(f)

    def script(item):
        """One recorded call of each function that has one, then an answer; or giving up."""
        calls = []
        for name in item.reference["functions"]:
            if name in recorded:
                calls.append(turn(name, next(iter(recorded[name]))))
        return [*calls[:3], finish(f"after {len(calls[:3])}") if calls else GIVE_UP]

    scripts = {i.messages[1].text + i.messages[0].text: script(i) for i in items}

    def respond(conversations):
        return [scripts[c[1].text + c[0].text][turns_taken(c)] for c in conversations]

    traces = run(items, respond, recorded_file(path))
    summary = bench.summary([bench.judge(i, traces[i.id]) for i in items])
    assert summary["asked"] == 765
    assert summary["finish_rate"] + summary["give_up_rate"] == 1
    assert 0.3 < summary["finish_rate"] < 0.5
    assert summary["valid_action_rate"] == 1 and summary["valid_json_rate"] > 0.95
    assert summary["server_errors"] == {} and set(summary["sources"]) == {"stored"}
    assert summary["sources"]["stored"] == summary["steps"] > 500


@needs_data
def test_the_functions_are_those_of_toolbench_s_own_prompts():
    marker = "access to the following APIs: "
    theirs = {}
    path = os.path.join(DATA, "toolbench", "trajectories.json")
    with open(path, encoding="utf-8") as f:
        for record in json.load(f):
            system = record["conversations"][0]["value"]
            for function in ast.literal_eval(system.split(marker)[1]):
                theirs.setdefault(function["name"], []).append(function)
    same = total = 0
    for item in bench.items(os.path.join(DATA, "stabletoolbench")):
        for function in ast.literal_eval(item.messages[0].text.split(marker)[1])[:-1]:
            if function["name"] in theirs:
                same += function in theirs[function["name"]]
                total += 1
    assert total > 1000 and same / total > 0.99, (same, total)
