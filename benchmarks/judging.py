"""StableToolBench's verdicts: how a trace ended, whether it solved the query, and the figures."""
import json
import re
from collections import Counter

from benchmarks import Item

STATUSES = ("Solved", "Unsure", "Unsolved")
SCORES = {"Solved": 1.0, "Unsure": 0.5}

SOLVED = """\
Does the answer solve the user's query?
Unsolved: it apologises, or does not respond to the query. \
Unsure: it responds, but one cannot tell from it alone whether the query is solved. \
Solved or Unsolved: it responds, and one can tell.

Query: {query}

Answer: {answer}"""

SOLVED_IN_DETAIL = """\
Does the answer solve the user's query? Check it against the calls that were made for it.
Unsolved: every call failed, or the calls' results contradict the answer. \
Unsure: the calls do not show whether the answer is true. \
Solved: calls succeeded, and what they returned does solve the query.

Query: {query}

Answer: {answer}

Calls: {trace}"""

BETTER = """\
Which of two answers serves the user's query better? \
Compare how informative, how true to the calls' results and how well reasoned they are; \
then how much of the query the calls dealt with; then how few calls were needed.

Query: {query}

Answer 0: {first_answer}
Calls 0: {first_trace}

Answer 1: {second_answer}
Calls 1: {second_trace}"""


def final_answer(trace: list[dict]) -> tuple[str | None, str]:
    """How the last step ends the trace.

    Returns ("give_answer", the answer), ("give_up_and_restart", "") or (None, what is missing).
    """
    if not trace or trace[-1].get("action") != "Finish":
        return None, "no Finish"
    raw_input = trace[-1].get("input", "")
    if isinstance(raw_input, dict):
        kind = raw_input.get("return_type")
        answer = raw_input.get("final_answer")
    else:       # broken JSON, perhaps cut short: upstream searches for the fields too
        kind = first_group(r'"return_type": ?"(\w+)', raw_input)
        answer = first_group(r'"final_answer": ?"(.*)', raw_input)
    if kind == "give_up_and_restart":
        return kind, ""
    if kind != "give_answer":
        return None, 'must have "return_type"'
    if answer is None:
        return None, 'must have "final_answer"'
    if not isinstance(answer, str):
        answer = json.dumps(answer)
    return kind, answer.encode("utf-8", "replace").decode()     # files take no lone surrogates


def first_group(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.DOTALL)
    return found[1] if found else None


def judge(item: Item, trace: list[dict], ask=None) -> dict:
    """The verdict on a trace: "status", one of STATUSES or "not judged", and its "score".

    ask(prompt, choices) -> (choice, reasons) asks the judge model. It sees the answer alone and,
    if that leaves it Unsure, the calls too. A trace without an answer is Unsolved; the judge is not
    asked. Without a judge, or if it fails, the status is "not judged" and the score 0.
    """
    kind, answer = final_answer(trace)
    status = "Unsolved" if ask else "not judged"
    judge_errors = []
    if "fault" in item.reference:
        reason = f"the query is broken: {item.reference['fault']}"
    elif not trace:
        reason = "no output"
    elif kind == "give_up_and_restart":
        reason = "gave up"
    elif kind is None:
        reason = trace[-1].get("stopped") or answer
    elif not answer.strip():
        reason = "empty answer"
    elif ask is None:
        reason = "finished, but there is no judge"
    else:
        query = item.reference["query"]
        status, reason = ask(SOLVED.format(query=query, answer=answer), STATUSES)
        if status == "Unsure":
            trace_json = json.dumps(trace)
            prompt = SOLVED_IN_DETAIL.format(query=query, answer=answer, trace=trace_json)
            status, reason = ask(prompt, STATUSES)
        if status is None:
            judge_errors = [reason]
            status = "not judged"
            reason = f"the judge failed: {reason}"
    return {
        "id": item.id, "category": item.category, "correct": status == "Solved", "reason": reason,
        "output": answer if kind == "give_answer" else None, "status": status,
        "score": SCORES.get(status, 0.0), "end": kind, **count_calls(item, trace, kind),
        "judge_errors": dict(Counter(judge_errors))}


def count_calls(item: Item, trace: list[dict], kind: str | None) -> dict:
    """What can be said of a trace's calls without a judge; the Finish that ends it is left out."""
    steps = [step for step in trace if "stopped" not in step]
    if kind:
        steps = steps[:-1]
    functions = item.reference.get("functions", {})
    relevant = item.reference.get("relevant", [])
    called = {step["action"] for step in steps}
    return {
        "steps": len(steps),
        "valid_actions": sum(step["action"] in (*functions, "Finish") for step in steps),
        "valid_json": sum(isinstance(step["input"], dict) for step in steps),
        "relevant": len(relevant),
        "relevant_called": len(called.intersection(relevant)),
        "sources": dict(Counter(str(step["source"]) for step in steps if "source" in step)),
        "server_errors": dict(Counter(str(step["fault"]) for step in steps if "fault" in step))}


