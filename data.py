"""From files to padded batches: readers, chat rendering with output masks, SHAD's shuffling, labels, batching.

    samples = read_samples("train.json")              # APIGen, ToolBench, ShareGPT or messages, told by their content
    dataset = Dataset(samples, Renderer("model_dir"))  # token ids with a mask of the output tokens
    shuffled = shuffle_outputs(samples, 0.01, seed=0)  # SHAD, step 1: no output stays with its own input

A sample is a conversation. Its input is everything but the assistant's turns; its output is the assistant's turns, each with
the end-of-turn token that the model must emit. Only output tokens carry loss.
"""
import argparse
import hashlib
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
from safetensors import safe_open
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers


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
    sliced = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", path_or_name)
    if sliced:
        name, first, last = sliced.groups()
        samples = read_samples(name)[int(first or 0):int(last) if last else None]
        if not samples:
            raise DataError(f"{path_or_name} selects no samples.")
        return samples
    if path_or_name == "toy":
        return toy_samples(4000, seed=0)
    samples = []
    for where, record in read_records(path_or_name):
        try:
            sample = read_record(record, len(samples))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"{where}: {e if isinstance(e, DataError) else f'{type(e).__name__}: {e}'}") from None
        if not any(m.is_output and m.text for m in sample.messages):
            raise DataError(f"{where} has no assistant turn, so there is nothing to learn from it; remove the record.")
        samples.append(sample)
    if not samples:
        raise DataError(f"{path_or_name} holds no samples.")
    return samples


def read_records(path: str):
    """Yield (where, record) of a JSON list or a JSON Lines file."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be read ({getattr(e, 'strerror', None) or 'not UTF-8 text'}).") from None
    try:
        line, rows = 0, [row for row in text.split("\n") if row.strip()]
        if text.lstrip()[:1] == "[" or rows and rows[0].strip() == "{":        # one JSON document: a list, or a single record
            content = json.loads(text)
            for i, record in enumerate(content if isinstance(content, list) else [content]):
                yield f"{path}, record {i + 1}", record
        else:
            for line, row in enumerate(text.split("\n"), 1):
                if row.strip():
                    yield f"{path}, line {line}", json.loads(row)
    except json.JSONDecodeError as e:
        line = line or e.lineno
        raise DataError(f"{path}, line {line}: not JSON ({e.msg}); mend the line, or export the file again.") from None


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


def call_parts(text: str) -> list[tuple[str, str]]:
    """The token roles of a JSON list of calls, read off its structure: [(text, role)], concatenating to `text`.

    Function names, argument names and values are reasoning; fixed keys ("name", "arguments") and punctuation are format.
    """
    parts, depth, fixed = [], 0, None
    for token in JSON_TOKEN.findall(text):
        depth += (token in "{[") - (token in "}]")
        if token[0] == '"':
            # depth 2 is a call's own object, [{ ; its keys are fixed, its values and all below are the model's choice
            is_key = depth == 2 and fixed != ":"
            role = "format" if is_key and token in ('"name"', '"arguments"') else "reasoning"
            parts += [('"', "format"), (token[1:-1], role), ('"', "format")]
        else:
            parts.append((token, "format" if token in "{}[]:," or token.isspace() else "reasoning"))
        if not token.isspace():
            fixed = token
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

def shuffle_outputs(samples: list[Sample], fraction: float, seed: int) -> list[Sample]:
    """Draw a fraction of the samples and permute the outputs among them, so that none stays with its own input.

    samples: at least 2. fraction: of the samples, in (0, 1]; at least 2 are drawn. Returns new samples; inputs stay where
    they are. Output turns of conversations move one by one. Where one conversation has more than half of all the turns no
    permutation can do it; it then gets the others' turns more than once. Raises DataError below 2 samples.
    """
    if len(samples) < 2:
        raise DataError(f"shuffling outputs needs at least 2 samples, not {len(samples)}.")
    rng = random.Random(seed)
    drawn = rng.sample(samples, min(len(samples), max(2, round(fraction * len(samples)))))
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
        return self.start + self.encode(f"{role}\n" if self.start else f"{role.capitalize()}:\n")

    def prompt(self, messages: list[Message]) -> list[int]:
        """The ids after which the assistant speaks."""
        return self.render(messages)[0] + self.header("assistant")

    def render(self, messages: list[Message]) -> tuple[list[int], list[bool], list[str | None]]:
        """(ids, is_output, roles): every token, whether it is scored, and its true role where the sample knows it."""
        ids, is_output, roles = list(self.bos), [False] * len(self.bos), [None] * len(self.bos)

        def add(new, output, new_roles=None):
            ids.extend(new), is_output.extend([output] * len(new)), roles.extend(new_roles or [None] * len(new))

        for m in messages:
            add(self.header(m.role), False)
            encoding = self.tokenizer.encode(m.text, add_special_tokens=False)
            add(encoding.ids, m.is_output, token_roles(m, encoding.offsets) if m.parts and m.is_output else None)
            if self.start or m.role == "assistant":
                add([self.end], m.is_output, ["format"] if m.parts and m.is_output else None)
            add(self.encode("\n" if self.start else "\n\n"), False)
        if self.vocab_size and ids and max(ids) >= self.vocab_size:
            raise DataError(f"{self.directory}: the tokenizer gives id {max(ids)}, but the model has {self.vocab_size} embeddings; "
                            "the two do not belong together.")
        return ids, is_output, roles


def token_roles(message: Message, offsets) -> list[str]:
    """The role of the part in which each token's first visible character lies."""
    ends = np.cumsum([len(text) for text, _ in message.parts])
    roles = []
    for start, end in offsets:
        while start < end - 1 and message.text[start].isspace():
            start += 1
        roles.append(message.parts[min(np.searchsorted(ends, start, side="right"), len(ends) - 1)][1])
    return roles


