"""Samples, and the file formats they come in: APIGen, ToolBench, ShareGPT, messages, and the toy."""
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
    parts: list | None = None       # where known, [(text, token role)] that concatenate to `text`: the truth SHAD is judged by
    scored: bool = True             # an assistant turn with scored=False is context, not output

    @property
    def is_output(self) -> bool:
        return self.role == "assistant" and self.scored


@dataclass
class Sample:
    id: str
    messages: list[Message]


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "function_call": "assistant", "function": "tool", "observation": "tool", "tool": "tool"}

TOOL_PROMPT = ('You can call these functions:\n{}\nAnswer with a JSON list of calls: '
               '[{{"name": "...", "arguments": {{...}}}}]')


def read_samples(path_or_name: str) -> list[Sample]:
    """The samples of a JSON or JSON Lines file, its format recognised from each record; or "toy" for 4,000 toy samples.

    A slice may follow, as in "train.json[:300]" or "toy[100:200]". Raises DataError, naming the file and the record, for what
    is in no known format or has nothing to learn from.
    """
    return list(stream_samples(path_or_name))


def split_slice(path_or_name: str) -> tuple[str, int, int | None]:
    """("train.json", 0, 300) of "train.json[:300]"."""
    sliced = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", path_or_name)
    return (sliced[1], int(sliced[2] or 0), int(sliced[3]) if sliced[3] else None) if sliced else (path_or_name, 0, None)


def stream_samples(path_or_name: str, progress: bool = False):
    """Yield what read_samples returns, holding little more than one sample at a time."""
    name, first, last = split_slice(path_or_name)
    empty = True
    for sample in itertools.islice(toy_samples(4000, seed=0) if name == "toy" else parse_samples(name, progress), first, last):
        empty = False
        yield sample
    if empty:
        raise DataError(f"{path_or_name} {'selects' if name != path_or_name else 'holds'} no samples.")


def toy_samples(count: int, seed: int, held_out: bool = False) -> list[Sample]:
    """Samples of the toy: see toy/task.py."""
    return [read_record(record, i) for i, record in enumerate(toy_records(count, seed, held_out))]


