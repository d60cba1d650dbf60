"""Tables for the terminal, pages for the browser.

All of it takes plain data: text, numbers, arrays. A page is one file without scripts or references
to others, fits a phone, and follows the reader's light or dark mode (report.css).
"""
import html
import re
from pathlib import Path

import numpy as np

from support.figures import (
    band,
    curves_svg,
    histogram_svg,
    line_plot,
    mean_interval,
    roc_svg,
)
from support.files import replacing

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

# The kinds of token on a page. Format tokens are field markers, JSON keys, brackets and quotes;
# connecting tokens are the words of the template between them.
KINDS = {"reasoning": "reasoning", "format": "boilerplate: format",
         "connecting": "boilerplate: connecting"}
FORMAT = re.compile(
    r'^[ \t]*[A-Z][\w ]{0,30}:|"[^"\n]{0,40}"\s*:|[{}\[\]"][:,]*|\s+', re.MULTILINE)


def format_table(rows: list[list[str]]) -> str:
    """Rows as text in columns: the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def comparison_rows(summaries: dict[str, dict]) -> list[list[str]]:
    """A header, and one row per model: its losses by true role and its success, held-in / held-out.

    `summaries` are those of the toy benchmark, {model: {"losses", "success"}}.
    """
    rows = [["held-in / held-out", "reasoning loss", "boilerplate loss", "success"]]
    for name, summary in summaries.items():
        row = [name]
        for role in ("reasoning", "boilerplate"):
            held_in = summary["losses"]["held_in"][role]["loss"]
            held_out = summary["losses"]["held_out"][role]["loss"]
            row.append(f"{held_in:.3f} / {held_out:.3f}")
        success = summary["success"]
        row.append(f"{success['held_in']:.1%} / {success['held_out']:.1%}")
        rows.append(row)
    return rows


def mean_rows(results: dict[str, dict[str, list]], forms: dict[str, str]) -> list[list[str]]:
    """A header, and one row per method: mean and 95 % interval of each column.

    `results` are {method: {column: a value per run}}, `forms` {column: its format}, as ".1%" or,
    for differences, "+.3f".
    """
    rows = [["method", *forms]]
    for name, columns in results.items():
        row = [name]
        for column, form in forms.items():
            mean, half = mean_interval(columns[column])
            text = f"{mean:{form}}"
            if len(columns[column]) > 1:
                text += f" \N{PLUS-MINUS SIGN} {half:{form.lstrip('+')}}"
            row.append(text.replace("-", "\N{MINUS SIGN}"))
        rows.append(row)
    return rows


def table_html(rows: list[list[str]]) -> str:
    """Rows as an HTML table, the first of them its header."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>\n")
    return f'<div class="table"><table>\n{"".join(lines)}</table></div>\n'


def summary_html(text: str) -> str:
    """The lines of a summary; on a narrow screen they wrap with a hanging indent."""
    lines = "".join(f"<div>{html.escape(line)}</div>" for line in text.splitlines())
    return f'<div class="summary">{lines}</div>\n'


def figure_html(content: str, caption: str, command: str = "") -> str:
    """A figure or table (HTML) with its caption (text) and the command it comes from."""
    source = f" <code>{html.escape(command)}</code>" if command else ""
    caption = f'<figcaption class="note">{html.escape(caption)}{source}</figcaption>'
    return f"<figure>\n{content}{caption}\n</figure>\n"


def choice_html(name: str, bodies: dict[str, str]) -> str:
    """Radio buttons to choose one of {title (text): body (HTML)}; the name is unique on a page."""
    parts = []
    for i, (title, body) in enumerate(bodies.items()):
        checked = "" if i else " checked"
        parts.append(
            f'<input type="radio" name="{name}" id="{name}{i}"{checked}>'
            f'<label for="{name}{i}">{html.escape(title)}</label>\n<section>\n{body}</section>\n'
        )
    return f'<div class="choice">\n{"".join(parts)}</div>\n'


def write_page(path: str, title: str, body: str) -> None:
    """Write one self-contained HTML file; `title` is text, `body` is HTML."""
    title = html.escape(title)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{title}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )
    with replacing(path) as f:
        f.write(page)


# -------------------------------------------------------------------------------------------------
# Samples whose output tokens are coloured by kind

