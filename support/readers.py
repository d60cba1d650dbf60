"""Samples, and the formats they come in: APIGen, ToolBench, ShareGPT, messages, and the toy."""
import itertools
import json
import re
from dataclasses import dataclass, field

from support.cli import DataError
from support.records import read_object as read_object  # these two are public here
from support.records import read_records as read_records
from support.records import reading
from toy.task import toy_records

LONGEST_SAMPLE = 2**24      # characters of its record; no model reads four million tokens


@dataclass
class Message:
    role: str                       # "system", "user", "assistant" or "tool"
    text: str
    role_spans: list | None = None  # true roles, if known: (text, role) pairs that make up `text`
    scored: bool = True             # an assistant turn with scored=False is context, not output
    # The same turn as a model's own chat template takes it, where role and text do not say it all:
    # with tool_calls, say. {} where that template writes it itself, as it does the list of tools.
    turn: dict | None = field(default=None, compare=False)

    @property
    def is_output(self) -> bool:
        return self.role == "assistant" and self.scored


@dataclass
class Sample:
    id: str
    messages: list[Message]
    tools: list | None = None       # for a model's own chat template


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

# What an output token can be: chosen from the input, fixed by the format, connecting the two, or a
# boundary: it ends a name or value, or decides whether another follows. A boundary depends on the
# input in part, so that calling it reasoning or boilerplate is neither right nor wrong.
SPAN_ROLES = ("reasoning", "format", "connecting", "boundary")

TOOL_PROMPT = ('You can call these functions:\n{}\nAnswer with a JSON list of calls: '
               '[{{"name": "...", "arguments": {{...}}}}]')


# --------------------------------------------------------------------------------------------------
# From a name to samples

def read_samples(path_or_name: str, native_calls: bool = False) -> list[Sample]:
    """The samples of a JSON or JSON Lines file, or of "toy", which has 4,000.

    The format is recognised from each record. A slice may follow the name, as in
    "train.json[:300]" or "toy[100:200]". native_calls: APIGen's and ShareGPT's calls become tool
    calls for the model's own chat template; else they are text. Raises DataError, naming the file
    and the record, for a record in no known format or with nothing to learn from.
    """
    return list(stream_samples(path_or_name, native_calls=native_calls))


def stream_samples(path_or_name: str, progress: bool = False, native_calls: bool = False):
    """Yield what read_samples returns, holding little more than one sample in memory."""
    name, first, last = split_slice(path_or_name)
    if name == "toy":
        samples = toy_samples(4000, seed=0)
    else:
        samples = parse_samples(name, progress, native_calls)
    empty = True
    for sample in itertools.islice(samples, first, last):
        empty = False
        yield sample
    if empty:
        verb = "holds" if name == path_or_name else "selects"
        raise DataError(f"{path_or_name} {verb} no samples.")


def split_slice(path_or_name: str) -> tuple[str, int, int | None]:
    """("train.json", 0, 300) of "train.json[:300]"."""
    sliced = re.fullmatch(r"(.+)\[(\d{0,18}):(\d{0,18})\]", path_or_name)
    if not sliced:
        return path_or_name, 0, None
    name, first, last = sliced.groups()
    return name, int(first or 0), int(last) if last else None


def toy_samples(count: int, seed: int, held_out: bool = False) -> list[Sample]:
    """Samples of the toy: see toy/task.py."""
    records = toy_records(count, seed, held_out)
    return [read_record(record, index) for index, record in enumerate(records)]


def parse_samples(path: str, progress: bool, native_calls: bool):
    """Yield the sample of each record of a file."""
    records = read_records(path, progress, LONGEST_SAMPLE)
    for index, (where, record) in enumerate(records):
        with reading(where, "fix or remove the record"):
            sample = read_record(record, index, native_calls)
        if not any(message.is_output and message.text for message in sample.messages):
            raise DataError(f"{where} has no assistant turn, so there is nothing to learn from it; "
                            "remove the record.")
        yield sample