def compare(item: Item, ours: tuple[dict, list], theirs: tuple[dict, list], ask) -> dict:
    """{"win": "win" | "tie" | "lose" | "not judged", "win_reason"}, to be added to our verdict.

    ours and theirs are (verdict, trace) on the same item. The better status wins, and a missing
    answer loses to any. Between equals the judge chooses and is asked in both orders: a tie if the
    two disagree. (Upstream asks twice in the same order, and tosses a coin between equal answers.)
    """
    verdict, trace = ours
    other, other_trace = theirs
    if "not judged" in (verdict["status"], other["status"]):
        return {"win": "not judged", "win_reason": "not both answers are judged"}

    # decided without the judge
    standing = answer_status(verdict)
    other_standing = answer_status(other)
    if standing != other_standing:
        ranks = (*STATUSES, "no answer")
        win = "win" if ranks.index(standing) < ranks.index(other_standing) else "lose"
        return {"win": win, "win_reason": f"{standing} against {other_standing}"}
    if standing == "no answer":
        return {"win": "tie", "win_reason": "no answer from either"}
    if verdict["output"] == other["output"]:
        return {"win": "tie", "win_reason": "the same answer"}

    # decided by the judge, which may favour whichever comes first
    query = item.reference["query"]
    side = (verdict["output"], json.dumps(trace))
    other_side = (other["output"], json.dumps(other_trace))
    choice, reason = ask(better_prompt(query, side, other_side), ("0", "1"))
    swapped_choice, swapped_reason = ask(better_prompt(query, other_side, side), ("0", "1"))
    if None in (choice, swapped_choice):
        fault = reason if choice is None else swapped_reason
        judge_errors = Counter(verdict["judge_errors"]) + Counter([fault])
        return {"win": "not judged", "win_reason": f"the judge failed: {fault}",
                "judge_errors": dict(judge_errors)}
    outcomes = {("0", "1"): "win", ("1", "0"): "lose"}
    return {"win": outcomes.get((choice, swapped_choice), "tie"),
            "win_reason": f"{reason} / {swapped_reason}"}


def answer_status(verdict: dict) -> str:
    return verdict["status"] if (verdict["output"] or "").strip() else "no answer"


def better_prompt(query: str, first: tuple[str, str], second: tuple[str, str]) -> str:
    return BETTER.format(query=query, first_answer=first[0], first_trace=first[1],
                         second_answer=second[0], second_trace=second[1])


def summary(verdicts: list[dict]) -> dict:
    """Figures over the asked queries, overall and by category.

    With a judge: the solvable pass rate, (solved + 0.5 unsure) / asked, and the win rate. Without:
    how many finished, called existing functions in valid JSON, and called the relevant APIs; none
    of these is a pass rate.
    """
    judged = any(v["status"] != "not judged" or v["judge_errors"] for v in verdicts)
    compared = any("win" in v for v in verdicts)
    categories = {}
    for category in dict.fromkeys(v["category"] for v in verdicts):
        group = [v for v in verdicts if v["category"] == category]
        categories[category] = rates(group, judged, compared)
    figures = rates(verdicts, judged, compared) | {"categories": categories}
    if judged and categories:
        pass_rates = [group["pass_rate"] for group in categories.values()]
        figures["pass_rate_mean_of_categories"] = sum(pass_rates) / len(pass_rates)
    for key in ("sources", "server_errors", "judge_errors"):
        counts = Counter()
        for verdict in verdicts:
            counts += Counter(verdict[key])
        figures[key] = dict(counts)
    broken = [v for v in verdicts if v["reason"].startswith("the query is broken")]
    figures["broken_queries"] = [f"{v['id']}: {v['reason']}" for v in broken]
    return figures


def rates(verdicts: list[dict], judged: bool, compared: bool) -> dict:
    ends = Counter(v["end"] for v in verdicts)
    steps = total(verdicts, "steps")
    figures = {
        "asked": len(verdicts),
        "finish_rate": share(ends["give_answer"], len(verdicts)),
        "give_up_rate": share(ends["give_up_and_restart"], len(verdicts)),
        "valid_action_rate": share(total(verdicts, "valid_actions"), steps),
        "valid_json_rate": share(total(verdicts, "valid_json"), steps),
        "relevant_apis_called": share(total(verdicts, "relevant_called"),
                                      total(verdicts, "relevant")),
        "steps": steps}
    if judged:
        figures["pass_rate"] = share(total(verdicts, "score"), len(verdicts))
        statuses = Counter(v["status"] for v in verdicts)
        figures |= {status: statuses[status] for status in (*STATUSES, "not judged")}
    if compared:
        wins = Counter(v.get("win", "not judged") for v in verdicts)
        for outcome in ("win", "tie", "lose"):
            figures[f"{outcome}_rate"] = share(wins[outcome], len(verdicts))
        figures["not compared"] = wins["not judged"]
    return figures


def total(verdicts: list[dict], key: str):
    return sum(v[key] for v in verdicts)


def share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
