"""Samples, and the formats they come in: APIGen, ToolBench, ShareGPT, messages, and the toy."""
import itertools
import json
import os
import re
from dataclasses import dataclass

from tqdm import tqdm

from support.cli import DataError
from toy.task import toy_records


@dataclass
class Message:
    role: str                       # "system", "user", "assistant" or "tool"
    text: str
    role_spans: list | None = None  # true roles, if known: (text, role) pairs that make up `text`
    scored: bool = True             # an assistant turn with scored=False is context, not output

    @property
    def is_output(self) -> bool:
        return self.role == "assistant" and self.scored


@dataclass
class Sample:
    id: str
    messages: list[Message]


# What the formats call a speaker, and the role it has here.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool": "tool",
}

# What an output token can be: chosen from the input, fixed by the format, or connecting the two.
SPAN_ROLES = ("reasoning", "format", "connecting")

TOOL_PROMPT = ('You can call these functions:\n{}\nAnswer with a JSON list of calls: '
               '[{{"name": "...", "arguments": {{...}}}}]')


# --------------------------------------------------------------------------------------------------
# From a name to samples

def read_samples(path_or_name: str) -> list[Sample]:
    """The samples of a JSON or JSON Lines file, or of "toy", which has 4,000.

    The format is recognised from each record. A slice may follow the name, as in
    "train.json[:300]" or "toy[100:200]". Raises DataError, naming the file and the record, for a
    record in no known format or with nothing to learn from.
    """
    return list(stream_samples(path_or_name))


def stream_samples(path_or_name: str, progress: bool = False):
    """Yield what read_samples returns, holding little more than one sample in memory."""
    name, first, last = split_slice(path_or_name)
    samples = toy_samples(4000, seed=0) if name == "toy" else parse_samples(name, progress)
    empty = True
    for sample in itertools.islice(samples, first, last):
        empty = False
        yield sample
    if empty:
        verb = "holds" if name == path_or_name else "selects"
        raise DataError(f"{path_or_name} {verb} no samples.")


def split_slice(path_or_name: str) -> tuple[str, int, int | None]:
    """("train.json", 0, 300) of "train.json[:300]"."""
    sliced = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", path_or_name)
    if not sliced:
        return path_or_name, 0, None
    name, first, last = sliced.groups()
    return name, int(first or 0), int(last) if last else None


def toy_samples(count: int, seed: int, held_out: bool = False) -> list[Sample]:
    """Samples of the toy: see toy/task.py."""
    records = toy_records(count, seed, held_out)
    return [read_record(record, index) for index, record in enumerate(records)]


def parse_samples(path: str, progress: bool):
    """Yield the sample of each record of a file."""
    for index, (where, record) in enumerate(read_records(path, progress)):
        try:
            sample = read_record(record, index)
        except DataError as e:
            raise DataError(f"{where}: {e}") from None
        except KeyError as e:
            raise DataError(f"{where} lacks {e}, which its format has; "
                            "fix or remove the record.") from None
        except (TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{where} does not follow its format ({e}); "
                            "fix or remove the record.") from None
        if not any(message.is_output and message.text for message in sample.messages):
            raise DataError(f"{where} has no assistant turn, so there is nothing to learn from it; "
                            "remove the record.")
        yield sample


# --------------------------------------------------------------------------------------------------
# From a record to a sample

def read_record(record: dict, index: int) -> Sample:
    """One record of any known format. Raises DataError, KeyError, TypeError, AttributeError or
    ValueError for an unknown or broken one."""
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__} where an object was expected.")
    if "query" in record and "answers" in record:
        messages = apigen_messages(record)
    elif "conversations" in record:
        messages = conversation_messages(record)
    elif "messages" in record:
        messages = chat_messages(record)
    else:
        keys = ", ".join(map(str, record))[:80]
        raise DataError(f"unknown format (keys: {keys}); expected APIGen's query/answers/tools, "
                        "ToolBench's or ShareGPT's conversations, or messages.")
    for message in messages:
        if not isinstance(message.text, str):
            kind = type(message.text).__name__
            raise DataError(f"a {message.role} text is a {kind}, not a string.")
    return Sample(str(record.get("id", index)), messages)


