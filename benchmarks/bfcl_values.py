"""Is an argument's value among BFCL's accepted ones? Java and JavaScript values are read first."""
import re

from benchmarks.bfcl_calls import unquote

# The type names in each language's documents, and the Python type that such a value is read as.
TYPES = {
    "python": {"string": str, "any": str, "integer": int, "float": float, "boolean": bool,
               "array": list, "tuple": list, "dict": dict},
    "java": {"String": str, "char": str, "any": str, "byte": int, "short": int, "integer": int,
             "long": int, "float": float, "double": float, "boolean": bool,
             "Array": list, "ArrayList": list, "HashMap": dict},
    "javascript": {"String": str, "any": str, "integer": int, "Bigint": int, "float": float,
                   "Boolean": bool, "array": list, "dict": dict},
}
LISTS = ("array", "tuple", "Array", "ArrayList")        # their documents name an element type


def check_value(value, document: dict, accepted: list, language: str) -> str | None:
    """Why one argument's value is wrong, as the end of a sentence, or None.

    document: the argument's own, with its "type". Types are compared exactly, but the type of the
    accepted values will do as well: this is how the data write the name of a variable.
    """
    type_name = document["type"]
    element_name = document["items"]["type"] if type_name in LISTS else None
    types = TYPES[language]
    expected = types[type_name]
    element_type = types[element_name] if element_name else None

    if language != "python":
        if type(value) is not str:
            return f": {language} values are written as strings"
        convert = java_value if language == "java" else javascript_value
        value = convert(value, type_name, element_name)
    elif type_name == "tuple" and type(value) is tuple:
        value = list(value)
    elif type_name == "float" and type(value) is int:
        value = float(value)

    accepted_type = type_of(accepted)
    if type(value) is expected:
        fits = element_type is None or elements_fit(value, accepted, element_type)
        is_variable = accepted_type not in (None, expected)
    else:
        fits = type(value) is accepted_type
        is_variable = True
    if not fits:
        of_elements = f" of {element_name}" if element_name else ""
        return f" is not of type {type_name}{of_elements}"
    matches = value in accepted if is_variable else is_accepted(value, accepted, element_type)
    return None if matches else f" is not among {accepted!r:.200}"


def type_of(accepted: list) -> type | None:
    """The type that the accepted values have. "" is not one: it says "may be left out"."""
    return next((type(a) for a in accepted if a != ""), None)


def elements_fit(values: list, accepted: list, element_type: type) -> bool:
    """Has each element the document's element type, or that of one accepted list's elements?"""
    for option in accepted:
        if type(option) is not list:
            return True
        if all(type(v) in (element_type, type_of(option)) for v in values):
            return True
    return False


def is_accepted(value, accepted: list, element_type: type | None) -> bool:
    """Is a value of the right type among the accepted ones?"""
    if type(value) is dict:
        return any(a != "" and fields_match(value, a) for a in accepted)
    if element_type is dict:
        return any(dicts_match(value, a) for a in accepted)
    if type(value) is str:
        return normalize_text(value) in [normalize_text(a) for a in accepted if type(a) is str]
    if type(value) is list:
        return normalize_elements(value) in [normalize_elements(a) for a in accepted]
    return value in accepted


def fields_match(value: dict, alternatives: dict) -> bool:
    """Is each field among its alternatives, and may each missing one be left out?"""
    for key, field in value.items():
        if key not in alternatives:
            return False
        if normalize_text(field) not in normalize_elements(alternatives[key]):
            return False
    return all(key in value or "" in options for key, options in alternatives.items())


def dicts_match(values: list, accepted: list[dict]) -> bool:
    """The same for lists of dictionaries: equally many, in the same order."""
    if len(values) != len(accepted):
        return False
    for value, alternatives in zip(values, accepted, strict=True):
        if type(value) is not dict or alternatives == "" or not fields_match(value, alternatives):
            return False
    return True


def normalize_text(value):
    """Text without case, spaces and the punctuation ,./-_*^, with double quotes for single ones."""
    if type(value) is not str:
        return value
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"')


def normalize_elements(values) -> list:
    return [normalize_text(value) for value in values]


# -------------------------------------------------------------------------------------------------
# Java and JavaScript: from source text to values. Text that is not written as its type stays text.
# Upstream's patterns decide, in nested or unusual text too. Some take quadratic or cubic time; they
# are matched here in two steps with the same result, the head and then what follows it.

NUMBERS = {
    "java": {"byte": (int, ""), "short": (int, ""), "integer": (int, ""), "long": (int, "[lL]"),
             "float": (float, "[fF]"), "double": (float, "")},
    "javascript": {"integer": (int, ""), "Bigint": (int, "n"), "float": (float, "")},
}


def script_number(text: str, type_name: str, language: str):
    """A number written as a literal of its type: long 5L, float 1.5f, Bigint 5n."""
    number, suffix = NUMBERS[language][type_name]
    fraction = ""
    if number is float:
        fraction = r"(?:\.\d+)?"
        if language == "java":
            fraction += r"(?:[eE][+-]?\d+)?"
    m = re.match(rf"(-?\d+{fraction}){suffix}$", text)
    return number(m[1]) if m else text


