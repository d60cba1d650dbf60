"""StableToolBench's verdicts: how a trace ended, whether it solved the query, and the figures."""
import json
import statistics
from collections import Counter
from typing import NamedTuple

from benchmarks import NO_OUTPUT, Item
from benchmarks.servers import find_function
from benchmarks.traces import converted_answer, final_answer
from support.cli import DataError

STATUSES = ("Solved", "Unsure", "Unsolved")
SCORES = {"Solved": 1.0, "Unsure": 0.5}


class Question(NamedTuple):
    """What a judge is asked: a prompt, and the function that it is to call with its choice.

    The functions, their arguments and the rules are those of ToolEval's evaluator
    tooleval_gpt-3.5-turbo_default; the wording is ours.
    """
    prompt: str
    function: str
    argument: str
    schema: dict        # of the argument
    choices: tuple


STATUS_SCHEMA = {"type": "string", "enum": list(STATUSES)}

SOLVED = Question("""\
Decide the `answer_status` of the answer to the query below:
1. "Unsolved" if the answer is an apology, or does not respond to the query directly.
2. If it does respond directly, look further:
2.1 "Unsure" if the answer alone does not let you tell whether the query is solved;
2.2 "Solved" or "Unsolved" if it does and you are confident.

Query:
{query}
Answer:
{answer}

Call `check_answer_status` with the `answer_status` and your reason.""",
                  "check_answer_status", "answer_status", STATUS_SCHEMA, STATUSES)

SOLVED_IN_DETAIL = Question("""\
Decide the `answer_status` of the answer to the query below, given with every step that led to it:
1. "Unsolved" if the messages of all 'tool' nodes show errors.
2. "Unsolved" if the messages of the 'tool' nodes show that the "final_answer" is false or invalid.
3. "Unsure" if you cannot verify that its information is true and valid.
4. "Solved" if there are 'tool' nodes with successful calls, and these do solve the query.

Query:
{query}
Answer:
{answer}

Call `parse_answer_status` with the `answer_status` and your reason.""",
                            "parse_answer_status", "answer_status", STATUS_SCHEMA, STATUSES)

BETTER = Question("""\
Query:
{query}

Answer_0:
{answer_0}

Answer_1:
{answer_1}

Choose the better of these two answers, which are given in JSON; their order means nothing:
1. Compare their "final_answer":
- Informative: does it hold everything that is needed to reply to the query?
- Factual: does it state truthfully what was done, and what failed in the end?
- Reasoning: if it does not solve the query, does it give the reason in detail and correctly?
2. If that does not decide, compare their "answer_details":
- Cost of the calls: what share of the calls failed, or repeated others?
- Cost of the run: how many tokens did it take in all?
- Milestones: how many of the task's parts were completed?
- Exploration: how many different tools and arguments were called with success?

Call `select_better_answer` with the `index` of the better answer, 0 or 1, and your reason. \
If you cannot decide, choose one at random.""",
                  "select_better_answer", "index", {"type": "number"}, ("0", "1"))


# --------------------------------------------------------------------------------------------------
# One trace

def judge(item: Item, trace: list[dict], ask=None, times: int = 1) -> dict:
    """The verdict on a trace: "status", one of STATUSES or "not judged", and its "score".

    ask(question, **fields) -> (choice, reason), or (None, fault) if the judge fails. It is asked
    `times` times: the status is the most frequent one and the score the mean. If it fails once,
    the status is "not judged" and the score 0; without a judge, too. A trace without an answer is
    Unsolved, and the judge is not asked.
    """
    kind, answer = final_answer(trace)
    reason = why_unsolved(item, trace)
    statuses = []
    judge_errors = {}
    if ask is None:
        status = "not judged"
        reason = reason or "finished, but there is no judge"
    elif reason:
        status = "Unsolved"
    else:
        statuses, reason = ask_statuses(item, trace, ask, times)
        if statuses:
            status = Counter(statuses).most_common(1)[0][0]
        else:
            status = "not judged"
            judge_errors = {reason: 1}
            reason = f"the judge failed: {reason}"

    scores = [SCORES.get(s, 0.0) for s in statuses or [status]]
    return {
        "id": item.id, "category": item.category, "correct": status == "Solved", "reason": reason,
        "output": answer if kind == "give_answer" else None, "status": status,
        "statuses": statuses, "score": sum(scores) / len(scores), "end": kind,
        **count_calls(item, trace, kind), "judge_errors": judge_errors, "trace": trace}


