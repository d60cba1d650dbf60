"""StableToolBench: an agent calls APIs until it finishes, then a judge model says whether its answer solves the query."""
import glob
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from benchmarks import Item
from benchmarks.servers import cache, endpoint, input, recorded, server, stored
from support.cli import DataError
from support.readers import Message, as_json, read_records


MAX_NEW_TOKENS = 512


PROMPT = """You are an agent that does the task below with the help of many tools (functions).
At each step, think about where you stand and what to do next, and make a function call. Your output should follow this format:
Thought:
Action
Action Input:

You then get the result of the call and go on from there, one thought and call after the other, until you can give the answer.
Remember:
1.a call cannot be taken back; to begin the task afresh, give up and restart.
2.keep every thought short, five sentences at most.
3.you may try several things, one in each call.
Task description: Use the functions to help with the user's query. Remember:
1.ALWAYS call "Finish" at the end of the task, with a final answer that holds all that the user should be told. If you cannot do \
the task, or the functions always fail, use Finish->give_up_and_restart.
2.Use the functions' names, not the names of the tools.
You have access of the following tools:
{tools}
Specifically, you have access to the following APIs: {functions}"""
FINISH = {"name": "Finish", "description": "Ends the task: with the final answer, which is all that the user will see, or by "
              "giving up where no answer can be had. ALWAYS call it at the end.", "parameters": {
                  "type": "object", "required": ["return_type"], "properties": {
                      "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
                      "final_answer": {"type": "string", "description": 'The answer, if "return_type"=="give_answer"'}}}}


STATUSES = ("Solved", "Unsure", "Unsolved")
SOLVED = """Does the answer solve the user's query?
Unsolved: it apologises, or does not respond to the query. Unsure: it responds, but one cannot tell from it alone whether the \
query is solved. Solved or Unsolved: it responds, and one can tell.

Query: {query}

Answer: {answer}"""
SOLVED_IN_DETAIL = """Does the answer solve the user's query? Check it against the calls that were made for it.
Unsolved: every call failed, or the calls' results contradict the answer. Unsure: the calls do not show whether the answer is \
true. Solved: calls succeeded, and what they returned does solve the query.

Query: {query}

Answer: {answer}

Calls: {trace}"""
BETTER = """Which of two answers serves the user's query better? Compare how informative, how true to the calls' results and how \
well reasoned they are; then how much of the query the calls dealt with; then how few calls were needed.

Query: {query}

Answer 0: {0}
Calls 0: {1}

Answer 1: {2}
Calls 1: {3}"""


def items(folder: str) -> list[Item]:
    """The queries of solvable_queries/test_instruction/G*.json below `folder`, or of the folder itself; id is the query_id.

    A record that lacks what is needed stays in, without messages and with its fault as the reference: asked, and unsolved.
    """
    files = sorted(path for below in ("", "test_instruction", "solvable_queries/test_instruction")
                   for path in glob.glob(os.path.join(glob.escape(folder), below, "G[123]_*.json")))
    if not files:
        raise DataError(f"{folder} holds no solvable_queries/test_instruction/G*.json; name StableToolBench's folder.")
    items = []
    for path in files:
        category = os.path.basename(path)[:-len(".json")]
        for where, record in read_records(path):
            try:
                items.append(item(record, category))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                items.append(Item(where, category, [], {"fault": f"{type(e).__name__}: {e}"}))
    return items


def item(record: dict, category: str) -> Item:
    apis = record["api_list"]
    documents = [function(api) for api in apis]
    functions = {}              # name -> (category, tool, api); names are cut, so a few collide: the first has it, as upstream
    for api, document in zip(apis, documents):
        names = api["category_name"], name(api["tool_name"]), name(api["api_name"], True)
        functions.setdefault(document["name"], names)
    # upstream describes each tool from its own files, which the queries do not hold; without a description it says None
    names = dict.fromkeys(name(api["tool_name"]) for api in apis)
    tools = "".join(f"{i}.{name}: None\n" for i, name in enumerate(names, 1))
    return Item(str(record["query_id"]), category, [
        Message("system", PROMPT.format(tools=tools, functions=[*documents, FINISH])),
        Message("user", f"{record['query']}\nBegin!")],
        {"query": record["query"], "functions": functions,
         "relevant": sorted({function_name(tool, api) for tool, api in record["relevant APIs"]})})


def name(text: str, reserved: bool = False) -> str:
    """ToolBench's name of a tool (or, with `reserved`, of an API or a parameter, which may be no word of Python's)."""
    name = re.sub("_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", text)).lower().strip("_")
    name = "get_" + name if name[:1].isdigit() else name
    return "is_" + name if reserved and name in ("from", "class", "return", "false", "true", "id", "and") else name


