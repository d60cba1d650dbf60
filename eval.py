"""Evaluation of any checkpoint: loss by token role, and success on the toy.

    python eval.py toy --model out/rft/model --out out/eval                        # exact match of tool and arguments
    python eval.py toy --predictions FILE.jsonl --out DIR                          # score {"id": ..., "output": "text"} lines
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out DIR  # mean loss by group of tokens

Writes OUT/summary.json and, for the toy, OUT/verdicts.jsonl: a line an asked item, with the reason.
"""
import ast
import html
import json
import operator
import os
import re
import warnings
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import (TOOL_PROMPT, DataError, Dataset, Message, Renderer, load_labels, option, parse_options, read_records, run_script,
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
# BFCL, single turn: the function calls, compared with lists of accepted values as bfcl-eval 2026.3.23 does

@dataclass
class Item:                         # one asked question of a benchmark
    id: str
    category: str
    messages: list[Message]         # the prompt
    reference: object = None        # what the judge needs


BFCL_CATEGORIES = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
                   "irrelevance", "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
                   "live_irrelevance", "live_relevance")
BFCL_TYPES = {
    "python": {"string": str, "any": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
               "dict": dict},
    "java": {"String": str, "char": str, "any": str, "byte": int, "short": int, "integer": int, "long": int, "float": float,
             "double": float, "boolean": bool, "Array": list, "ArrayList": list, "HashMap": dict},
    "javascript": {"String": str, "any": str, "integer": int, "Bigint": int, "float": float, "Boolean": bool, "array": list,
                   "dict": dict}}
BFCL_LONGEST = 10_000               # characters of an output; patterns and parsers need bounded time on whatever a model writes


def bfcl_language(category: str) -> str:
    return category.removeprefix("simple_") if category in ("simple_java", "simple_javascript") else "python"


def bfcl_items(folder: str) -> list[Item]:
    """The items of every single-turn BFCL_v4_CATEGORY.json in a folder; answers come from possible_answer/ beside it."""
    items = []
    for category in BFCL_CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        path, answer_path = os.path.join(folder, name), os.path.join(folder, "possible_answer", name)
        if not os.path.isfile(path):
            continue
        where = answer_path
        try:
            answers = {} if "relevance" in category else {r["id"]: r["ground_truth"] for _, r in read_records(answer_path)}
            for where, record in read_records(path):
                documents, language = record["function"], bfcl_language(category)
                tools = documents if language == "python" else [bfcl_as_strings(d, language) for d in documents]
                system = [TOOL_PROMPT.format(json.dumps(tools, ensure_ascii=False))]
                turns = [Message(turn["role"], turn["content"]) for turn in record["question"][0]]
                if turns[0].role == "system":
                    system.append(turns.pop(0).text)
                reference = {"documents": documents}
                if "relevance" not in category:
                    if record["id"] not in answers:
                        raise DataError(f"{where}: {answer_path} has no answer to {record['id']}; copy both files of one release.")
                    reference["truth"] = answers[record["id"]]
                    reference["fault"] = bfcl_fault(documents, reference["truth"], language)
                items.append(Item(record["id"], category, [Message("system", "\n\n".join(system)), *turns], reference))
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise DataError(f"{where} is no record of BFCL ({type(e).__name__}: {e}); copy the release's file again.") from None
    if not items:
        raise DataError(f"{folder} holds no BFCL_v4_*.json of a single-turn category; copy the data folder of bfcl-eval.")
    return items


def bfcl_as_strings(document: dict, language: str) -> dict:
    """A function's document for the prompt of a Java or JavaScript item: every argument is a string of source text."""
    properties, language = {}, {"java": "Java", "javascript": "JavaScript"}[language]
    for name, p in document["parameters"]["properties"].items():
        of = f" of {p['items']['type']}" if "items" in p else ""
        of += f" with the fields {json.dumps(p['properties'])}" if "properties" in p else ""
        note = f"Written as a string: {language} source text of type {p['type']}{of}."
        properties[name] = {"type": "string", "description": f"{p.get('description', '')} {note}".strip()}
    return document | {"parameters": document["parameters"] | {"properties": properties}}


