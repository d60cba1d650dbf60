"""Evaluation of any checkpoint: loss by token role, and success on the toy.

    python eval.py toy --model out/rft/model --out out/eval                        # exact match of tool and arguments
    python eval.py toy --predictions FILE.jsonl --out DIR                          # score {"id": ..., "output": "text"} lines
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out DIR  # mean loss by group of tokens

Writes OUT/summary.json and, for the toy, OUT/verdicts.jsonl: a line an asked item, with the reason.
"""
import ast
import functools
import glob
import html
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import (DataError, Dataset, Message, Renderer, as_json, load_labels, option, parse_options, read_records, run_script,
                  toy_samples)
from model import CheckpointError, Transformer, generate, init_distributed, mixed_precision, rank_and_world, resolve, write_json
from shad import classify, token_losses


@dataclass
class Options:
    bench: str = option("toy", "what to evaluate", positional=True, choices=["toy", "loss"])
    model: str = option("", "checkpoint: a Hugging Face directory or hub id")
    out: str = option("", "directory for summary.json and verdicts.jsonl", required=True)
    predictions: str = option(None, 'score these {"id", "output"} lines instead of generating (toy)')
    data: list = option([], "data files (loss)")
    labels: str = option(None, "labels of shad.py for the same data (loss)")
    count: int = option(200, "toy samples of each kind, held-in and held-out")
    micro_tokens: int = option(4096, "tokens of one forward, padding included")
    max_length: int = option(2048, "longer samples are dropped, in tokens")
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    seed: int = option(1, "seed of the toy samples; train.py's are made with others")


@dataclass
class Item:
    """One asked question of a benchmark."""
    id: str
    category: str
    messages: list[Message]         # the prompt: what the model is given
    reference: object = None        # what the judge needs


def losses_by_group(losses: np.ndarray, groups: dict) -> dict:
    """Mean loss of each group of tokens: {name: {"loss": nats, "tokens": count}}; groups: {name: (output tokens,) bool}."""
    return {name: {"loss": float(losses[g].mean()) if g.any() else None, "tokens": int(g.sum())} for name, g in groups.items()}


def role_losses(model: Transformer, dataset: Dataset, micro_tokens: int, reasoning=None) -> dict:
    """Mean loss of all output tokens; by the true roles where the data has them; by SHAD's labels where given."""
    losses, roles = token_losses(model, dataset, micro_tokens, "loss"), dataset.true_roles()
    groups = {"all": np.ones(len(losses), bool)}
    if roles is not None:
        groups |= {"reasoning": roles == "reasoning", "boilerplate": roles != "reasoning"}
        groups |= {name: roles == name for name in ("format", "connecting") if (roles == name).any()}
    if reasoning is not None:
        groups |= {"SHAD reasoning": reasoning, "SHAD boilerplate": ~reasoning}
    return losses_by_group(losses, groups)


# -----------------------------------------------------------------------------------------------------------------
# The toy: the call must have the right tool and exactly the right arguments

def parse_call(text: str):
    """(tool, arguments) of a Thought / Action / Action Input turn; ValueError says what is missing. Nothing is executed."""
    match = re.search(r"Action: *(\S+)\s+Action Input: *(\{.*\})", text, re.DOTALL)
    if not match:
        raise ValueError("no 'Action: ... Action Input: {...}'")
    return match[1], json.loads(match[2])


def judge_call(output: str, reference: str) -> tuple[bool, str]:
    """(correct, reason) of one output against the reference turn: exact match of tool and arguments."""
    tool, arguments = parse_call(reference)
    try:
        got_tool, got_arguments = parse_call(output)
    except ValueError as e:
        return False, f"not a call: {e}"
    if got_tool != tool:
        return False, f"tool {got_tool}, not {tool}"
    if got_arguments != arguments:
        return False, f"arguments {json.dumps(got_arguments)}, not {json.dumps(arguments)}"
    return True, "correct"


