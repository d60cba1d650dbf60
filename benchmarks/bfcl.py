"""BFCL, single turn: calls compared with lists of accepted values, as bfcl-eval 2026.3.23 does."""
import json
import os

from benchmarks import Item
from benchmarks.bfcl_calls import decode
from benchmarks.bfcl_values import LISTS, TYPES, check_value
from support.cli import DataError
from support.readers import TOOL_PROMPT, Message, read_records
from support.records import reading

MAX_NEW_TOKENS = 512
COPY_AGAIN = "copy the release's file again"

SIMPLE = ("simple_python", "simple_java", "simple_javascript")
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple")
CATEGORIES = (*SIMPLE, "multiple", "parallel", "parallel_multiple", "irrelevance",
              *LIVE, "live_irrelevance", "live_relevance")


def language_of(category: str) -> str:
    """The language in which a category's calls are written."""
    if category in ("simple_java", "simple_javascript"):
        return category.removeprefix("simple_")
    return "python"


# -------------------------------------------------------------------------------------------------
# The items

def items(folder: str) -> list[Item]:
    """The items of each single-turn BFCL_v4_CATEGORY.json in a folder, with its possible_answer/.

    Raises DataError if there is no such file, and for a record that is not BFCL's, has no answer or
    repeats an id.
    """
    found = []
    for category in CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            answer_path = os.path.join(folder, "possible_answer", name)
            found += category_items(category, path, answer_path)
    if not found:
        raise DataError(f"{folder} holds no BFCL_v4_*.json of a single-turn category; "
                        "copy the data folder of bfcl-eval.")
    return found


def category_items(category: str, path: str, answer_path: str) -> list[Item]:
    """The items of one file; the relevance categories have no answers."""
    has_answers = "relevance" not in category
    answers = {}
    if has_answers:
        for where, record in unique_records(answer_path):
            with reading(where, COPY_AGAIN):
                answers[record["id"]] = record["ground_truth"]

    found = []
    for where, record in unique_records(path):
        with reading(where, COPY_AGAIN):
            item = question(record, category)
            if has_answers:
                if item.id not in answers:
                    raise DataError(f"{answer_path} has no answer to {item.id}; "
                                    "copy both files of one release.")
                add_answer(item, answers[item.id])
            found.append(item)
    if not found:
        raise DataError(f"{path} holds no records; {COPY_AGAIN}.")
    return found


def unique_records(path: str):
    """Yield (where, record) of a file, each record with an id of its own."""
    seen = {}
    for where, record in read_records(path):
        with reading(where, COPY_AGAIN):
            name = record["id"]
            if not isinstance(name, str):
                raise TypeError(f"the id is {name!r:.50}, not text")
            if name in seen:
                raise DataError(f"the id {name!r:.50} was there before ({seen[name]}); "
                                "keep one record of it.")
        seen[name] = where
        yield where, record


def question(record: dict, category: str) -> Item:
    """A record as an item without its answer: a system prompt with the functions, and the turns."""
    documents = record["function"]
    if not all(isinstance(d["name"], str) for d in documents):
        raise TypeError("a function's name is not text")
    language = language_of(category)
    shown = documents
    if language != "python":
        shown = [with_string_arguments(d, language) for d in documents]
    tools = [flat_specification(d) for d in shown]
    system = [TOOL_PROMPT.format(json.dumps(tools, ensure_ascii=False))]

    if len(record["question"]) > 1:
        raise TypeError("several turns in a single-turn category")
    turns = [Message(turn["role"], turn["content"]) for turn in record["question"][0]]
    for turn in turns:
        if not isinstance(turn.text, str) or turn.role not in ("system", "user", "assistant"):
            raise TypeError(f"a message of {turn.role} with {type(turn.text).__name__} content")
    if turns[0].role == "system":
        system.append(turns.pop(0).text)
    if not turns:
        raise TypeError("no message of a user")
    messages = [Message("system", "\n\n".join(system)), *turns]
    for message in messages:
        message.text.encode()           # raises for half a character, which no tokenizer takes
    return Item(record["id"], category, messages, {"documents": documents})


