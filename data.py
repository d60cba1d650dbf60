"""From files to padded batches: readers, chat rendering with output masks, SHAD's shuffling, labels, batching.

    samples = read_samples("train.json")              # APIGen, ToolBench, ShareGPT or messages, told by their content
    dataset = Dataset(samples, Renderer("model_dir"))  # token ids with a mask of the output tokens
    shuffled = shuffle_outputs(samples, 0.01, seed=0)  # SHAD, step 1: no output stays with its own input

A sample is a conversation. Its input is everything but the assistant's turns; its output is the assistant's turns, each with
the end-of-turn token that the model must emit. Only output tokens carry loss.
"""
import argparse
import bisect
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm


class DataError(ValueError):
    """Input that cannot be used as it is; the message names the file, the record and the remedy."""


# -----------------------------------------------------------------------------------------------------------------
# Samples and their readers

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


# -----------------------------------------------------------------------------------------------------------------
# The toy: its words. Pools are large, so that a guess without the input is dear: at least 126 words, 4.8 nats.

def _made_up(count: int, length: int, seed: int) -> list[str]:
    """Pronounceable words that mean nothing: `length` syllables and a final consonant."""
    rng, words = random.Random(seed), {}
    while len(words) < count:
        words["".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(length)) + rng.choice("lnrsx")] = None
    return list(words)


VERBS = "find book check send make open read save show sort move share track print".split()
NOUNS = "hotel flight ticket report letter photo recipe order song file event room table bill ride game".split()
ARGUMENTS = [f"{a}_{b}" for a in "first last old new home work main next top base best local final early".split()
             for b in "city date name code price color size team time place level group".split()]
POOLS = {"tool": [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS], "argument": ARGUMENTS,
         "value": _made_up(320, 2, 1), "person": [w.capitalize() for w in _made_up(240, 1, 2)], "topic": _made_up(240, 3, 3)}

REQUESTS = {    # held out or not -> wordings; every one names the person, the topic, the tool and the arguments
    False: ["I am {person}. About the {topic}: please use a {tool} with {arguments}.",
            "{person} here. Can you use the {tool} for the {topic}? Take {arguments}.",
            "Hello, {person} needs you to use one {tool}, {arguments}. It is for the {topic}.",
            "For the {topic} of {person}, use my {tool} with {arguments}, thanks.",
            "We plan the {topic}. {person} wants to use this {tool}. Set {arguments}."],
    True: ["Help {person}! I want to use some {tool} by {arguments}. The {topic} is near.",
           "As for the {topic}, {person} would like to use that {tool}: {arguments}."]}
OPENINGS = ["Based on the request of {person}, I should", "To help {person}, I need to", "Since {person} asks me, I will",
            "It is clear what {person} wants, so I can", "Reading this, {person} expects me to"]
MIDDLES = ["deal with the {topic}", "call a tool for the {topic}", "look into the {topic} now", "use what fits the {topic}"]
CLOSINGS = [".", ".", ". By doing so, we get the answer.", ", which gives the result."]


