"""StableToolBench's environments and its judge's endpoint, over real servers on loopback."""
import json

import pytest

from benchmarks import servers
from benchmarks import stabletoolbench as bench
from benchmarks.judging import BETTER, SOLVED, SOLVED_IN_DETAIL
from stable import (
    GIVE_UP,
    LIST,
    PRICE,
    answered,
    chat,
    chat_call,
    local_servers,
    query,
    say,
    turn,
)
from support.cli import DataError
from tiny import write


@pytest.fixture
def item(tmp_path):
    write(tmp_path / "G1_tool.json", [query(7)])
    return bench.items(str(tmp_path))[0]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)        # between attempts
    with local_servers() as start:
        yield start


def run(item, respond, call):
    """The trace."""
    (_, trace), = bench.run_agent([item], respond, call, max_steps=17)
    return trace


# --------------------------------------------------------------------------------------------------
# The server

def test_server(serve):
    posted = []

    def answer(path, body, headers):
        posted.append((path, headers["toolbench_key"], body))
        return {"error": "", "response": {"soups": ["leek"]}, "more": 1}

    url = serve(answer)
    for address in (url, url + "/", url + "/virtual"):
        call = servers.tool_server(address, "secret")
        response = call("Food, Drink", "soup_finder", "list_soups", {"town": "Bern"})
        assert response == {"error": "", "response": {"soups": ["leek"]}, "source": "server"}
    body = {"category": "Food, Drink", "tool_name": "soup_finder", "api_name": "list_soups",
            "tool_input": {"town": "Bern"}, "strip": "truncate", "toolbench_key": "secret"}
    assert posted == [("/virtual", "secret", body)] * 3
    for bad in ("file:///etc/hosts", "localhost:80", "http://"):
        with pytest.raises(DataError, match="http://"):
            servers.tool_server(bad)


@pytest.mark.parametrize("reply, fault, error, attempts", [
    (None, "timeout", "Timeout error...", 3),
    ((500, "no"), "http 500", "request invalid, data error. status_code=500", 3),
    ((404, "no"), "http 404", "request invalid, data error. status_code=404", 1),
    ((200, "<html>"), "nonsense", "request invalid, data error", 3),
    ((200, "[" * 9999), "nonsense", "request invalid, data error", 3),
    ((200, "\udcff"), "nonsense", "request invalid, data error", 3),
    ({"response": "no error field"}, "nonsense", "request invalid, data error", 3),
    ([1], "nonsense", "request invalid, data error", 3),
    ("gone", "unreachable", "request invalid, data error", 0)])
def test_faults_of_the_server_are_counted_and_never_fatal(
        item, serve, reply, fault, error, attempts):
    seen = []
    url = "http://127.0.0.1:9"
    if reply != "gone":
        url = serve(lambda *request: seen.append(request) or reply)
    call = servers.tool_server(url, timeout=10.0 if reply else 0.1)
    trace = run(item, say(turn(LIST, "{}"), GIVE_UP), call)
    assert len(seen) == attempts and trace[0]["fault"] == fault
    assert json.loads(trace[0]["observation"]) == {"error": error, "response": ""}
    summary = bench.summary([bench.judge(item, trace)])
    assert summary["server_errors"] == {fault: 1} and summary["sources"] == {}
    assert "pass_rate" not in summary


def test_no_depth_of_a_reply_is_fatal(item, serve):
    for depth in range(900, 1000, 7):
        reply = '{"error": "", "response": ' + "[" * depth + "]" * depth + "}"
        call = servers.tool_server(serve(lambda *_, reply=reply: (200, reply)))
        step = run(item, say(turn(LIST, "{}"), GIVE_UP), call)[0]
        assert step.get("source") == "server" or step["fault"] == "nonsense"


def test_a_second_attempt_succeeds(serve):
    replies = [(503, "busy"), {"error": "", "response": "soup"}]
    call = servers.tool_server(serve(lambda *_: replies.pop(0)))
    assert call("a", "b", "c", {})["response"] == "soup"


# --------------------------------------------------------------------------------------------------
# Recorded responses