def toy_success(outputs: dict[str, str], samples: dict) -> list[dict]:
    """Verdicts on {sample id: output text}; samples: {category: samples}. A missing output is wrong."""
    return [{"id": s.id, "category": category, "correct": correct, "reason": reason, "output": outputs.get(s.id)}
            for category, group in samples.items() for s in group
            for correct, reason in [judge_call(outputs[s.id], s.messages[-1].text) if s.id in outputs else (False, "no output")]]


def generate_outputs(model: Transformer, renderer: Renderer, samples, max_new_tokens: int = 96, batch: int = 64) -> dict[str, str]:
    """Greedy outputs {sample id: text} for the last turn of each sample."""
    outputs = {}
    for i in tqdm(range(0, len(samples), batch), "generate", unit="batch", disable=rank_and_world()[0] > 0):
        group = samples[i:i + batch]
        with mixed_precision(model.head.device):
            ids = generate(model, [renderer.prompt(s.messages[:-1]) for s in group], max_new_tokens, {renderer.end})
        outputs |= {s.id: renderer.tokenizer.decode(x, skip_special_tokens=False) for s, x in zip(group, ids)}
    return outputs


def evaluate_toy(model: Transformer, renderer: Renderer, count: int, seed: int, micro_tokens: int = 4096):
    """(summary, verdicts) of a checkpoint on `count` fresh toy samples of each kind: losses by true role, and success."""
    samples = {"held_in": toy_samples(count, seed), "held_out": toy_samples(count, seed, held_out=True)}
    verdicts = toy_success(generate_outputs(model, renderer, [s for group in samples.values() for s in group]), samples)
    losses = {kind: role_losses(model, Dataset(group, renderer), micro_tokens) for kind, group in samples.items()}
    return summarize_toy(verdicts) | {"losses": losses}, verdicts


def summarize_toy(verdicts: list[dict]) -> dict:
    kinds = ("held_in", "held_out")
    return {"asked": len(verdicts), "success": {k: float(np.mean([v["correct"] for v in verdicts if v["category"] == k])) for k in kinds}}


# -----------------------------------------------------------------------------------------------------------------
# StableToolBench: an agent calls APIs until it finishes, then a judge model says whether its answer solves the query

STB_PROMPT = """You are an agent that does the task below with the help of many tools (functions).
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
STB_FINISH = {"name": "Finish", "description": "Ends the task: with the final answer, which is all that the user will see, or by "
              "giving up where no answer can be had. ALWAYS call it at the end.", "parameters": {
                  "type": "object", "required": ["return_type"], "properties": {
                      "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
                      "final_answer": {"type": "string", "description": 'The answer, if "return_type"=="give_answer"'}}}}
STB_ATTEMPTS = 3            # of a request that times out, fails with 5xx or 429, or is answered with nonsense
STB_STATUSES = ("Solved", "Unsure", "Unsolved")
STB_SOLVED = """Does the answer solve the user's query?
Unsolved: it apologises, or does not respond to the query. Unsure: it responds, but one cannot tell from it alone whether the \
query is solved. Solved or Unsolved: it responds, and one can tell.

Query: {query}

Answer: {answer}"""
STB_SOLVED_IN_DETAIL = """Does the answer solve the user's query? Check it against the calls that were made for it.
Unsolved: every call failed, or the calls' results contradict the answer. Unsure: the calls do not show whether the answer is \
true. Solved: calls succeeded, and what they returned does solve the query.

Query: {query}

Answer: {answer}

Calls: {trace}"""
STB_BETTER = """Which of two answers serves the user's query better? Compare how informative, how true to the calls' results and how \
well reasoned they are; then how much of the query the calls dealt with; then how few calls were needed.

Query: {query}

Answer 0: {0}
Calls 0: {1}

