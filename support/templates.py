"""Chat rendering: messages to token ids, the mask of output tokens built on the way."""
import bisect
import hashlib
import itertools
import json
import os
import shutil

from tokenizers import Tokenizer

from support.cli import DataError
from support.readers import Message, Sample


MARKS = ("input", "output", "reasoning", "format", "connecting")    # what a token is; "output" where its true role is unknown


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


def copy_tokenizer(source: str, target: str) -> None:
    """Copy the tokenizer files of a HF directory, so that the new one is complete."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                 "generation_config.json", "vocab.json", "merges.txt"):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