def split_pieces(text: str, offsets: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """(text, is format) of each token of one output message.

    `offsets` are the tokens' (start, end) in `text`, as `tokenizers` gives them. The pieces tile
    the text: white space that no token covers goes with the token that follows.
    """
    is_format = np.zeros(len(text) + 1, bool)               # of each character, and of the end
    for match in FORMAT.finditer(text):
        is_format[match.start():match.end()] = True

    pieces = []
    start = 0
    for _, end in offsets:
        piece = text[start:end]
        spaces = len(piece) - len(piece.lstrip())
        first = start if spaces == len(piece) else start + spaces
        pieces.append((piece, bool(is_format[first])))
        start = max(start, end)
    return pieces


def key_html(kinds: dict[str, str]) -> str:
    """What the colours of tokens mean, {kind: text}."""
    spans = [f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in kinds.items()]
    return f'<p class="key">{"".join(spans)}</p>\n'


def sample_html(name: str, given: str, tokens: list[tuple[str, str, str]]) -> str:
    """One sample: its name, its input, and its output tokens (text, kind, hover).

    A kind is a class of report.css, such as those of KINDS. `hover` is shown while the pointer
    rests on the token, or once it is tapped. All of it is text, not HTML.
    """
    spans = []
    for text, kind, hover in tokens:
        title = html.escape(hover).replace("\n", "&#10;")
        spans.append(
            f'<span class="{kind}" title="{title}" tabindex="-1">{html.escape(text)}</span>'
        )
    return (
        f'<div class="sample"><div class="name">{html.escape(name)}</div>'
        f'<div class="input">{html.escape(given)}</div>'
        f'<div class="output">{"".join(spans)}</div></div>\n'
    )


def labels_body(
    summary_text: str, shares_text: str, threshold: float, difference: np.ndarray,
    is_reasoning: np.ndarray, samples_html: str, command: str = "",
) -> str:
    """The body of labels.html.

    `summary_text` is the run's summary and `shares_text` the share of each kind among the tokens
    shown; `difference` (n,) and `is_reasoning` (n,) are those of all output tokens, `samples_html`
    is the samples from `sample_html`, joined, and `command` is what made them.
    """
    caption = (
        "LD = loss of the tuned model \N{MINUS SIGN} loss of the base model, in nats, of all "
        f"{len(difference):,} output tokens, clipped to \N{PLUS-MINUS SIGN}8. Heights are square "
        "roots of counts, or the peak would hide the rest."
    )
    return (
        f"{summary_html(summary_text)}"
        "<h2>Loss difference</h2>\n"
        f"{figure_html(histogram_svg(difference, is_reasoning), caption, command)}"
        f"<h2>Samples</h2>\n{key_html(KINDS)}"
        f'<p class="note">Of the tokens below: {html.escape(shares_text)}. SHAD tells reasoning '
        f"(LD &gt; {threshold:g}) from boilerplate; format and connecting are told apart by the "
        "shape of the text. Point at a token, or tap it, for its losses.</p>\n"
        f"{samples_html}"
    )


def truth_html(difference: np.ndarray, is_reasoning: np.ndarray, note: str, command="") -> str:
    """SHAD against the true roles: LD (n,) of the truly reasoning tokens (n,) and of the others.

    `note` says which tokens these are.
    """
    caption = (
        f"Histogram: LD = loss of the tuned model \N{MINUS SIGN} loss of the base model, in nats, "
        "clipped to \N{PLUS-MINUS SIGN}8, by the tokens' true roles; heights are square roots of "
        "counts. ROC curve: the tokens that a threshold on LD calls reasoning; the dot is the "
        f"paper's threshold, 0. {note}"
    )
    panels = histogram_svg(difference, is_reasoning) + roc_svg(difference, is_reasoning)
    return figure_html(f'<div class="panels">\n{panels}</div>\n', caption, command)


def runs_note(runs: dict[str, list]) -> str:
    """What a caption says of {name: its runs}, where any has several."""
    counts = sorted({len(of_name) for of_name in runs.values()})
    if counts == [1]:
        return ""
    return f" Means with 95 % intervals over {' or '.join(map(str, counts))} seeds."


def held_out_html(histories: dict[str, list[dict[int, dict]]], command: str = "") -> str:
    """Held-out success and losses over training: {name: {step: summary of the toy} of each run}.

    Several runs are shown as their mean and its 95 % interval.
    """
    figures = {
        "Success": lambda summary: 100 * summary["success"]["held_out"],
        "Reasoning tokens": lambda summary: summary["losses"]["held_out"]["reasoning"]["loss"],
        "Boilerplate tokens": lambda summary: summary["losses"]["held_out"]["boilerplate"]["loss"],
    }
    panels = ""
    for title, figure in figures.items():
        lines = {}
        for name, runs in histories.items():
            steps = sorted(runs[0])
            x, *line = band(steps, [[figure(run[step]) for step in steps] for run in runs])
            most = 100 if title == "Success" else None
            lines[name] = (x, *np.clip(line, 0, most))
        label = "right calls (%)" if title == "Success" else "loss (nats)"
        log_y = title == "Boilerplate tokens"       # it falls to a tenth within the first steps
        panels += line_plot(title, "step", label, lines, log_y)
    caption = (
        "Held-out tasks have other tools, arguments, values and wordings: the words of a right "
        "call can only be copied from the request. Losses are by the true role of the tokens."
    )
    caption += runs_note(histories)
    panels = f'<div class="panels">\n{panels}</div>\n'
    return f"<h2>Held-out tasks over training</h2>\n{figure_html(panels, caption, command)}"


def training_html(runs: dict[str, list[list[dict]]], command: str = "") -> str:
    """Training curves by group of tokens: {name: metrics of each run}, a dict per step.

    Several runs are shown as their mean and its 95 % interval.
    """
    panels = ""
    for group in ("reasoning", "boilerplate"):
        curves = {}
        for name, metrics in runs.items():
            curves[name] = [[step[f"loss_{group}"] for step in run] for run in metrics]
        panels += curves_svg(f"{group.capitalize()} tokens", curves)
    panels = f'<div class="panels">\n{panels}</div>\n'
    caption = (
        "Losses on the training data, of SHAD's two groups. Each curve is a moving average over a "
        f"fortieth of the steps.{runs_note(runs)}"
    )
    return f"<h2>Training curves</h2>\n{figure_html(panels, caption, command)}"


def report_html(
    runs: dict[str, list[dict]], summaries: dict[str, dict], command: str = "", histories=None,
) -> str:
    """The comparison: training curves of {name: metrics} by group of tokens, and the table.

    histories: those of held_out_html, where models were evaluated over training. `command` is what
    made them.
    """
    curves = {name: [metrics] for name, metrics in runs.items()}
    table_caption = (
        "Mean loss in nats by the true role of the tokens, and the share of calls that are exactly "
        "right. Held-in tasks are made of the words and phrases of the training data; held-out "
        "tasks have other tools, arguments, values and wordings."
    )
    return (
        f"{held_out_html(histories, command) if histories else ''}"
        f"{training_html(curves, command)}"
        "<h2>Losses and success: held-in / held-out</h2>\n"
        f"{figure_html(table_html(comparison_rows(summaries)), table_caption, command)}"
    )