# --------------------------------------------------------------------------------------------------
# From a record to a sample

def read_record(record: dict, index: int, native_calls: bool = False) -> Sample:
    """One record of any known format. Raises DataError, or whatever else goes wrong in a broken
    record: see `reading`."""
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__} where an object was expected.")
    name = str(record.get("id", index))
    if native_calls:
        record = with_native_calls(record)
    tools = None
    if "query" in record and "answers" in record:
        messages = apigen_messages(record)
    elif "conversations" in record:
        messages = conversation_messages(record)
    elif "messages" in record:
        messages = chat_messages(record)
        tools = parsed(record.get("tools")) or None
    else:
        keys = ", ".join(map(str, record))[:80]
        raise DataError(f"unknown format (keys: {keys}); expected APIGen's query/answers/tools, "
                        "ToolBench's or ShareGPT's conversations, or messages.")
    for message in messages:
        if not isinstance(message.text, str):
            kind = type(message.text).__name__
            raise DataError(f"the {message.role}'s text is of type {kind}, not a string.")
    sample = Sample(name, messages, tools)
    check_characters(sample)
    return sample


def check_characters(sample: Sample) -> None:
    """Raise UnicodeEncodeError for half a surrogate pair, which no tokenizer can encode."""
    sample.id.encode()
    for message in sample.messages:
        message.text.encode()
        if message.turn:
            json.dumps(message.turn, ensure_ascii=False).encode()
    if sample.tools:
        json.dumps(sample.tools, ensure_ascii=False).encode()


def apigen_messages(record: dict) -> list[Message]:
    """APIGen, also known as xlam-function-calling-60k: one query, answered by a list of calls."""
    for key in ("tools", "answers"):
        if record[key] is None:
            raise DataError(f"{key} is null; fix or remove the record.")
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
        # ToolBench's texts begin with "\n", which its own prompts leave out.
        messages.append(Message(known_role(turn["from"]), turn["value"].strip("\n")))

    # ToolBench also comes as one record per step, where only the last turn is new.
    if re.match(r"Step \d+:", str(record.get("id"))):
        for message in messages[:-1]:
            message.scored = False
    return messages


def known_role(speaker: str) -> str:
    if speaker not in ROLES:
        raise DataError(f"unknown role {speaker!r}; known are {', '.join(ROLES)}.")
    return ROLES[speaker]


def chat_messages(record: dict) -> list[Message]:
    """Messages, the chat format of OpenAI and TRL; "parts" may give a turn's true token roles."""
    messages = []
    for turn in record["messages"]:
        turn = {key: value for key, value in turn.items() if value is not None}
        turn["role"] = known_role(turn["role"])
        text = content_text(turn.get("content", ""))
        if "content" in turn:
            turn["content"] = text
        if turn.get("tool_calls"):
            turn["tool_calls"] = parsed_calls(turn["tool_calls"])
            text += calls_as_text(turn["tool_calls"])
        spans = annotated_spans(turn.pop("parts", None), text)
        says_more = turn.keys() - {"role", "content"}
        messages.append(Message(turn["role"], text, spans, turn=turn if says_more else None))

    if record.get("tools"):
        tool_prompt = TOOL_PROMPT.format(as_json(record["tools"]))
        system = Message("system", tool_prompt, turn={})
        if messages and messages[0].role == "system":
            own = messages.pop(0)
            system.text = own.text + "\n\n" + tool_prompt
            system.turn = own.turn or {"role": "system", "content": own.text}
        messages.insert(0, system)
    return messages


