"""StableToolBench's environments and its judge's endpoint, over real servers on loopback."""
import json

import pytest

from benchmarks import servers
from benchmarks import stabletoolbench as bench
from stable import GIVE_UP, LIST, PRICE, answered, chat, local_servers, query, say, turn
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
    (_, trace), = bench.run_agent([item], respond, call)
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
    call = servers.tool_server(url, timeout=0.1)
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


# --------------------------------------------------------------------------------------------------
# The judge's endpoint

@pytest.mark.parametrize("reply, fault", [
    (None, "timeout"), ((500, ""), "http 500"), ((401, ""), "http 401"),
    ((200, "soup"), "nonsense"), (chat(None), "nonsense"), ({"choices": []}, "nonsense"),
    (chat("Solved, I think."), "nonsense"), (chat('{"verdict": "Sol"}'), "nonsense"),
    (chat('{"verdict": "0"}'), "nonsense")])
def test_faults_of_the_judge_are_never_success(item, serve, reply, fault):
    ask = servers.judge_endpoint(serve(lambda *_: reply), "m", timeout=0.1)
    verdict = bench.judge(item, answered("leek"), ask)
    assert (verdict["correct"], verdict["score"], verdict["status"]) == (False, 0, "not judged")
    assert verdict["reason"] == f"the judge failed: {fault}"
    summary = bench.summary([verdict])
    assert summary["judge_errors"] == {fault: 1}
    assert summary["pass_rate"] == 0 and summary["not judged"] == 1


def test_a_redirect_does_not_take_the_key_along(item, serve):
    seen = []

    def record(path, body, headers):
        seen.append(headers["Authorization"])
        return 500, ""

    elsewhere = serve(record)
    ask = servers.judge_endpoint(serve(lambda *_: elsewhere), "m", "key")
    bench.judge(item, answered("leek"), ask)
    assert seen == [None] * 3
