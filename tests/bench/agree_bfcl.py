"""A measurement, not a test: do eval.py's BFCL verdicts agree with upstream's own checker on the same texts?

    pip install --no-deps bfcl-eval==2026.3.23 filelock tenacity
    pip install --no-deps tree-sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
    python tests/agree_bfcl.py --data DIR            # the folder of BFCL_v4_*.json and possible_answer/

Every item is answered with its accepted calls and with damaged ones, as calls in its language and some as JSON. A text
goes through upstream's decoding and checking of prompted models (JSON: as its handlers of xLAM models read it) and through
bfcl_judge. Where upstream raises while checking, its verdict counts as "wrong", and the number of these is printed.
"""
import argparse
import collections
import json
import os
import random
import sys
import types

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from eval import bfcl_items, bfcl_judge, bfcl_language


def load_upstream():
    """Upstream's decoder, checker and enums; its table of models, which imports every vendor's client, is stood in for."""
    try:
        table = types.ModuleType("bfcl_eval.constants.model_config")
        table.MODEL_CONFIG_MAPPING = {"prompted": types.SimpleNamespace(underscore_to_dot=False)}
        sys.modules[table.__name__] = table
        from bfcl_eval.constants.enums import Language, ReturnFormat
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import default_decode_ast_prompting
        from bfcl_eval.utils import is_empty_output, is_function_calling_format_output
    except ImportError as e:
        sys.exit(f"agree_bfcl.py needs bfcl-eval 2026.3.23 and what its checker imports ({e}); --help has the pip command.")

    def verdict(item, text: str, is_json: bool):
        """(correct, reason, crashed)"""
        language = bfcl_language(item.category)
        try:
            if is_json:
                decoded = [{call["name"]: call["arguments"]} for call in json.loads(text)]
            else:
                decoded = default_decode_ast_prompting(text, ReturnFormat(language))
        except Exception as e:
            return item.category.endswith("irrelevance"), f"decoding: {type(e).__name__}: {e}", False
        if "relevance" in item.category:
            return is_empty_output(decoded) == item.category.endswith("irrelevance"), f"decoded {decoded}", False
        if not is_function_calling_format_output(decoded):
            return False, "wrong output format", False
        try:
            result = ast_checker(item.reference["documents"], decoded, item.reference["truth"], Language(language),
                                 item.category, "prompted")
        except Exception as e:
            return False, f"crash: {type(e).__name__}: {e}", True
        return result["valid"], f"{result.get('error_type')}: {result.get('error')}", False
    return verdict


# -----------------------------------------------------------------------------------------------------------------
# Accepted calls: [(name, {argument: value})]

def realise(accepted):
    """A value from an accepted one: of every dictionary's lists of alternatives the first, left out if that is ""."""
    if isinstance(accepted, dict):
        return {k: v[0] if isinstance(v, list) and v else v for k, v in accepted.items() if v[:1] != [""]}
    return [realise(v) for v in accepted] if isinstance(accepted, list) else accepted


def accepted_calls(item, which: str):
    """which: "sparse" leaves out what may be left out; "full" gives the first value of each argument, "last" the last."""
    required, calls = {d["name"]: d["parameters"]["required"] for d in item.reference["documents"]}, []
    for call in item.reference["truth"]:
        for name, arguments in call.items():
            given = {}
            for argument, values in arguments.items():
                some = [v for v in values if v != ""] or values
                if some and (argument in required[name] or "" not in values or which != "sparse" and some != [""]):
                    given[argument] = realise(some[-1 if which == "last" else 0])
            calls.append((name, given))
    return calls


# -----------------------------------------------------------------------------------------------------------------
# Damage: a function of (calls, rng) that returns new calls, or None where it does not apply

def change(kinds, new):
    """Damage to one argument's value (or one list element) of some types."""
    def damage(calls, rng):
        places = [(i, a) for i, (_, arguments) in enumerate(calls) for a, v in arguments.items()
                  if type(v) in kinds or type(v) is list and any(type(x) in kinds for x in v) and list not in kinds]
        if not places:
            return None
        i, a = rng.choice(places)
        value = calls[i][1][a]
        if type(value) not in kinds:
            at = rng.choice([j for j, x in enumerate(value) if type(x) in kinds])
            value = value[:at] + [new(value[at], rng)] + value[at + 1:]
        else:
            value = new(value, rng)
        return [(n, {**g, a: value}) if j == i else (n, g) for j, (n, g) in enumerate(calls)]
    return damage


