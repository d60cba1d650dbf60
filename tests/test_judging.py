"""StableToolBench's verdicts and figures: pass rate, win rate, and what needs no judge."""
import pytest

from benchmarks import Item, servers
from benchmarks import stabletoolbench as bench
from benchmarks.judging import compare, judge, summary
from stable import (
    GIVE_UP,
    LIST,
    always_ok,
    answered,
    chat,
    finish,
    local_servers,
    options,
    query,
    say,
    turn,
)
from tiny import write


@pytest.fixture
def items(tmp_path):
    write(tmp_path / "G1_tool.json", [query(7), query(8, "Second?")])
    write(tmp_path / "G2_category.json", [query(9, "Third?")])
    return bench.items(str(tmp_path))


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)        # between attempts
    with local_servers() as start:
        yield start


def in_turn(*statuses):
    """A judge that finds these, one after the other."""
    left = list(statuses)

    def ask(question, **fields):
        status = left.pop(0)
        return status, f"because {status}"
    return ask


# --------------------------------------------------------------------------------------------------
# Pass rate

def test_pass_rate(items, serve):
    asked = []

    def answer(path, body, headers):
        prompt = body["messages"][0]["content"]
        in_detail = "answer_details" in prompt
        asked.append((path, headers["Authorization"], body["model"], in_detail))
        if "leek" in prompt:
            return chat('At first {"answer_status": "Unsolved"} but: {"answer_status": "Solved"}')
        solved = "the soup is in this call" in prompt
        return chat('{"answer_status": "Solved"}' if solved else '{"answer_status": "Unsure"}')

    ask = servers.judge_endpoint(serve(answer) + "/v1/", "judge-1", "key")
    call = {"action": LIST, "input": {}, "observation": "the soup is in this call"}
    one, two, three = items
    verdicts = [judge(one, answered("leek"), ask), judge(two, [call, *answered("maybe")], ask)]
    for verdict in verdicts:
        assert (verdict["status"], verdict["score"], verdict["correct"]) == ("Solved", 1, True)
    assert asked == [("/v1/chat/completions", "Bearer key", "judge-1", in_detail)
                     for in_detail in (False, False, True)]
    verdicts.append(judge(three, answered("maybe"), ask))
    verdict = verdicts[2]
    assert (verdict["status"], verdict["score"], verdict["correct"]) == ("Unsure", 0.5, False)
    figures = summary(verdicts)
    assert figures["pass_rate"] == 2.5 / 3 and figures["pass_rate_mean_of_categories"] == 0.75
    assert figures["categories"]["G1_tool"]["pass_rate"] == 1
    assert figures["categories"]["G2_category"]["Unsure"] == 1
    assert "pass_rate_std" not in figures                   # asked once

    n = len(asked)
    for trace, reason in (([], "no output"), (answered(" "), "empty answer"),
                          (answered("give_up_and_restart"), "gave up"),
                          ([call], "no Finish"), (bench.run_turn(one, GIVE_UP, None), "gave up")):
        verdict = judge(one, trace, ask)
        assert (verdict["status"], verdict["correct"]) == ("Unsolved", False)
        assert verdict["reason"] == reason
    assert len(asked) == n                                  # unsolved without asking


def test_the_judge_reads_the_input_of_the_finish_as_upstream_s_does(items):
    asked = []

    def ask(question, **fields):
        asked.append(fields)
        return "Unsure", ""

    trace = [{"action": LIST, "input": {}, "observation": "leek"}, *answered("Zürich")]
    judge(items[0], trace, ask)
    text = '{"return_type": "give_answer", "final_answer": "Zürich"}'
    assert asked[0] == {"query": "Which soup is cheap?", "answer": text}
    assert '"role": "tool", "message": {"name": "list_soups_for' in asked[1]["answer"]


def test_the_judge_asked_several_times(items):
    verdicts = [judge(items[0], answered("a"), in_turn("Unsolved", "Solved", "Solved"), times=3),
                judge(items[1], answered("b"), in_turn("Unsure", "Solved", "Unsolved",
                                                       "Unsolved"), times=3),
                judge(items[2], [], in_turn(), times=3)]
    first, second, third = verdicts
    assert first["statuses"] == ["Unsolved", "Solved", "Solved"] and first["score"] == 2 / 3
    assert first["correct"] and first["reason"] == "because Solved"
    assert second["statuses"] == ["Solved", "Unsolved", "Unsolved"]     # Unsure: looked further
    assert not second["correct"] and second["score"] == 1 / 3
    assert third["status"] == "Unsolved" and third["statuses"] == []
    figures = summary(verdicts)
    assert figures["pass_rate"] == pytest.approx(1 / 3)
    assert figures["pass_rate_std"] == pytest.approx(0)
    group = figures["categories"]["G1_tool"]
    assert group["pass_rate"] == 0.5 and group["pass_rate_std"] == pytest.approx(0)
    figures = summary([first])
    assert figures["pass_rate_std"] == pytest.approx((2 / 9) ** 0.5)

    failed = judge(items[0], answered("a"), in_turn("Solved", None), times=3)
    assert (failed["status"], failed["statuses"], failed["score"]) == ("not judged", [], 0)
    assert failed["judge_errors"] == {"because None": 1}


