"""BFCL, single turn: the function calls, compared with lists of accepted values as bfcl-eval 2026.3.23 does."""
import json
import os
import re

from benchmarks import Item
from benchmarks.calls import decode, java_value, javascript_value
from support.cli import DataError
from support.readers import TOOL_PROMPT, Message, read_records


MAX_NEW_TOKENS = 512


CATEGORIES = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
                   "irrelevance", "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
                   "live_irrelevance", "live_relevance")
TYPES = {
    "python": {"string": str, "any": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
               "dict": dict},
    "java": {"String": str, "char": str, "any": str, "byte": int, "short": int, "integer": int, "long": int, "float": float,
             "double": float, "boolean": bool, "Array": list, "ArrayList": list, "HashMap": dict},
    "javascript": {"String": str, "any": str, "integer": int, "Bigint": int, "float": float, "Boolean": bool, "array": list,
                   "dict": dict}}


def language(category: str) -> str:
    return category.removeprefix("simple_") if category in ("simple_java", "simple_javascript") else "python"


def items(folder: str) -> list[Item]:
    """The items of every single-turn BFCL_v4_CATEGORY.json in a folder; answers come from possible_answer/ beside it."""
    items = []
    for category in CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        path, answer_path = os.path.join(folder, name), os.path.join(folder, "possible_answer", name)
        if not os.path.isfile(path):
            continue
        where = answer_path
        try:
            answers = {} if "relevance" in category else {r["id"]: r["ground_truth"] for _, r in read_records(answer_path)}
            for where, record in read_records(path):
                documents, language = record["function"], language(category)
                tools = [tool(d if language == "python" else as_strings(d, language)) for d in documents]
                system = [TOOL_PROMPT.format(json.dumps(tools, ensure_ascii=False))]
                turns = [Message(turn["role"], turn["content"]) for turn in record["question"][0]]
                if turns[0].role == "system":
                    system.append(turns.pop(0).text)
                reference = {"documents": documents}
                if "relevance" not in category:
                    if record["id"] not in answers:
                        raise DataError(f"{where}: {answer_path} has no answer to {record['id']}; copy both files of one release.")
                    reference["truth"] = answers[record["id"]]
                    reference["fault"] = fault(documents, reference["truth"], language)
                items.append(Item(record["id"], category, [Message("system", "\n\n".join(system)), *turns], reference))
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise DataError(f"{where} is no record of BFCL ({type(e).__name__}: {e}); copy the release's file again.") from None
    if not items:
        raise DataError(f"{folder} holds no BFCL_v4_*.json of a single-turn category; copy the data folder of bfcl-eval.")
    return items


def tool(document: dict) -> dict:
    """A function's document as APIGen's flat specification, which upstream too gives to models trained on APIGen: an argument
    that may be left out says so in its type."""
    required = document["parameters"].get("required", [])
    return document | {"parameters": {name: p | {"type": p["type"] + ", optional" * (name not in required)}
                                      for name, p in document["parameters"]["properties"].items()}}


def as_strings(document: dict, language: str) -> dict:
    """A function's document for the prompt of a Java or JavaScript item: every argument is a string of source text."""
    properties, language = {}, {"java": "Java", "javascript": "JavaScript"}[language]
    for name, p in document["parameters"]["properties"].items():
        of = f" of {p['items']['type']}" if "items" in p else ""
        of += f" with the fields {json.dumps(p['properties'])}" if "properties" in p else ""
        note = f"Written as a string: {language} source text of type {p['type']}{of}."
        properties[name] = {"type": "string", "description": f"{p.get('description', '')} {note}".strip()}
    return document | {"parameters": document["parameters"] | {"properties": properties}}


