"""Traces of StableToolBench's agent: on file, and in ToolEval's converted form."""
import json

import pytest

from benchmarks import stabletoolbench as bench
from benchmarks.traces import converted_answer, final_answer, read_predictions, save_converted
from stable import GIVE_UP, LIST, PRICE, always_ok, answered, finish, options, query, say, turn
from support.cli import DataError
from tiny import write


@pytest.fixture
def items(tmp_path):
    write(tmp_path / "G1_tool.json", [query(7), query(8, "Second?")])
    write(tmp_path / "G2_category.json", [query(9, "Third?"), {"query_id": 10}])
    return bench.items(str(tmp_path))


def run(item, *outputs):
    """The trace of an agent that says these."""
    (_, trace), = bench.run_agent([item], say(*outputs), always_ok, max_steps=17)
    return trace


def write_lines(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# --------------------------------------------------------------------------------------------------
# Files

def test_traces(tmp_path, items):
    trace = run(items[0], turn(LIST, "{}"), finish("leek"))
    text = '{"return_type": "give_answer", "final_answer": "x"}'
    lines = [{"id": 7, "output": "old"}, {"id": "7", "trace": trace}, {"id": 8, "output": "soup"},
             {"id": 9, "output": None}, {"id": 10, "trace": [{"action": "Finish ", "input": text}]},
             {"id": 11, "trace": []}]
    traces = read_predictions(write_lines(tmp_path / "traces.jsonl", *lines))
    assert traces["7"] == trace
    assert {id: final_answer(trace)[1] for id, trace in traces.items()} == {
        "7": "leek", "8": "soup", "9": "", "10": "x", "11": "no Finish"}
    for bad in ({"id": 1}, {"output": "x"}, {"id": 1, "trace": [{"action": 1, "input": {}}]},
                {"id": 1, "trace": [1]}, {"id": 1, "trace": 1}, {"id": 1, "output": [1]}, 5):
        with pytest.raises(DataError, match="traces.jsonl, line 2"):
            read_predictions(write_lines(tmp_path / "traces.jsonl", lines[0], bad))


def test_a_run_s_own_files_are_read_with_all_steps(tmp_path, items):
    traces = {"7": run(items[0], turn(LIST, '{"town": "Bern"}'), turn(LIST, "{'a': 1}"), GIVE_UP),
              "8": run(items[1], "no call", finish("leek\nsoup")), "9": run(items[2], None)}
    settings = {"bench": "stabletoolbench", "model": "m", "max_steps": 17}
    folder = tmp_path / "out"
    folder.mkdir()
    for rank, ids in enumerate((("7", "9"), ("8",))):
        lines = [{"id": id, "output": traces[id]} for id in ids]
        write_lines(folder / f"outputs.{rank}.jsonl", settings, *lines)
    assert read_predictions(str(folder)) == traces
    assert list(read_predictions(str(folder / "outputs.0.jsonl"))) == ["7", "9"]

    verdicts = bench.judge_outputs(items[:3], traces, options())
    path = write_lines(folder / "verdicts.jsonl", *verdicts)
    assert read_predictions(path) == traces
    assert bench.judge_outputs(items[:3], read_predictions(path), options()) == verdicts
    with pytest.raises(DataError, match="holds no outputs"):
        read_predictions(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# ToolEval's converted form

def nodes(answer):
    """[(role, message)] of a chain."""
    chain = answer["answer_details"]
    found = []
    while chain:
        node, = chain
        assert list(node) == ["role", "message", "next"]
        found.append((node["role"], node["message"]))
        chain = node["next"]
    assert answer["total_steps"] == len(found)
    return found


def tool_node(name, arguments, response=""):
    return "tool", {"name": name, "arguments": arguments, "response": response}


def test_converted_answer(items):
    both = json.dumps([{"name": LIST, "arguments": {"town": "Zürich"}},
                       {"name": PRICE, "arguments": "{'a': 1}"}], ensure_ascii=False)
    response = '{"error": "", "response": "ok"}'
    answer = converted_answer(run(items[0], "I think.", both, finish("leek")))
    text = '{"return_type": "give_answer", "final_answer": "leek"}'
    assert answer["final_answer"] == text and answer["method"] == "CoT@1"
    assert nodes(answer) == [
        ("system", ""), ("user", ""), ("assistant", "I think."),
        tool_node(LIST, '{"town": "Zürich"}', response), tool_node(PRICE, "{'a': 1}", response),
        tool_node("Finish", text)]

    # as upstream, a made-up name and what a Finish in vain returned are left out
    answer = converted_answer(run(items[0], turn("f", "{}"), turn("Finish", "{}"), finish("leek")))
    unknown = '{"error": "No such function name: f", "response": ""}'
    assert nodes(answer)[2:4] == [tool_node("invalid_hallucination_function_name", "{}", unknown),
                                  tool_node("Finish", "{}")]

    # without an answer, the thoughts are there too
    answer = converted_answer(run(items[0], turn(LIST, "{}"), GIVE_UP))
    gave_up = tool_node("Finish", '{"return_type": "give_up_and_restart"}',
                        '{"error": "", "response": ""}')
    assert answer["final_answer"] == ""
    assert nodes(answer) == [
        ("system", ""), ("user", ""), ("assistant", "hm"), tool_node(LIST, "{}", response),
        ("assistant", "hm"), gave_up]
    assert nodes(converted_answer([])) == [("system", ""), ("user", "")]
    assert nodes(converted_answer(answered("leek")))[-1] == tool_node("Finish", text)
    assert nodes(converted_answer(run(items[0], None))) == [("system", ""), ("user", "")]


def test_a_long_trace_does_not_nest_too_deep_to_be_read(items):
    calls = [{"action": LIST, "input": {}, "thought": "hm"}] * 2000
    answer = converted_answer([*calls, *answered("leek")])
    assert json.loads(json.dumps(answer))["final_answer"].endswith('"leek"}')
    assert len(nodes(answer)) == 102


def test_the_run_is_saved_for_upstream_s_evaluator(tmp_path, items):
    traces = {"7": run(items[0], turn(LIST, '{"a": "\\ud800"}'), finish("leek"))}
    verdicts = bench.judge_outputs(items, traces, options(out=str(tmp_path / "out")))
    assert [v["reason"] for v in verdicts][1:3] == ["no output"] * 2
    folder = tmp_path / "out" / "tooleval"
    assert sorted(path.name for path in folder.iterdir()) == ["G1_tool.json", "G2_category.json"]
    records = json.loads((folder / "G1_tool.json").read_text())
    assert list(records) == ["7", "8"] and list(records["7"]) == [
        "query", "available_tools", "answer"]
    assert records["7"]["query"] == "Which soup is cheap?"
    assert [tool["name"] for tool in records["7"]["available_tools"]] == [LIST, PRICE, "Finish"]
    assert records["7"]["answer"] == converted_answer(traces["7"])
    # every query is in, so that it counts; a broken one cannot be
    assert records["8"]["answer"]["final_answer"] == ""
    assert list(json.loads((folder / "G2_category.json").read_text())) == ["9"]
    save_converted([], {}, str(tmp_path / "none"))