def flat_specification(document: dict) -> dict:
    """A function's document in APIGen's flat form, where an optional argument's type says so.

    Upstream also shows this form to models that were trained on APIGen.
    """
    required = document["parameters"].get("required", [])
    parameters = {}
    for name, parameter in document["parameters"]["properties"].items():
        optional = "" if name in required else ", optional"
        parameters[name] = parameter | {"type": parameter["type"] + optional}
    return document | {"parameters": parameters}


def with_string_arguments(document: dict, language: str) -> dict:
    """A Java or JavaScript function's document for the prompt: each argument is source text."""
    title = {"java": "Java", "javascript": "JavaScript"}[language]
    properties = {}
    for name, parameter in document["parameters"]["properties"].items():
        kind = parameter["type"]
        if parameter.get("items", {}).get("type"):
            kind += f" of {parameter['items']['type']}"
        if "properties" in parameter:
            kind += f" with the fields {json.dumps(parameter['properties'])}"
        description = parameter.get("description", "")
        note = f"Written as a string: {title} source text of type {kind}."
        properties[name] = {"type": "string", "description": f"{description} {note}".strip()}
    return document | {"parameters": document["parameters"] | {"properties": properties}}


def add_answer(item: Item, truth: list[dict]) -> None:
    """Add the expected calls to an item's reference, and any fault that is found in them."""
    item.reference["truth"] = truth
    item.reference["fault"] = find_fault(item.reference["documents"], truth,
                                         language_of(item.category))


def find_fault(documents: list[dict], truth: list[dict], language: str) -> str | None:
    """Why an item's own data reject even a call with accepted values, or None."""
    properties = {d["name"]: d["parameters"]["properties"] for d in reversed(documents)}
    if not isinstance(truth, list) or not truth:
        return "the answer is no list of expected calls"
    for call in truth:
        if not isinstance(call, dict) or len(call) != 1:
            return "an expected call is not one {function: {argument: accepted values}}"
        name, arguments = next(iter(call.items()))
        if name not in properties:
            return f"{name} is expected but not among the functions"
        if not isinstance(arguments, dict):
            return f"{name}'s accepted values are no object"
        for argument, values in arguments.items():
            if argument not in properties[name]:
                return f"{name}'s {argument} has accepted values but is not among its parameters"
            fault = argument_fault(properties[name][argument], values, language)
            if fault:
                return f"{name}'s {argument}{fault}"
    return None


def argument_fault(document: dict, values: list, language: str) -> str | None:
    """A fault in one argument's document or accepted values, as the end of a sentence, or None."""
    kind = document["type"]
    if kind not in TYPES[language]:
        return f" is of the unknown type {kind}"
    if kind in LISTS:
        elements = document.get("items")
        if not isinstance(elements, dict) or elements.get("type") not in TYPES[language]:
            return " has elements of an unknown type"
    if not isinstance(values, list) or not values:
        return " has no accepted value"
    for value in values:
        if type(value) is dict and any(type(options) is not list for options in value.values()):
            return ": a key has a value where a list of accepted values is due"
    if language == "java" and document.get("items") == {"type": "any"}:
        for value in values:
            if any(type(element) is not str for element in value):
                return ": elements of type any are read as text, and other types are expected"
    return None


# -------------------------------------------------------------------------------------------------
# The judge

def judge(item: Item, output: str) -> dict:
    """The verdict on one output: "correct", "reason", and "fault" if the item's data have one."""
    try:
        reason = why_wrong(item, output)
    except Exception as e:      # a model can write anything: numbers too large to print, ...
        reason = f"the calls cannot be checked: {type(e).__name__}"
    verdict = {"correct": reason is None, "reason": reason or "correct"}
    if item.reference.get("fault"):
        verdict["fault"] = item.reference["fault"]
    return verdict