def why_unsolved(item: Item, trace: list[dict]) -> str | None:
    """Why a trace is Unsolved whatever a judge may say; None if a judge must decide."""
    kind, answer = final_answer(trace)
    if "fault" in item.reference:
        return f"the query is broken: {item.reference['fault']}"
    if not trace:
        return NO_OUTPUT
    if "stopped" in trace[-1]:
        return trace[-1]["stopped"]
    if kind is None:
        return answer
    if kind == "give_up_and_restart" or "give_up_and_restart" in answer:
        return "gave up"
    return None if answer.strip() else "empty answer"


def ask_statuses(item: Item, trace: list[dict], ask, times: int) -> tuple[list[str], str]:
    """(the statuses, the reason for the most frequent one), or ([], fault) if the judge fails."""
    query = item.reference["query"]
    answer = converted_answer(trace)
    statuses = []
    reasons = {}
    for _ in range(times):
        # the answer alone and, if that leaves the judge Unsure, with all steps
        status, reason = ask(SOLVED, query=query, answer=answer["final_answer"])
        if status == "Unsure":
            status, reason = ask(SOLVED_IN_DETAIL, query=query, answer=json.dumps(answer))
        if status is None:
            return [], reason
        statuses.append(status)
        reasons.setdefault(status, reason)
    return statuses, reasons[Counter(statuses).most_common(1)[0][0]]


def count_calls(item: Item, trace: list[dict], kind: str | None) -> dict:
    """What can be said of a trace's calls without a judge; the Finish that ends it is left out."""
    steps = [step for step in trace if "stopped" not in step]
    if kind:
        steps = steps[:-1]
    functions = item.reference.get("functions", {})
    relevant = item.reference.get("relevant", [])
    actions = [step["action"] for step in steps]
    return {
        "steps": len(steps),
        "valid_actions": sum(a == "Finish" or bool(find_function(functions, a)) for a in actions),
        "valid_json": sum(isinstance(step["input"], dict) for step in steps),
        "relevant": len(relevant),
        "relevant_called": len(set(actions).intersection(relevant)),
        "sources": dict(Counter(str(step["source"]) for step in steps if "source" in step)),
        "server_errors": dict(Counter(str(step["fault"]) for step in steps if "fault" in step))}


# --------------------------------------------------------------------------------------------------
# Two traces

def compare(item: Item, ours: dict, theirs: dict, ask, times: int = 1) -> dict:
    """{"win": "win" | "tie" | "lose" | "not judged", "win_reason"}, to be added to our verdict.

    ours and theirs are verdicts on the same item. The better status wins, and a missing trace loses
    to any. Between equals the judge chooses: it is asked `times` times in both orders, and the
    majority of its choices wins. (Upstream asks in a random order, and tosses a coin between
    identical answers.)
    """
    errors = Counter(ours["judge_errors"]) + Counter(theirs["judge_errors"])
    if "not judged" in (ours["status"], theirs["status"]):
        return {"win": "not judged", "win_reason": "not both answers are judged",
                "judge_errors": dict(errors)}

    # decided without the judge
    status = ours["status"] if ours["trace"] else NO_OUTPUT
    other_status = theirs["status"] if theirs["trace"] else NO_OUTPUT
    if status != other_status:
        ranks = (*STATUSES, NO_OUTPUT)
        win = "win" if ranks.index(status) < ranks.index(other_status) else "lose"
        return {"win": win, "win_reason": f"{status} against {other_status}"}
    answer = answer_to_compare(ours)
    other_answer = answer_to_compare(theirs)
    if answer == other_answer or "fault" in item.reference:
        return {"win": "tie", "win_reason": "nothing to choose between"}

    # decided by the judge
    query = item.reference["query"]
    votes = Counter()
    reasons = []
    for _ in range(times):
        for answers, our_index in (((answer, other_answer), "0"), ((other_answer, answer), "1")):
            index, reason = ask(BETTER, query=query, answer_0=answers[0], answer_1=answers[1])
            if index is None:
                return {"win": "not judged", "win_reason": f"the judge failed: {reason}",
                        "judge_errors": dict(errors + Counter([reason]))}
            votes["win" if index == our_index else "lose"] += 1
            reasons.append(reason)
    win = "tie" if votes["win"] == votes["lose"] else max(votes, key=votes.get)
    return {"win": win, "win_reason": " / ".join(reasons)}