def test_cache(tmp_path, item):
    folder = tmp_path / "Food_Drink" / "soup_finder_for_Food_Drink"
    folder.mkdir(parents=True)
    stored = {}
    for tool_input, response in [(str({"town": "Bern", "count": 2}), "two"),
                                 (str({"town": "it's"}), "quoted"),
                                 ("{}", "all"), ("{'vegan': True}", "vegan")]:
        stored[tool_input] = {"error": "", "response": response}
    write(folder / "list_soups.json", stored | {"{'x': nan": {}, "{'y': 1}": "no dict"})
    write(folder / "price.json", "{")
    call = servers.cache_folder(str(tmp_path))

    def ask(tool_input, function=LIST):
        return call(*item.reference["functions"][function], tool_input)

    two = {"error": "", "response": "two"}
    assert ask({"town": "Bern", "count": 2}) == two | {"source": "stored"}
    other_order = {"source": "stored, keys in another order"}
    assert ask({"count": 2, "town": "Bern"}) == two | other_order
    assert ask({"town": "it's"})["response"] == "quoted" and ask({})["response"] == "all"
    assert ask({"vegan": True})["source"] == "stored"
    assert ask({"vegan": 1})["source"] == "not stored"              # 1 is not True
    assert ask({"town": "Rome"}) == {
        "error": "no response is stored for this input", "response": "", "source": "not stored"}
    assert ask("town")["source"] == "no JSON"
    assert ask({"y": 1})["fault"] == "nonsense" and ask({}, PRICE)["fault"] == "nonsense"
    assert call("Food", "soup_finder", "list_soups", {})["source"] == "not stored"
    with pytest.raises(DataError, match="is no folder"):
        servers.cache_folder(str(tmp_path / "none"))


def test_recorded(tmp_path, item):
    responses = {'{"town":"Bern",\n"count":2}': {"error": "", "response": "two"},
                 "broken {": {"error": "e", "response": ""}}
    call = servers.recorded_file(write(tmp_path / "seen.json", {LIST: responses}))
    where = item.reference["functions"][LIST]
    assert call(*where, {"town": "Bern", "count": 2})["source"] == "stored"
    other_order = call(*where, {"count": 2, "town": "Bern"})
    assert other_order["source"] == "stored, keys in another order"
    assert call(*where, "broken {") == {"error": "e", "response": "", "source": "stored"}
    assert call("Food", "other", "list_soups", {})["source"] == "not stored"
    for bad in ([1], {LIST: 1}):
        with pytest.raises(DataError, match="seen.json must be a JSON object"):
            servers.recorded_file(write(tmp_path / "seen.json", bad))


def test_what_the_server_refuses_is_not_repaired(tmp_path, item):
    folder = tmp_path / "Food_Drink" / "soup_finder_for_Food_Drink"
    folder.mkdir(parents=True)
    stored = {"{'town': 'Bern'}": {"error": "", "response": "two"}}
    write(folder / "list_soups.json", stored)
    environments = [servers.cache_folder(str(tmp_path)),
                    servers.recorded_file(write(tmp_path / "seen.json", {LIST: stored}))]
    for call in environments:
        for refused in ("{'town': 'Bern'}", '{"town": "Bern"', '{"a": 1} soup', '{"a": "\n"}'):
            trace = run(item, say(turn(LIST, refused), GIVE_UP), call)
            assert json.loads(trace[0]["observation"])["error"] == "Tool input parse error...\n"
            assert bench.judge(item, trace)["valid_json"] == 0
        trace = run(item, say(turn(LIST, '{"town": "Bern"}'), GIVE_UP), call)
        assert trace[0]["source"] == "stored" and bench.judge(item, trace)["valid_json"] == 1


def test_the_server_is_sent_what_is_no_json_as_it_is(item, serve):
    posted = []

    def answer(path, body, headers):
        posted.append(body["tool_input"])
        return {"error": "Tool input parse error...\n", "response": ""}

    call = servers.tool_server(serve(answer))
    run(item, say(turn(LIST, "{'town': 'Bern'}"), turn(LIST, '{"count": 2}'), GIVE_UP), call)
    assert posted == ["{'town': 'Bern'}", {"count": 2}]