def on_call(new):
    def damage(calls, rng):
        i = rng.randrange(len(calls))
        result = new(*calls[i], rng)
        return result and calls[:i] + [result] + calls[i + 1:]
    return damage


def without(arguments, rng):
    gone = rng.choice(list(arguments))
    return {k: v for k, v in arguments.items() if k != gone}


def insert(text, piece, rng):
    at = rng.randrange(len(text) + 1)
    return text[:at] + piece + text[at:]


def shuffled(x, rng):
    return rng.sample(x, len(x))


CALL_DAMAGE = {
    "wrong name": on_call(lambda n, g, r: (r.choice([n + "s", n[:-1], n.swapcase(), n.replace(".", "_") + "_"]), g)),
    "name without module": on_call(lambda n, g, r: (n.split(".")[-1], g) if "." in n else None),
    "missing argument": on_call(lambda n, g, r: (n, without(g, r)) if g else None),
    "extra argument": on_call(lambda n, g, r: (n, {**g, r.choice(["verbose", "unit", "limit", "type"]): r.choice([True, 3, "x"])})),
    "renamed argument": on_call(lambda n, g, r: (n, {k + "_" * (i == 0): v for i, (k, v) in enumerate(g.items())}) if g else None),
    "type: number as text": change((int, float), lambda v, r: str(v)),
    "type: text as number": change((str,), lambda v, r: r.choice([7, 1.5, True])),
    "type: value in a list": change((int, float, str, bool), lambda v, r: [v]),
    "type: list as its item": change((list,), lambda v, r: v[0] if v else 0),
    "type: list as a tuple": change((list,), lambda v, r: tuple(v)),
    "type: None": change((int, float, str, bool, list, dict), lambda v, r: None),
    "type: bool as text or number": change((bool,), lambda v, r: r.choice([str(v), str(v).lower(), int(v)])),
    "near: int as float": change((int,), lambda v, r: float(v)),
    "near: float as int": change((float,), lambda v, r: int(v)),
    "near: off by one": change((int, float), lambda v, r: v + r.choice([-1, 1, 0.01])),
    "near: sign": change((int, float), lambda v, r: -v),
    "near: case": change((str,), lambda v, r: v.swapcase()),
    "near: spaces": change((str,), lambda v, r: insert(v, r.choice([" ", "  ", "\t"]), r)),
    "near: punctuation": change((str,), lambda v, r: insert(v, r.choice(list(",./-_*^;:!'\"()[]{}?&")), r)),
    "near: a letter less": change((str,), lambda v, r: v[:-1]),
    "near: not bool": change((bool,), lambda v, r: not v),
    "list: other order": change((list,), lambda v, r: shuffled(v, r)),
    "list: an item more": change((list,), lambda v, r: v + v[-1:]),
    "list: an item less": change((list,), lambda v, r: v[:-1]),
    "dict: a key less": change((dict,), lambda v, r: without(v, r) if v else {"x": 1}),
    "dict: a key more": change((dict,), lambda v, r: {**v, "more": 1}),
    "calls reordered": lambda calls, r: shuffled(calls, r),
    "calls surplus": lambda calls, r: calls + [r.choice(calls)],
    "calls dropped": lambda calls, r: r.sample(calls, len(calls) - 1),
    "argument order": lambda calls, r: [(n, dict(shuffled(list(g.items()), r))) for n, g in calls]}


def cut_argument_name(text, rng):
    at = rng.choice([i for i, c in enumerate(text) if c == "="] or [0])
    return text[:max(text.rfind("(", 0, at), text.rfind(",", 0, at)) + 1] + text[at + 1:]