def java_value(text: str, type_name: str, element_name: str | None = None):
    """A Java value from its source text."""
    if type_name in NUMBERS["java"]:
        return script_number(text, type_name, "java")
    if type_name == "boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "ArrayList":
        return java_list(text, element_name)
    if type_name == "Array":
        m = re.search(r"new\s+\w+\[\]\s*\{([^}\n]*)\}", text)
        if m:
            elements = [e.strip() for e in m[1].split(",")]
            return [java_value(e, element_name) for e in elements if e]
    if type_name == "HashMap":
        return java_map(text)
    return text


def java_list(text: str, element_name: str | None):
    """A list from new ArrayList<>(Arrays.asList(...)) or new ArrayList<>() {{ add(...); }}."""
    as_list = re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", text)
    if as_list:
        elements = as_list[1].split(",")
    else:
        head = re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{", text)
        end = text.find("}}", head.end() + 1) if head else -1
        if end < 0:
            return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text
        # a line without another ")" is skipped as a whole, which leaves an empty match
        adds = re.findall(r"add\((?:(.[^)\n]*)\)|.*)", text[head.end():end])
        elements = [element for element in adds if element]
    elements = [e.strip() for e in elements]
    if element_name in ("char", "String"):
        return [e[1:-1] for e in elements]
    return [java_value(e, element_name) for e in elements]


def java_map(text: str):
    """A dictionary from new HashMap<>() {{ put("key", value); }}."""
    head = re.search(r"new\s+HashMap<", text)
    if not head:
        return text
    after = text[head.end():]
    body = re.search(r">\s*\(\)\s*\{\s*\{?([^}]*)", after[:after.rfind("}") + 1])
    if body:
        return {key: untyped_value(value.strip(), "java") for key, value in put_calls(body[1])}
    return {} if re.search(r">\s*\(\)", after) else text


PUT_VALUE = re.compile(r'",\s*(?!\s)([^)\n]*)\)')


def put_calls(body: str) -> list[tuple[str, str]]:
    """[(key, value)] of each put("key", value): the matches of put\\("(.*?)",\\s*(.*?)\\).

    Only the first `",` of a line can end the key, or the last one if the value is on the next line.
    """
    found = []
    start = body.find('put("')
    while start >= 0:
        key_start = start + len('put("')
        line_end = body.find("\n", key_start)
        if line_end < 0:
            line_end = len(body)
        resume = line_end           # without a value here, no other put(" on this line has one
        for find in (body.find, body.rfind):
            key_end = find('",', key_start, line_end)
            value = PUT_VALUE.match(body, key_end) if key_end >= 0 else None
            if value:
                found.append((body[key_start:key_end], value[1]))
                resume = value.end()
                break
        start = body.find('put("', resume)
    return found


def javascript_value(text: str, type_name: str, element_name: str | None = None):
    """A JavaScript value from its source text."""
    if type_name in NUMBERS["javascript"]:
        return script_number(text, type_name, "javascript")
    if type_name == "Boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "String":
        return unquote(text)
    if type_name == "array":
        return javascript_array(text.strip(), element_name)
    if type_name == "dict":
        return javascript_object(text.strip())
    return text


def javascript_array(text: str, element_name: str | None):
    """A list from [...] or new Array(...), one level of rows included."""
    row = r"\[[^\]\n]*\]\s*"        # upstream's lets a row hold "]", and takes exponential time
    rows = rf"{row}(,\s*{row})*"
    m = re.match(rf"\[\s*{rows}\]|new\s+Array\(\s*{rows}\)", text)
    if m:
        matrix = []
        for content in re.findall(r"\[(.*?)\]", m[0]):
            elements = content.strip().removeprefix("[").split(",")
            matrix.append([untyped_value(e.strip(), "javascript") for e in elements])
        return matrix
    m = re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text)
    if not m:
        return text
    content = (m[1] if m[1] is not None else m[2]).strip()
    elements = [e.strip() for e in content.split(",")] if content else []
    if element_name:
        return [javascript_value(e, element_name) for e in elements]
    return [untyped_value(e, "javascript") for e in elements]


def javascript_object(text: str):
    """A dictionary from {key: value, ...}; it ends at the first }, so it holds no other."""
    m = re.match(r"\{(.*?)\}", text)
    if not m:
        return text
    fields = {}
    if ":" in m[1]:
        # A field ends at a comma that a key follows. The first lookahead already says so; it keeps
        # the spaces from being tried one by one.
        field = r"([^:]+):\s*(.*?)(?:,(?=[^,]+:)\s*(?=[^,]+:)|$)"
        for key, value in re.findall(field, m[1]):
            fields[key.strip().strip("'\"")] = javascript_field(value.strip())
    return fields


def javascript_field(text: str):
    if text.startswith("[") and text.endswith("]"):
        return javascript_array(text, None)
    return untyped_value(text.strip("'\"").strip(), "javascript")


def untyped_value(text: str, language: str):
    """The value of an element whose type no document names."""
    if text in ("true", "false"):
        return text == "true"
    if language == "javascript":
        if unquote(text) != text:
            return unquote(text)
        return untyped_number(text)

    if text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    m = re.match(r"(-?\d+)[lL]$", text)
    if m:
        return untyped_number(m[1])
    m = re.match(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[fF]$", text)
    return float(m[1]) if m else untyped_number(text)


def untyped_number(text: str):
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text