def fault(documents: list[dict], truth: list[dict], language: str) -> str | None:
    """What in an item's own data refuses even a call of its accepted values, if anything does."""
    by_name = {d["name"]: d["parameters"]["properties"] for d in documents}
    for call in truth:
        for name, arguments in call.items():
            if name not in by_name:
                return f"{name} is expected but not among the functions"
            for argument in arguments:
                if argument not in by_name[name]:
                    return f"{name}'s {argument} has accepted values but is not among its parameters"
                document, values = by_name[name][argument], arguments[argument]
                if document["type"] not in TYPES[language]:
                    return f"{name}'s {argument} is of the unknown type {document['type']}"
                if not values:
                    return f"{name}'s {argument} has no accepted value"
                if any(type(options) is not list for v in values if type(v) is dict for options in v.values()):
                    return f"{name}'s {argument}: a key has a value where a list of accepted values is due"
                of_any = language == "java" and document.get("items") == {"type": "any"}
                if of_any and any(type(x) is not str for v in values for x in v):
                    return f"{name}'s {argument}: elements of type any are read as text, and other types are expected"


def judge(item: Item, output: str) -> dict:
    """The verdict on one output: {"correct", "reason"}, and "fault" where the item's own data are faulty."""
    try:
        reason = reason(item, output)
    except Exception as e:          # whatever a model writes gets a verdict: numbers too large to print, nesting too deep ...
        reason = f"the calls cannot be checked: {type(e).__name__}"
    fault = {"fault": item.reference["fault"]} if item.reference.get("fault") else {}
    return {"correct": reason is None, "reason": reason or "correct"} | fault


def reason(item: Item, output: str) -> str | None:
    """Why an output is wrong, or None. "parallel" in a category goes before "multiple", which goes before the rest."""
    language, documents = language(item.category), item.reference["documents"]
    try:
        calls = decode(output, language)
        failure = None
    except Exception as e:          # of ast.parse alone: SyntaxError, ValueError, RecursionError, MemoryError
        calls, failure = [], f"no calls can be read: {e or type(e).__name__}"
    if "irrelevance" in item.category:
        return f"calls {calls[0][0]!r:.100}, where no function fits" if calls else None
    if "relevance" in item.category:
        return None if calls else failure or "no call"
    if failure:
        return failure
    truth = [next(iter(call.items())) for call in item.reference["truth"]]       # (name, {argument: accepted values})
    if len(calls) != len(truth):
        return f"{len(calls)} calls, not {len(truth)}"
    by_name = {d["name"]: d for d in reversed(documents)}
    if "parallel" in item.category:             # each expected call takes the first output that passes; no backtracking
        left = list(calls)
        for name, accepted in truth:
            reasons = [check(call, by_name[name], accepted, language) for call in left]
            if None not in reasons:
                return f"no call passes for {name}: " + "; ".join(reasons)
            left.pop(reasons.index(None))
        return None
    name, accepted = truth[0]
    return check(calls[0], by_name[name] if "multiple" in item.category else documents[0], accepted, language)


def check(call, document: dict, accepted: dict, language: str) -> str | None:
    """Why one call (name, arguments) is wrong, or None. accepted: {argument: its values}, "" among them = may be left out."""
    (name, arguments), properties = call, document["parameters"]["properties"]
    if name != document["name"]:
        return f"function {name!r:.100}, not {document['name']}"
    for argument in document["parameters"].get("required", []):
        if argument not in arguments:
            return f"required argument {argument} is missing"
    for argument, value in arguments.items():
        if argument not in properties or argument not in accepted:
            return f"unexpected argument {argument!r:.100}"
        type_name, types = properties[argument]["type"], TYPES[language]
        expected = types[type_name]
        inner_name = properties[argument]["items"]["type"] if type_name in ("array", "tuple", "Array", "ArrayList") else None
        inner = types[inner_name] if inner_name else None
        given = value
        if language != "python":
            if type(value) is not str:
                return f"{argument} = {value!r:.200}: {language} values are written as strings"
            value = (java_value if language == "java" else javascript_value)(value, type_name, inner_name)
        elif type_name == "tuple" and type(value) is tuple:
            value = list(value)
        elif type_name == "float" and type(value) is int:
            value = float(value)
        fits, is_variable = type(value, accepted[argument], expected, inner)
        if not fits:
            return f"{argument} = {given!r:.200} is not of type {type_name}" + (f" of {inner_name}" if inner_name else "")
        if not (value in accepted[argument] if is_variable else value(value, accepted[argument], expected, inner)):
            return f"{argument} = {given!r:.200} is not among {accepted[argument]!r:.200}"
    for argument, values in accepted.items():
        if argument not in arguments and "" not in values:
            return f"argument {argument} is missing and has no default"
    return None