def _split(pool: list[str], held_out: bool) -> list[str]:
    """Every fourth word is held out (of the tools: every fourth pair of words, in each verb and each noun)."""
    shift = len(NOUNS) if len(pool) == len(VERBS) * len(NOUNS) else len(pool)
    return [word for i, word in enumerate(pool) if ((i + i // shift) % 4 == 3) == held_out]


def toy_samples(count: int, seed: int, held_out: bool = False) -> list[Sample]:
    """`count` agent samples; `held_out` ones have other tools, arguments, values, people, topics and request wordings."""
    rng, samples = random.Random(f"{seed} {held_out}"), []
    pools = {kind: _split(pool, held_out) for kind, pool in POOLS.items()}
    for i in range(count):
        tools = rng.sample(pools["tool"], 3)
        names = iter(rng.sample(pools["argument"], 9))
        arguments = {tool: list(itertools.islice(names, rng.choice((2, 3)))) for tool in tools}
        tool = rng.choice(tools)
        values = rng.sample(pools["value"], len(arguments[tool]))
        pairs = list(zip(arguments[tool], values))
        fields = {"person": rng.choice(pools["person"]), "topic": rng.choice(pools["topic"])}
        request = rng.choice(REQUESTS[held_out]).format(
            tool=tool, arguments=", ".join(f"{name} {value}" for name, value in pairs), **fields)
        thought = f"{rng.choice(OPENINGS)} {rng.choice(MIDDLES)}{rng.choice(CLOSINGS)}"

        parts = [("Thought: ", "format")]
        for piece in re.split(r"(\{\w+\})", thought):
            slot = fields.get(piece.strip("{}"))
            parts.append((slot, "reasoning") if slot else (piece, "connecting"))
        parts += [("\nAction: ", "format"), (tool, "reasoning"), ("\nAction Input: ", "format")]
        for n, (name, value) in enumerate(pairs):
            parts += [('","' if n else '{"', "format"), (name, "reasoning"), ('":"', "format"), (value, "reasoning")]
        parts.append(('"}', "format"))
        system = "Tools:" + "".join(f"\n- {name}({', '.join(arguments[name])})" for name in tools)
        samples.append(Sample(f"toy-{'out' if held_out else 'in'}-{seed}-{i}", [
            Message("system", system), Message("user", request),
            Message("assistant", "".join(text for text, _ in parts), parts)]))
    return samples


# -----------------------------------------------------------------------------------------------------------------
# The toy's tokenizer: one id a word, a run of punctuation, or a newline

PIECE = r"\w+|[^\w\s]+|\n"


def toy_words() -> list[str]:
    """The words of the wordings (requests, thoughts, the fixed format), sorted: all that no pool holds."""
    texts = [*REQUESTS[False], *REQUESTS[True], *OPENINGS, *MIDDLES, *CLOSINGS, ". , ? ! : - ( ) {\" \":\" \",\" \"}", "\n",
             "Tools Thought Action Input system user assistant tool", *VERBS, *NOUNS]
    return sorted({word for text in texts for word in re.findall(PIECE, re.sub(r"\{\w+\}", " ", text))})


def toy_tokenizer():
    """The word-level tokenizer. decode(encode(text)) gives back an agent's output exactly."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *toy_words(), *itertools.chain(*POOLS.values())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "removed", invert=True)
    glue = {" \n ": "\n", " :": ":", " ,": ",", " .": ".", '{" ': '{"', ' ":" ': '":"', ' "," ': '","', ' "}': '"}',
            "( ": "(", " )": ")", " (": "("}
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse(),
                                           *(decoders.Replace(old, new) for old, new in glue.items())])
    return tokenizer


# -----------------------------------------------------------------------------------------------------------------
# SHAD, step 1: which output belongs to which input is shuffled

def draw(count: int, fraction: float, rng: random.Random) -> list[int]:
    """Which of `count` samples are shuffled: a fraction of them, at least 2."""
    return rng.sample(range(count), min(count, max(2, round(fraction * count))))


def shuffle_outputs(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """Draw a fraction of the samples and permute the outputs among them, so that none stays with its own input.

    samples: at least 2. fraction: of the samples, in (0, 1]; at least 2 are drawn. Returns new samples; inputs stay where
    they are. Output turns of conversations move one by one. Where one conversation has more than half of all the turns no
    permutation can do it; it then gets the others' turns more than once. Raises DataError below 2 samples.
    """
    if len(samples) < 2:
        raise DataError(f"shuffling outputs needs at least 2 samples, not {len(samples)}.")
    rng = random.Random(seed)
    drawn = [samples[i] for i in draw(len(samples), fraction, rng)]
    slots = []                                                  # (sample, message), one sample's beside each other
    for s, sample in enumerate(drawn):
        turns = [m for m, message in enumerate(sample.messages) if message.is_output]
        rng.shuffle(turns)
        slots.append([(s, m) for m in turns])
    most, N = max(map(len, slots)), sum(map(len, slots))
    flat = list(itertools.chain(*slots))
    if 2 * most <= N:       # shifted by at least the longest run, and at most N minus it, every slot leaves its own run
        shift = rng.randint(most, N - most)
        source = {flat[i]: flat[(i + shift) % N] for i in range(N)}
    else:                   # the long conversation and the others take each other's turns, round and round
        long = max(slots, key=len)
        others = [slot for slot in flat if slot not in long]
        source = dict(zip(long, itertools.cycle(others))) | dict(zip(others, long))
    shuffled = []
    for s, sample in enumerate(drawn):
        messages = list(sample.messages)
        for m, message in enumerate(messages):
            if message.is_output:
                s2, m2 = source[s, m]
                messages[m] = replace(drawn[s2].messages[m2])
        shuffled.append(Sample(sample.id, messages))
    return shuffled


# -----------------------------------------------------------------------------------------------------------------
# Rendering: messages to token ids, the output mask built on the way

class Renderer:
    """Turns a conversation into token ids, segment by segment, so that a prompt's ids are always a prefix of the full ids.

    directory: a HF checkpoint with tokenizer.json. template: "chatml" (<|im_start|>role\\n ... <|im_end|>\\n), "plain"
    (Role:\\n ... \\n\\n, the tokenizer's eos token closing an assistant's turn), or "auto": chatml if the tokenizer has its tokens.
    """

    def __init__(self, directory: str, template: str = "auto"):
        file = os.path.join(directory, "tokenizer.json")
        if not os.path.isfile(file):
            raise DataError(f"{directory} holds no tokenizer.json; copy it from the model's release.")
        self.directory, self.tokenizer = directory, Tokenizer.from_file(file)
        with open(file, "rb") as f:
            self.fingerprint = hashlib.sha256(f.read()).hexdigest()
        self.tokenizer.no_padding(), self.tokenizer.no_truncation()
        # markers are placed as ids; the same characters inside a text are only characters
        self.tokenizer.encode_special_tokens = True
        start, end = (self.tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
        self.template = template if template != "auto" else "plain" if None in (start, end) else "chatml"
        if self.template == "chatml":
            if None in (start, end):
                raise DataError(f"{file} has no <|im_start|> and <|im_end|>; use --template plain.")
            self.start, self.end = [start], end
        else:
            self.start, self.end = [], self.setting("eos_token_id")
            if self.end is None:
                raise DataError(f"{directory} names no eos_token_id in config.json; the plain template needs it to end a turn.")
        self.headers, self.gap = {}, self.encode("\n" if self.start else "\n\n")      # what stands before and after a turn
        self.vocab_size = self.setting("vocab_size")
        mask = (probe := self.tokenizer.encode("a")).special_tokens_mask
        self.bos = probe.ids[:mask.index(0)] if 0 in mask else []        # what the tokenizer itself puts first

    def setting(self, key: str) -> int | None:
        """A number of the checkpoint's JSON files (the first, of a list)."""
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(self.directory, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as f:
                    value = json.load(f).get(key)
                if value is not None:
                    return value[0] if isinstance(value, list) else value

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def header(self, role: str) -> list[int]:
        if role not in self.headers:
            self.headers[role] = self.start + self.encode(f"{role}\n" if self.start else f"{role.capitalize()}:\n")
        return self.headers[role]

    def prompt(self, messages: list[Message]) -> list[int]:
        """The ids after which the assistant speaks."""
        return self.render(messages)[0] + self.header("assistant")

    def encode_texts(self, samples: list[Sample]) -> list[list]:
        """The tokenizer's encodings of every text of some samples, made in parallel."""
        encodings = iter(self.tokenizer.encode_batch([m.text for s in samples for m in s.messages], add_special_tokens=False))
        return [[next(encodings) for _ in s.messages] for s in samples]

    def render(self, messages: list[Message], encodings=None) -> tuple[list[int], list[int]]:
        """(ids, marks), one of each a token; marks index MARKS and say which tokens are output, and their true role where the
        sample knows it. encodings: of the messages' texts, as encode_texts makes them."""
        ids, marks = list(self.bos), [0] * len(self.bos)
        for m, encoding in zip(messages, encodings or self.encode_texts([Sample("", messages)])[0]):
            header = self.header(m.role)
            closing = [self.end] if self.start or m.role == "assistant" else []
            ids += header + encoding.ids + closing + self.gap
            output = [int(m.is_output)] * (len(encoding) + len(closing))
            if m.is_output and m.parts:
                output = token_roles(m, encoding.offsets) + [MARKS.index("format")]
            marks += [0] * len(header) + output + [0] * len(self.gap)
        if self.vocab_size and ids and max(ids) >= self.vocab_size:
            raise DataError(f"{self.directory}: the tokenizer gives id {max(ids)}, but the model has {self.vocab_size} embeddings; "
                            "the two do not belong together.")
        return ids, marks


def token_roles(message: Message, offsets) -> list[int]:
    """The mark of the part in which each token's first visible character lies."""
    ends = list(itertools.accumulate(len(text) for text, _ in message.parts))
    roles = []
    for start, end in offsets:
        while start < end - 1 and message.text[start].isspace():
            start += 1
        roles.append(MARKS.index(message.parts[min(bisect.bisect(ends, start), len(ends) - 1)][1]))
    return roles


# -----------------------------------------------------------------------------------------------------------------
# The dataset, its labels, its batches

MARKS = ("input", "output", "reasoning", "format", "connecting")    # what a token is; "output" where its true role is unknown
ARRAYS = {"tokens": np.int32, "marks": np.uint8, "texts": np.uint8, "index": np.int64}


class Rows:
    """Rows of unequal length in one flat array: rows[i] = view(flat[starts[i]:starts[i + 1]]), or of some of them, in an order."""

    def __init__(self, flat, starts, view=lambda row: row, order=None):
        self.flat, self.starts, self.view, self.order = flat, starts, view, range(len(starts) - 1) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self.order[i]
        return self.view(self.flat[self.starts[row]:self.starts[row + 1]])

    def pick(self, order):
        return Rows(self.flat, self.starts, self.view, order)


def pack(sample: Sample) -> bytes:
    return json.dumps([sample.id, [(m.role, m.text, m.parts, m.scored) for m in sample.messages]]).encode()


def unpack(text: np.ndarray) -> Sample:
    name, messages = json.loads(text.tobytes())
    return Sample(name, [Message(*m) for m in messages])


class Dataset:
    """Rendered samples in flat arrays, held in memory or, by `load`, in files mapped into it.

    ids[i] (T_i,) int32, is_output[i] (T_i,) bool and samples[i], a Sample, are made when asked for. Samples longer than
    max_length tokens keep their place with no tokens and are counted in `dropped`, never cut.
    """

    def __init__(self, samples, renderer: Renderer, max_length: int = 2048):
        streams = {name: io.BytesIO() for name in ARRAYS}
        facts = self.write(samples, renderer, max_length, streams)
        self._hold({name: np.frombuffer(streams[name].getbuffer(), dtype) for name, dtype in ARRAYS.items()}, facts, renderer, max_length)

    @staticmethod
    def write(samples, renderer, max_length, streams) -> dict:
        """Render samples one after the other into binary streams; the facts that go with them."""
        data, dropped, ends = hashlib.sha256(), 0, np.zeros(3, np.int64)        # ends: of tokens, of output tokens, of texts
        streams["index"].write(ends.tobytes())
        samples = iter(samples)
        while group := list(itertools.islice(samples, 256)):
            for sample, encodings in zip(group, renderer.encode_texts(group)):
                data.update(json.dumps([(m.role, m.text, m.scored) for m in sample.messages]).encode())
                ids, marks = renderer.render(sample.messages, encodings)
                if len(ids) > max_length:
                    ids, marks, dropped = [], [], dropped + 1
                text, marks = pack(sample), np.array(marks, np.uint8)
                ends += len(ids), np.count_nonzero(marks), len(text)
                for name, row in (("tokens", np.array(ids, np.int32)), ("marks", marks), ("texts", text), ("index", ends)):
                    streams[name].write(row)
        return {"dropped": dropped,
                "fingerprint": {"data": data.hexdigest(), "tokenizer": renderer.fingerprint, "template": renderer.template}}

    def _hold(self, arrays, facts, renderer, max_length):
        self.renderer, self.max_length, self.dropped, self.fingerprint = renderer, max_length, facts["dropped"], facts["fingerprint"]
        starts, self.offsets, texts = arrays["index"].reshape(-1, 3).T             # offsets: of each sample's output tokens
        self.ids, self.is_output = Rows(arrays["tokens"], starts), Rows(arrays["marks"], starts, lambda marks: marks > 0)
        self.marks, self.samples = arrays["marks"], Rows(arrays["texts"], texts, unpack)
        self.lengths, self.outputs = np.diff(starts), np.diff(self.offsets)         # tokens, output tokens of each sample
        self.kept = np.flatnonzero(self.lengths)
        if not len(self.kept):
            raise DataError(f"all {len(self.samples)} samples are longer than {max_length} tokens; raise --max-length.")

    @classmethod
    def load(cls, paths: list[str], model_directory: str, template: str, max_length: int) -> "Dataset":
        """All samples of some files, one file after the other, rendered with the tokenizer of a checkpoint.

        They are rendered once, into files under ~/.cache/shad-rft (or $XDG_CACHE_HOME), and found there again as long as data
        files, tokenizer, template and max_length are the same. Several processes may call this at once: one works, the rest wait.
        """
        renderer = Renderer(model_directory, template)
        samples = itertools.chain.from_iterable(stream_samples(path, progress=True) for path in paths)
        files = [split_slice(path)[0] for path in paths]
        if not all(map(os.path.isfile, files)):
            return cls(samples, renderer, max_length)                   # the toy, or an error that names the missing file
        import fcntl                                                    # here, since Windows lacks it
        key = json.dumps([1, [(os.path.abspath(p), os.stat(f).st_size, os.stat(f).st_mtime_ns) for p, f in zip(paths, files)],
                          renderer.fingerprint, renderer.template, renderer.bos, renderer.vocab_size, renderer.end, max_length])
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "shad-rft")
        directory = os.path.join(root, hashlib.sha256(key.encode()).hexdigest()[:16])
        os.makedirs(root, exist_ok=True)
        with open(directory + ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)                            # the system lets go of it however this process ends
            if not os.path.isdir(directory):
                shutil.rmtree(directory + ".tmp", ignore_errors=True)   # left by a process that was killed
                os.mkdir(directory + ".tmp")
                try:
                    with contextlib.ExitStack() as stack:
                        streams = {name: stack.enter_context(open(os.path.join(directory + ".tmp", name), "wb")) for name in ARRAYS}
                        facts = cls.write(samples, renderer, max_length, streams)
                    with open(os.path.join(directory + ".tmp", "facts.json"), "w") as f:
                        json.dump(facts, f)
                    os.rename(directory + ".tmp", directory)
                finally:
                    shutil.rmtree(directory + ".tmp", ignore_errors=True)
        with open(os.path.join(directory, "facts.json")) as f:
            facts = json.load(f)
        mapped = {name: (np.memmap(file, dtype, "r") if os.path.getsize(file) else np.zeros(0, dtype))
                  for name, dtype in ARRAYS.items() for file in [os.path.join(directory, name)]}
        dataset = cls.__new__(cls)
        dataset._hold(mapped, facts, renderer, max_length)
        return dataset

    def true_roles(self) -> dict[str, np.ndarray] | None:
        """{role: (output tokens,) bool, in data order}, or None where the true role of any output token is unknown."""
        marks = self.marks[self.marks > 0]
        return None if (marks == 1).any() else {role: marks == mark for mark, role in enumerate(MARKS) if mark > 1}

    def describe(self) -> str:
        tokens, outputs = int(self.lengths.sum()), int(self.offsets[-1])
        return (f"{len(self.kept):,} samples, {tokens:,} tokens, {outputs:,} of them output ({outputs / tokens:.0%}); "
                f"template {self.renderer.template}"
                + (f"; {self.dropped:,} longer than {self.max_length} tokens dropped" if self.dropped else ""))


def collate(dataset: Dataset, indices, differences: np.ndarray | None = None, device="cpu"):
    """Right-padded tensors of some samples: tokens (B, T) and targets (B, T) int64, already shifted, -100 where not
    scored; LD (B, T) float32, from `differences`, those of all output tokens in data order (default: 0). Of no samples: one
    token with nothing to score, for a rank that has no work where others do."""
    B, T = max(1, len(indices)), max((int(dataset.lengths[i]) for i in indices), default=2) - 1
    tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), -100, np.int64)
    LD = np.zeros((B, T), np.float32)
    for b, i in enumerate(indices):
        ids, out, n = dataset.ids[i], dataset.is_output[i][1:], int(dataset.lengths[i]) - 1
        tokens[b, :n] = ids[:-1]
        targets[b, :n] = np.where(out, ids[1:], -100)
        if differences is not None:
            LD[b, :n][out] = differences[dataset.offsets[i]:dataset.offsets[i + 1]]
    return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in (tokens, targets, LD))