def apigen_messages(record: dict) -> list[Message]:
    """APIGen, also known as xlam-function-calling-60k: one query, answered by a list of calls."""
    tools = as_json(record["tools"])
    answers = as_json(record["answers"])
    return [
        Message("system", TOOL_PROMPT.format(tools)),
        Message("user", record["query"]),
        Message("assistant", answers, call_spans(answers)),
    ]


def conversation_messages(record: dict) -> list[Message]:
    """ToolBench and ShareGPT, with or without ShareGPT's tools."""
    system = []
    if record.get("system"):
        system.append(record["system"])
    if record.get("tools") not in (None, "", "[]", []):
        system.append(TOOL_PROMPT.format(as_json(record["tools"])))

    messages = []
    if system:
        messages.append(Message("system", "\n\n".join(system)))
    for turn in record["conversations"]:
        if turn["from"] not in ROLES:
            raise DataError(f"unknown speaker {turn['from']!r}; known are {', '.join(ROLES)}.")
        # ToolBench's texts begin with "\n", which its own prompts leave out.
        messages.append(Message(ROLES[turn["from"]], turn["value"].strip("\n")))

    # ToolBench also comes as one record per step, where only the last turn is new.
    if re.match(r"Step \d+:", str(record.get("id"))):
        for message in messages[:-1]:
            message.scored = False
    return messages


def chat_messages(record: dict) -> list[Message]:
    """Messages, the chat format of OpenAI and TRL; "parts" may give a turn's true token roles."""
    messages = []
    for turn in record["messages"]:
        if turn["role"] not in ROLES:
            raise DataError(f"unknown role {turn['role']!r}; known are {', '.join(ROLES)}.")
        text = turn.get("content") or ""
        if turn.get("tool_calls"):
            text += calls_as_text(turn["tool_calls"])
        messages.append(Message(ROLES[turn["role"]], text, annotated_spans(turn, text)))

    if record.get("tools"):
        tool_prompt = TOOL_PROMPT.format(as_json(record["tools"]))
        if messages[0].role == "system":
            tool_prompt = messages.pop(0).text + "\n\n" + tool_prompt
        messages.insert(0, Message("system", tool_prompt))
    return messages


def calls_as_text(tool_calls: list) -> str:
    """OpenAI's tool calls as the JSON list that TOOL_PROMPT asks for."""
    calls = []
    for call in tool_calls:
        function = call.get("function", call)
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        calls.append({"name": function["name"], "arguments": arguments})
    return json.dumps(calls, ensure_ascii=False)


def annotated_spans(turn: dict, text: str) -> list[tuple[str, str]] | None:
    """The true roles that a turn's "parts" give, checked against its text."""
    if turn.get("parts") is None:
        return None
    spans = [(part, role) for part, role in turn["parts"]]
    for _, role in spans:
        if role not in SPAN_ROLES:
            raise DataError(f"a part has the unknown role {role!r}; known are "
                            f"{', '.join(SPAN_ROLES)}.")
    if "".join(part for part, _ in spans) != text:
        raise DataError("the parts of a turn do not concatenate to its content.")
    return spans


