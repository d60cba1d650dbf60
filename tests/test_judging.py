"""StableToolBench's verdicts and figures: pass rate, win rate, and what needs no judge."""
import pytest

from benchmarks import servers
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


def test_pass_rate(items, serve):
    asked = []

    def answer(path, body, headers):
        prompt = body["messages"][0]["content"]
        asked.append((path, headers["Authorization"], body["model"], "Calls: " in prompt))
        if "Answer: maybe" in prompt:
            solved = "the soup is in this call" in prompt
            return chat('{"verdict": "Solved"}' if solved else '{"verdict": "Unsure"}')
        assert "Answer: leek" in prompt
        return chat('At first I thought {"verdict": "Unsolved"} but: {"verdict": "Solved"}')

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

    n = len(asked)
    for trace, reason in (([], "no output"), (answered(" "), "empty answer"),
                          ([call], "no Finish"), (bench.run_turn(one, GIVE_UP, None), "gave up")):
        verdict = judge(one, trace, ask)
        assert (verdict["status"], verdict["correct"]) == ("Unsolved", False)
        assert verdict["reason"] == reason
    assert len(asked) == n                                  # unsolved without asking


def test_win_rate(items):
    item = items[0]

    def better(prompt, choices):
        return "0" if prompt.index("good") < prompt.index("bad") else "1", "why"

    def never(prompt, choices):
        pytest.fail("the judge is asked where the status decides")

    def verdict(answer, status):
        return judge(item, answered(answer), lambda *_: (status, ""))

    def win(ours, theirs, ask=better):
        return compare(item, (ours, []), (theirs, []), ask)["win"]

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
    wavering = win(verdict("good", "Solved"), verdict("bad", "Solved"), lambda *_: ("0", "first"))
    assert wavering == "tie"
    both = (verdict("a", "Solved"), []), (verdict("b", "Solved"), [])
    failed = compare(item, *both, lambda *_: (None, "timeout"))
    assert failed["win"] == "not judged" and failed["judge_errors"] == {"timeout": 1}
    assert win(judge(item, answered("a")), verdict("b", "Unsolved")) == "not judged"

    ours = verdict("a", "Solved")
    verdicts = [ours | {"win": outcome} for outcome in ("win", "win", "tie", "lose")]
    figures = summary([*verdicts, ours | failed])
    assert figures["win_rate"] == 0.4 and figures["not compared"] == 1
    assert figures["tie_rate"] == figures["lose_rate"] == 0.2
    assert figures["judge_errors"] == {"timeout": 1}


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