# -----------------------------------------------------------------------------------------------------------------
# The dataset, its labels, its batches

class Dataset:
    """Rendered samples: ids[i] int32 and is_output[i] bool, (T_i,) each; roles[i], a list of names, where the truth is known.

    Samples longer than max_length tokens keep their place with no tokens and are counted in `dropped`, never cut.
    """

    def __init__(self, samples: list[Sample], renderer: Renderer, max_length: int = 2048):
        self.samples, self.renderer, self.max_length, self.dropped = samples, renderer, max_length, 0
        self.ids, self.is_output, self.roles = [], [], []
        data = hashlib.sha256()
        for sample in samples:
            data.update(json.dumps([(m.role, m.text, m.scored) for m in sample.messages]).encode())
            ids, is_output, roles = renderer.render(sample.messages)
            if len(ids) > max_length:
                ids, is_output, roles, self.dropped = [], [], [], self.dropped + 1
            self.ids.append(np.array(ids, dtype=np.int32))
            self.is_output.append(np.array(is_output, dtype=bool))
            self.roles.append(roles)
        self.lengths = np.array([len(x) for x in self.ids], dtype=np.int64)
        self.kept = np.flatnonzero(self.lengths)
        if not len(self.kept):
            raise DataError(f"all {len(samples)} samples are longer than {max_length} tokens; raise --max-length.")
        self.offsets = np.cumsum([0] + [int(m.sum()) for m in self.is_output])       # of each sample's output tokens
        self.fingerprint = {"data": data.hexdigest(), "tokenizer": renderer.fingerprint, "template": renderer.template}

    @classmethod
    def load(cls, paths: list[str], model_directory: str, template: str, max_length: int) -> "Dataset":
        """All samples of some files, one file after the other, rendered with the tokenizer of a checkpoint."""
        return cls([s for path in paths for s in read_samples(path)], Renderer(model_directory, template), max_length)

    def true_roles(self) -> np.ndarray | None:
        """Names of the true roles of all output tokens, in data order, or None where any is unknown."""
        roles = [r for m, rs in zip(self.is_output, self.roles) for r, o in zip(rs, m) if o]
        return None if None in roles else np.array(roles)

    def describe(self) -> str:
        outputs = self.offsets[-1]
        return (f"{len(self.kept):,} samples, {self.lengths.sum():,} tokens, {outputs:,} of them output "
                f"({outputs / self.lengths.sum():.0%}); template {self.renderer.template}"
                + (f"; {self.dropped:,} longer than {self.max_length} tokens dropped" if self.dropped else ""))


def collate(dataset: Dataset, indices, reasoning: np.ndarray | None = None, device="cpu"):
    """Right-padded tensors of some samples: tokens (B, T) and targets (B, T) int64, already shifted, -100 where not
    scored; is_reasoning (B, T) bool, taken from `reasoning`, the labels of all output tokens in data order (default: False)."""
    B, T = len(indices), max(int(dataset.lengths[i]) for i in indices) - 1
    tokens, targets = np.zeros((B, T), np.int64), np.full((B, T), -100, np.int64)
    is_reasoning = np.zeros((B, T), bool)
    for b, i in enumerate(indices):
        ids, out, n = dataset.ids[i], dataset.is_output[i][1:], len(dataset.ids[i]) - 1
        tokens[b, :n] = ids[:-1]
        targets[b, :n] = np.where(out, ids[1:], -100)
        if reasoning is not None:
            is_reasoning[b, :n][out] = reasoning[dataset.offsets[i]:dataset.offsets[i + 1]]
    return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in (tokens, targets, is_reasoning))


