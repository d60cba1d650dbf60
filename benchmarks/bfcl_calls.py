"""Reading calls from a model's text: JSON, Python, Java or JavaScript. Parsed, never executed."""
import ast
import json
import operator
import re
from typing import NamedTuple

from benchmarks.native_calls import native_calls

LONGEST = 10_000    # characters of an output: parsers and patterns need bounded time on any text


def decode(output: str, language: str) -> list[tuple[str, dict]]:
    """The calls [(name, {argument: value})] in a model's text.

    The prompt asks for JSON or calls in `language`; a model's own tool-call form is read as well.
    Java and JavaScript values stay source text: what they mean depends on the documents' types.
    Raises ValueError if no calls can be read, or whatever else json.loads and ast.parse raise.
    """
    if len(output) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters")
    try:
        return requested_calls(output, language)
    except Exception:
        calls = native_calls(output)
        if calls is None:
            raise
        return calls


def requested_calls(output: str, language: str) -> list[tuple[str, dict]]:
    """A JSON list of {"name", "arguments"}, or calls in `language`, perhaps in a fence."""
    try:
        content = json.loads(re.sub(r"^```(?:json)?|```$", "", output.strip()))
    except ValueError:
        text = output.strip("`\n ")
        if language == "python":
            opening = "" if text.startswith("[") else "["
            closing = "" if text.endswith("]") else "]"
            return python_calls(opening + text + closing)
        return script_call(text.removeprefix("[").removesuffix("]"), language)
    return json_calls(content)


def json_calls(content) -> list[tuple[str, dict]]:
    """The calls of parsed JSON: one {"name", "arguments"}, or a list of them."""
    calls = content if isinstance(content, list) else [content]
    for call in calls:
        is_call = isinstance(call, dict) and isinstance(call.get("name"), str)
        if not is_call or not isinstance(call.get("arguments"), dict):
            raise ValueError('JSON, but not a list of {"name": ..., "arguments": {...}}')
    return [(call["name"], call["arguments"]) for call in calls]


# -------------------------------------------------------------------------------------------------
# Python: a list of calls with keyword arguments

def python_calls(text: str) -> list[tuple[str, dict]]:
    """The calls of a Python list. Positional arguments are ignored, as upstream ignores them."""
    body = ast.parse(text, mode="eval").body
    if not isinstance(body, ast.List) or not all(isinstance(e, ast.Call) for e in body.elts):
        raise ValueError("not a list of calls")
    return [python_call(call) for call in body.elts]


def python_call(call: ast.Call) -> tuple[str, dict]:
    """(name, {argument: value}) of one parsed call; the name of a.b.c(x=1) is "a.b.c"."""
    names = []
    node = call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    return ".".join(reversed(names)), {k.arg: python_value(k.value) for k in call.keywords}


def python_value(node):
    """The value of a parsed argument; a name or a call without keywords stands for its own text."""
    match node:
        case ast.Constant():
            return "..." if node.value is ... else node.value
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value          # as upstream, whatever the sign: +5 is -5
        case ast.BinOp():
            return arithmetic(node)
        case ast.List():
            return [python_value(e) for e in node.elts]
        case ast.Tuple():
            return tuple(python_value(e) for e in node.elts)
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {python_value(key): python_value(value) for key, value in pairs}
        case ast.Name():
            return node.id
        case ast.Call():
            return dict([python_call(node)]) if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise ValueError(f"no value: {type(node).__name__}")


ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}


def arithmetic(node):
    """The result of arithmetic on numbers, or of adding strings."""
    match node:
        case ast.Constant(value=int() | float() | str()):
            return node.value
        case ast.UnaryOp():
            return ARITHMETIC[type(node.op)](arithmetic(node.operand))
        case ast.BinOp():
            left = arithmetic(node.left)
            right = arithmetic(node.right)
            if str in (type(left), type(right)) and not isinstance(node.op, ast.Add):
                raise ValueError("arithmetic on a string")
            is_power = isinstance(node.op, ast.Pow) and isinstance(left, int)
            if is_power and left.bit_length() * right > 4096:
                raise ValueError("a power too large")
            result = ARITHMETIC[type(node.op)](left, right)
            if isinstance(result, int) and result.bit_length() > 2**16:     # more than any literal
                raise ValueError("a number too large")
            return result
    raise ValueError("arithmetic on names or calls")


# -------------------------------------------------------------------------------------------------
# Java and JavaScript: one call whose arguments are assignments. Upstream uses tree-sitter; here the
# text is cut into tokens and arguments, and values that tree-sitter would refuse are refused.