def function_name(tool: str, api: str) -> str:
    return f"{name(api, True)}_for_{name(tool)}"[-64:]


def function(api: dict) -> dict:
    """ToolBench's document of one function: its name is api_for_tool, and texts end at 256 characters."""
    name = function_name(api["tool_name"], api["api_name"])
    description = f'This is the subfunction for tool "{name(api["tool_name"])}", you can use this tool.'
    if (about := (api["api_description"] or "").strip()):
        description += f'The description of this function is: "{about.replace(api["api_name"], name)[:256]}"'
    properties, lists = {}, {"required": [], "optional": []}
    # ToolBench shows optional parameters only beside required ones; its training data does, so the prompt does
    for kind in lists if api["required_parameters"] else ():
        for p in api[f"{kind}_parameters"]:
            kind_of_value = {"NUMBER": "integer", "BOOLEAN": "boolean"}.get(p["type"], "string")
            example = {} if str(p["default"]) == "" else {"example_value": p["default"]}
            properties[name(p["name"], True)] = {"type": kind_of_value, "description": p["description"][:256]} | example
            lists[kind].append(name(p["name"], True))
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, **lists}}


def calls(output: str) -> tuple[str, list[tuple[str, object]]]:
    """(thought, [(action, input)]) of a turn: Thought / Action / Action Input, or APIGen's JSON list of calls; else []."""
    head, found, tool_input = output.partition("Action Input:")
    thought, found_action, action = head.rpartition("Action:")
    if found and found_action:
        return thought.replace("Thought:", "", 1).strip(), [(action.strip(), input(tool_input))]
    try:
        calls = json.loads(output[output.index("["):output.rindex("]") + 1], strict=False)
        return output[:output.index("[")].strip(), [(str(c["name"]), input(as_json(c["arguments"]))) for c in calls]
    except (ValueError, KeyError, TypeError, RecursionError):
        return output.strip(), []


def end(trace: list[dict]) -> tuple[str | None, str]:
    """("give_answer", the answer), ("give_up_and_restart", "") or (None, what is wrong): how the last step ends the trace."""
    if not trace or trace[-1].get("action") != "Finish":
        return None, "no Finish"
    given = trace[-1].get("input", "")
    if isinstance(given, dict):
        kind, answer = given.get("return_type"), given.get("final_answer")
    else:                                   # broken JSON, cut short perhaps: the fields are searched for, as upstream does
        kind, answer = (found and found[1] for found in (re.search(r'"return_type": ?"(\w+)', given),
                                                         re.search(r'"final_answer": ?"(.*)', given, re.DOTALL)))
    if kind == "give_up_and_restart":
        return kind, ""
    if kind != "give_answer" or answer is None:
        return None, 'must have "final_answer"' if kind == "give_answer" else 'must have "return_type"'
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return kind, answer.encode("utf-8", "replace").decode()                 # a lone surrogate cannot be written to a file


def run(items: list[Item], speak, call, max_steps: int = 12, done=lambda item, trace: None) -> dict[str, list[dict]]:
    """Let the agent answer all items side by side; returns {item id: trace}, and calls done(item, trace) as each one finishes.

    speak(conversations) -> outputs, None for a conversation that has grown too long; call: one of the environments below.
    A trace is a list of steps {"thought", "action", "input", "observation"}, with "source" (or "fault") of a call's response.
    max_steps counts turns. (Upstream's 12 counts thought, action and input each for one: its ToolLLaMA stops after 4 turns.)
    """
    active = [(item, list(item.messages), []) for item in items]
    traces = {item.id: trace for item, _, trace in active}
    with ThreadPoolExecutor(8) as pool:                 # a call waits for the environment, not for this machine
        for turn in range(max_steps + 1):
            over = [turn == max_steps or not talk or end(trace)[0] or any("stopped" in step for step in trace)
                    for _, talk, trace in active]
            for entry, is_over in zip(active, over):
                if is_over:
                    done(entry[0], entry[2])
            active = [entry for entry, is_over in zip(active, over) if not is_over]
            if not active:
                return traces
            outputs = speak([talk for _, talk, _ in active])
            turns = pool.map(lambda entry, output: turn(entry[0], output, call), active, outputs)
            for (_, talk, trace), output, steps in zip(active, outputs, turns, strict=True):
                trace += steps
                talk += [Message("assistant", (output or "").strip("\n")), *(Message("tool", s["observation"]) for s in steps)]