TEXT_DAMAGE = {
    "text: cut": lambda t, r: t[:r.randrange(len(t))],
    "text: bracket cut": lambda t, r: t[:-2] if r.random() < 0.5 else t[:-1],
    "text: a sign less": lambda t, r: (lambda i: t[:i] + t[i + 1:])(r.choice([i for i, c in enumerate(t) if c in "()[]{}'\"=,"])),
    "text: a sign more": lambda t, r: insert(t, r.choice(list("()[]{}'\"=,;:#")), r),
    "text: positional": cut_argument_name,
    "text: prose before": lambda t, r: "Here is the call: " + t,
    "text: prose after": lambda t, r: t + " This gives the answer.",
    "text: fence": lambda t, r: "```\n" + t + "\n```",
    "text: fence with a language": lambda t, r: "```python\n" + t + "\n```",
    "text: no brackets": lambda t, r: t[1:-1],
    "text: spaced": lambda t, r: "\n " + t.replace(", ", " ,\n  ") + " \n",
    "text: bare words": lambda t, r: t.replace('"', "").replace("'", ""),
    "text: sum": lambda t, r: t.replace("=", "=1+", 1),
    "text: plus": lambda t, r: t.replace("=", "=+", 1),
    "text: bare map": lambda t, r: t.replace("'new HashMap", "new HashMap").replace("}}'", "}}"),
    "text: nested call": lambda t, r: r.choice([t.replace("=", "=f(x=1)+", 1), t.replace("=", "=f(", 1).replace(",", "),", 1)]),
    "text: only prose": lambda t, r: r.choice(["I cannot help with that.", "None of the functions fits", "None", "", "[]", "{}"])}


# -----------------------------------------------------------------------------------------------------------------
# Rendering

def quoted(text: str, rng) -> str:
    """A string literal of Java or JavaScript; both keep what stands between the quotes as it is."""
    quotes = [q for q in "\"'" if q not in text] if text else ['"']
    return rng.choice(quotes).join(["", text, ""]) if quotes else json.dumps(text)


def script_source(value, parameter: dict, language: str, rng) -> str:
    """Source text of a value in a Java or JavaScript call, as the parameter's type is written."""
    kind, inner = parameter.get("type"), parameter.get("items", {}).get("type")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}{dict(long='L', float='f' * (language == 'java'), Bigint='n').get(kind, '')}"
    if value is None:
        return "null"
    if isinstance(value, str):
        return value if value.isidentifier() and kind == "any" and rng.random() < 0.5 else quoted(value, rng)
    if language == "javascript":
        if isinstance(value, dict):
            keys = [k if rng.random() < 0.5 else quoted(k, rng) for k in value]
            return "{" + ", ".join(f"{k}: {script_source(v, {}, language, rng)}" for k, v in zip(keys, value.values())) + "}"
        return "[" + ", ".join(script_source(v, {"type": inner}, language, rng) for v in value) + "]"
    if isinstance(value, dict):
        puts = "".join(f'put("{k}", {json.dumps(v)}); ' for k, v in value.items())
        text = f"new HashMap<String, Object>() {{{{ {puts}}}}}" if value else "new HashMap<>()"
        return text if "'" in text else f"'{text}'"             # quoted: upstream's parser drops the body of a bare `new`
    if kind == "ArrayList":
        # elements of type any keep their quotes, so they get none, which only a quoted literal can hold
        bare = inner == "any"
        items = [str(v) if bare and isinstance(v, str) else script_source(v, {"type": inner}, language, rng) for v in value]
        text = f"new ArrayList<>({'Arrays.asList(' + ', '.join(items) + ')' if value else ''})"
        return quoted(text, rng) if bare else text
    items = ", ".join(str(v) if isinstance(v, str) else script_source(v, {"type": inner}, language, rng) for v in value)
    text = f"new {'int' if inner == 'integer' else inner or 'Object'}[]{{{items}}}"
    return text if inner == "integer" else quoted(text, rng)


def render(item, calls, rng) -> str:
    language = bfcl_language(item.category)
    documents = {d["name"]: d["parameters"]["properties"] for d in item.reference["documents"]}

    def source(name, argument, value):
        if language == "python":
            return repr(value)
        return script_source(value, documents.get(name, {}).get(argument, {}), language, rng)
    calls = [f"{name}({', '.join(f'{a}={source(name, a, v)}' for a, v in given.items())})" for name, given in calls]
    return f"[{', '.join(calls)}]"