def epoch_batches(lengths: np.ndarray, indices: np.ndarray, batch_tokens: int, seed: int, epoch: int = 0) -> list[np.ndarray]:
    """The global batches of one epoch: arrays of sample indices, at most batch_tokens tokens each (a longer sample stands alone).

    A function of the data, the seed and batch_tokens alone. Similar lengths go together, to keep padding small: the shuffled
    samples are sorted in pools of 32 batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(indices)
    pool = max(1, int(32 * batch_tokens / lengths[indices].mean()))
    batches = []
    for i in range(0, len(order), pool):
        some = order[i:i + pool]
        batches += cut(some[np.argsort(-lengths[some], kind="stable")], lengths, batch_tokens, padded=False)
    return [batches[i] for i in rng.permutation(len(batches))]


def cut(indices: np.ndarray, lengths: np.ndarray, budget: int, padded: bool = True) -> list[np.ndarray]:
    """Cut samples, sorted by falling length, into arrays of at most `budget` tokens each, counted with their padding or without."""
    bounds, used, count, widest = [0], 0, 0, 0
    for i, length in enumerate(lengths[indices].tolist()):
        count, used, widest = count + 1, used + length, max(widest, length)
        if count > 1 and (count * widest if padded else used) > budget:
            bounds.append(i)
            count, used, widest = 1, length, length
    return [indices[a:b] for a, b in zip(bounds, [*bounds[1:], len(indices)])] if len(indices) else []


def micro_batches(batch, lengths, micro_tokens: int, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    """This rank's share of a global batch, cut into micro-batches of at most micro_tokens tokens, padding included.

    Every rank gets as many of them, some perhaps empty: ranks that hold a model together must go through it together.
    """
    batch = np.sort(np.asarray(batch))
    by_length = batch[np.argsort(-lengths[batch], kind="stable")]
    shares = [cut(by_length[r::world], lengths, micro_tokens) for r in range(world)]
    return shares[rank] + [by_length[:0]] * (max(map(len, shares)) - len(shares[rank]))


def save_labels(directory: str, loss_difference: np.ndarray, dataset: Dataset, base_model: str, threshold: float, seed: int) -> None:
    """Write labels.safetensors: loss_difference (output tokens,) float32 in data order, offsets (samples + 1,) int64."""
    metadata = dataset.fingerprint | {"base_model": base_model, "threshold": str(threshold), "seed": str(seed)}
    arrays = {"offsets": dataset.offsets.astype(np.int64), "loss_difference": loss_difference.astype(np.float32)}
    header, end = {"__metadata__": metadata}, 0                 # by hand: safetensors' own `save` shuffles the metadata
    for dtype, (name, array) in zip(("I64", "F32"), arrays.items()):
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = os.path.join(directory, "labels.safetensors")
    with open(path + ".tmp", "wb") as f:
        for piece in (len(text).to_bytes(8, "little"), text, *arrays.values()):
            f.write(piece)
    os.replace(path + ".tmp", path)


def load_labels(path: str, dataset: Dataset) -> tuple[np.ndarray, float]:
    """(loss_difference (output tokens,) float32, threshold) of a labels file or its directory. Raises DataError, naming what
    differs, when the labels were not made from this data with this tokenizer and template."""
    path = os.path.join(path, "labels.safetensors") if os.path.isdir(path) else path
    try:        # safetensors: the header's length, 8 bytes; the header, JSON; the arrays, which are mapped, not read
        with open(path, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > 2**20:
                raise ValueError("no safetensors header")
            header = json.loads(f.read(size))
        arrays = [np.memmap(path, dtype, "r", 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"]))
                  for name, kind, dtype in (("loss_difference", "F32", np.float32), ("offsets", "I64", np.int64))
                  if header[name]["dtype"] == kind]
        difference, offsets = arrays
        metadata = header["__metadata__"]
        threshold = float(metadata["threshold"])
    except Exception as e:
        raise DataError(f"{path} cannot be read as labels ({type(e).__name__}: {e}); make it with shad.py.") from None
    differs = [key for key, value in dataset.fingerprint.items() if metadata.get(key) != value]
    if differs:
        raise DataError(f"{path} does not fit: its {' and '.join(differs)} differ{'s' * (len(differs) == 1)} from this run's; "
                        "run shad.py again with the same --data, --model and --template.")
    if not np.array_equal(offsets, dataset.offsets):
        i = int(np.flatnonzero(np.diff(offsets) != np.diff(dataset.offsets))[0])
        raise DataError(f"{path} does not fit: sample {dataset.samples[i].id!r} is in only one of the two; "
                        "use the --max-length that shad.py was run with.")
    return difference, threshold


def copy_tokenizer(source: str, target: str) -> None:
    """Copy the tokenizer files of a HF directory, so that the new one is complete."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                 "generation_config.json", "vocab.json", "merges.txt"):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


