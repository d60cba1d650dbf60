"""Chat rendering: messages to token ids, and which of them are output."""
import bisect
import hashlib
import itertools
import os
import shutil

from tokenizers import Tokenizer, processors

from support.chat_template import BREAK, DATE, NOT_A_PREFIX, ChatTemplate, has_chat_template
from support.cli import DataError
from support.readers import SPAN_ROLES, Message, Sample
from support.records import COPY_AGAIN, read_settings, read_text, reading

# What a token is; "output" where its true role is unknown.
TOKEN_ROLES = ("input", "output", *SPAN_ROLES)


class Renderer:
    """Turns conversations into token ids, and says which of them are output.

    directory: a HF checkpoint with tokenizer.json. template:
      "chatml"  <|im_start|>role\\n ... <|im_end|>\\n
      "plain"   Role:\\n ... \\n\\n, where the tokenizer's eos token ends an assistant's turn
      "raw"     the texts as they are, special tokens too: for prompts that are complete
      "auto"    the checkpoint's own chat template if it brings one; else chatml if the tokenizer
                has its tokens; else plain
    chatml and plain are tokenized segment by segment, so that a prompt's ids are always a prefix of
    the full ids. The checkpoint's own template is rendered and tokenized as transformers does it.
    native_calls: refuse a checkpoint whose own template writes no tool calls.
    """

    def __init__(self, directory: str, template: str = "auto", native_calls: bool = False):
        self.directory = directory
        self.load_files()
        self.chat_template = None
        if template == "auto" and has_chat_template(directory):
            self.use_chat_template()
        else:
            self.use_segments(template)
        self.native_calls = native_calls
        if native_calls:
            self.template += ", native calls"
            if not self.chat_template or not self.chat_template.writes_calls():
                raise DataError(f"{directory} has no chat template that writes tool calls; "
                                "leave out --native-calls.")

    @property
    def dated(self) -> dict:
        """{DATE: the day} where the checkpoint's own template has printed it, else {}."""
        own = self.chat_template
        return {DATE: own.day.isoformat()} if own and own.prints_day else {}

    def load_files(self) -> None:
        """The tokenizer, and the settings of the checkpoint that have to do with tokens."""
        self.file = os.path.join(self.directory, "tokenizer.json")
        if not os.path.isfile(self.file):
            raise DataError(f"{self.directory} holds no tokenizer.json; {COPY_AGAIN}.")
        content = read_text(self.file)
        with open(self.file, "rb") as f:
            self.fingerprint = hashlib.sha256(f.read()).hexdigest()
        with reading(self.file, COPY_AGAIN):
            self.tokenizer = Tokenizer.from_str(content)
            self.tokenizer.no_padding()
            self.tokenizer.no_truncation()
            probe = self.tokenizer.encode("a")
        # what the tokenizer itself puts before a text: usually nothing, or bos
        self.bos = []
        if 0 in probe.special_tokens_mask:
            self.bos = probe.ids[:probe.special_tokens_mask.index(0)]
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_tokens = {i: t.content for i, t in added.items() if t.special}

        self.vocab_size = None
        self.eos_ids = []
        for name in ("config.json", "generation_config.json"):
            path = os.path.join(self.directory, name)
            settings = read_settings(path)
            self.vocab_size = next(iter(token_ids(settings, "vocab_size", path)), self.vocab_size)
            self.eos_ids = token_ids(settings, "eos_token_id", path) or self.eos_ids

    def encode(self, text: str):
        """The tokenizer's encoding of a text: ids, and offsets in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list:
        """The tokenizer's encodings of some texts, made in parallel."""
        with reading(self.file, COPY_AGAIN):
            return self.tokenizer.encode_batch(texts, add_special_tokens=False)

    def prompt(self, messages: list[Message], tools: list | None = None) -> list[int]:
        """The ids after which the assistant speaks. tools: for the checkpoint's own template."""
        if self.chat_template:
            text = self.chat_template.write_prompt(messages, tools)
            encoding = self.encode(text)
            is_kept = kept_tokens(text, encoding.offsets)
            return list(itertools.compress(encoding.ids, is_kept))
        ids, _ = self.render(messages)
        return ids + self.header("assistant")

    def render(self, messages: list[Message], tools=None) -> tuple[list[int], list[int]]:
        """(ids, roles), one of each per token. roles index TOKEN_ROLES: which tokens are output,
        and their true role where the sample knows it."""
        (ids, roles, _), = self.render_batch([Sample("", messages, tools)])
        return ids, roles

    def render_batch(self, samples: list[Sample]):
        """Yield (ids, roles, notes) of each sample; texts are tokenized in parallel.

        notes: sentences on what is odd about how the sample is rendered. Raises DataError, naming
        the sample, where the checkpoint's own template refuses it.
        """
        render = self.render_chats if self.chat_template else self.render_segments
        for ids, roles, notes in render(samples):
            if self.vocab_size and ids and max(ids) >= self.vocab_size:
                raise DataError(
                    f"{self.directory}: the tokenizer gives id {max(ids)}, but the model has "
                    f"{self.vocab_size} embeddings; the two do not belong together.")
            yield ids, roles, sorted(set(notes))

    def output_pieces(self, sample: Sample) -> list[list[str]]:
        """The text of each output token, one list per scored turn."""
        turns = []
        if not self.chat_template:
            for message in sample.messages:
                if message.is_output:
                    offsets = self.encode(message.text).offsets
                    turns.append([*pieces(message.text, 0, offsets), "⏎\n"])
            return turns
        text, spans, _ = self.chat_template.write_sample(sample)
        encoding = self.encode(text)
        ids = encoding.ids
        offsets = encoding.offsets
        for _, start, end in spans:
            first, last = self.output_range(text, ids, offsets, start, end)
            is_kept = kept_tokens(text, offsets[first:last])
            turn = itertools.compress(pieces(text, start, offsets[first:last]), is_kept)
            turns.append([piece.replace(BREAK, "") for piece in turn])
        return turns

    # ----------------------------------------------------------------------------------------------
    # chatml and plain: segment by segment

    def use_segments(self, template: str) -> None:
        # special tokens are placed as ids; the same characters inside a text are only characters
        self.tokenizer.encode_special_tokens = template != "raw"
        start = self.tokenizer.token_to_id("<|im_start|>")
        end = self.tokenizer.token_to_id("<|im_end|>")
        has_chatml = start is not None and end is not None
        if template == "auto":
            template = "chatml" if has_chatml else "plain"
        self.template = template
        if template == "chatml":
            if not has_chatml:
                raise DataError(f"{self.file} has no <|im_start|> and <|im_end|>; "
                                "use --template plain.")
            self.start = [start]
            self.end = end
            self.gap = self.encode("\n").ids
        else:
            if not self.eos_ids:
                raise DataError(f"{self.directory} names no eos_token_id in config.json; "
                                "the plain template needs it to end a turn.")
            self.start = []
            self.end = self.eos_ids[0]
            self.gap = [] if template == "raw" else self.encode("\n\n").ids
        self.stop_ids = {self.end}              # ids after which the assistant has spoken
        self.headers = {}

    def header(self, role: str) -> list[int]:
        """The ids that open a turn."""
        if self.template == "raw":
            return []
        if role not in self.headers:
            name = f"{role}\n" if self.template == "chatml" else f"{role.capitalize()}:\n"
            self.headers[role] = self.start + self.encode(name).ids
        return self.headers[role]

    def render_segments(self, samples: list[Sample]):
        """Yield (ids, roles, notes) of each sample."""
        texts = []
        for sample in samples:
            texts += [message.text for message in sample.messages]
        encodings = iter(self.encode_batch(texts))
        for sample in samples:
            ids = list(self.bos)
            roles = [0] * len(ids)
            for message in sample.messages:
                encoding = next(encodings)
                header = self.header(message.role)
                ends_with_id = self.template == "chatml" or message.role == "assistant"
                closing = [self.end] if ends_with_id else []
                ids += header + encoding.ids + closing + self.gap

                body_roles = [int(message.is_output)] * (len(encoding.ids) + len(closing))
                if message.is_output and message.role_spans:
                    body_roles = token_roles(message, encoding.offsets)
                    body_roles.append(TOKEN_ROLES.index("format"))
                roles += [0] * len(header) + body_roles + [0] * len(self.gap)
            yield ids, roles, []

    # ----------------------------------------------------------------------------------------------
    # The checkpoint's own chat template: it writes the whole text, which is then tokenized

    def use_chat_template(self) -> None:
        self.chat_template = ChatTemplate(self.directory, list(self.special_tokens.values()))
        self.template = f"of the checkpoint ({self.chat_template.fingerprint[:8]})"
        # the template writes its own bos; a tokenizer's post-processor would trim the offsets
        self.bos = []
        self.tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

        # what ends an answer is found by rendering one
        self.end = self.eos_ids[0] if self.eos_ids else None
        try:
            ids, roles = self.render([Message("user", "a"), Message("assistant", "b")])
            output = list(itertools.compress(ids, roles))
            if output and output[-1] in self.special_tokens:
                self.end = output[-1]
        except DataError:
            pass                                # it wants more than these two turns
        if self.end is None:
            raise DataError(f"{self.directory} names no eos_token_id in config.json, "
                            "and its chat template ends an answer with no special token.")
        self.stop_ids = {self.end, *self.eos_ids}

    def render_chats(self, samples: list[Sample]):
        """Yield (ids, roles, notes) of each sample."""
        written = []
        for sample in samples:
            with reading(f"sample {sample.id!r}", "fix or remove the record"):
                written.append(self.chat_template.write_sample(sample))
        encodings = self.encode_batch([text for text, _, _ in written])
        for (text, spans, notes), encoding in zip(written, encodings, strict=True):
            ids = encoding.ids
            offsets = encoding.offsets          # (start, end) of each token in the text
            roles = [0] * len(ids)
            for message, start, end in spans:
                first, last = self.output_range(text, ids, offsets, start, end)
                roles[first:last] = span_roles(message, text, start, offsets[first:last])
                if not self.is_prefix(text, ids, offsets, start, first):
                    notes.append(NOT_A_PREFIX)
            is_kept = kept_tokens(text, offsets)
            ids = list(itertools.compress(ids, is_kept))
            yield ids, list(itertools.compress(roles, is_kept)), notes

    def output_range(self, text: str, ids, offsets, start: int, end: int) -> tuple[int, int]:
        """The tokens of text[start:end], without white space after the one that ends the turn."""
        first = bisect.bisect_right(offsets, start, key=lambda offset: offset[1])
        last = bisect.bisect_right(offsets, end, key=lambda offset: offset[1])
        closing = last
        while closing > first and text[slice(*offsets[closing - 1])].isspace():
            closing -= 1
        has_end_token = closing > first and self.is_special(text, ids, offsets, closing - 1)
        return first, closing if has_end_token else last

    def is_special(self, text: str, ids, offsets, k: int) -> bool:
        """Whether token k is a special token that stands in the text, not <unk> for another."""
        return self.special_tokens.get(ids[k]) == text[slice(*offsets[k])].strip()

    def is_prefix(self, text: str, ids, offsets, start: int, first: int) -> bool:
        """Whether text[:start] alone is tokenized as it is here, where token `first` follows it.

        Special tokens cut a text, so that only what follows the last of them is compared.
        """
        cut = first
        while cut > 0 and not self.is_special(text, ids, offsets, cut - 1):
            cut -= 1
        cut = max(0, cut - 1)
        cut_at = offsets[cut][0] if cut else 0
        return self.encode(text[cut_at:start]).ids == ids[cut:first]