def content_text(content) -> str:
    """The text of a turn's content, which OpenAI also writes as a list of parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if part["type"] != "text":
            raise DataError(f"a content list has a part of type {part['type']!r}; "
                            "only text parts can be used.")
    return "".join(part["text"] for part in content)


def parsed_calls(tool_calls: list) -> list:
    """Tool calls whose arguments are objects; OpenAI writes them as JSON text."""
    calls = []
    for call in tool_calls:
        function = call.get("function", call)
        function = function | {"arguments": parsed(function["arguments"])}
        calls.append(call | {"function": function} if "function" in call else function)
    return calls


def calls_as_text(tool_calls: list) -> str:
    """Tool calls as the JSON list that TOOL_PROMPT asks for."""
    calls = []
    for call in tool_calls:
        function = call.get("function", call)
        calls.append({"name": function["name"], "arguments": function["arguments"]})
    return json.dumps(calls, ensure_ascii=False)


def annotated_spans(parts: list | None, text: str) -> list[tuple[str, str]] | None:
    """The true roles that a turn's "parts" give, checked against its text."""
    if parts is None:
        return None
    spans = [(part, role) for part, role in parts]
    for _, role in spans:
        if role not in SPAN_ROLES:
            raise DataError(f"a part has the unknown role {role!r}; known are "
                            f"{', '.join(SPAN_ROLES)}.")
    if "".join(part for part, _ in spans) != text:
        raise DataError("the parts of a turn do not concatenate to its content.")
    return spans


# --------------------------------------------------------------------------------------------------
# Calls, as text and as tool calls

def with_native_calls(record: dict) -> dict:
    """A record of APIGen, or of ShareGPT with calls, in the chat format of OpenAI."""
    if "query" in record and "answers" in record:
        turns = [{"from": "user", "value": record["query"]},
                 {"from": "function_call", "value": record["answers"]}]
    else:
        turns = record.get("conversations", [])
    if not any(turn["from"] == "function_call" for turn in turns):
        return record

    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    count = 0
    unanswered = []                                     # ids of calls
    for turn in turns:
        message = {"role": known_role(turn["from"]), "content": turn["value"]}
        if turn["from"] == "function_call":
            calls = parsed(turn["value"])
            if isinstance(calls, dict):
                calls = [calls]
            ids = [f"call{count + i:05}" for i in range(len(calls))]    # Mistral: 9 characters
            count += len(ids)
            unanswered += ids
            message["content"] = ""
            message["tool_calls"] = [as_tool_call(*pair) for pair in zip(ids, calls, strict=True)]
        elif message["role"] == "tool" and unanswered:
            message["tool_call_id"] = unanswered.pop(0)
        messages.append(message)
    tools = [as_tool(tool) for tool in parsed(record.get("tools") or [])]
    return {"messages": messages, "tools": tools}


def as_tool_call(name: str, call: dict) -> dict:
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"id": name, "type": "function", "function": function}


def as_tool(tool: dict) -> dict:
    return tool if "function" in tool else {"type": "function", "function": tool}


def parsed(value):
    """The inverse of as_json: the value of a JSON string, or a value that is no string."""
    return json.loads(value) if isinstance(value, str) else value


def as_json(value) -> str:
    """Tools and calls come as JSON strings, or already parsed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+|\s+')


def call_spans(text: str) -> list[tuple[str, str]] | None:
    """The token roles of a JSON list of calls, read off its structure: (text, role) pairs.

    Function names, argument names and values are reasoning; fixed keys ("name", "arguments") and
    punctuation that opens something are format. Boundary is what ends a name or value (its closing
    quote), goes on or closes (, } ]), or tells a number from a string (the white space before it).
    The texts concatenate to `text`; None where a string never ends.
    """
    spans = []
    depth = 0
    position = 0
    previous = None
    for match in JSON_TOKEN.finditer(text):
        token = match[0]
        if match.start() != position:
            return None                 # at an open string, which is no token
        position = match.end()
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
            spans.append(('"', "format" if is_fixed else "boundary"))
        elif token.isspace():
            before_number = text[position:position + 1] not in ('"', *"{}[]", "")
            spans.append((token, "boundary" if before_number else "format"))
        elif token in "{}[]:,":
            spans.append((token, "format" if token in "{[:" else "boundary"))
        else:
            spans.append((token, "reasoning"))
        if not token.isspace():
            previous = token
    if position != len(text):
        return None
    return [(part, role) for part, role in spans if part]