def turn(item: Item, output: str | None, call) -> list[dict]:
    """The steps of one turn, a call each, with what the environment observes."""
    if output is None:
        return [{"thought": "", "action": "", "input": "", "observation": "", "stopped": "the conversation grew too long"}]
    thought, calls = calls(output)
    steps = []
    for action, given in calls or [("", "")]:
        steps.append(step := {"thought": thought, "action": action, "input": given})
        if action == "Finish":
            kind, problem = end([step])
            reply = {"error": "" if kind else problem, "response": ""}
        elif action in item.reference["functions"]:
            reply = call(*item.reference["functions"][action], given)
            step |= {key: reply[key] for key in ("source", "fault") if key in reply}
        else:
            reply = {"error": f"No such function name: {action}", "response": ""}
        text = json.dumps({key: reply[key] for key in ("error", "response")})
        step["observation"] = text if len(text) <= 1024 else text[:1024] + "..."
        thought = ""
        if action == "Finish" and kind:
            break
    return steps


def traces(path: str) -> dict[str, list[dict]]:
    """Traces {id: steps} of a file of {"id", "trace": [{"action", "input", "observation"}, ...]} lines, as the run writes them.

    {"id", "output": "the final answer"} will do where the steps are unknown. A later line of an id replaces an earlier one.
    """
    traces = {}
    for where, record in read_records(path):
        try:
            trace = record["trace"] if "trace" in record else [{"action": "Finish", "input": {
                "return_type": "give_answer", "final_answer": record["output"] or ""}}]
            traces[str(record["id"])] = [step | {"action": step["action"].strip(), "input": input(as_json(step["input"]))}
                                         for step in trace]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f'{where}: expected {{"id", "trace": [{{"action": "...", "input": ...}}]}} '
                            'or {"id", "output": "..."}.') from None
    return traces


def outputs(o: Options, items: list[Item], speak, settings: dict) -> dict[str, list[dict]]:
    """The traces of all items; they are kept in OUT/outputs.RANK.jsonl as they end, and the ranks share those not there yet."""
    call = (server(o.server, os.environ.get("TOOLBENCH_KEY", "")) if o.server else cache(o.cache) if o.cache
            else recorded(o.recorded) if o.recorded else stored(lambda *_: {}))
    return keep_outputs(items, o.out, settings, "agent", lambda mine, done: run(mine, speak, call, o.max_steps, done))


def verdicts(o: Options, items: list[Item], traces: dict[str, list[dict]]) -> list[dict]:
    """A verdict on every asked item, with its win over --against where given; judged side by side."""
    if bool(o.judge_url) != bool(o.judge_model) or o.against and not o.judge_url:
        raise DataError("a judge needs both --judge-url and --judge-model" + "; --against needs a judge." * bool(o.against))
    judge = endpoint(o.judge_url, o.judge_model, os.environ.get("OPENAI_API_KEY", "")) if o.judge_url else None
    others = traces(o.against) if o.against else {}

    def verdict(item):
        trace, other = traces.get(item.id, []), others.get(item.id, [])
        ours = judge(item, trace, judge)
        return ours | (compare(item, (ours, trace), (judge(item, other, judge), other), judge) if o.against else {})

    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(verdict, items), "judge", total=len(items), unit="query", disable=not judge))


def judge(item: Item, trace: list[dict], judge=None) -> dict:
    """The verdict on a trace: "status" Solved, Unsure or Unsolved, "score" 1, 0.5 or 0; "not judged" and 0 without a judge's word.

    The judge sees the answer alone, and if Unsure of that once more with the calls. What has no answer is Unsolved unasked.
    """
    query, functions = item.reference.get("query"), item.reference.get("functions", {})
    kind, answer = end(trace)
    status, reason, errors = "Unsolved" if judge else "not judged", None, []
    if "fault" in item.reference:
        reason = f"the query is broken: {item.reference['fault']}"
    elif not trace:
        reason = "no output"
    elif kind != "give_answer":
        reason = "gave up" if kind else trace[-1].get("stopped") or answer
    elif not answer.strip():
        reason = "empty answer"
    elif judge is None:
        reason = "finished, but there is no judge"
    else:
        status, reason = judge(SOLVED.format(query=query, answer=answer), STATUSES)
        if status == "Unsure":
            prompt = SOLVED_IN_DETAIL.format(query=query, answer=answer, trace=json.dumps(trace))
            status, reason = judge(prompt, STATUSES)
        if status is None:
            status, reason, errors = "not judged", f"the judge failed: {reason}", [reason]
    steps = [step for step in trace if "stopped" not in step][:-1 if kind else None]            # all but the Finish
    return {"id": item.id, "category": item.category, "correct": status == "Solved", "reason": reason,
            "output": answer if kind == "give_answer" else None, "status": status,
            "score": {"Solved": 1.0, "Unsure": 0.5}.get(status, 0.0), "end": kind, "steps": len(steps),
            "valid_actions": sum(step["action"] in functions or step["action"] == "Finish" for step in steps),
            "valid_json": sum(isinstance(step["input"], dict) for step in steps),
            "relevant": len(item.reference.get("relevant", [])),
            "relevant_called": len({step["action"] for step in steps} & set(item.reference.get("relevant", []))),
            "sources": dict(Counter(str(step["source"]) for step in steps if "source" in step)),
            "server_errors": dict(Counter(str(step["fault"]) for step in steps if "fault" in step)),
            "judge_errors": dict(Counter(errors))}


