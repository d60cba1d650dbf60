"""StableToolBench: an agent calls APIs until it finishes, and a judge model says whether its answer
solves the query.

The agent is here; what answers its calls, and the judge's endpoint, in servers.py; its traces on
file in traces.py; verdicts and figures in judging.py.
"""
import functools
import glob
import json
import os
import re
from collections import Counter

from tqdm import tqdm

from benchmarks import TOO_LONG, Item
from benchmarks.judging import check_verdicts, compare, format_counts, judge
from benchmarks.judging import summary as summary
from benchmarks.servers import (
    DOWN_AFTER,
    cache_folder,
    check_reachable,
    find_function,
    judge_endpoint,
    map_in_threads,
    parse_input,
    recorded_environment,
    recorded_file,
    tool_server,
)
from benchmarks.traces import final_answer, read_predictions, save_converted
from support.cli import DataError
from support.readers import Message, as_json, read_records

# upstream's defaults; its 50 steps (--max-steps here) are 17 turns
MAX_NEW_TOKENS = 1024       # of one turn
MAX_OBSERVATION = 1024      # characters
HAS_ACCURACY = False        # without a judge nothing is correct, and that is no accuracy

PROMPT = """\
You are an agent that does the task below with the help of many tools (functions).
At each step, think about where you stand and what to do next, and make a function call. \
Your output should follow this format:
Thought:
Action
Action Input:

You then get the result of the call and go on from there, one thought and call after the other, \
until you can give the answer.
Remember:
1.a call cannot be taken back; to begin the task afresh, give up and restart.
2.keep every thought short, five sentences at most.
3.you may try several things, one in each call.
Task description: Use the functions to help with the user's query. Remember:
1.ALWAYS call "Finish" at the end of the task, with a final answer that holds all that the user \
should be told. If you cannot do the task, or the functions always fail, use \
Finish->give_up_and_restart.
2.Use the functions' names, not the names of the tools.
You have access of the following tools:
{tools}
Specifically, you have access to the following APIs: {functions}"""

FINISH = {
    "name": "Finish",
    "description": "Ends the task: with the final answer, which is all that the user will see, or "
                   "by giving up where no answer can be had. ALWAYS call it at the end.",
    "parameters": {
        "type": "object",
        "required": ["return_type"],
        "properties": {
            "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
            "final_answer": {"type": "string",
                             "description": 'The answer, if "return_type"=="give_answer"'}}}}


# --------------------------------------------------------------------------------------------------
# Queries

def items(folder: str) -> list[Item]:
    """The queries of solvable_queries/test_instruction/G*.json; an item's id is its query_id.

    The folder may also be test_instruction itself or the one above it. A record that lacks what is
    needed stays in, without messages and with its fault as the reference: it counts as unsolved.
    """
    files = []
    for below in ("", "test_instruction", "solvable_queries/test_instruction"):
        files += glob.glob(os.path.join(glob.escape(folder), below, "G[123]_*.json"))
    if not files:
        raise DataError(f"{folder} holds no solvable_queries/test_instruction/G*.json; "
                        "give StableToolBench's folder.")
    items = []
    for path in sorted(files):
        category = os.path.basename(path).removesuffix(".json")
        for where, record in read_records(path):
            try:
                items.append(read_item(record, category))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                items.append(Item(where, category, [], {"fault": f"{type(e).__name__}: {e}"}))
    return items


def read_item(record: dict, category: str) -> Item:
    tools = []
    functions = {}      # function name -> (category, tool, api), as the server knows them
    tool_names = []
    for api in record["api_list"]:
        document = function_document(api)
        tools.append(document)
        tool = standard_name(api["tool_name"])
        tool_names.append(tool)
        # names are cut, so a few collide: calls then go to the last API of that name, as upstream
        name = standard_name(api["api_name"], reserved=True)
        category_and_tool = functions.get(document["name"], (api["category_name"], tool))[:2]
        functions[document["name"]] = (*category_and_tool, name)

    # upstream describes each tool from files that do not come with the queries, or else says None
    tool_lines = [f"{i}.{name}: None\n" for i, name in enumerate(dict.fromkeys(tool_names), 1)]
    tools.append(FINISH)
    system = PROMPT.format(tools="".join(tool_lines), functions=tools)
    messages = [Message("system", system), Message("user", f"{record['query']}\nBegin!")]
    relevant = {function_name(tool, api) for tool, api in record["relevant APIs"]}
    reference = {"query": record["query"], "tools": tools, "functions": functions,
                 "relevant": sorted(relevant)}
    return Item(str(record["query_id"]), category, messages, reference)