def token_ids(settings: dict, key: str, path: str) -> list[int]:
    """One or more whole numbers of a checkpoint's JSON file; [] where it has none."""
    value = settings.get(key)
    if value is None:
        return []
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise DataError(f"{path}: {key} is {value!r}, not a whole number; {COPY_AGAIN}.")
    return numbers


def pieces(text: str, start: int, offsets) -> list[str]:
    """The text of each token, from `start` on; white space that no token covers is the next's."""
    found = []
    for _, end in offsets:
        found.append(text[start:end])
        start = max(start, end)
    return found


def kept_tokens(text: str, offsets) -> list[bool]:
    """False for the tokens of BREAK, which has done its work once a text is tokenized."""
    if BREAK not in text:
        return [True] * len(offsets)
    return [set(text[start:end]) != {BREAK} for start, end in offsets]


def span_roles(message: Message, text: str, start: int, offsets) -> list[int]:
    """The roles of a turn's tokens, where the template has put the message's text unchanged."""
    position = text.find(message.text, start) if message.role_spans else -1
    if position < 0:
        return [TOKEN_ROLES.index("output")] * len(offsets)
    length = len(message.text)
    inside = []
    before = 0
    for first, end in offsets:
        if end <= position:
            before += 1
        elif first < position + length:
            inside.append((max(0, first - position), min(length, end - position)))
    after = len(offsets) - before - len(inside)
    around = TOKEN_ROLES.index("format")
    return [around] * before + token_roles(message, inside) + [around] * after


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


# --------------------------------------------------------------------------------------------------
# For people, and for the model that is made

def highlighted(renderer: Renderer, sample: Sample, colour: bool) -> str:
    """A rendered sample, special tokens and all, its output in colour or in brackets."""
    before, after = ("\033[30;42m", "\033[0m") if colour else ("⟦", "⟧")
    ids, roles = renderer.render(sample.messages, sample.tools)
    text = ""
    for is_output, tokens in itertools.groupby(zip(ids, roles, strict=True), lambda t: t[1] > 0):
        piece = renderer.tokenizer.decode([i for i, _ in tokens], skip_special_tokens=False)
        # what a terminal would obey is shown instead
        piece = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece)
        text += before + piece + after if is_output else piece
    return text


def copy_tokenizer(source: str, target: str) -> None:
    """Copy the tokenizer files of a HF directory, so that the new one is complete."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "chat_template.jinja", "generation_config.json", "vocab.json", "merges.txt"):
        if os.path.isfile(os.path.join(source, name)):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    if os.path.isdir(os.path.join(source, "additional_chat_templates")):
        shutil.copytree(os.path.join(source, "additional_chat_templates"),
                        os.path.join(target, "additional_chat_templates"), dirs_exist_ok=True)
