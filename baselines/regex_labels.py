"""Format tokens found by regular expressions: the labels of `--method regex` and `regex+rft`.

    labels = regex_labels(dataset)      # (output tokens,) bool, False for format tokens

Unlike SHAD's they come from somebody's knowledge of the formats, and know nothing of wording that
every sample repeats. The expressions are this project's own, not the paper's.
"""
import itertools
import re

import numpy as np
from tqdm import tqdm

from data import Dataset
from support.distributed import rank_and_world
from support.readers import Message
from support.templates import TOKEN_ROLES, token_roles

# JSON: brackets, separators and quotes are format, and so are the fixed keys of a call; what stands
# between two quotes is not, which the group leaves out.
JSON = r'"(?:name|arguments|parameters)"(?=\s*:)|[\[\]{}:,\s]+|"((?:[^"\\]|\\.)*)"'

# (where in an output text, what is format there); a group in the first narrows it to the group, a
# group in the second is what is not format
TABLE = {
    # APIGen, messages with tool calls, ShareGPT's function calls: the JSON that ends a text ...
    "calls": (r'(?:\[\s*)?\{\s*"name"\s*:.*\}(?:\s*\])?\s*(?:</tool_call>\s*)?\Z', JSON),
    # ... and what chat templates write around it
    "marks of calls": (r"\A.*\Z", r"\s*</?tool_call>\s*|\[TOOL_CALLS\]|<\|python_tag\|>"),
    # ToolBench and the toy: the words that begin a line, and the JSON of the arguments
    "Thought / Action": (r"\A.*\Z", r"(?m)^(?:Thought|Action Input|Action):[ \t]*|\n(?=Action)"),
    "Action Input": (r"^Action Input:(.*)", JSON),
    # ShareGPT's chats: what Markdown puts before and around its words
    "Markdown": (r"\A.*\Z", r"(?m)^(?:```.*|#+ |[-*] |\d+\. )|\*\*"),
}


def format_spans(text: str) -> list[tuple[str, str]]:
    """(piece, role) pairs that make up an output text; the roles are "format" and "reasoning"."""
    is_format = np.zeros(len(text), bool)
    for where, what in TABLE.values():
        for part in re.finditer(where, text, re.DOTALL | re.MULTILINE):
            first, end = part.span(part.re.groups)      # of the group, or of the whole match
            for match in re.compile(what).finditer(text, first, end):
                is_format[match.start():match.end()] = True
                content, content_end = match.span(match.re.groups)
                if match.re.groups:
                    is_format[content:content_end] = False

    edges = np.flatnonzero(np.diff(is_format)) + 1
    bounds = [0, *edges.tolist(), len(text)]
    spans = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        if start < end:
            spans.append((text[start:end], "format" if is_format[start] else "reasoning"))
    return spans


def regex_labels(dataset: Dataset) -> np.ndarray:
    """(output tokens,) bool in data order: True for what no expression calls format.

    The first visible character of a token decides; the end of a turn is format.
    """
    is_reasoning = np.zeros(dataset.output_starts[-1], bool)
    rank, _ = rank_and_world()
    for i in tqdm(dataset.kept, "regular expressions", unit="sample", disable=rank > 0, delay=1):
        labels = []
        for turn in filter(None, dataset.renderer.output_pieces(dataset.samples[i])):
            *said, _ = turn
            text = "".join(said)
            ends = list(itertools.accumulate(map(len, said)))
            message = Message("assistant", text, format_spans(text))
            roles = token_roles(message, zip([0, *ends], ends, strict=False))
            labels += [TOKEN_ROLES[role] == "reasoning" for role in roles]
            labels.append(False)                        # the end of the turn
        is_reasoning[dataset.output_starts[i]:dataset.output_starts[i + 1]] = labels
    return is_reasoning