def compare(item: Item, ours: tuple[dict, list], theirs: tuple[dict, list], judge) -> dict:
    """{"win": "win" | "tie" | "lose" | "not judged", "win_reason"} of two (verdict, trace) on an item, to be merged into our verdict.

    The better status wins, and a missing answer loses to any. Between equals the judge chooses, asked in both orders: a tie if
    it wavers. (Upstream asks twice in the same order, and tosses a coin between equal answers.)
    """
    (verdict, trace), (other, other_trace) = ours, theirs
    if "not judged" in (verdict["status"], other["status"]):
        return {"win": "not judged", "win_reason": "not both answers are judged"}
    status, other_status = (v["status"] if (v["output"] or "").strip() else "no answer" for v in (verdict, other))
    ranks = (*STATUSES, "no answer")
    if status != other_status:
        win = "win" if ranks.index(status) < ranks.index(other_status) else "lose"
        return {"win": win, "win_reason": f"{status} against {other_status}"}
    if verdict["output"] == other["output"] or status == "no answer":
        return {"win": "tie", "win_reason": "no answer from either" if status == "no answer" else "the same answer"}
    sides = [(verdict["output"], json.dumps(trace)), (other["output"], json.dumps(other_trace))]
    (first, why), (second, why_too) = (judge(BETTER.format(*a, *b, query=item.reference["query"]), ("0", "1"))
                                       for a, b in (sides, sides[::-1]))
    if None in (first, second):
        fault = why if first is None else why_too
        return {"win": "not judged", "win_reason": f"the judge failed: {fault}",
                "judge_errors": dict(Counter(verdict["judge_errors"]) + Counter([fault]))}
    return {"win": {("0", "1"): "win", ("1", "0"): "lose"}.get((first, second), "tie"), "win_reason": f"{why} / {why_too}"}


def summary(verdicts: list[dict]) -> dict:
    """Figures over the asked queries: the solvable pass rate (solved + 0.5 unsure) / N and the win rate where there was a judge;
    and what needs none and is no pass rate: finished, calls of existing functions and in valid JSON, relevant APIs called."""
    def rates(group: list[dict]) -> dict:
        total = lambda key: sum(v[key] for v in group)
        share = lambda part, whole: part / whole if whole else None
        figures = {"asked": len(group), "finish_rate": share(sum(v["end"] == "give_answer" for v in group), len(group)),
                   "give_up_rate": share(sum(v["end"] == "give_up_and_restart" for v in group), len(group)),
                   "valid_action_rate": share(total("valid_actions"), total("steps")),
                   "valid_json_rate": share(total("valid_json"), total("steps")),
                   "relevant_apis_called": share(total("relevant_called"), total("relevant")), "steps": total("steps")}
        if judged:
            figures |= {"pass_rate": share(total("score"), len(group))}
            figures |= {status: sum(v["status"] == status for v in group) for status in (*STATUSES, "not judged")}
        if compared:
            count = Counter(v.get("win", "not judged") for v in group)
            figures |= {f"{outcome}_rate": share(count[outcome], len(group)) for outcome in ("win", "tie", "lose")}
            figures |= {"not compared": count["not judged"]}
        return figures

    judged = any(v["status"] != "not judged" or v["judge_errors"] for v in verdicts)
    compared = any("win" in v for v in verdicts)
    categories = {c: rates([v for v in verdicts if v["category"] == c]) for c in dict.fromkeys(v["category"] for v in verdicts)}
    summary = rates(verdicts) | {"categories": categories}
    if judged and categories:
        summary["pass_rate_mean_of_categories"] = sum(c["pass_rate"] for c in categories.values()) / len(categories)
    for key in ("sources", "server_errors", "judge_errors"):
        summary[key] = dict(sum((Counter(v[key]) for v in verdicts), Counter()))
    broken = [f"{v['id']}: {v['reason']}" for v in verdicts if v["reason"].startswith("the query is broken")]
    return summary | {"broken_queries": broken}