Answer 1: {2}
Calls 1: {3}"""


def stb_items(folder: str) -> list[Item]:
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
                items.append(stb_item(record, category))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                items.append(Item(where, category, [], {"fault": f"{type(e).__name__}: {e}"}))
    return items


def stb_item(record: dict, category: str) -> Item:
    apis = record["api_list"]
    documents = [stb_function(api) for api in apis]
    functions = {}              # name -> (category, tool, api); names are cut, so a few collide: the first has it, as upstream
    for api, document in zip(apis, documents):
        names = api["category_name"], stb_name(api["tool_name"]), stb_name(api["api_name"], True)
        functions.setdefault(document["name"], names)
    # upstream describes each tool from its own files, which the queries do not hold; without a description it says None
    names = dict.fromkeys(stb_name(api["tool_name"]) for api in apis)
    tools = "".join(f"{i}.{name}: None\n" for i, name in enumerate(names, 1))
    return Item(str(record["query_id"]), category, [
        Message("system", STB_PROMPT.format(tools=tools, functions=[*documents, STB_FINISH])),
        Message("user", f"{record['query']}\nBegin!")],
        {"query": record["query"], "functions": functions,
         "relevant": sorted({stb_function_name(tool, api) for tool, api in record["relevant APIs"]})})


def stb_name(text: str, reserved: bool = False) -> str:
    """ToolBench's name of a tool (or, with `reserved`, of an API or a parameter, which may be no word of Python's)."""
    name = re.sub("_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", text)).lower().strip("_")
    name = "get_" + name if name[:1].isdigit() else name
    return "is_" + name if reserved and name in ("from", "class", "return", "false", "true", "id", "and") else name


def stb_function_name(tool: str, api: str) -> str:
    return f"{stb_name(api, True)}_for_{stb_name(tool)}"[-64:]


def stb_function(api: dict) -> dict:
    """ToolBench's document of one function: its name is api_for_tool, and texts end at 256 characters."""
    name = stb_function_name(api["tool_name"], api["api_name"])
    description = f'This is the subfunction for tool "{stb_name(api["tool_name"])}", you can use this tool.'
    if (about := (api["api_description"] or "").strip()):
        description += f'The description of this function is: "{about.replace(api["api_name"], name)[:256]}"'
    properties, lists = {}, {"required": [], "optional": []}
    # ToolBench shows optional parameters only beside required ones; its training data does, so the prompt does
    for kind in lists if api["required_parameters"] else ():
        for p in api[f"{kind}_parameters"]:
            kind_of_value = {"NUMBER": "integer", "BOOLEAN": "boolean"}.get(p["type"], "string")
            example = {} if str(p["default"]) == "" else {"example_value": p["default"]}
            properties[stb_name(p["name"], True)] = {"type": kind_of_value, "description": p["description"][:256]} | example
            lists[kind].append(stb_name(p["name"], True))
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, **lists}}


def stb_calls(output: str) -> tuple[str, list[tuple[str, object]]]:
    """(thought, [(action, input)]) of a turn: Thought / Action / Action Input, or APIGen's JSON list of calls; else []."""
    head, found, tool_input = output.partition("Action Input:")
    thought, found_action, action = head.rpartition("Action:")
    if found and found_action:
        return thought.replace("Thought:", "", 1).strip(), [(action.strip(), stb_input(tool_input))]
    try:
        calls = json.loads(output[output.index("["):output.rindex("]") + 1], strict=False)
        return output[:output.index("[")].strip(), [(str(c["name"]), stb_input(as_json(c["arguments"]))) for c in calls]
    except (ValueError, KeyError, TypeError, RecursionError):
        return output.strip(), []


def stb_input(text: str):
    """The dict that a call's input spells, in JSON or as a Python literal; {} for no text; else the text as it is."""
    if text.count("{") + text.count("[") > 300:         # no API's input nests so deep, and nothing below may run out of stack
        return text
    for parse in (lambda t: json.loads(t, strict=False), ast.literal_eval):
        try:
            value = parse(text.strip() or "{}")
            if isinstance(value, dict) and json.dumps(value, sort_keys=True):       # it can be sent, and compared in any order
                return value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def stb_end(trace: list[dict]) -> tuple[str | None, str]:
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


