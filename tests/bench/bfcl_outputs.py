"""Outputs for BFCL's items: their accepted calls, and the same calls damaged in many ways."""
import json

from benchmarks import bfcl

# -------------------------------------------------------------------------------------------------
# Accepted calls: [(name, {argument: value})]

def realise(accepted):
    """A value from an accepted one; a dictionary's are lists of alternatives, "" for none."""
    if isinstance(accepted, dict):
        value = {}
        for key, alternatives in accepted.items():
            if alternatives[:1] != [""]:
                is_list = isinstance(alternatives, list) and alternatives
                value[key] = alternatives[0] if is_list else alternatives
        return value
    return [realise(v) for v in accepted] if isinstance(accepted, list) else accepted


def accepted_calls(item, which: str):
    """which: "sparse" leaves out what is optional; "full" and "last" take all."""
    required = {d["name"]: d["parameters"]["required"] for d in item.reference["documents"]}
    calls = []
    for call in item.reference["truth"]:
        for name, arguments in call.items():
            given = {}
            for argument, values in arguments.items():
                choices = [v for v in values if v != ""] or values
                is_needed = argument in required[name] or "" not in values
                is_wanted = which != "sparse" and choices != [""]
                if choices and (is_needed or is_wanted):
                    given[argument] = realise(choices[-1 if which == "last" else 0])
            calls.append((name, given))
    return calls


# -------------------------------------------------------------------------------------------------
# Damage: a function of (calls, rng) that returns new calls, or None where it does not apply

def change(kinds, new):
    """Damage to one argument's value, or to one list element, of some types."""
    def is_place(value):
        if type(value) in kinds:
            return True
        return type(value) is list and list not in kinds and any(type(x) in kinds for x in value)

    def damage(calls, rng):
        places = []
        for i, (_, arguments) in enumerate(calls):
            places += [(i, argument) for argument, value in arguments.items() if is_place(value)]
        if not places:
            return None
        i, argument = rng.choice(places)
        name, arguments = calls[i]
        value = arguments[argument]
        if type(value) in kinds:
            value = new(value, rng)
        else:
            at = rng.choice([j for j, element in enumerate(value) if type(element) in kinds])
            value = value[:at] + [new(value[at], rng)] + value[at + 1:]
        return [*calls[:i], (name, {**arguments, argument: value}), *calls[i + 1:]]
    return damage


def on_call(new):
    """Damage to one call by a function of its name and arguments."""
    def damage(calls, rng):
        i = rng.randrange(len(calls))
        result = new(*calls[i], rng)
        return result and [*calls[:i], result, *calls[i + 1:]]
    return damage


def without(arguments, rng):
    gone = rng.choice(list(arguments))
    return {k: v for k, v in arguments.items() if k != gone}


def with_extra(arguments, rng):
    name = rng.choice(["verbose", "unit", "limit", "type"])
    return {**arguments, name: rng.choice([True, 3, "x"])}


def with_first_renamed(arguments):
    return {k + "_" * (i == 0): v for i, (k, v) in enumerate(arguments.items())}


def insert(text, piece, rng):
    at = rng.randrange(len(text) + 1)
    return text[:at] + piece + text[at:]


def shuffled(values, rng):
    return rng.sample(values, len(values))


def shuffle_arguments(calls, rng):
    return [(name, dict(shuffled(list(given.items()), rng))) for name, given in calls]


SCALARS = (int, float, str, bool)
PUNCTUATION = list(",./-_*^;:!'\"()[]{}?&")

CALL_DAMAGE = {
    "wrong name": on_call(
        lambda n, g, r: (r.choice([n + "s", n[:-1], n.swapcase(), n.replace(".", "_") + "_"]), g)),
    "name without module": on_call(lambda n, g, r: (n.split(".")[-1], g) if "." in n else None),
    "missing argument": on_call(lambda n, g, r: (n, without(g, r)) if g else None),
    "extra argument": on_call(lambda n, g, r: (n, with_extra(g, r))),
    "renamed argument": on_call(lambda n, g, r: (n, with_first_renamed(g)) if g else None),
    "type: number as text": change((int, float), lambda v, r: str(v)),
    "type: text as number": change((str,), lambda v, r: r.choice([7, 1.5, True])),
    "type: value in a list": change(SCALARS, lambda v, r: [v]),
    "type: list as its item": change((list,), lambda v, r: v[0] if v else 0),
    "type: list as a tuple": change((list,), lambda v, r: tuple(v)),
    "type: None": change((*SCALARS, list, dict), lambda v, r: None),
    "type: bool as text or number": change(
        (bool,), lambda v, r: r.choice([str(v), str(v).lower(), int(v)])),
    "near: int as float": change((int,), lambda v, r: float(v)),
    "near: float as int": change((float,), lambda v, r: int(v)),
    "near: off by one": change((int, float), lambda v, r: v + r.choice([-1, 1, 0.01])),
    "near: sign": change((int, float), lambda v, r: -v),
    "near: case": change((str,), lambda v, r: v.swapcase()),
    "near: spaces": change((str,), lambda v, r: insert(v, r.choice([" ", "  ", "\t"]), r)),
    "near: punctuation": change((str,), lambda v, r: insert(v, r.choice(PUNCTUATION), r)),
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
    "argument order": shuffle_arguments,
}


def cut_bracket(text, rng):
    return text[:-2] if rng.random() < 0.5 else text[:-1]


def drop_sign(text, rng):
    at = rng.choice([i for i, c in enumerate(text) if c in "()[]{}'\"=,"])
    return text[:at] + text[at + 1:]


def cut_argument_name(text, rng):
    at = rng.choice([i for i, c in enumerate(text) if c == "="] or [0])
    start = max(text.rfind("(", 0, at), text.rfind(",", 0, at)) + 1
    return text[:start] + text[at + 1:]


