"""The chat template that a checkpoint brings along: what it writes, and where the output stands.

It is run as transformers runs it, so that the text is what apply_chat_template gives.
"""
import datetime
import glob
import hashlib
import importlib.metadata
import json
import os
import re

from support.cli import DataError
from support.readers import Message, Sample
from support.records import COPY_AGAIN, read_settings, read_text, reading

OLDEST_SAFE_JINJA2 = (3, 1, 6)      # templates could leave the sandbox of older versions
OR_ELSE = "or use --template chatml or plain"

# What transformers hands to a template by name, if the tokenizer's files define it.
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                  "mask_token")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Put into a special token that stands in somebody's text, so that it stays text. Unicode keeps
# this character out of all texts.
BREAK = "\ufdd0"

# What labels, checkpoints and outputs are known by besides, where the template prints the date.
DATE = "date in the chat template (SHAD_RFT_DATE sets it)"

# What is said of a sample that is not rendered as one would think.
REWRITTEN = "the chat template rewrites earlier turns, which are therefore not scored"
NOT_A_PREFIX = "the whole conversation does not begin with the tokens of its prompt"
LEFT_OUT = "the chat template leaves out tools, calls or answers; --template chatml writes them"


class ChatTemplate:
    """A checkpoint's own chat template. special_tokens: those of its tokenizer, as text."""

    def __init__(self, directory: str, special_tokens: list[str]):
        self.directory = directory
        config = read_settings(os.path.join(directory, "tokenizer_config.json"))
        texts = template_texts(directory, config)
        if "added_tokens_decoder" not in config:        # as older versions of transformers wrote
            config |= read_settings(os.path.join(directory, "special_tokens_map.json"))
        self.variables = {}
        for name in SPECIAL_TOKENS:
            token = config.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None:
                self.variables[name] = str(token)
        content = json.dumps([texts, self.variables])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()
        self.day = today()          # one for the whole run, even beyond midnight
        self.prints_day = False
        self.templates = compiled(directory, texts, self.strftime_now)
        longest_first = sorted((t for t in special_tokens if len(t) > 1), key=len, reverse=True)
        self.special_token = re.compile("|".join(map(re.escape, longest_first)) or r"\Z.")

    def strftime_now(self, format: str) -> str:
        """What a template asks for the date; one that asks for the time is given midnight."""
        self.prints_day = True
        return self.day.strftime(format)

    def write(self, turns: list[dict], tools=None, add_generation_prompt=False) -> str:
        """What transformers' apply_chat_template(tokenize=False) gives. Raises DataError for a
        conversation that the template refuses."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        turns = [named_reasoning(turn) for turn in turns]
        arguments = {"tools": tools, "documents": None, **self.variables,
                     "add_generation_prompt": add_generation_prompt}
        try:
            text = self.templates[name].render(messages=turns, **arguments)
            text.encode()           # it may write half a character, which no tokenizer takes
            return text
        except Exception as e:      # the template's own, or of any operation it tries on the turns
            reason = " ".join(str(e).split()) or type(e).__name__
        # Some templates need a content, which a turn of tool calls may lack.
        if all("content" in turn for turn in turns):
            raise DataError(f"the chat template of {self.directory} refuses the conversation "
                            f"({reason[:300]}); remove it, {OR_ELSE}.")
        turns = [{"content": "", **turn} for turn in turns]
        return self.write(turns, tools, add_generation_prompt)

    def write_prompt(self, messages: list[Message], tools=None) -> str:
        """The text after which the assistant speaks."""
        turns = [turn_of(message) for message in messages if message.turn != {}]
        turns = self.as_plain_text(turns)
        return self.write(turns, self.as_plain_text(tools), add_generation_prompt=True)

    def write_sample(self, sample: Sample) -> tuple[str, list, list[str]]:
        """(text, spans, notes): the whole conversation, (message, start, end) of what the assistant
        says in each scored turn, and sentences on what is odd about it.

        A turn's prompt, and the conversation up to the turn's end, are rendered on their own. Where
        both are prefixes of the whole, the turn stands between their ends. Else the template has
        rewritten it since, as Qwen 3 does by dropping its reasoning.
        """
        messages = [message for message in sample.messages if message.turn != {}]
        turns = self.as_plain_text([turn_of(message) for message in messages])
        tools = self.as_plain_text(sample.tools)
        text = self.write(turns, tools)
        spans = []
        notes = [] if has_names(text, tools or []) else [LEFT_OUT]
        for k, message in enumerate(messages):
            if not message.is_output:
                continue
            start, end, is_prefix = self.span(text, turns, k, tools)
            if not is_prefix:
                notes.append(NOT_A_PREFIX)
            if start is None or end is None:
                notes.append(REWRITTEN)
            elif start < end and has_names(text[start:end], turns[k].get("tool_calls") or []):
                spans.append((message, start, end))
            else:
                notes.append(LEFT_OUT)
        if not spans:
            raise DataError(f"nothing is left to learn from it: {'; '.join(notes)}; "
                            f"remove it, {OR_ELSE}.")
        return text, spans, notes

    def span(self, text: str, turns: list[dict], k: int, tools):
        """(start, end, is the prompt a prefix of `text`?) of turn k; None for what is not to be
        found, since the template has rewritten it."""
        start = self.prefix_length(text, turns[:k], tools, add_generation_prompt=True)
        if k < len(turns) - 1:
            return start, self.prefix_length(text, turns[:k + 1], tools), True
        if start is not None:
            return start, len(text), True
        # Mistral's writes the system prompt only before there is an answer. Still, the answer
        # begins where another answer would make a difference.
        other = {"role": "assistant", "content": BREAK}
        other_text = self.write([*turns[:k], other], tools)
        return len(os.path.commonprefix([text, other_text])), len(text), False

    def prefix_length(self, text: str, *arguments, **more) -> int | None:
        """The length of what write(...) gives, if `text` begins with it."""
        try:
            prefix = self.write(*arguments, **more)
        except DataError:
            return None
        return len(prefix) if text.startswith(prefix) else None

    def writes_calls(self) -> bool:
        """Whether the template writes an assistant's tool calls."""
        function = {"name": "probe", "arguments": {}}
        call = {"id": "call00000", "type": "function", "function": function}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            return "probe" in self.write([{"role": "user", "content": "a"}, answer])
        except DataError:
            return False

    def as_plain_text(self, value):
        """A turn or a list of tools in which no text holds a special token."""
        if isinstance(value, str):
            return self.special_token.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        if isinstance(value, list):
            return [self.as_plain_text(element) for element in value]
        if isinstance(value, dict):
            return {key: self.as_plain_text(element) for key, element in value.items()}
        return value