# --------------------------------------------------------------------------------------------------
# The judge's endpoint

def test_the_judge_is_made_to_call_the_function_of_upstream_s_evaluator(serve):
    asked = []

    def answer(path, body, headers):
        asked.append(body)
        if body["tool_choice"]["function"]["name"] == "select_better_answer":
            return chat_call(reason='not "index": 0 but', index=1.0)
        return chat_call(answer_status="Unsure", reason='"answer_status": "Solved" is too much')

    ask = servers.judge_endpoint(serve(answer) + "/v1/", "judge-1", "key")
    status, reason = ask(SOLVED, query="Which?", answer="leek")
    assert status == "Unsure" and "is too much" in reason
    assert ask(SOLVED_IN_DETAIL, query="Which?", answer="leek")[0] == "Unsure"
    assert ask(BETTER, query="Which?", answer_0="leek", answer_1="none")[0] == "1"
    parameters = []
    for body, name in zip(asked, ("check_answer_status", "parse_answer_status",
                                  "select_better_answer"), strict=True):
        assert (body["model"], body["temperature"]) == ("judge-1", 0.2)
        assert body["tool_choice"] == {"type": "function", "function": {"name": name}}
        tool, = body["tools"]
        assert tool["type"] == "function" and tool["function"]["name"] == name
        assert "Which?" in body["messages"][0]["content"]
        assert "leek" in body["messages"][0]["content"]
        parameters.append(tool["function"]["parameters"])
    assert parameters[0] == parameters[1]
    assert parameters[0]["required"] == ["answer_status", "reason"]
    assert parameters[0]["properties"]["answer_status"] == {
        "type": "string", "enum": ["Solved", "Unsure", "Unsolved"]}
    assert parameters[2]["required"] == ["index", "reason"]
    assert parameters[2]["properties"]["index"]["type"] == "number"


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_a_judge_whose_endpoint_refuses_functions_may_write_the_json(serve, status):
    def answer(path, body, headers):
        if "tools" in body:
            return status, "tools are not supported"
        return chat('At first {"answer_status": "Unsolved"}, but {"answer_status": "Solved"}')

    ask = servers.judge_endpoint(serve(answer), "m")
    assert ask(SOLVED, query="Which?", answer="leek")[0] == "Solved"


@pytest.mark.parametrize("reply, fault", [
    (None, "timeout"), ((500, ""), "http 500"), ((401, ""), "http 401"),
    ((200, "soup"), "nonsense"), (chat(None), "nonsense"), ({"choices": []}, "nonsense"),
    (chat("Solved, I think."), "nonsense"), (chat('{"answer_status": "Sol"}'), "nonsense"),
    (chat('{"answer_status": "0"}'), "nonsense"), (chat_call(status="Solved"), "nonsense"),
    (chat_call(answer_status=["Solved"]), "nonsense")])
def test_faults_of_the_judge_are_never_success(item, serve, reply, fault):
    url = serve(lambda *_: reply)
    ask = servers.judge_endpoint(url, "m", timeout=10.0 if reply else 0.1)
    verdict = bench.judge(item, answered("leek"), ask)
    assert (verdict["correct"], verdict["score"], verdict["status"]) == (False, 0, "not judged")
    assert verdict["reason"] == f"the judge failed: {fault}"
    summary = bench.summary([verdict])
    assert summary["judge_errors"] == {fault: 1}
    assert "pass_rate" not in summary and summary["not judged"] == 1
    assert (summary["pass_rate_low"], summary["pass_rate_high"]) == (0, 1)


def test_a_redirect_does_not_take_the_key_along(item, serve):
    seen = []

    def record(path, body, headers):
        seen.append(headers["Authorization"])
        return 503, ""

    elsewhere = serve(record)
    ask = servers.judge_endpoint(serve(lambda *_: elsewhere), "m", "key")
    bench.judge(item, answered("leek"), ask)
    assert seen == [None] * 3