def type(value, accepted: list, expected: type, inner: type | None) -> tuple[bool, bool]:
    """(fits, is a variable): by exact type, the items of a list one level deep. A value of the accepted values' own type
    passes in the place of another: the data write a variable's name so."""
    own = next((type(a) for a in accepted if a != ""), None)
    if type(value) is not expected:
        return type(value) is own, True
    fits = inner is None or any(type(a) is not list or all(type(v, a, inner, None)[0] for v in value) for a in accepted)
    return fits, own not in (None, expected)


def standardize(value):
    """Strings are compared without case, spaces and the punctuation ,./-_*^ and with one kind of quote."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def value(value, accepted: list, expected: type, inner: type | None) -> bool:
    """Is a value of the right type among the accepted ones?"""
    if expected is dict:
        return any(a != "" and all(k in a and standardize(v) in map(standardize, a[k]) for k, v in value.items())
                   and all(k in value or "" in options for k, options in a.items()) for a in accepted)
    if inner is dict:
        return any(len(value) == len(a) and all(type(v) is dict and value(v, [b], dict, None) for v, b in zip(value, a))
                   for a in accepted)
    if expected is str:
        return standardize(value) in [standardize(a) for a in accepted if type(a) is str]
    if expected is list:
        return [standardize(v) for v in value] in [[standardize(x) for x in a] for a in accepted]
    return value in accepted


def summary(verdicts: list[dict]) -> dict:
    """Accuracy and count of every category present; the groups of upstream's leaderboard, each over the members it names."""
    correct = {c: [v["correct"] for v in verdicts if v["category"] == c] for c in CATEGORIES}
    count = {c: len(x) for c, x in correct.items() if x}
    accuracy = {c: sum(correct[c]) / n for c, n in count.items()}

    def group(members, scores, weights=None):
        members = [m for m in members if m in scores]
        weights = {m: weights[m] if weights else 1 for m in members}
        total = sum(scores[m] * weights[m] for m in members)
        return {"accuracy": total / sum(weights.values()), "over": members} if members else None

    groups = {"simple": group(CATEGORIES[:3], accuracy)}
    non_live = accuracy | ({"simple": groups["simple"]["accuracy"]} if groups["simple"] else {})
    groups["non_live_ast"] = group(("simple", "multiple", "parallel", "parallel_multiple"), non_live)
    groups["live_ast"] = group(CATEGORIES[7:11], accuracy, count)          # by their counts; all others by equal parts
    groups["irrelevance"] = group(("irrelevance", "live_irrelevance"), accuracy)
    groups = {name: g for name, g in groups.items() if g}
    # upstream weights these three 10 : 10 : 10, beside multi-turn (30) and agentic (40), which are not asked here
    of_groups = {name: g["accuracy"] for name, g in groups.items()}
    groups["overall_of_present"] = group(("non_live_ast", "live_ast", "irrelevance"), of_groups)
    return {"categories": {c: {"accuracy": accuracy[c], "count": n} for c, n in count.items()},
            "groups": {name: g for name, g in groups.items() if g},
            "all_items": {"accuracy": sum(v["correct"] for v in verdicts) / max(len(verdicts), 1), "count": len(verdicts)},
            "data_faults": {v["id"]: v["fault"] for v in verdicts if v.get("fault")}}