def answer_to_compare(verdict: dict) -> str:
    answer = converted_answer(verdict["trace"])
    del answer["method"]
    answer["final_answer"] = answer["final_answer"][:1000]
    return json.dumps(answer)


# --------------------------------------------------------------------------------------------------
# Figures

def summary(verdicts: list[dict]) -> dict:
    """Figures over the asked queries, overall and by category.

    With a judge: the solvable pass rate and the win rate. Without: how many finished, called
    existing functions in valid JSON, and called the relevant APIs; none of these is a pass rate.
    """
    judged = any(v["status"] != "not judged" or v["judge_errors"] for v in verdicts)
    compared = any("win" in v for v in verdicts)
    categories = {}
    for category in dict.fromkeys(v["category"] for v in verdicts):
        group = [v for v in verdicts if v["category"] == category]
        categories[category] = rates(group, judged, compared)
    figures = rates(verdicts, judged, compared) | {"categories": categories}
    if "pass_rate" in figures:
        pass_rates = [group["pass_rate"] for group in categories.values()]
        figures["pass_rate_mean_of_categories"] = sum(pass_rates) / len(pass_rates)
    for key in ("sources", "server_errors", "judge_errors"):
        figures[key] = add_up(verdicts, key)
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
        figures |= pass_rates(verdicts)
    if compared:
        figures |= win_rates(verdicts)
    return figures


def pass_rates(verdicts: list[dict]) -> dict:
    """(solved + 0.5 unsure) / asked, and its standard deviation over the times the judge was asked.

    Where verdicts are missing there is no pass rate, only its bounds and that of the judged ones.
    """
    statuses = Counter(v["status"] for v in verdicts)
    missing = statuses["not judged"]
    score = total(verdicts, "score")
    if missing:
        figures = {"pass_rate_of_judged": share(score, len(verdicts) - missing),
                   "pass_rate_low": score / len(verdicts),
                   "pass_rate_high": (score + missing) / len(verdicts)}
    else:
        figures = {"pass_rate": score / len(verdicts)}
        times = max(len(v["statuses"]) for v in verdicts)
        if times > 1:
            rounds = [pass_rate_of_round(verdicts, i) for i in range(times)]
            figures["pass_rate_std"] = statistics.pstdev(rounds)
    return figures | {status: statuses[status] for status in (*STATUSES, "not judged")}


def pass_rate_of_round(verdicts: list[dict], i: int) -> float:
    score = 0.0
    for verdict in verdicts:
        # those Unsolved without asking have no statuses
        score += SCORES.get(verdict["statuses"][i], 0.0) if verdict["statuses"] else 0.0
    return score / len(verdicts)


def win_rates(verdicts: list[dict]) -> dict:
    wins = Counter(v.get("win", "not judged") for v in verdicts)
    missing = wins["not judged"]
    suffix = "_of_compared" if missing else ""
    figures = {}
    for outcome in ("win", "tie", "lose"):
        figures[f"{outcome}_rate{suffix}"] = share(wins[outcome], len(verdicts) - missing)
    return figures | {"not compared": missing}


def check_verdicts(verdicts: list[dict]) -> None:
    """Print how many verdicts the judge failed to give; raise DataError if it gave none."""
    asked = [v for v in verdicts if v["statuses"] or v["judge_errors"]]
    pairs = [v for v in verdicts if "win" in v]
    unjudged = [v for v in asked if v["status"] == "not judged"]
    uncompared = [v for v in pairs if v["win"] == "not judged"]
    for what, missing, whole in (("judged", unjudged, asked), ("compared", uncompared, pairs)):
        if missing:
            faults = format_counts(add_up(missing, "judge_errors"))
            message = f"not {what}: {len(missing)} of {len(whole)} ({faults})"
            if len(missing) == len(whole):
                raise DataError(f"{message}; see that the judge answers, and run the same command "
                                "again: the outputs are kept.")
            print(message)


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())


def add_up(verdicts: list[dict], key: str) -> dict:
    """The sum of the verdicts' counts."""
    counts = Counter()
    for verdict in verdicts:
        counts += Counter(verdict[key])
    return dict(counts)


def total(verdicts: list[dict], key: str):
    return sum(v[key] for v in verdicts)


def share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
