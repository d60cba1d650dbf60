"""What failed must not look like a score: StableToolBench with servers and judges that are down."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import servers
from benchmarks import stabletoolbench as bench
from stable import (
    HANG_UP,
    LIST,
    UNREACHABLE,
    answered,
    chat_call,
    dripping_server,
    finish,
    local_servers,
    options,
    query,
    say,
    turn,
    turns_taken,
)
from support.cli import DataError
from tiny import write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# --------------------------------------------------------------------------------------------------
# A server that fails

@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)        # between attempts
    with local_servers() as start:
        yield start


def make_items(tmp_path, count):
    write(tmp_path / "G1_tool.json", [query(n, f"Soup {n}?") for n in range(count)])
    return bench.items(str(tmp_path))


def test_a_run_without_its_server_does_not_begin(tmp_path):
    items = make_items(tmp_path, 2)

    def never(conversations):
        pytest.fail("asked although no server is there")

    assert list(bench.run([], never, options(server=UNREACHABLE))) == []
    with pytest.raises(DataError, match="--server http://127.0.0.1:9 cannot be reached"):
        list(bench.run(items, never, options(server=UNREACHABLE)))


def test_a_server_that_goes_down_stops_the_run_after_a_few_calls(tmp_path, serve):
    seen = []

    def answer(path, body, headers):
        seen.append(path)
        return HANG_UP if path == "/virtual" else {}

    url = serve(answer)
    with pytest.raises(DataError, match="left 5 calls in a row unanswered .unreachable."):
        respond = say(*[turn(LIST, "{}")] * 20)
        list(bench.run(make_items(tmp_path, 30), respond, options(server=url)))
    most = (servers.DOWN_AFTER + servers.CONCURRENT_REQUESTS) * servers.ATTEMPTS
    assert len(seen) <= 1 + most


def test_a_trace_with_a_call_that_reached_no_server_is_not_kept_but_asked_again(tmp_path, serve):
    items = make_items(tmp_path, 4)
    broken = [{"town": "2"}]

    def answer(path, body, headers):
        if body and body["tool_input"] in broken:
            return HANG_UP
        return {"error": "", "response": "leek"}

    def respond(conversations):
        outputs = []
        for conversation in conversations:
            town = conversation[1].text.split("?")[0].removeprefix("Soup ")
            first = turn(LIST, json.dumps({"town": town}))
            outputs.append(finish("leek") if turns_taken(conversation) else first)
        return outputs

    with_server = options(server=serve(answer))
    kept = []
    with pytest.raises(DataError, match="could not be reached in 1 of 4 queries; run the same"):
        for item, _ in bench.run(items, respond, with_server):
            kept.append(item.id)
    assert kept == ["0", "1", "3"]
    broken.clear()
    rest = [item for item in items if item.id not in kept]
    assert [item.id for item, _ in bench.run(rest, respond, with_server)] == ["2"]


def test_a_run_in_which_no_call_was_answered_gives_no_figures(tmp_path, serve):
    items = make_items(tmp_path, 6)
    respond = say(turn(LIST, "{}"), finish("none"))
    given = options(server=serve(lambda *_: (404, "no such page")))
    traces = {item.id: trace for item, trace in bench.run(items, respond, given)}
    with pytest.raises(DataError, match="none of 6 calls was answered .http 404: 6.; correct"):
        bench.judge_outputs(items, traces, given)
    traces["0"][0] |= {"source": "server"}
    assert len(bench.judge_outputs(items, traces, given)) == 6


# --------------------------------------------------------------------------------------------------
# Options

def test_options_are_checked_before_anything_is_asked(tmp_path, serve):
    url = serve(lambda *_: (404, "nothing here"))
    lines = write(tmp_path / "traces.jsonl", json.dumps({"id": 7, "output": "leek"}))
    judge = {"judge_url": url, "judge_model": "m"}
    bench.check_options(options())
    bench.check_options(options(**judge, against=lines))        # any reply will do
    for given, message in [
            ({"judge_url": url}, "needs both --judge-url and --judge-model"),
            ({"judge_model": "m"}, "needs both --judge-url and --judge-model"),
            ({"against": lines}, "--against needs a judge"),
            (judge | {"against": str(tmp_path / "none.jsonl")}, "none.jsonl cannot be read"),
            (judge | {"judge_url": "localhost:80"}, "begins with http://"),
            (judge | {"judge_url": UNREACHABLE}, "--judge-url http://127.0.0.1:9 cannot be reach"),
            ({"server": "localhost:80"}, "begins with http://"),
            ({"cache": str(tmp_path / "none")}, "is no folder"),
            ({"recorded": lines, "cache": str(tmp_path)}, "exclude each other")]:
        with pytest.raises(DataError, match=message):
            bench.check_options(options(**given))


def test_a_server_that_is_busy_passes_the_check(monkeypatch, serve):
    monkeypatch.setattr(servers, "CHECK_SECONDS", 0.1)
    servers.check_reachable(serve(lambda *_: None), "--server")


# --------------------------------------------------------------------------------------------------
# A judge that fails

def judged_by(url, **given):
    return options(judge_url=url, judge_model="m", **given)


@pytest.mark.parametrize("reply, fault, requests", [
    (None, "timeout", 39), (HANG_UP, "unreachable", 39), ((401, ""), "http 401", 12),
    ((200, "soup"), "nonsense", 36)])
def test_a_judge_that_never_answers_is_an_error(tmp_path, serve, reply, fault, requests):
    items = make_items(tmp_path, 12)
    traces = {item.id: answered("leek") for item in items}
    seen = []
    url = serve(lambda *request: seen.append(request) or reply)
    given = judged_by(url, timeout=10.0 if reply else 0.1)
    with pytest.raises(DataError, match=f"^not judged: 12 of 12 .{fault}: 12.; see that the judge"):
        bench.judge_outputs(items, traces, given)
    assert len(seen) <= requests            # one that is down is not asked for every query


def test_those_unsolved_without_asking_are_no_figure_if_the_judge_is_down(tmp_path, serve):
    items = make_items(tmp_path, 6)
    traces = {"0": answered("leek"), "1": answered(" ")}
    with pytest.raises(DataError, match="not judged: 1 of 1 .http 401: 1."):
        bench.judge_outputs(items, traces, judged_by(serve(lambda *_: (401, ""))))


def test_a_judge_that_sometimes_fails_gives_bounds_and_no_pass_rate(tmp_path, serve, capsys):
    items = make_items(tmp_path, 4)
    traces = {"0": answered("leek"), "1": answered("silence"), "2": answered("maybe")}

    def answer(path, body, headers):
        prompt = body["messages"][0]["content"]
        if "silence" in prompt:
            return 401, ""
        return chat_call(answer_status="Solved" if "leek" in prompt else "Unsure", reason="")

    verdicts = bench.judge_outputs(items, traces, judged_by(serve(answer)))
    assert "not judged: 1 of 3 (http 401: 1)\n" in capsys.readouterr().out
    assert [v["status"] for v in verdicts] == ["Solved", "not judged", "Unsure", "Unsolved"]
    figures = bench.summary(verdicts)
    for group in (figures, figures["categories"]["G1_tool"]):
        assert "pass_rate" not in group and group["not judged"] == 1
        assert group["pass_rate_of_judged"] == 0.5
        assert (group["pass_rate_low"], group["pass_rate_high"]) == (1.5 / 4, 2.5 / 4)
    assert "pass_rate_mean_of_categories" not in figures


def test_a_comparison_that_fails_is_no_loss(tmp_path, serve, capsys):
    items = make_items(tmp_path, 3)
    traces = {item.id: answered(f"leek {item.id}") for item in items}
    lines = [json.dumps({"id": item.id, "output": f"soup {item.id}"}) for item in items]
    against = write(tmp_path / "other.jsonl", "\n".join(lines))
    fails = ["leek 0"]

    def answer(path, body, headers):
        prompt = body["messages"][0]["content"]
        if "Answer_0" not in prompt:
            return chat_call(answer_status="Solved")
        if any(text in prompt for text in fails):
            return 401, ""
        return chat_call(index=0 if prompt.index("leek") < prompt.index("soup") else 1)

    given = judged_by(serve(answer), against=against)
    figures = bench.summary(bench.judge_outputs(items, traces, given))
    assert "not compared: 1 of 3 (http 401: 1)\n" in capsys.readouterr().out
    assert figures["win_rate_of_compared"] == 1.0 and figures["not compared"] == 1
    assert "win_rate" not in figures and figures["pass_rate"] == 1.0
    fails.append("leek")
    with pytest.raises(DataError, match="^not compared: 3 of 3 .http 401: 3."):
        bench.judge_outputs(items, traces, given)


def test_a_file_to_compare_with_whose_ids_match_nothing_is_an_error(tmp_path):
    items = make_items(tmp_path, 2)
    against = write(tmp_path / "other.jsonl", '{"id": "bfcl_7", "output": "x"}')
    with pytest.raises(DataError, match="its 1 ids are like 'bfcl_7', the benchmark's like '0'"):
        bench.judge_outputs(items, {}, judged_by(UNREACHABLE, against=against))


# --------------------------------------------------------------------------------------------------
# Time

@pytest.mark.parametrize("data", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nX-Long: "])
def test_a_server_that_drips_times_out_as_a_silent_one(data, monkeypatch):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)
    with dripping_server(data, pause=0.02, longest=10.0) as url:
        call = servers.tool_server(url, timeout=0.3)
        start = time.monotonic()
        assert call("a", "b", "c", {})["fault"] == "timeout"
        assert time.monotonic() - start < 3 * 0.3 + 2
        start = time.monotonic()
        monkeypatch.setattr(servers, "CHECK_SECONDS", 0.3)
        servers.check_reachable(url, "--server")
        assert time.monotonic() - start < 0.3 + 2


HANGS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background ignores it
sys.path.insert(0, sys.argv[1])
from benchmarks import Item
from benchmarks.servers import map_in_threads, judge_endpoint
from benchmarks.judging import judge
from support.cli import run_script
answer = [{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": "leek"}}]
ask = judge_endpoint(sys.argv[2], "m", timeout=60)
def main():
    items = [Item(str(i), "c", [], {"query": "?"}) for i in range(20)]
    print("asking", flush=True)
    list(map_in_threads(lambda item: judge(item, answer, ask), items))
run_script(main)
"""


def test_ctrl_c_does_not_wait_for_a_judge_that_hangs():
    with dripping_server(b"", pause=10, longest=30) as url:
        command = [sys.executable, "-c", HANGS, ROOT, url]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"asking\n"
            time.sleep(0.3)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert time.monotonic() - start < 15                    # a request alone may take a minute
    assert process.returncode == 130 and errors == b"-c: stopped\n"


def test_an_error_in_a_thread_reaches_the_caller_and_ends_the_work():
    begun = []

    def work(n):
        begun.append(n)
        if n == 3:
            raise ValueError("three")
        time.sleep(0.001)
        return n

    results = servers.map_in_threads(work, range(5000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) <= count + servers.CONCURRENT_REQUESTS < 5000
    assert list(servers.map_in_threads(max, [1, 5], [4, 2])) == [4, 5]