def turn_of(message: Message) -> dict:
    return message.turn or {"role": message.role, "content": message.text}


def today() -> datetime.date:
    """The day of this run: that of SHAD_RFT_DATE in the environment, or the current one."""
    current = datetime.date.today().isoformat()
    with reading("SHAD_RFT_DATE in the environment", "give a day such as 2026-07-01, or unset it"):
        return datetime.date.fromisoformat(os.environ.get("SHAD_RFT_DATE") or current)


def has_names(text: str, functions: list[dict]) -> bool:
    """Whether a text names all functions of some tools, or of some tool calls."""
    names = [function.get("function", function).get("name", "") for function in functions]
    return all(name in text for name in names)


def named_reasoning(turn: dict) -> dict:
    """A turn without empty entries, its reasoning under every name that templates know."""
    turn = {key: value for key, value in turn.items() if value is not None}
    reasoning = next((turn[key] for key in REASONING_KEYS if key in turn), None)
    if reasoning is None:
        return turn
    return {"thinking": reasoning, **turn, "reasoning_content": reasoning}


# --------------------------------------------------------------------------------------------------
# The checkpoint's files

def has_chat_template(directory: str) -> bool:
    config = read_settings(os.path.join(directory, "tokenizer_config.json"))
    return bool(template_texts(directory, config))


def template_texts(directory: str, config: dict) -> dict[str, str]:
    """{name: template} of a checkpoint: one named "default", perhaps one named "tool_use"."""
    more = os.path.join(glob.escape(directory), "additional_chat_templates", "*.jinja")
    files = {"default": os.path.join(directory, "chat_template.jinja")}
    for path in sorted(glob.glob(more)):
        files[os.path.basename(path).removesuffix(".jinja")] = path
    texts = {name: read_text(path) for name, path in files.items() if os.path.exists(path)}
    if not texts:
        with reading(os.path.join(directory, "tokenizer_config.json"), COPY_AGAIN):
            texts = config.get("chat_template") or {}
            if isinstance(texts, str):
                texts = {"default": texts}
            elif isinstance(texts, list):
                texts = {entry["name"]: entry["template"] for entry in texts}
            # TypeError if it is no text
            texts = {"" + name: "" + text for name, text in texts.items()}
    if texts and "default" not in texts:
        raise DataError(f"{directory} has chat templates named {', '.join(texts)} and no default; "
                        f"{COPY_AGAIN}, {OR_ELSE}.")
    if not all(text.strip() for text in texts.values()):
        raise DataError(f"the chat template of {directory} is empty; {COPY_AGAIN}, {OR_ELSE}.")
    return texts


def compiled(directory: str, texts: dict[str, str], strftime_now) -> dict:
    """{name: jinja template}."""
    try:
        version = re.findall(r"\d+", importlib.metadata.version("jinja2"))
        is_safe = tuple(map(int, version)) >= OLDEST_SAFE_JINJA2
        environment = sandbox(strftime_now) if is_safe else None
    except ImportError:
        is_safe = False
    if not is_safe:
        raise DataError(f"{directory} has a chat template, which needs jinja2 3.1.6 or newer: "
                        f"pip install -U jinja2, {OR_ELSE}.")
    try:
        return {name: environment.from_string(text) for name, text in texts.items()}
    except Exception as e:              # a TemplateError, or of any constant that it computes
        reason = " ".join(str(e).split())
        raise DataError(f"the chat template of {directory} is broken ({reason[:300]}); "
                        f"{COPY_AGAIN}, {OR_ELSE}.") from None


def sandbox(strftime_now):
    """What transformers runs templates in: they can neither call Python nor change their input."""
    import jinja2.ext  # here, since only a chat template needs it
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks an assistant's output; here it only opens a scope."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """jinja's own would escape HTML."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