def stb_run(items: list[Item], speak, call, max_steps: int = 12, done=lambda item, trace: None) -> dict[str, list[dict]]:
    """Let the agent answer all items side by side; returns {item id: trace}, and calls done(item, trace) as each one finishes.

    speak(conversations) -> outputs, None for a conversation that has grown too long; call: one of the environments below.
    A trace is a list of steps {"thought", "action", "input", "observation"}, with "source" (or "fault") of a call's response.
    max_steps counts turns. (Upstream's 12 counts thought, action and input each for one: its ToolLLaMA stops after 4 turns.)
    """
    active = [(item, list(item.messages), []) for item in items]
    traces = {item.id: trace for item, _, trace in active}
    with ThreadPoolExecutor(8) as pool:                 # a call waits for the environment, not for this machine
        for turn in range(max_steps + 1):
            over = [turn == max_steps or not talk or stb_end(trace)[0] or any("stopped" in step for step in trace)
                    for _, talk, trace in active]
            for entry, is_over in zip(active, over):
                if is_over:
                    done(entry[0], entry[2])
            active = [entry for entry, is_over in zip(active, over) if not is_over]
            if not active:
                return traces
            outputs = speak([talk for _, talk, _ in active])
            turns = pool.map(lambda entry, output: stb_turn(entry[0], output, call), active, outputs)
            for (_, talk, trace), output, steps in zip(active, outputs, turns, strict=True):
                trace += steps
                talk += [Message("assistant", (output or "").strip("\n")), *(Message("tool", s["observation"]) for s in steps)]


def stb_turn(item: Item, output: str | None, call) -> list[dict]:
    """The steps of one turn, a call each, with what the environment observes."""
    if output is None:
        return [{"thought": "", "action": "", "input": "", "observation": "", "stopped": "the conversation grew too long"}]
    thought, calls = stb_calls(output)
    steps = []
    for action, given in calls or [("", "")]:
        steps.append(step := {"thought": thought, "action": action, "input": given})
        if action == "Finish":
            kind, problem = stb_end([step])
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


def stb_post(url: str, body: dict, headers: dict, timeout: float, read):
    """(read(the JSON answer), None) of a POST, or (None, fault): "timeout", "unreachable", "http CODE" or "nonsense"."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)                        # keys go to this host only
    for attempt in range(STB_ATTEMPTS):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return read(json.loads(answer.read(1 << 24))), None
        except urllib.error.HTTPError as e:
            e.close()
            fault = f"http {e.code}"
            if e.code < 500 and e.code != 429:
                break
        except OSError as e:
            fault = "timeout" if isinstance(getattr(e, "reason", e), TimeoutError) else "unreachable"
        except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fault = "nonsense"
    return None, fault


def stb_reply(value: dict) -> dict:
    return {"error": value["error"], "response": value["response"]}


def stb_failure(fault: str) -> dict:
    """What the agent sees, in upstream's words, when the environment itself fails; the fault is counted in the summary."""
    status = f". status_code={fault[5:]}" if fault.startswith("http ") else ""
    error = "Timeout error..." if fault == "timeout" else f"request invalid, data error{status}"
    return {"error": error, "response": "", "fault": fault}


def stb_server(url: str, key: str = "", timeout: float = 60.0):
    """The environment behind StableToolBench's own server: call(category, tool, api, input) posts to URL/virtual."""
    url = checked_url(url).removesuffix("/virtual") + "/virtual"

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        body = {"category": category, "tool_name": tool, "api_name": api, "tool_input": tool_input, "strip": "truncate",
                "toolbench_key": key}
        reply, fault = stb_post(url, body, {"toolbench_key": key}, timeout, stb_reply)
        return stb_failure(fault) if fault else reply | {"source": "server"}
    return call


def checked_url(url: str) -> str:
    if not re.match(r"https?://[^/]", url):
        raise DataError(f"{url!r} is no address; give one that begins with http:// or https://.")
    return url.rstrip("/")


