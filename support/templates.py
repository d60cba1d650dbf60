"""Chat rendering: messages to token ids, the mask of output tokens built on the way."""
import bisect
import hashlib
import itertools
import json
import os
import shutil

from tokenizers import Tokenizer

from support.cli import DataError
from support.readers import SPAN_ROLES, Message, Sample

# What a token is; "output" where its true role is unknown.
TOKEN_ROLES = ("input", "output", *SPAN_ROLES)


class Renderer:
    """Turns a conversation into token ids, segment by segment, so that a prompt's ids are always a
    prefix of the full ids.

    directory: a HF checkpoint with tokenizer.json. template: "chatml" (<|im_start|>role\\n ...
    <|im_end|>\\n), "plain" (Role:\\n ... \\n\\n, where the tokenizer's eos token ends an
    assistant's turn), or "auto": chatml if the tokenizer has its tokens, else plain.
    """

    def __init__(self, directory: str, template: str = "auto"):
        file = os.path.join(directory, "tokenizer.json")
        if not os.path.isfile(file):
            raise DataError(f"{directory} holds no tokenizer.json; "
                            "copy it from the model's release.")
        with open(file, "rb") as f:
            self.fingerprint = hashlib.sha256(f.read()).hexdigest()
        self.directory = directory
        self.tokenizer = Tokenizer.from_file(file)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.bos = self.leading_special_ids()
        # From here on special tokens are placed as ids; the same characters inside a text are only
        # characters.
        self.tokenizer.encode_special_tokens = True

        start = self.tokenizer.token_to_id("<|im_start|>")
        end = self.tokenizer.token_to_id("<|im_end|>")
        has_chatml = start is not None and end is not None
        if template == "auto":
            template = "chatml" if has_chatml else "plain"
        self.template = template
        if template == "chatml":
            if not has_chatml:
                raise DataError(f"{file} has no <|im_start|> and <|im_end|>; use --template plain.")
            self.start = [start]
            self.end = end
            self.gap = self.encode("\n")
        else:
            self.start = []
            self.end = self.setting("eos_token_id")
            self.gap = self.encode("\n\n")
            if self.end is None:
                raise DataError(f"{directory} names no eos_token_id in config.json; "
                                "the plain template needs it to end a turn.")
        self.headers = {}
        self.vocab_size = self.setting("vocab_size")

    def leading_special_ids(self) -> list[int]:
        """The ids that the tokenizer itself puts before a text: usually none, or bos."""
        probe = self.tokenizer.encode("a")
        if 0 not in probe.special_tokens_mask:
            return []
        return probe.ids[:probe.special_tokens_mask.index(0)]

    def setting(self, key: str) -> int | None:
        """A number of the checkpoint's JSON files (the first, of a list)."""
        for name in ("generation_config.json", "config.json"):
            path = os.path.join(self.directory, name)
            if not os.path.isfile(path):
                continue
            with open(path, encoding="utf-8") as f:
                value = json.load(f).get(key)
            if value is not None:
                return value[0] if isinstance(value, list) else value
        return None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def header(self, role: str) -> list[int]:
        """The ids that open a turn."""
        if role not in self.headers:
            name = f"{role}\n" if self.template == "chatml" else f"{role.capitalize()}:\n"
            self.headers[role] = self.start + self.encode(name)
        return self.headers[role]

    def prompt(self, messages: list[Message]) -> list[int]:
        """The ids after which the assistant speaks."""
        ids, _ = self.render(messages)
        return ids + self.header("assistant")

    def encode_texts(self, samples: list[Sample]) -> list[list]:
        """The tokenizer's encodings of every text of some samples, made in parallel."""
        texts = [message.text for sample in samples for message in sample.messages]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        return [list(itertools.islice(encodings, len(sample.messages))) for sample in samples]

    def render(self, messages: list[Message], encodings=None) -> tuple[list[int], list[int]]:
        """(ids, roles), one of each per token. roles index TOKEN_ROLES: which tokens are output,
        and their true role where the sample knows it.

        encodings: those of the messages' texts, as encode_texts makes them.
        """
        if encodings is None:
            encodings = self.encode_texts([Sample("", messages)])[0]
        ids = list(self.bos)
        roles = [0] * len(ids)
        for message, encoding in zip(messages, encodings, strict=True):
            header = self.header(message.role)
            ends_with_id = self.template == "chatml" or message.role == "assistant"
            closing = [self.end] if ends_with_id else []
            ids += header + encoding.ids + closing + self.gap

            body_roles = [int(message.is_output)] * (len(encoding.ids) + len(closing))
            if message.is_output and message.role_spans:
                body_roles = token_roles(message, encoding.offsets) + [TOKEN_ROLES.index("format")]
            roles += [0] * len(header) + body_roles + [0] * len(self.gap)

        if self.vocab_size and ids and max(ids) >= self.vocab_size:
            raise DataError(f"{self.directory}: the tokenizer gives id {max(ids)}, but the model "
                            f"has {self.vocab_size} embeddings; the two do not belong together.")
        return ids, roles


def token_roles(message: Message, offsets) -> list[int]:
    """The role of the span in which each token's first visible character lies.

    offsets: (first character, end) of each token of the message's text.
    """
    span_ends = list(itertools.accumulate(len(text) for text, _ in message.role_spans))
    roles = []
    for start, end in offsets:
        while start < end - 1 and message.text[start].isspace():
            start += 1
        span = min(bisect.bisect(span_ends, start), len(span_ends) - 1)
        _, role = message.role_spans[span]
        roles.append(TOKEN_ROLES.index(role))
    return roles


def copy_tokenizer(source: str, target: str) -> None:
    """Copy the tokenizer files of a HF directory, so that the new one is complete."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt"):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