def nest_call(text, rng):
    return rng.choice([text.replace("=", "=f(x=1)+", 1),
                       text.replace("=", "=f(", 1).replace(",", "),", 1)])


def replace_by_prose(text, rng):
    return rng.choice(["I cannot help with that.", "None of the functions fits", "None", "", "[]",
                       "{}"])


TEXT_DAMAGE = {
    "text: cut": lambda t, r: t[:r.randrange(len(t))],
    "text: bracket cut": cut_bracket,
    "text: a sign less": drop_sign,
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
    "text: nested call": nest_call,
    "text: only prose": replace_by_prose,
}


# -------------------------------------------------------------------------------------------------
# Rendering

def quoted(text: str, rng) -> str:
    """A string literal of Java or JavaScript; both keep what stands between the quotes as it is."""
    quotes = [q for q in "\"'" if q not in text] if text else ['"']
    return rng.choice(quotes).join(["", text, ""]) if quotes else json.dumps(text)


def script_source(value, parameter: dict, language: str, rng) -> str:
    """Source text of a value in a Java or JavaScript call, as the parameter's type is written."""
    kind = parameter.get("type")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        suffixes = {"long": "L", "float": "f" * (language == "java"), "Bigint": "n"}
        return f"{value}{suffixes.get(kind, '')}"
    if value is None:
        return "null"
    if isinstance(value, str):
        is_bare = value.isidentifier() and kind == "any" and rng.random() < 0.5
        return value if is_bare else quoted(value, rng)
    inner = parameter.get("items", {}).get("type")
    if language == "javascript":
        return javascript_source(value, inner, rng)
    return java_source(value, kind, inner, rng)


def javascript_source(value, inner: str | None, rng) -> str:
    """Source text of a list or a dictionary."""
    if isinstance(value, dict):
        keys = [k if rng.random() < 0.5 else quoted(k, rng) for k in value]
        sources = [script_source(v, {}, "javascript", rng) for v in value.values()]
        fields = [f"{k}: {source}" for k, source in zip(keys, sources, strict=True)]
        return "{" + ", ".join(fields) + "}"
    elements = [script_source(v, {"type": inner}, "javascript", rng) for v in value]
    return "[" + ", ".join(elements) + "]"


def java_source(value, kind: str | None, inner: str | None, rng) -> str:
    """Source text of a list or a dictionary; quoted where upstream's parser would change it."""
    if isinstance(value, dict):
        puts = "".join(f'put("{k}", {json.dumps(v)}); ' for k, v in value.items())
        text = f"new HashMap<String, Object>() {{{{ {puts}}}}}" if value else "new HashMap<>()"
        return text if "'" in text else f"'{text}'"         # a bare `new` loses its body
    # elements of type any keep their quotes, so they get none, which only a quoted literal can hold
    is_bare = inner == "any" or kind != "ArrayList"
    elements = []
    for v in value:
        is_text = is_bare and isinstance(v, str)
        elements.append(str(v) if is_text else script_source(v, {"type": inner}, "java", rng))
    content = ", ".join(elements)
    if kind == "ArrayList":
        source = f"Arrays.asList({content})" if value else ""
        text = f"new ArrayList<>({source})"
        return quoted(text, rng) if is_bare else text
    if inner == "integer":
        return f"new int[]{{{content}}}"
    return quoted(f"new {inner or 'Object'}[]{{{content}}}", rng)


def parameters_of(item) -> dict:
    return {d["name"]: d["parameters"]["properties"] for d in item.reference["documents"]}


def render(item, calls, rng) -> str:
    language = bfcl.language_of(item.category)
    parameters = parameters_of(item)
    texts = []
    for name, given in calls:
        arguments = []
        for argument, value in given.items():
            parameter = parameters.get(name, {}).get(argument, {})
            if language == "python":
                source = repr(value)
            else:
                source = script_source(value, parameter, language, rng)
            arguments.append(f"{argument}={source}")
        texts.append(f"{name}({', '.join(arguments)})")
    return f"[{', '.join(texts)}]"


def render_json(item, calls, rng, bare=0.0) -> str:
    """bare: how often a Java or JavaScript value is no source text, which upstream refuses."""
    language = bfcl.language_of(item.category)
    parameters = parameters_of(item)

    def content(name, argument, value):
        if language == "python" or isinstance(value, str) or rng.random() < bare:
            return value
        parameter = parameters.get(name, {}).get(argument, {})
        source = script_source(value, parameter, language, rng)
        is_quoted = source[:1] in ("'", '"') and source[-1:] == source[:1]
        return source[1:-1] if is_quoted else source

    rendered = []
    for name, given in calls:
        arguments = {a: content(name, a, v) for a, v in given.items()}
        rendered.append({"name": name, "arguments": arguments})
    return json.dumps(rendered)


def outputs(item, rng):
    """Yield (kind of damage, text, is it JSON) for one item."""
    if "relevance" in item.category:
        yield from relevance_outputs(item.reference["documents"])
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
        text = render(item, accepted_calls(item, rng.choice(("sparse", "full"))), rng)
        yield kind, damage(text, rng), False


def relevance_outputs(documents):
    call = f"{documents[0]['name']}(x=1)" if documents else "f(x=1)"
    for text in (f"[{call}]", call, f"[{call}, {call}]"):
        yield "call", text, False
    for text in ("I cannot help with that.", "", "None", f"You could use {call}.", f"[{call}",
                 "Sorry", "x = 1"):
        yield "prose", text, False
    yield "empty", "[]", False
    yield "empty", "[]", True
    yield "JSON", '[{"name": "f", "arguments": {"x": 1}}]', True