def stb_stored(find):
    """The environment of stored responses: find(category, tool, api) gives {input: {"error", "response"}}, or raises.

    The server looks up str() of the input's dict, so the order of keys counts; here any will do, and "source" says which hit.
    """
    @functools.lru_cache(512)
    def table(category: str, tool: str, api: str) -> tuple[dict, dict]:
        inputs = [(stb_input(key), reply) for key, reply in find(category, tool, api).items()]
        return {str(value): reply for value, reply in inputs}, {json.dumps(v, sort_keys=True): reply for v, reply in inputs}

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        try:
            exact, any_order = table(category, tool, api)
            if str(tool_input) in exact:
                return stb_reply(exact[str(tool_input)]) | {"source": "stored"}
            if (key := json.dumps(tool_input, sort_keys=True)) in any_order:
                return stb_reply(any_order[key]) | {"source": "stored, keys in another order"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return stb_failure("nonsense")
        if isinstance(tool_input, str):
            return {"error": "Tool input parse error...\n", "response": "", "source": "no JSON"}
        return {"error": "no response is stored for this input", "response": "", "source": "not stored"}
    return call


def stb_cache(folder: str):
    """The environment of a cache folder in the server's layout: <Category>/<tool>_for_<Category>/<api>.json."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder; name the cache's, with <Category>/<tool>_for_<Category>/<api>.json in it.")

    def find(category: str, tool: str, api: str) -> dict:
        category = re.sub("[ ,/]", "_", category).replace("__", "_")
        path = os.path.join(folder, category, f"{tool}_for_{category}", f"{api}.json")
        if not os.path.isfile(path):
            return {}
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    return stb_stored(find)


def stb_recorded(path: str):
    """The environment of responses seen in earlier runs: a JSON object {function: {input as text: {"error", "response"}}}."""
    recorded = dict(pair for _, record in read_records(path) if isinstance(record, dict) for pair in record.items())
    if not all(isinstance(responses, dict) for responses in recorded.values()) or not recorded:
        raise DataError(f'{path} must be a JSON object {{function: {{input: {{"error", "response"}}}}}}.')
    return stb_stored(lambda category, tool, api: recorded.get(f"{api}_for_{tool}"[-64:], {}))


def stb_traces(path: str) -> dict[str, list[dict]]:
    """Traces {id: steps} of a file of {"id", "trace": [{"action", "input", "observation"}, ...]} lines, as the run writes them.

    {"id", "output": "the final answer"} will do where the steps are unknown. A later line of an id replaces an earlier one.
    """
    traces = {}
    for where, record in read_records(path):
        try:
            trace = record["trace"] if "trace" in record else [{"action": "Finish", "input": {
                "return_type": "give_answer", "final_answer": record["output"] or ""}}]
            traces[str(record["id"])] = [step | {"action": step["action"].strip(), "input": stb_input(as_json(step["input"]))}
                                         for step in trace]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f'{where}: expected {{"id", "trace": [{{"action": "...", "input": ...}}]}} '
                            'or {"id", "output": "..."}.') from None
    return traces


def stb_endpoint(url: str, model: str, key: str = "", timeout: float = 120.0):
    """The judge behind an OpenAI-compatible endpoint: judge(prompt, choices) -> (choice, its reasons), or (None, fault)."""
    url = checked_url(url) + "/chat/completions"

    def judge(prompt: str, choices: tuple) -> tuple[str | None, str]:
        ask = f'{prompt}\n\nGive your reasons briefly, then end with {{"verdict": "..."}}: one of {", ".join(choices)}.'

        def read(reply: dict) -> tuple[str, str]:
            text = reply["choices"][0]["message"]["content"]
            verdict = re.findall(r'"verdict"\s*:\s*"?(\w+)', text)[-1]
            return choices[choices.index(verdict)], text.encode("utf-8", "replace").decode()[:1000]
        verdict, fault = stb_post(url, {"model": model, "temperature": 0, "messages": [{"role": "user", "content": ask}]},
                                  {"Authorization": f"Bearer {key}"} if key else {}, timeout, read)
        return (None, fault) if fault else verdict
    return judge


def stb_judge(item: Item, trace: list[dict], judge=None) -> dict:
    """The verdict on a trace: "status" Solved, Unsure or Unsolved, "score" 1, 0.5 or 0; "not judged" and 0 without a judge's word.

    The judge sees the answer alone, and if Unsure of that once more with the calls. What has no answer is Unsolved unasked.
    """
    query, functions = item.reference.get("query"), item.reference.get("functions", {})
    kind, answer = stb_end(trace)
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
        status, reason = judge(STB_SOLVED.format(query=query, answer=answer), STB_STATUSES)
        if status == "Unsure":
            prompt = STB_SOLVED_IN_DETAIL.format(query=query, answer=answer, trace=json.dumps(trace))
            status, reason = judge(prompt, STB_STATUSES)
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


def stb_compare(item: Item, ours: tuple[dict, list], theirs: tuple[dict, list], judge) -> dict:
    """{"win": "win" | "tie" | "lose" | "not judged", "win_reason"} of two (verdict, trace) on an item, to be merged into our verdict.

    The better status wins, and a missing answer loses to any. Between equals the judge chooses, asked in both orders: a tie if
    it wavers. (Upstream asks twice in the same order, and tosses a coin between equal answers.)
    """
    (verdict, trace), (other, other_trace) = ours, theirs
    if "not judged" in (verdict["status"], other["status"]):
        return {"win": "not judged", "win_reason": "not both answers are judged"}
    status, other_status = (v["status"] if (v["output"] or "").strip() else "no answer" for v in (verdict, other))
    ranks = (*STB_STATUSES, "no answer")
    if status != other_status:
        win = "win" if ranks.index(status) < ranks.index(other_status) else "lose"
        return {"win": win, "win_reason": f"{status} against {other_status}"}
    if verdict["output"] == other["output"] or status == "no answer":
        return {"win": "tie", "win_reason": "no answer from either" if status == "no answer" else "the same answer"}
    sides = [(verdict["output"], json.dumps(trace)), (other["output"], json.dumps(other_trace))]
    (first, why), (second, why_too) = (judge(STB_BETTER.format(*a, *b, query=item.reference["query"]), ("0", "1"))
                                       for a, b in (sides, sides[::-1]))
    if None in (first, second):
        fault = why if first is None else why_too
        return {"win": "not judged", "win_reason": f"the judge failed: {fault}",
                "judge_errors": dict(Counter(verdict["judge_errors"]) + Counter([fault]))}
    return {"win": {("0", "1"): "win", ("1", "0"): "lose"}.get((first, second), "tie"), "win_reason": f"{why} / {why_too}"}


def stb_summary(verdicts: list[dict]) -> dict:
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
            figures |= {status: sum(v["status"] == status for v in group) for status in (*STB_STATUSES, "not judged")}
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


# -----------------------------------------------------------------------------------------------------------------
# The comparison: a table for the terminal, a report for the browser

def comparison_rows(summaries: dict[str, dict]) -> list[list[str]]:
    """A header and a row a model: losses by true role and success, held-in / held-out."""
    both = lambda f, form: " / ".join(format(f(kind), form) for kind in ("held_in", "held_out"))
    return [["held-in / held-out", "reasoning loss", "boilerplate loss", "success"]] + [
        [name, both(lambda k: s["losses"][k]["reasoning"]["loss"], ".3f"),
         both(lambda k: s["losses"][k]["boilerplate"]["loss"], ".3f"), both(lambda k: s["success"][k], ".1%")]
        for name, s in summaries.items()]


def format_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if j == 0 else cell.rjust(w) for j, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def curves_svg(title: str, curves: dict[str, list[float]]) -> str:
    """One panel of training curves, {name: loss of each step}, smoothed over a few steps, on a logarithmic loss axis."""
    window = max(1, max(map(len, curves.values())) // 40)
    smooth = {n: np.convolve(np.pad(v, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid")
              for n, v in curves.items()}
    low = max(1e-3, min(v.min() for v in smooth.values())) * 0.8
    high = max(v.max() for v in smooth.values()) * 1.1
    y = lambda v: 20 + 190 * (np.log(high) - np.log(np.maximum(v, low))) / (np.log(high) - np.log(low))
    marks = [m * 10.0 ** e for e in range(-3, 2) for m in (1, 2, 5) if low < m * 10.0 ** e < high]
    parts = [f'<text x="44" y="12" font-size="13" font-weight="600">{title}</text>']
    parts += [f'<line x1="44" x2="420" y1="{y(m):.0f}" y2="{y(m):.0f}" stroke="#e3e3e3"/><text x="40" y="{y(m) + 4:.0f}" font-size="11" '
              f'text-anchor="end">{m:g}</text>' for m in marks]
    for (name, v), colour in zip(smooth.items(), ("#888888", "#1a7f4b", "#b5543a")):
        x = np.linspace(44, 420, len(v))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(v))) + f'"><title>{name}</title></polyline>'
                     f'<text x="424" y="{y(v[-1]) + (11 if name == "RFT" else -3):.0f}" font-size="12" fill="{colour}">{name}</text>')
    steps = len(next(iter(smooth.values())))
    parts.append(f'<text x="420" y="228" font-size="11" text-anchor="end">step {steps}</text><text x="44" y="228" font-size="11">1</text>')
    return f'<svg viewBox="0 0 470 236" width="470" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def report_html(runs: dict[str, list[dict]], summaries: dict[str, dict]) -> str:
    """The comparison as HTML: training curves of {name: metrics} by group, and the table."""
    rows = comparison_rows(summaries)
    cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
    panels = "".join(curves_svg(f"{group} tokens, training loss (nats)", {n: [m[f"loss_{group}"] or 0 for m in ms] for n, ms in runs.items()})
                     for group in ("reasoning", "boilerplate"))
    return f"<h2>Training curves</h2>{panels}<h2>Held-out evaluation</h2><table>{cells(rows[0], 'th')}" \
           f"{''.join(cells(r, 'td') for r in rows[1:])}</table>"


def main():
    o = parse_options(Options, __doc__)
    device, (rank, _) = init_distributed(), rank_and_world()
    verdicts = None
    if o.bench == "toy" and o.predictions:
        try:
            outputs = {str(r["id"]): r["output"] for _, r in read_records(o.predictions)}
            if not all(isinstance(text, str) for text in outputs.values()):
                raise TypeError
        except (KeyError, TypeError):
            raise DataError(f'{o.predictions}: every line must be {{"id": ..., "output": "text"}}.') from None
        verdicts = toy_success(outputs, {"held_in": toy_samples(o.count, o.seed), "held_out": toy_samples(o.count, o.seed, held_out=True)})
        summary = summarize_toy(verdicts)
    else:
        if not o.model or (o.bench == "loss" and not o.data):
            raise DataError(f"eval.py {o.bench} needs --model{' and --data' if o.bench == 'loss' else ''}.")
        path = resolve(o.model)
        model = Transformer.from_pretrained(path, device=device)
        if o.bench == "toy":
            summary, verdicts = evaluate_toy(model, Renderer(path, o.template), o.count, o.seed, o.micro_tokens)
        else:
            dataset = Dataset.load(o.data, path, o.template, o.max_length)
            reasoning = classify(*load_labels(o.labels, dataset)) if o.labels else None
            summary = {"losses": role_losses(model, dataset, o.micro_tokens, reasoning), "dropped": dataset.dropped}
    if rank > 0:
        return
    os.makedirs(o.out, exist_ok=True)
    write_json(os.path.join(o.out, "summary.json"), {"bench": o.bench, "model": o.model, "predictions": o.predictions, **summary})
    if verdicts:
        with open(os.path.join(o.out, "verdicts.jsonl.tmp"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(v, ensure_ascii=False) + "\n" for v in verdicts)
        os.replace(os.path.join(o.out, "verdicts.jsonl.tmp"), os.path.join(o.out, "verdicts.jsonl"))
        print("success: " + ", ".join(f"{k} {v:.1%}" for k, v in summary["success"].items()) + f" of {o.count} each")
    losses = summary.get("losses", {})
    for kind, groups in (losses if o.bench == "toy" else {"loss": losses}).items():
        print(f"{kind}: " + ", ".join(f"{n} {g['loss']:.4f} ({g['tokens']:,} tokens)" for n, g in groups.items() if g["tokens"]))
    print(f"wrote {o.out}/summary.json" + (" and verdicts.jsonl" if verdicts else ""))


if __name__ == "__main__":
    run_script(main, CheckpointError)