class Token(NamedTuple):
    kind: str       # "string", "number", "word" or "sign"; white space and comments are left out
    text: str
    start: int      # place in the source text
    end: int


SCRIPT_TOKEN = re.compile(r"""
      (?P<space>  (?: \s | //[^\n]* | /\*.*?\*/ )+ )
    | (?P<string> "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\\n])*' | `[^`]*` )
    | (?P<number> (?: \d[\d_]*(?:\.\d*)? | \.\d+ )(?: [eE][+-]?\d+ )? )
    | (?P<word>   [^\W\d][\w$]* | \$[\w$]* )
    | (?P<sign>   :: | => | -> | [=!<>]=+ | \+\+ | -- | \.\.\. | [-+*/%=<>!&|^~?:;,.(){}\[\]] )
    """, re.S | re.X)
REGEX_LITERAL = re.compile(r"(?P<string>/[^/*\s][^/\n]*/[a-z]*)")       # JavaScript's /.../g
NUMBER_SUFFIX = {"java": re.compile("[lLfFdD]"), "javascript": re.compile("n")}
TYPE_PARAMETERS = re.compile(r"<[\w\s,.?<>]{0,500}>")                   # of new HashMap<K, V>

DOTTED_NAME = re.compile(r"[^\W\d][\w$]*(?:\.[^\W\d][\w$]*)*")
FENCE_LANGUAGE = re.compile(r"[a-z]+(\s+)")                             # the rest of ```javascript
CLOSING = {"(": ")", "[": "]", "{": "}"}

RESERVED = {"javascript": {
    "break", "case", "catch", "class", "const", "continue", "do", "else", "enum", "export",
    "extends", "finally", "for", "if", "import", "switch", "throw", "try", "while", "with"}}
RESERVED["java"] = RESERVED["javascript"] | {
    "boolean", "byte", "char", "double", "float", "int", "long", "short",
    "package", "private", "public", "static"}
BEFORE_OPERAND = {"new", "instanceof", "typeof", "await", "async", "function", "return", "const",
                  "let", "var", "in", "of"}


def script_call(text: str, language: str) -> list[tuple[str, dict]]:
    """The one call `name(argument=value, ...)` of a text; statements after it are not looked at."""
    tokens = tokenize(text, language)
    texts = [token.text for token in tokens]
    if "(" not in texts:
        raise ValueError("not a call of a named function")
    head = texts.index("(")
    name = call_name(text[:tokens[head].start].strip(), language)

    arguments = {}
    pieces = split_arguments(tokens[head + 1:])
    for piece in pieces:
        if not piece and (language == "javascript" or len(pieces) == 1):
            continue                # f(), or JavaScript's f(x=1,)
        argument, expression = split_assignment(piece)
        check_expression(expression, language)
        if argument is None and (len(piece) > 1 or piece[0].kind != "word"):
            continue                # as upstream: positional values are ignored, except for names
        if argument in arguments:
            raise ValueError(f"{argument} is given twice")
        if language == "java":
            arguments[argument] = java_source(expression, text)
        else:
            arguments[argument] = unquote(text[expression[0].start:expression[-1].end])
    return [(name, arguments)]


def call_name(text: str, language: str) -> str:
    """The function's name in the text before its bracket. Raises ValueError for any other text."""
    fence = FENCE_LANGUAGE.match(text) if language == "javascript" else None
    if fence and "\n" in fence[1]:
        text = text[fence.end():]
    if not DOTTED_NAME.fullmatch(text):
        raise ValueError("not a call of a named function")
    return text


def tokenize(text: str, language: str) -> list[Token]:
    """The tokens of a text. Raises ValueError at the first character that begins none."""
    tokens = []
    position = 0
    while position < len(text):
        previous = tokens[-1].text if tokens else None
        found = SCRIPT_TOKEN.match(text, position)
        if language == "javascript" and previous in tuple("=([{,:"):
            found = REGEX_LITERAL.match(text, position) or found
        if not found or is_foreign_string(found[0], language):
            raise ValueError(f"{text[position]!r} at character {position}")
        kind = found.lastgroup
        position = found.end()

        rest = None
        if kind == "number":
            rest = NUMBER_SUFFIX[language].match(text, position)
        elif kind == "word" and language == "java" and previous == "new":
            rest = TYPE_PARAMETERS.match(text, position)
        if rest:
            position = rest.end()
        if kind != "space":
            tokens.append(Token(kind, text[found.start():position], found.start(), position))
    return tokens