def bfcl_fault(documents: list[dict], truth: list[dict], language: str) -> str | None:
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
                if document["type"] not in BFCL_TYPES[language]:
                    return f"{name}'s {argument} is of the unknown type {document['type']}"
                if not values:
                    return f"{name}'s {argument} has no accepted value"
                if any(type(options) is not list for v in values if type(v) is dict for options in v.values()):
                    return f"{name}'s {argument}: a key has a value where a list of accepted values is due"
                of_any = language == "java" and document.get("items") == {"type": "any"}
                if of_any and any(type(x) is not str for v in values for x in v):
                    return f"{name}'s {argument}: elements of type any are read as text, and other types are expected"


def bfcl_judge(item: Item, output: str) -> dict:
    """The verdict on one output: {"correct", "reason"}, and "fault" where the item's own data are faulty."""
    try:
        reason = bfcl_reason(item, output)
    except Exception as e:          # whatever a model writes gets a verdict: numbers too large to print, nesting too deep ...
        reason = f"the calls cannot be checked: {type(e).__name__}"
    fault = {"fault": item.reference["fault"]} if item.reference.get("fault") else {}
    return {"correct": reason is None, "reason": reason or "correct"} | fault


def bfcl_reason(item: Item, output: str) -> str | None:
    """Why an output is wrong, or None. "parallel" in a category goes before "multiple", which goes before the rest."""
    language, documents = bfcl_language(item.category), item.reference["documents"]
    try:
        calls = bfcl_decode(output, language)
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
            reasons = [bfcl_check(call, by_name[name], accepted, language) for call in left]
            if None not in reasons:
                return f"no call passes for {name}: " + "; ".join(reasons)
            left.pop(reasons.index(None))
        return None
    name, accepted = truth[0]
    return bfcl_check(calls[0], by_name[name] if "multiple" in item.category else documents[0], accepted, language)


def bfcl_check(call, document: dict, accepted: dict, language: str) -> str | None:
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
        type_name, types = properties[argument]["type"], BFCL_TYPES[language]
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
        fits, is_variable = bfcl_type(value, accepted[argument], expected, inner)
        if not fits:
            return f"{argument} = {given!r:.200} is not of type {type_name}" + (f" of {inner_name}" if inner_name else "")
        if not (value in accepted[argument] if is_variable else bfcl_value(value, accepted[argument], expected, inner)):
            return f"{argument} = {given!r:.200} is not among {accepted[argument]!r:.200}"
    for argument, values in accepted.items():
        if argument not in arguments and "" not in values:
            return f"argument {argument} is missing and has no default"
    return None


def bfcl_type(value, accepted: list, expected: type, inner: type | None) -> tuple[bool, bool]:
    """(fits, is a variable): by exact type, the items of a list one level deep. A value of the accepted values' own type
    passes in the place of another: the data write a variable's name so."""
    own = next((type(a) for a in accepted if a != ""), None)
    if type(value) is not expected:
        return type(value) is own, True
    fits = inner is None or any(type(a) is not list or all(bfcl_type(v, a, inner, None)[0] for v in value) for a in accepted)
    return fits, own not in (None, expected)