def standard_name(text: str, reserved: bool = False) -> str:
    """ToolBench's name of a tool; with `reserved`, of an API or a parameter: never a keyword."""
    name = re.sub("_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", text))
    name = name.lower().strip("_")
    if name[:1].isdigit():
        name = "get_" + name
    if reserved and name in ("from", "class", "return", "false", "true", "id", "and"):
        name = "is_" + name
    return name


def function_name(tool: str, api: str) -> str:
    return f"{standard_name(api, reserved=True)}_for_{standard_name(tool)}"[-64:]


def function_document(api: dict) -> dict:
    """ToolBench's document of one function: its name is api_for_tool, its texts are cut at 256."""
    name = function_name(api["tool_name"], api["api_name"])
    tool = standard_name(api["tool_name"])
    description = f'This is the subfunction for tool "{tool}", you can use this tool.'
    about = (api["api_description"] or "").strip()
    if about:
        about = about.replace(api["api_name"], name)[:256]
        description += f'The description of this function is: "{about}"'
    properties = {}
    names = {"required": [], "optional": []}
    # ToolBench, and so its training data, shows optional parameters only next to required ones
    for kind in names if api["required_parameters"] else ():
        for parameter in api[f"{kind}_parameters"]:
            parameter_name = standard_name(parameter["name"], reserved=True)
            names[kind].append(parameter_name)
            properties[parameter_name] = parameter_schema(parameter)
    parameters = {"type": "object", "properties": properties, **names}
    return {"name": name, "description": description, "parameters": parameters}


def parameter_schema(parameter: dict) -> dict:
    types = {"NUMBER": "integer", "BOOLEAN": "boolean"}
    schema = {"type": types.get(parameter["type"], "string"),
              "description": parameter["description"][:256]}
    if str(parameter["default"]) != "":
        schema["example_value"] = parameter["default"]
    return schema


# --------------------------------------------------------------------------------------------------
# The agent

def parse_turn(output: str) -> tuple[str, list[tuple[str, dict | str]]]:
    """(thought, [(action, input), ...]) of one turn; no calls if none can be read.

    A turn is ToolBench's Thought / Action / Action Input, or a thought and APIGen's JSON list.
    """
    head, has_input, tool_input = output.partition("Action Input:")
    thought, has_action, action = head.rpartition("Action:")
    if has_input and has_action:
        thought = thought.replace("Thought:", "", 1).strip()
        return thought, [(action.strip(), parse_input(tool_input.strip()))]
    try:
        start = output.index("[")
        calls = []
        for call in json.loads(output[start:output.rindex("]") + 1], strict=False):
            calls.append((str(call["name"]), parse_input(as_json(call["arguments"]))))
        return output[:start].strip(), calls
    except (ValueError, KeyError, TypeError, RecursionError):
        return output.strip(), []


def run_settings(options) -> dict:
    """The options that change the traces: saved with them, and compared when a run is resumed."""
    return {"environment": options.server or options.cache or options.recorded,
            "max_steps": options.max_steps}


def environment(options):
    """What answers the agent's calls (see servers.py); without any option no call is answered."""
    if options.server:
        key = os.environ.get("TOOLBENCH_KEY", "")
        return tool_server(options.server, key, options.timeout)
    if options.cache:
        return cache_folder(options.cache)
    if options.recorded:
        return recorded_file(options.recorded)
    return recorded_environment(lambda *function: {})


def run(items: list[Item], respond, options):
    """Let the agent work on all items side by side; yields (item, trace) as each one ends.

    respond(conversations) returns the agent's next turns: None where a conversation grew too long.
    A trace with a call that did not reach its server is not yielded. Raises DataError at the end if
    there was one, and at once if the server is down.
    """
    if items and options.server:
        check_reachable(options.server, "--server")
    unreached = 0
    for item, trace in run_agent(items, respond, environment(options), options.max_steps):
        if any(step.get("fault") == "unreachable" for step in trace):
            unreached += 1
        else:
            yield item, trace
    if unreached:
        raise DataError(f"{options.server} could not be reached in {unreached} of {len(items)} "
                        "queries; run the same command again to ask these anew.")


def run_agent(items: list[Item], respond, call, max_steps: int):
    """`run` in the environment `call`, all traces included.

    max_steps counts turns. Upstream's 50 count a turn's thought, action and input each for one, so
    that its ToolLLaMA stops after 17 turns.
    """
    active = [(item, list(item.messages), []) for item in items]
    run_turn_here = functools.partial(run_turn, call=call)
    for turn in range(max_steps + 1):
        # those that have ended leave
        unfinished = []
        for item, conversation, trace in active:
            if turn == max_steps or not conversation or finished(trace):
                yield item, trace
            else:
                unfinished.append((item, conversation, trace))
        active = unfinished
        if not active:
            return

        # the others take a turn, and their calls are made side by side
        outputs = respond([conversation for _, conversation, _ in active])
        turns = map_in_threads(run_turn_here, [item for item, _, _ in active], outputs)
        for entry, output, steps in zip(active, outputs, turns, strict=True):
            _, conversation, trace = entry
            if trace and "stopped" in steps[-1]:
                steps[-1]["stopped"] = "the conversation grew too long"
            trace += steps
            conversation.append(Message("assistant", (output or "").strip("\n")))
            conversation += [Message("tool", step["observation"]) for step in steps]