def render_json(item, calls, rng, bare=0.0) -> str:
    """bare: how often a Java or JavaScript value is a JSON value instead of its source text, which upstream refuses."""
    language = bfcl_language(item.category)
    documents = {d["name"]: d["parameters"]["properties"] for d in item.reference["documents"]}

    def text(name, argument, value):
        if language == "python" or isinstance(value, str) or rng.random() < bare:
            return value
        source = script_source(value, documents.get(name, {}).get(argument, {}), language, rng)
        return source[1:-1] if source[:1] in ("'", '"') and source[-1:] == source[:1] else source
    return json.dumps([{"name": n, "arguments": {a: text(n, a, v) for a, v in g.items()}} for n, g in calls])


def outputs(item, rng):
    """Yield (kind of damage, text, is it JSON) for one item."""
    if "relevance" in item.category:
        call = f"{item.reference['documents'][0]['name']}(x=1)" if item.reference["documents"] else "f(x=1)"
        yield from (("call", f"[{call}]", False), ("call", call, False), ("call", f"[{call}, {call}]", False))
        for text in ("I cannot help with that.", "", "None", f"You could use {call}.", f"[{call}", "Sorry", "x = 1"):
            yield "prose", text, False
        yield from (("empty", "[]", False), ("empty", "[]", True), ("JSON", '[{"name": "f", "arguments": {"x": 1}}]', True))
        return
    for which in ("sparse", "full", "last"):
        calls = accepted_calls(item, which)
        yield f"accepted, {which}", render(item, calls, rng), False
        yield f"accepted, {which}", render_json(item, calls, rng), True
    for kind, damage in CALL_DAMAGE.items():
        calls = damage(accepted_calls(item, rng.choice(("sparse", "full", "last"))), rng)
        if calls:
            yield kind, render(item, calls, rng), False
            if rng.random() < 0.3 and "tuple" not in kind:
                yield kind, render_json(item, calls, rng, 0.1), True
    for kind, damage in TEXT_DAMAGE.items():
        yield kind, damage(render(item, accepted_calls(item, rng.choice(("sparse", "full"))), rng), rng), False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of BFCL_v4_*.json and possible_answer/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=100, help="disagreements printed at most")
    o = parser.parse_args()
    upstream, rng, shown, crashes = load_upstream(), random.Random(o.seed), 0, 0
    by_category, by_damage = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    refused = collections.defaultdict(list)
    for item in bfcl_items(o.data):
        for kind, text, is_json in outputs(item, rng):
            theirs, reason, crashed = upstream(item, text, is_json)
            mine = bfcl_judge(item, text)
            crashes += crashed
            for counter in (by_category[item.category], by_damage[kind + (", JSON" if is_json else "")]):
                counter["n"] += 1
                counter["agree"] += theirs == mine["correct"]
                counter["accepted"] += theirs
            if kind.startswith("accepted") and not theirs:
                refused[kind + (", JSON" if is_json else "")].append(item.id)
            if theirs != mine["correct"] and (shown := shown + 1) <= o.show:
                print(f"DISAGREE {item.id} ({kind}): {text[:300]!r}\n   upstream {theirs}: {reason[:300]}\n"
                      f"   ours     {mine['correct']}: {mine['reason'][:300]}")
    for title, table in (("category", by_category), ("damage", by_damage)):
        print(f"\n{title:34} {'outputs':>8} {'accepted':>9} {'agree':>8}")
        for name, c in table.items():
            print(f"{name:34} {c['n']:8,} {c['accepted']:9,} {c['agree'] / c['n']:8.2%}")
    for kind, ids in refused.items():
        print(f"\nrefused by upstream among '{kind}': {len(ids)}: {' '.join(ids[:40])}")
    n, agree = (sum(c[k] for c in by_category.values()) for k in ("n", "agree"))
    print(f"\nagreement {agree / n:.3%} ({n - agree} of {n:,} outputs differ); upstream raised on {crashes}, counted as wrong")


if __name__ == "__main__":
    main()