def standardize(value):
    """Strings are compared without case, spaces and the punctuation ,./-_*^ and with one kind of quote."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def bfcl_value(value, accepted: list, expected: type, inner: type | None) -> bool:
    """Is a value of the right type among the accepted ones?"""
    if expected is dict:
        return any(a != "" and all(k in a and standardize(v) in map(standardize, a[k]) for k, v in value.items())
                   and all(k in value or "" in options for k, options in a.items()) for a in accepted)
    if inner is dict:
        return any(len(value) == len(a) and all(type(v) is dict and bfcl_value(v, [b], dict, None) for v, b in zip(value, a))
                   for a in accepted)
    if expected is str:
        return standardize(value) in [standardize(a) for a in accepted if type(a) is str]
    if expected is list:
        return [standardize(v) for v in value] in [[standardize(x) for x in a] for a in accepted]
    return value in accepted


def bfcl_decode(output: str, language: str) -> list[tuple[str, dict]]:
    """The calls [(name, arguments)] of a model's text: a JSON list of {"name", "arguments"}, or the item's language."""
    if len(output) > BFCL_LONGEST:
        raise ValueError(f"longer than {BFCL_LONGEST:,} characters")
    try:
        calls = json.loads(re.sub(r"^```(?:json)?|```$", "", output.strip()))
    except ValueError:
        text = output.strip("`\n ")
        text = (text if text.startswith("[") else "[" + text) + ("" if text.endswith("]") else "]")
        return python_calls(text) if language == "python" else script_call(text[1:-1], language)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict) for c in calls):
        raise ValueError('JSON, but not a list of {"name": ..., "arguments": {...}}')
    return [(c["name"], c["arguments"]) for c in calls]


def python_calls(text: str) -> list[tuple[str, dict]]:
    """Calls with keyword arguments, parsed and never evaluated. Positional arguments are ignored, as upstream does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of odd escapes in the model's strings
        body = ast.parse(text, mode="eval").body
    if not isinstance(body, ast.List) or not all(isinstance(call, ast.Call) for call in body.elts):
        raise ValueError("not a list of calls")
    return [python_call(call) for call in body.elts]


def python_call(call: ast.Call) -> tuple[str, dict]:
    names, node = [], call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    return ".".join(reversed(names)), {k.arg: python_value(k.value) for k in call.keywords}


def python_value(node):
    """The value of a parsed argument: literals, displays, arithmetic; a name or a call without keywords stands for its text."""
    match node:
        case ast.Constant():
            return "..." if node.value is ... else node.value
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value          # upstream's, whatever the sign: +5 is -5
        case ast.BinOp():
            return arithmetic(node)
        case ast.List():
            return [python_value(e) for e in node.elts]
        case ast.Tuple():
            return tuple(python_value(e) for e in node.elts)
        case ast.Dict():
            return {python_value(k): python_value(v) for k, v in zip(node.keys, node.values)}
        case ast.Name():
            return node.id
        case ast.Call():
            return dict([python_call(node)]) if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise ValueError(f"no value: {type(node).__name__}")


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
              ast.UAdd: operator.pos}


def arithmetic(node):
    """A number written as arithmetic, or strings added."""
    match node:
        case ast.Constant(value=int() | float() | str()):
            return node.value
        case ast.UnaryOp():
            return ARITHMETIC[type(node.op)](arithmetic(node.operand))
        case ast.BinOp():
            left, right = arithmetic(node.left), arithmetic(node.right)
            if str in (type(left), type(right)) and not isinstance(node.op, ast.Add):
                raise ValueError("arithmetic on a string")
            if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * right > 4096:
                raise ValueError("a power too large")
            return ARITHMETIC[type(node.op)](left, right)
    raise ValueError("arithmetic on names or calls")


# Java and JavaScript: one call of assignments, its values source text, converted where the type in the document says so

SCRIPT_TOKEN = re.compile(r"""(?P<space>(?:\s|//[^\n]*|/\*.*?\*/)+)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`)
    | (?P<number>(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>[^\W\d][\w$]*|\$[\w$]*)
    | (?P<sign>::|=>|->|[=!<>]=+|\+\+|--|\.\.\.|[-+*/%=<>!&|^~?:;,.(){}\[\]])""", re.S | re.X)
BEFORE_OPERAND = {"new", "instanceof", "typeof", "await", "async", "function", "return", "const", "let", "var", "in", "of"}