def test_the_judge_is_asked_as_often_as_the_option_says(items, monkeypatch):
    asked = []

    def ask(question, **fields):
        asked.append(question.function)
        return "Solved", ""

    monkeypatch.setattr(bench, "judge_endpoint", lambda *arguments: ask)
    given = options(judge_url="http://judge", judge_model="m", judge_times=3)
    traces = {"7": answered("a"), "8": answered("b")}
    verdicts = bench.judge_outputs(items, traces, given)
    assert asked == ["check_answer_status"] * 6
    assert [len(v["statuses"]) for v in verdicts] == [3, 3, 0]
    assert summary(verdicts)["pass_rate"] == 2 / 3 and summary(verdicts)["pass_rate_std"] == 0


# --------------------------------------------------------------------------------------------------
# Win rate

def better(question, query, answer_0, answer_1):
    """A judge."""
    return "0" if "good" in answer_0 else "1", "why"


def never(question, **fields):
    pytest.fail("the judge is asked where the status decides")


def test_win_rate(items):
    item = items[0]

    def verdict(answer, status):
        return judge(item, answered(answer), lambda *_, **fields: (status, ""))

    def win(ours, theirs, ask=better):
        return compare(item, ours, theirs, ask)["win"]

    missing = judge(item, [], better)
    assert win(verdict("a", "Solved"), verdict("b", "Unsolved"), never) == "win"
    assert win(verdict("a", "Unsure"), verdict("b", "Solved"), never) == "lose"
    assert win(verdict("a", "Unsure"), verdict("b", "Unsolved"), never) == "win"
    assert win(missing, verdict("b", "Unsolved"), never) == "lose"
    assert win(verdict("b", "Unsolved"), missing, never) == "win"
    assert win(missing, missing, never) == "tie"
    assert win(verdict("a", "Solved"), verdict("a", "Solved"), never) == "tie"
    assert win(verdict("good", "Solved"), verdict("bad", "Solved")) == "win"
    assert win(verdict("bad", "Unsolved"), verdict("good", "Unsolved")) == "lose"
    first = win(verdict("good", "Solved"), verdict("bad", "Solved"), lambda *_, **fields: ("0", ""))
    assert first == "tie"                                   # it wavers
    failed = compare(item, verdict("a", "Solved"), verdict("b", "Solved"),
                     lambda *_, **fields: (None, "timeout"))
    assert failed["win"] == "not judged" and failed["judge_errors"] == {"timeout": 1}
    assert win(judge(item, answered("a")), verdict("b", "Unsolved")) == "not judged"

    ours = verdict("a", "Solved")
    verdicts = [ours | {"win": outcome} for outcome in ("win", "win", "tie", "lose")]
    figures = summary(verdicts)
    assert [figures[f"{name}_rate"] for name in ("win", "tie", "lose")] == [0.5, 0.25, 0.25]
    assert figures["not compared"] == 0
    figures = summary([*verdicts, ours | failed])
    assert figures["win_rate_of_compared"] == 0.5 and figures["not compared"] == 1
    assert "win_rate" not in figures and figures["judge_errors"] == {"timeout": 1}


def test_equals_are_compared_by_their_steps_and_the_majority_wins(items):
    call = {"action": LIST, "input": {}, "observation": "good"}
    ours, theirs = (judge(items[0], trace, in_turn("Solved"))
                    for trace in ([call, *answered("a")], answered("a")))
    assert compare(items[0], ours, theirs, better)["win"] == "win"
    stuck = judge(items[0], [call], never)
    given_up = judge(items[0], [call, *bench.run_turn(items[0], GIVE_UP, None)], never)
    assert compare(items[0], stuck, given_up, in_turn("0", "1"))["win"] == "win"
    broken = Item("x", "c", [], {"fault": "KeyError: 'query'"})
    assert compare(broken, stuck, given_up, never)["win"] == "tie"
    for votes, outcome in (("010101", "win"), ("100000", "lose"), ("000000", "tie"),
                           ("010000", "win")):
        ask = in_turn(*votes)
        assert compare(items[0], ours, theirs, ask, times=3)["win"] == outcome


# --------------------------------------------------------------------------------------------------
# Without a judge

def test_figures_without_a_judge(items):
    scripts = [[turn(LIST, "{}"), turn("soup", "{}"), turn(LIST, "not json"), finish("leek")],
               [GIVE_UP],
               ["I do not know"] * 5]
    verdicts = []
    for item, script in zip(items, scripts, strict=True):
        (_, trace), = bench.run_agent([item], say(*script), always_ok, max_steps=5)
        verdicts.append(judge(item, trace))
    assert not any(v["correct"] for v in verdicts)
    assert verdicts[0]["status"] == "not judged" and verdicts[0]["output"] == "leek"
    figures = summary(verdicts)
    for group in (figures, *figures["categories"].values()):
        assert not [key for key in group if "pass" in key]
    assert figures["asked"] == 3 and figures["steps"] == 8
    assert figures["finish_rate"] == figures["give_up_rate"] == 1 / 3
    assert figures["valid_action_rate"] == figures["valid_json_rate"] == 2 / 8
    assert figures["relevant_apis_called"] == 1 / 3
    assert figures["sources"] == {"test": 2}
    assert figures["categories"]["G2_category"]["finish_rate"] == 0
    assert summary([])["asked"] == 0