def as_json(value) -> str:
    """Tools and calls come as JSON strings, or already parsed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+|\s+')


def call_spans(text: str) -> list[tuple[str, str]] | None:
    """The token roles of a JSON list of calls, read off its structure: (text, role) pairs.

    Function names, argument names and values are reasoning; fixed keys ("name", "arguments") and
    punctuation are format. The texts concatenate to `text`; None where it is not valid JSON.
    """
    spans = []
    depth = 0
    previous = None
    for token in JSON_TOKEN.findall(text):
        if token in "{[":
            depth += 1
        elif token in "}]":
            depth -= 1
        if token.startswith('"'):
            # Depth 2 is a call's own object, as in [{"name": ...}]. Its keys are fixed; its
            # values, and everything deeper, are what the model chooses.
            is_key = depth == 2 and previous != ":"
            is_fixed = is_key and token in ('"name"', '"arguments"')
            spans.append(('"', "format"))
            spans.append((token[1:-1], "format" if is_fixed else "reasoning"))
            spans.append(('"', "format"))
        else:
            is_format = token in "{}[]:," or token.isspace()
            spans.append((token, "format" if is_format else "reasoning"))
        if not token.isspace():
            previous = token

    spans = [(part, role) for part, role in spans if part]
    if "".join(part for part, _ in spans) != text:
        return None
    return spans


# --------------------------------------------------------------------------------------------------
# From a file to records

def read_object(path: str) -> dict:
    """The one JSON object that a file holds."""
    content = next((record for _, record in read_records(path)), None)
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold one JSON object; fetch the benchmark's file again.")
    return content


def read_records(path: str, progress: bool = False):
    """Yield (where, record) of a JSON list or a JSON Lines file of any size, holding little more
    than one record in memory."""
    try:
        with (
            open(path, encoding="utf-8-sig") as file,
            tqdm(desc=f"read {path}", total=os.path.getsize(path), unit="B", unit_scale=True,
                 disable=not progress, delay=1) as bar,
        ):
            head = file.read(2**16).lstrip()
            file.seek(0)
            if head.startswith("["):
                for number, record in enumerate(list_elements(file, bar), 1):
                    yield f"{path}, record {number}", record
            elif head.split("\n")[0].strip() == "{":    # a single record over several lines
                yield f"{path}, record 1", json.load(file)
            else:
                for number, record in json_lines(file, bar):
                    yield f"{path}, line {number}", record
    except UnicodeDecodeError:
        raise DataError(f"{path} cannot be read (not UTF-8 text).") from None
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror}).") from None
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {e.lineno}: not JSON ({e.msg}); "
                        "fix the line, or export the file again.") from None


def json_lines(file, bar):
    """Yield (line number, record) of JSON Lines; a JSONDecodeError has the line of the file."""
    for number, line in enumerate(file, 1):
        bar.update(len(line))
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as e:
            e.lineno = number
            raise


SEPARATOR = re.compile(r"\s*([\[,\]]?)\s*")
LIST_END = object()


def list_elements(file, bar):
    """Yield the elements of one JSON list, read a megabyte at a time.

    A JSONDecodeError has the line of the file.
    """
    text = ""               # what is held of the file ...
    line = 1                # ... from this line on ...
    position = 0            # ... and yielded up to here
    expected = "["          # what stands before the next element
    file_ended = False
    while True:
        try:
            element, end = next_element(text, position, expected)
            is_complete = end < len(text) or element is LIST_END    # 12 may go on as 123
        except json.JSONDecodeError as e:
            # Held text that is cut off breaks in an open string, or within the few characters of
            # an escape or a literal before its end.
            is_complete = e.pos <= len(text) - 16 and not e.msg.startswith("Unterminated")
            if is_complete or file_ended:
                e.lineno = line + text.count("\n", 0, e.pos)
                raise
        if is_complete or file_ended:
            if element is LIST_END:
                return
            yield element
            position = end
            expected = ","
        else:
            chunk = file.read(max(2**20, len(text) - position))
            bar.update(len(chunk))
            file_ended = not chunk
            line += text.count("\n", 0, position)
            text = text[position:] + chunk
            position = 0


def next_element(text: str, position: int, expected: str):
    """(element, its end) of the JSON list that `text` holds from `position` on; LIST_END, too."""
    separator = SEPARATOR.match(text, position)
    mark = separator[1]
    start = separator.end()
    is_empty_list = expected == "[" and mark == "[" and text.startswith("]", start)
    if mark == "]" or is_empty_list:
        return LIST_END, start
    if mark != expected:
        raise json.JSONDecodeError(f"Expecting {expected!r} delimiter", text, start)
    return json.JSONDecoder().raw_decode(text, start)