def epoch_batches(lengths: np.ndarray, indices: np.ndarray, batch_tokens: int, seed: int, epoch: int = 0) -> list[list[int]]:
    """The global batches of one epoch: lists of sample indices, at most batch_tokens tokens each (a longer sample stands alone).

    A function of the data, the seed and batch_tokens alone. Similar lengths go together, to keep padding small: the shuffled
    samples are sorted in pools of 32 batches, cut into batches, and the batches shuffled.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(indices)
    pool = max(1, int(32 * batch_tokens / lengths[indices].mean()))
    batches = []
    for i in range(0, len(order), pool):
        batches += cut(sorted(order[i:i + pool], key=lambda j: -lengths[j]), lengths, batch_tokens, padded=False)
    return [batches[i] for i in rng.permutation(len(batches))]


def cut(indices, lengths, budget: int, padded: bool = True) -> list[list[int]]:
    """Cut a list of samples, sorted by length, into lists of at most `budget` tokens each, counted with their padding or without."""
    pieces, used = [], 0
    for i in map(int, indices):
        # indices run from long to short, so the first sample of a piece sets its padded width
        used = (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] if padded and pieces else used + lengths[i]
        if not pieces or used > budget:
            pieces.append([])
            used = lengths[i]
        pieces[-1].append(i)
    return pieces


def micro_batches(batch, lengths, micro_tokens: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """This rank's share of a global batch, cut into micro-batches of at most micro_tokens tokens, padding included."""
    by_length = sorted(batch, key=lambda j: (-lengths[j], j))
    return cut(by_length[rank::world], lengths, micro_tokens)


def save_labels(directory: str, loss_difference: np.ndarray, dataset: Dataset, base_model: str, threshold: float, seed: int) -> None:
    """Write labels.safetensors: loss_difference (output tokens,) float32 in data order, offsets (samples + 1,) int64."""
    metadata = dataset.fingerprint | {"base_model": base_model, "threshold": str(threshold), "seed": str(seed)}
    path = os.path.join(directory, "labels.safetensors")
    with open(path + ".tmp", "wb") as f:
        f.write(save({"loss_difference": loss_difference.astype(np.float32), "offsets": dataset.offsets.astype(np.int64)}, metadata))
    os.replace(path + ".tmp", path)


def load_labels(path: str, dataset: Dataset) -> tuple[np.ndarray, float]:
    """(loss_difference (output tokens,) float32, threshold) of a labels file or its directory. Raises DataError, naming what
    differs, when the labels were not made from this data with this tokenizer and template."""
    path = os.path.join(path, "labels.safetensors") if os.path.isdir(path) else path
    try:
        with safe_open(path, framework="np") as f:
            metadata, difference, offsets = f.metadata() or {}, f.get_tensor("loss_difference"), f.get_tensor("offsets")
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

def option(default, help: str, **argparse_arguments):
    """A dataclass field that is also a command-line flag."""
    return field(default_factory=lambda: default, metadata={"help": help, **argparse_arguments})


def parse_options(cls, description: str, argv=None):
    """The dataclass `cls` of options, filled from the command line. A list takes several values; a bool is a switch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(cls):
        default, extra = f.default_factory(), dict(f.metadata)
        text = extra.pop("help") + ("" if default in (None, [], False) else f" (default: {default})")
        if isinstance(default, bool):
            extra["action"] = "store_true"
        elif isinstance(default, list):
            extra["nargs"] = "+"
        else:
            extra.setdefault("type", str if default is None else type(default))
        positional = extra.pop("positional", False)
        parser.add_argument(f.name if positional else "--" + f.name.replace("_", "-"), default=default,
                            help=text.replace("%", "%%"), **extra)
    return cls(**vars(parser.parse_args(argv)))


def run_script(main, *expected: type[Exception]) -> None:
    """Run main(). An expected error, or one of the operating system's, becomes one sentence and exit code 2, no traceback."""
    try:
        main()
    except (DataError, OSError, *expected) as e:
        print(f"{os.path.basename(sys.argv[0])}: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
