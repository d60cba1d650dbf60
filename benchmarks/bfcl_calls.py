"""Reading calls out of a model's text: Python, Java and JavaScript. Everything is parsed; nothing is executed."""
import ast
import json
import operator
import re
import warnings


LONGEST = 10_000               # characters of an output; patterns and parsers need bounded time on whatever a model writes


def decode(output: str, language: str) -> list[tuple[str, dict]]:
    """The calls [(name, arguments)] of a model's text: a JSON list of {"name", "arguments"}, or the item's language."""
    if len(output) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
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