RESERVED = {"javascript": set("break case catch class const continue do else enum export extends finally for if import "
                              "switch throw try while with".split())}
RESERVED["java"] = RESERVED["javascript"] | set("boolean byte char double float int long short package private public "
                                                "static".split())


def script_call(text: str, language: str) -> list[tuple[str, dict]]:
    """The one call `name(argument=value, ...)` of a Java or JavaScript text; later statements are not looked at."""
    tokens, position = [], 0
    while position < len(text):
        m = SCRIPT_TOKEN.match(text, position)
        if language == "javascript" and tokens and tokens[-1][1] in "=([{,:":
            m = re.compile(r"(?P<string>/[^/*\s][^/\n]*/[a-z]*)").match(text, position) or m         # a regular expression
        if not m or language == "java" and m[0][0] == "`" or language == "javascript" and m[0][0] == '"' and "\n" in m[0]:
            raise ValueError(f"{text[position]!r} at character {position}")
        position = m.end()
        if m.lastgroup == "number" or m.lastgroup == "word" and language == "java" and tokens and tokens[-1][1] == "new":
            tail = r"<[\w\s,.?<>]*>" if m.lastgroup == "word" else "[lLfFdD]" if language == "java" else "n"
            tail = re.compile(tail).match(text, position)           # new HashMap<String, Object>, 5L, 5n
            position = tail.end() if tail else position
        if m.lastgroup != "space":
            tokens.append((m.lastgroup, text[m.start():position], m.start(), position))
    head = next((i for i, t in enumerate(tokens) if t[1] == "("), 0)
    line_before = r"\s*(?:[a-z]+\s*\n)?\s*" if language == "javascript" else r"\s*"       # the language's name, left of a fence
    name = tokens and re.fullmatch(line_before + r"([^\W\d][\w$]*(?:\.[^\W\d][\w$]*)*)\s*", text[:tokens[head][2]])
    if not name:
        raise ValueError("not a call of a named function")
    stack, pieces = ["("], [[]]
    for end, token in enumerate(tokens[head + 1:], head + 1):
        if token[1] in ("(", "[", "{"):
            stack.append(token[1])
        elif token[1] in (")", "]", "}") and stack.pop() + token[1] not in ("()", "[]", "{}"):
            raise ValueError(f"{token[1]!r} closes nothing")
        if not stack:
            break
        if token[1] == "," and len(stack) == 1:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if stack or tokens[end + 1:] and tokens[end + 1][1] != ";":
        raise ValueError("a bracket is not closed" if stack else "text after the call")
    arguments = {}
    for piece in pieces:
        if not piece and (language == "javascript" or len(pieces) == 1):
            continue
        argument, expression = None, piece
        if [t[0] for t in piece[:1]] == ["word"] and [t[1] for t in piece[1:2]] == ["="]:
            argument, expression = piece[0][1], piece[2:]
        if not expression or argument is None and "=" in [t[1] for t in piece]:
            raise ValueError("an argument without a name or a value")
        check_expression(expression, language)
        if argument is None and (len(piece) > 1 or piece[0][0] != "word"):
            continue                            # upstream ignores positional arguments, except for names
        if argument in arguments:
            raise ValueError(f"{argument} is given twice")
        start, end = expression[0][2], expression[-1][3]
        arguments[argument] = java_source(expression, text) if language == "java" else unquote(text[start:end])
    return [(name[1], arguments)]