def finished(trace: list[dict]) -> bool:
    return final_answer(trace)[0] is not None or any("stopped" in step for step in trace)


def run_turn(item: Item, output: str | None, call) -> list[dict]:
    """The steps of one turn, one per call, each with what the agent observes."""
    if output is None:
        return [{"thought": "", "action": "", "input": "", "observation": "",
                 "stopped": TOO_LONG}]
    thought, calls = parse_turn(output)
    functions = item.reference["functions"]
    steps = []
    for action, tool_input in calls or [("", "")]:
        step = {"thought": thought, "action": action, "input": tool_input}
        steps.append(step)
        thought = ""        # it belongs to the turn's first call
        if action == "Finish":
            kind, problem = final_answer([step])
            response = {"error": "" if kind else problem, "response": ""}
        elif find_function(functions, action):
            path = functions[find_function(functions, action)]
            response = call(*path, tool_input)
            step |= {key: response[key] for key in ("source", "fault") if key in response}
        else:
            response = {"error": f"No such function name: {action}", "response": ""}
        step["observation"] = observation(response)
        if finished(steps):
            break
    return steps


def observation(response: dict) -> str:
    text = json.dumps({"error": response["error"], "response": response["response"]})
    return text if len(text) <= MAX_OBSERVATION else text[:MAX_OBSERVATION] + "..."


# --------------------------------------------------------------------------------------------------
# Judging

def check_options(options) -> None:
    """Raise DataError for options that would otherwise fail only after the agent's work."""
    if bool(options.judge_url) != bool(options.judge_model):
        raise DataError("a judge needs both --judge-url and --judge-model.")
    if options.against and not options.judge_url:
        raise DataError("--against needs a judge: give --judge-url and --judge-model.")
    if bool(options.server) + bool(options.cache) + bool(options.recorded) > 1:
        raise DataError("--server, --cache and --recorded exclude each other; give one of them.")
    environment(options)
    if options.against:
        read_predictions(options.against)
    if options.judge_url:
        check_reachable(options.judge_url, "--judge-url")


def judge_outputs(items: list[Item], traces: dict[str, list[dict]], options) -> list[dict]:
    """A verdict on every asked item, and with --against whether it wins over the other's trace.

    Also saves the traces for upstream's evaluator, in OUT/tooleval. Raises DataError if none of the
    agent's calls was answered, or if the judge gave no verdict.
    """
    check_answered(items, traces)
    if options.out:
        save_converted(items, traces, options.out)
    ask = None
    if options.judge_url:
        key = os.environ.get("OPENAI_API_KEY", "")
        ask = judge_endpoint(options.judge_url, options.judge_model, key, options.timeout)
    other_traces = read_predictions(options.against) if options.against else {}
    if options.against and not any(item.id in other_traces for item in items):
        raise DataError(f"--against {options.against} matches no query: its {len(other_traces)} "
                        f"ids are like {next(iter(other_traces), None)!r}, the benchmark's like "
                        f"{items[0].id!r}.")

    def verdict(item: Item) -> dict:
        ours = judge(item, traces.get(item.id, []), ask, options.judge_times)
        if not options.against:
            return ours
        theirs = judge(item, other_traces.get(item.id, []), ask, options.judge_times)
        return ours | compare(item, ours, theirs, ask, options.judge_times)

    verdicts = map_in_threads(verdict, items)
    verdicts = list(tqdm(verdicts, "judge", len(items), unit="query", disable=not ask))
    check_verdicts(verdicts)
    return verdicts


def check_answered(items: list[Item], traces: dict[str, list[dict]]) -> None:
    """Raise DataError if the environment answered none of the calls: no figure can come of that."""
    sources = 0
    faults = Counter()
    for item in items:
        for step in traces.get(item.id, []):
            sources += "source" in step
            faults[str(step.get("fault", ""))] += "fault" in step
    failed = sum(faults.values())
    if failed >= DOWN_AFTER and not sources:
        raise DataError(f"none of {failed} calls was answered ({format_counts(+faults)}); correct "
                        "--server, and run again with another --out.")