def is_foreign_string(token: str, language: str) -> bool:
    """A string that only the other of the two languages has."""
    if language == "java":
        return token[0] == "`"
    return token[0] == '"' and "\n" in token


def split_arguments(tokens: list[Token]) -> list[list[Token]]:
    """The tokens after a call's opening bracket, up to its closing one, cut at the commas."""
    pieces = [[]]
    opened = ["("]
    for i, token in enumerate(tokens):
        if token.text in CLOSING:
            opened.append(token.text)
        elif token.text in CLOSING.values() and token.text != CLOSING[opened.pop()]:
            raise ValueError(f"{token.text!r} closes nothing")
        if not opened:
            after = tokens[i + 1:i + 2]
            if after and after[0].text != ";":
                raise ValueError("text after the call")
            return pieces
        if token.text == "," and len(opened) == 1:
            pieces.append([])
        else:
            pieces[-1].append(token)
    raise ValueError("a bracket is not closed")


def split_assignment(piece: list[Token]) -> tuple[str | None, list[Token]]:
    """(argument, expression) of the tokens of one argument; the name is None if it has none."""
    argument = None
    expression = piece
    if len(piece) > 1 and piece[0].kind == "word" and piece[1].text == "=":
        argument = piece[0].text
        expression = piece[2:]
    has_equals = any(token.text == "=" for token in piece)
    if not expression or (argument is None and has_equals):
        raise ValueError("an argument without a name or a value")
    return argument, expression


def check_expression(tokens: list[Token], language: str) -> None:
    """Raise ValueError for what no parser takes as a value, such as `1 2` or `* 3`."""
    first = tokens[0].text
    if len(tokens) == 1 and first in RESERVED[language]:
        raise ValueError(f"{first} is no value")
    conditional = any(token.text == "?" for token in tokens)
    depth = 0                                           # of ( and {, where statements may stand
    before = Token("sign", "=", 0, 0)
    for token in tokens:
        last = before.text
        word = token.text

        # two operands side by side
        kinds = {before.kind, token.kind}
        juxtaposed = "sign" not in kinds and not BEFORE_OPERAND & {last, word}
        if juxtaposed and (depth == 0 or kinds & {"string", "number"}):
            raise ValueError(f"{last:.40} {word:.40} without an operator")

        # punctuation that belongs in a block or an object
        stray_colon = word == ":" and not conditional and (language == "java" or depth == 0)
        if stray_colon or (word == ";" and depth == 0):
            raise ValueError(f"{word!r} in a value that is not quoted")
        if language == "java":
            array = word == "[" and last in tuple("=(,[{")
            block = word == "{" and last not in (")", "]", ">", "{", ",", "->")
            if array or block:
                raise ValueError(f"{word!r} begins no value in Java")

        # an operator without its left operand
        if last in tuple("=([{,") and word in tuple("*/%.&|?:<>=^"):
            raise ValueError(f"nothing before {word!r}")
        depth += (word in ("(", "{")) - (word in (")", "}"))
        before = token
    if before.text in tuple("+-*/%.=&|?:<>!^~"):
        raise ValueError(f"nothing after {before.text!r}")


def java_source(tokens: list[Token], text: str) -> str:
    """A Java value's source text as upstream rebuilds it from the syntax tree.

    A string loses its quotes. Only calls of methods keep their spaces. The class body in
    `new T() {...}` is left out, so a map that is filled there counts as empty.
    """
    if len(tokens) == 1 and tokens[0].kind == "string":
        return tokens[0].text[1:-1]
    source = ""
    body_depth = 0                  # > 0 inside a class body
    call_depth = 0                  # > 0 inside a method's arguments
    is_new = False                  # between `new` and its parenthesis
    before = Token("", "", 0, 0)
    for token in tokens:
        word = token.text
        if word == "{" and not call_depth and (body_depth or before.text == ")"):
            body_depth += 1
        opens_call = before.kind == "word" and not is_new
        if word == "(" and not body_depth and (call_depth or opens_call):
            call_depth += 1

        if call_depth:
            source += text[before.end:token.end]
        elif not body_depth:
            source += source_word(token)

        if word == "}" and body_depth:
            body_depth -= 1
        if word == ")" and call_depth:
            call_depth -= 1
        is_new = word == "new" or (is_new and word != "(")
        before = token
    return source


def source_word(token: Token) -> str:
    if token.text == "new":
        return "new "
    return re.sub(r"\s", "", token.text) if token.kind == "word" else token.text


def unquote(text: str) -> str:
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted else text