# -----------------------------------------------------------------------------------------------------------------
# What the scripts share: options from a dataclass, one clear sentence for bad input, one page for pictures

def option(default, help: str, low=0, **argparse_arguments):
    """A dataclass field that is also a command-line flag; a number is at least `low`."""
    return field(default_factory=lambda: default, metadata={"help": help, "low": low, **argparse_arguments})


def parse_options(cls, description: str, argv=None):
    """The dataclass `cls` of options, filled from the command line. A list takes several values; a bool is a switch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    low = {}
    for f in fields(cls):
        default, extra = f.default_factory(), dict(f.metadata)
        low[f.name] = extra.pop("low")
        text = extra.pop("help") + ("" if default is None or default is False or default in ("", []) else f" (default: {default})")
        if isinstance(default, bool):
            extra["action"] = "store_true"
        elif isinstance(default, list):
            extra["nargs"] = "+"
        else:
            extra.setdefault("type", str if default is None else type(default))
        positional = extra.pop("positional", False)
        parser.add_argument(f.name if positional else "--" + f.name.replace("_", "-"), default=default,
                            help=text.replace("%", "%%"), **extra)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, (int, float)) and not value >= low[name]:
            parser.error(f"--{name.replace('_', '-')} must be at least {low[name]}, not {value}")
    return cls(**values)


def run_script(main, *expected: type[Exception]) -> None:
    """Run main(). An expected error, or one of the operating system's, becomes one sentence and exit code 2, no traceback."""
    try:
        main()
    except (DataError, OSError, *expected) as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{os.path.basename(sys.argv[0])}: stopped", file=sys.stderr)
        sys.exit(130)