def check_expression(tokens, language: str) -> None:
    """Raise ValueError for what no parser takes as a value: operands side by side, operators without operands."""
    depth, words = 0, [t[1] for t in tokens]
    conditional = "?" in words
    if len(words) == 1 and words[0] in RESERVED[language]:
        raise ValueError(f"{words[0]} is no value")
    for (before, previous, *_), (kind, word, *_) in zip([("sign", "=")] + tokens, tokens):
        literal = {"string", "number"} & {before, kind}
        if "sign" not in (before, kind) and not {previous, word} & BEFORE_OPERAND and (literal or not depth):
            raise ValueError(f"{previous:.40} {word:.40} without an operator")
        if word == ";" and not depth or word == ":" and not conditional and (language == "java" or not depth):
            raise ValueError(f"{word!r} in a value that is not quoted")
        if language == "java" and (word == "[" and previous in "=(,[{" or word == "{" and previous not in (*")]>{,", "->")):
            raise ValueError(f"{word!r} begins no value in Java")
        if previous in tuple("=([{,") and word in tuple("*/%.&|?:<>=^"):
            raise ValueError(f"nothing before {word!r}")
        depth += (word in "({") - (word in ")}")
    if words[-1] in tuple("+-*/%.=&|?:<>!^~"):
        raise ValueError(f"nothing after {words[-1]!r}")


def java_source(tokens, text: str) -> str:
    """A value's source text as upstream rebuilds it: a string without its quotes; a method's call as it stands; elsewhere no
    spaces, and no class body after `new T(...)`, so that a map filled in the body counts as empty."""
    if len(tokens) == 1 and tokens[0][0] == "string":
        return tokens[0][1][1:-1]
    source, skipped, called, new = "", 0, 0, False          # depths of a class body, and of a method's arguments
    for (before, previous, _, gap), (kind, word, _, end) in zip([("", "", 0, 0)] + tokens, tokens):
        if word == "{" and not called and (skipped or previous == ")"):
            skipped += 1
        if word == "(" and not skipped and (called or before == "word" and not new):
            called += 1
        if called:
            source += text[gap:end]
        elif not skipped:
            source += "new " if word == "new" else re.sub(r"\s", "", word) if kind == "word" else word
        skipped -= word == "}" and skipped > 0
        called -= word == ")" and called > 0
        new = word == "new" or new and word != "("
    return source


def unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


NUMBERS = {"java": {"byte": (int, ""), "short": (int, ""), "integer": (int, ""), "long": (int, "[lL]"),
                    "float": (float, "[fF]"), "double": (float, "")},
           "javascript": {"integer": (int, ""), "Bigint": (int, "n"), "float": (float, "")}}


def script_number(text: str, type_name: str, language: str):
    """A number as its type's literal writes it (long 5L, float 1.5f, Bigint 5n); any other text stays text."""
    number, suffix = NUMBERS[language][type_name]
    fraction = "" if number is int else r"(?:\.\d+)?" + (r"(?:[eE][+-]?\d+)?" if language == "java" else "")
    m = re.match(rf"(-?\d+{fraction}){suffix}$", text)
    return number(m[1]) if m else text