def why_wrong(item: Item, output: str) -> str | None:
    """Why an output is wrong, or None."""
    language = language_of(item.category)
    documents = item.reference["documents"]
    failure = None
    try:
        calls = decode(output, language)
    except Exception as e:      # ast.parse and json.loads raise more than ValueError
        calls = []
        failure = f"no calls can be read: {str(e) or type(e).__name__}"

    # Whether there is a call is all that counts in these two; text that cannot be read has none.
    if "irrelevance" in item.category:
        return f"calls {calls[0][0]!r:.100}, where no function fits" if calls else None
    if "relevance" in item.category:
        if calls:
            return None
        return failure or "no call"

    if failure:
        return failure
    truth = [next(iter(call.items())) for call in item.reference["truth"]]
    if len(calls) != len(truth):
        return f"{len(calls)} calls, not {len(truth)}"
    by_name = {d["name"]: d for d in reversed(documents)}       # the first of a name counts

    # "parallel" goes first, as parallel_multiple holds both words and its calls have no order.
    if "parallel" in item.category:
        return check_in_any_order(calls, truth, by_name, language)
    name, accepted = truth[0]
    document = by_name[name] if "multiple" in item.category else documents[0]
    return check_call(calls[0], document, accepted, language)


def check_in_any_order(calls, truth, by_name: dict, language: str) -> str | None:
    """Each expected call takes the first remaining call that passes. As upstream: no backtracking.

    calls: [(name, {argument: value})]; truth: [(name, {argument: accepted values})].
    """
    remaining = list(calls)
    for name, accepted in truth:
        reasons = [check_call(call, by_name[name], accepted, language) for call in remaining]
        if None not in reasons:
            return f"no call passes for {name}: " + "; ".join(reasons)
        remaining.pop(reasons.index(None))
    return None


def check_call(call, document: dict, accepted: dict, language: str) -> str | None:
    """Why one call (name, {argument: value}) is wrong, or None.

    accepted: {argument: its accepted values}; "" among them says that the argument may be left out.
    """
    name, arguments = call
    properties = document["parameters"]["properties"]
    if name != document["name"]:
        return f"function {name!r:.100}, not {document['name']}"
    for argument in document["parameters"].get("required", []):
        if argument not in arguments:
            return f"required argument {argument} is missing"
    for argument, value in arguments.items():
        if argument not in properties or argument not in accepted:
            return f"unexpected argument {argument!r:.100}"
        wrong = check_value(value, properties[argument], accepted[argument], language)
        if wrong:
            return f"{argument} = {value!r:.200}{wrong}"
    for argument, values in accepted.items():
        if argument not in arguments and "" not in values:
            return f"argument {argument} is missing and has no default"
    return None


# -------------------------------------------------------------------------------------------------
# The summary

def summary(verdicts: list[dict]) -> dict:
    """Accuracy and count of each category present, and upstream's groups, each with its members."""
    accuracy = {}
    count = {}
    for category in CATEGORIES:
        correct = [v["correct"] for v in verdicts if v["category"] == category]
        if correct:
            accuracy[category] = sum(correct) / len(correct)
            count[category] = len(correct)

    # Upstream weights the live categories by their counts, and the members of any other group
    # equally. Its overall figure is 10 % of each of the three groups here, 30 % of multi-turn and
    # 40 % of agentic, which are not asked here.
    groups = {"simple": mean_over(SIMPLE, accuracy)}
    scores = accuracy | accuracies(groups)
    groups |= {
        "non_live_ast": mean_over(("simple", "multiple", "parallel", "parallel_multiple"), scores),
        "live_ast": mean_over(LIVE, accuracy, count),
        "irrelevance": mean_over(("irrelevance", "live_irrelevance"), accuracy),
    }
    three = ("non_live_ast", "live_ast", "irrelevance")
    groups["overall_of_present"] = mean_over(three, accuracies(groups))

    all_correct = sum(v["correct"] for v in verdicts)
    return {
        "categories": {c: {"accuracy": accuracy[c], "count": n} for c, n in count.items()},
        "groups": {name: group for name, group in groups.items() if group},
        "all_items": {"accuracy": all_correct / max(len(verdicts), 1), "count": len(verdicts)},
        "data_faults": {v["id"]: v["fault"] for v in verdicts if v.get("fault")},
    }


def mean_over(members, scores: dict, weights: dict | None = None) -> dict | None:
    """The mean score of the members that have one, equal weights unless given; None if none has."""
    present = [m for m in members if m in scores]
    if not present:
        return None
    weights = weights or dict.fromkeys(present, 1)
    total = sum(scores[m] * weights[m] for m in present)
    return {"accuracy": total / sum(weights[m] for m in present), "over": present}


def accuracies(groups: dict) -> dict:
    return {name: group["accuracy"] for name, group in groups.items() if group}