def parse_samples(path: str, progress: bool):
    for index, (where, record) in enumerate(read_records(path, progress)):
        try:
            sample = read_record(record, index)
        except DataError as e:
            raise DataError(f"{where}: {e}") from None
        except KeyError as e:
            raise DataError(f"{where} lacks {e} where its format has it; mend or remove the record.") from None
        except (TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{where} is not built as its format is ({e}); mend or remove the record.") from None
        if not any(m.is_output and m.text for m in sample.messages):
            raise DataError(f"{where} has no assistant turn, so there is nothing to learn from it; remove the record.")
        yield sample


def read_records(path: str, progress: bool = False):
    """Yield (where, record) of a JSON list or a JSON Lines file of any size, holding little more than one record."""
    line = 0
    try:
        with open(path, encoding="utf-8-sig") as f, tqdm(
                total=os.path.getsize(path), desc=f"read {path}", unit="B", unit_scale=True, disable=not progress, delay=1) as bar:
            head = f.read(2**16).lstrip()
            f.seek(0)
            if head[:1] == "[":
                for i, record in enumerate(list_elements(f, bar), 1):
                    yield f"{path}, record {i}", record
            elif head.split("\n")[0].strip() == "{":            # a single record over several lines
                yield f"{path}, record 1", json.load(f)
            else:
                for line, row in enumerate(f, 1):
                    bar.update(len(row))
                    if row.strip():
                        yield f"{path}, line {line}", json.loads(row)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8 text'}).") from None
    except json.JSONDecodeError as e:
        raise DataError(f"{path}, line {line or e.lineno}: not JSON ({e.msg}); mend the line, or export the file again.") from None


def list_elements(f, bar):
    """Yield the elements of one JSON list, read a megabyte at a time. Raises JSONDecodeError with the line of the file."""
    text, at, line, ended, opening = "", 0, 1, False, True      # `text` is what is held, from `line` on, used up to `at`

    def fail(message, position):
        e = json.JSONDecodeError(message, text, position)
        e.lineno = line + text.count("\n", 0, position)
        raise e

    while True:
        separator = re.compile(r"\s*([\[,\]]?)\s*").match(text, at)
        mark, start = separator[1], separator.end()
        more = start == len(text)                           # what is held ends here, but does the file?
        if not more:
            if mark == "]" or opening and mark == "[" and text[start] == "]":
                return
            if mark != ("[" if opening else ","):
                fail("Expecting ',' delimiter", start)
            try:
                element, end = json.JSONDecoder().raw_decode(text, start)
                more = end == len(text)                     # 12 may go on as 123
            except json.JSONDecodeError as e:
                # cut in a string, or at most a few characters before the end, in an escape or a literal
                more = e.msg.startswith("Unterminated") or e.pos > len(text) - 16
                if ended or not more:
                    fail(e.msg, e.pos)
        if more and not ended:
            piece = f.read(max(2**20, len(text) - at))
            bar.update(len(piece))
            line, text, at, ended = line + text.count("\n", 0, at), text[at:] + piece, 0, not piece
        elif start == len(text):                            # the file has ended
            if mark == "]":
                return
            fail("Expecting value" if mark else "Expecting ',' delimiter", start)
        else:
            yield element
            at, opening = end, False


def read_record(record: dict, index: int) -> Sample:
    """One record of any known format. Raises DataError, KeyError or TypeError for an unknown or broken one."""
    if not isinstance(record, dict):
        raise DataError(f"a {type(record).__name__} where an object was expected.")
    name, messages = str(record.get("id", index)), []
    if "query" in record and "answers" in record:                                   # APIGen / xlam-function-calling-60k
        tools, answers = as_json(record["tools"]), as_json(record["answers"])
        messages = [Message("system", TOOL_PROMPT.format(tools)), Message("user", record["query"]),
                    Message("assistant", answers, call_parts(answers))]
    elif "conversations" in record:                                                 # ToolBench, ShareGPT
        system = [record["system"]] if record.get("system") else []
        if record.get("tools") not in (None, "", "[]", []):                         # ShareGPT's tool-calling variant
            system.append(TOOL_PROMPT.format(as_json(record["tools"])))
        if system:
            messages.append(Message("system", "\n\n".join(system)))
        for turn in record["conversations"]:
            if turn["from"] not in ROLES:
                raise DataError(f"unknown speaker {turn['from']!r}; known are {', '.join(ROLES)}.")
            # ToolBench's texts begin with "\n", which its own prompts leave out: without it both agree
            messages.append(Message(ROLES[turn["from"]], turn["value"].strip("\n")))
        if re.match(r"Step \d+:", name):                # ToolBench, one record a step: only the last turn is new
            for m in messages[:-1]:
                m.scored = False
    elif "messages" in record:                                                      # the chat format of OpenAI and TRL
        for turn in record["messages"]:
            text = turn.get("content") or ""
            if turn.get("tool_calls"):
                calls = [c.get("function", c) for c in turn["tool_calls"]]
                text += json.dumps([{"name": c["name"], "arguments": json.loads(c["arguments"]) if isinstance(
                    c["arguments"], str) else c["arguments"]} for c in calls], ensure_ascii=False)
            if turn["role"] not in ROLES:
                raise DataError(f"unknown role {turn['role']!r}; known are {', '.join(ROLES)}.")
            messages.append(Message(ROLES[turn["role"]], text))
        if record.get("tools"):
            own = [messages.pop(0).text] if messages[0].role == "system" else []
            messages.insert(0, Message("system", "\n\n".join([*own, TOOL_PROMPT.format(as_json(record["tools"]))])))
    else:
        raise DataError(f"unknown format (keys: {', '.join(map(str, record))[:80]}); expected APIGen's query/answers/tools, "
                        "ToolBench's or ShareGPT's conversations, or messages.")
    for m in messages:
        if not isinstance(m.text, str):
            raise DataError(f"a {m.role} text is a {type(m.text).__name__}, not a string.")
    return Sample(name, messages)


def as_json(value) -> str:
    """Tools and calls come as JSON strings, or already parsed."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_object(path: str) -> dict:
    """The one JSON object that a file holds."""
    content = next((record for _, record in read_records(path)), None)
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold one JSON object; fetch the benchmark's file again.")
    return content


JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+|\s+')


def call_parts(text: str) -> list[tuple[str, str]] | None:
    """The token roles of a JSON list of calls, read off its structure: [(text, role)], concatenating to `text`.

    Function names, argument names and values are reasoning; fixed keys ("name", "arguments") and punctuation are format.
    """
    parts, depth, previous = [], 0, None
    for token in JSON_TOKEN.findall(text):
        depth += (token in "{[") - (token in "}]")
        if token[0] == '"':
            # depth 2 is a call's own object, [{ ; its keys are fixed, its values and all below are the model's choice
            is_key = depth == 2 and previous != ":"
            role = "format" if is_key and token in ('"name"', '"arguments"') else "reasoning"
            parts += [('"', "format"), (token[1:-1], role), ('"', "format")]
        else:
            parts.append((token, "format" if token in "{}[]:," or token.isspace() else "reasoning"))
        if not token.isspace():
            previous = token
    if "".join(t for t, _ in parts) != text:            # broken JSON: no claim about its roles
        return None
    return [(t, r) for t, r in parts if t]