def plain_value(text: str, language: str):
    """The value of an element whose type no document names."""
    if text in ("true", "false"):
        return text == "true"
    if language == "java":
        m = re.match(r"(-?\d+)[lL]$", text) or re.match(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[fF]$", text)
        if text.startswith('"') and text.endswith('"'):
            return text[1:-1]
        text = m[1] if m else text
        if m and "f" in m[0].lower():
            return float(text)
    elif unquote(text) != text:
        return unquote(text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def java_value(text: str, type_name: str, inner: str | None = None):
    """A Java value from its source text; what is not written as its type stays text."""
    if type_name in NUMBERS["java"]:
        return script_number(text, type_name, "java")
    if type_name == "boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "ArrayList":
        element = lambda x: x[1:-1] if inner in ("char", "String") else java_value(x, inner)
        if m := re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", text):
            return [element(x.strip()) for x in m[1].split(",")]
        if m := re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{(.+?)\}\}", text, re.S):
            return [element(x.strip()) for x in re.findall(r"add\((.+?)\)", m[1])]
        return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text
    if type_name == "Array" and (m := re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", text)):
        return [java_value(x.strip(), inner) for x in m[1].split(",") if x.strip()]
    if type_name == "HashMap":
        if m := re.search(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?([^}]*)\}", text, re.S):
            return {key: plain_value(value.strip(), "java") for key, value in re.findall(r'put\("(.*?)",\s*(.*?)\)', m[1])}
        return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", text, re.S) else text
    return text


def javascript_value(text: str, type_name: str, inner: str | None = None):
    """A JavaScript value from its source text; what is not written as its type stays text."""
    if type_name in NUMBERS["javascript"]:
        return script_number(text, type_name, "javascript")
    if type_name == "Boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "String":
        return unquote(text)
    text = text.strip() if type_name in ("array", "dict") else text
    element = lambda x: javascript_value(x.strip(), inner) if inner else plain_value(x.strip(), "javascript")
    if type_name == "array":
        row = r"\[[^\]\n]*\]\s*"                # upstream's pattern lets a row hold "]", and takes exponential time
        if m := re.match(rf"\[\s*{row}(,\s*{row})*\]|new\s+Array\(\s*{row}(,\s*{row})*\)", text):
            return [[plain_value(x.strip(), "javascript") for x in r.strip().removeprefix("[").split(",")]
                    for r in re.findall(r"\[(.*?)\]", m[0])]
        if m := re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text):
            elements = (m[1] if m[1] is not None else m[2]).strip()
            return [element(x) for x in elements.split(",")] if elements else []
    elif type_name == "dict" and (m := re.match(r"\{(.*?)\}", text)):
        pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", m[1])
        return {key.strip().strip("'\""): javascript_field(value.strip()) for key, value in pairs}
    return text


def javascript_field(text: str):
    for opening, closing, type_name in ("[", "]", "array"), ("{", "}", "dict"):
        if text.startswith(opening) and text.endswith(closing):
            return javascript_value(text, type_name)
    return plain_value(text.strip("'\"").strip(), "javascript")


def bfcl_summary(verdicts: list[dict]) -> dict:
    """Accuracy and count of every category present; the groups of upstream's leaderboard, each over the members it names."""
    correct = {c: [v["correct"] for v in verdicts if v["category"] == c] for c in BFCL_CATEGORIES}
    count = {c: len(x) for c, x in correct.items() if x}
    accuracy = {c: sum(correct[c]) / n for c, n in count.items()}

    def group(members, scores, weights=None):
        members = [m for m in members if m in scores]
        weights = {m: weights[m] if weights else 1 for m in members}
        total = sum(scores[m] * weights[m] for m in members)
        return {"accuracy": total / sum(weights.values()), "over": members} if members else None

    groups = {"simple": group(BFCL_CATEGORIES[:3], accuracy)}
    non_live = accuracy | ({"simple": groups["simple"]["accuracy"]} if groups["simple"] else {})
    groups["non_live_ast"] = group(("simple", "multiple", "parallel", "parallel_multiple"), non_live)
    groups["live_ast"] = group(BFCL_CATEGORIES[7:11], accuracy, count)          # by their counts; all others by equal parts
    groups["irrelevance"] = group(("irrelevance", "live_irrelevance"), accuracy)
    groups = {name: g for name, g in groups.items() if g}
    # upstream weights these three 10 : 10 : 10, beside multi-turn (30) and agentic (40), which are not asked here
    of_groups = {name: g["accuracy"] for name, g in groups.items()}
    groups["overall_of_present"] = group(("non_live_ast", "live_ast", "irrelevance"), of_groups)
    return {"categories": {c: {"accuracy": accuracy[c], "count": n} for c, n in count.items()},
            "groups": {name: g for name, g in groups.items() if g},
            "all_items": {"accuracy": sum(v["correct"] for v in verdicts) / max(len(verdicts), 1), "count": len(verdicts)},
            "data_faults": {v["id"]: v["fault"] for v in verdicts if v.get("fault")}}


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
