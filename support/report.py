"""Tables for the terminal, pages for the browser.

All of it takes plain data: text, numbers, arrays. A page is one file without scripts or references
to others, fits a phone, and follows the reader's light or dark mode (report.css).
"""
import html
import re
from pathlib import Path

import numpy as np

from support.files import replacing

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

# The kinds of token on a page. Format tokens are field markers, JSON keys, brackets and quotes;
# connecting tokens are the words of the template between them.
KEY = (
    '<p class="key"><span class="reasoning">reasoning</span>'
    '<span class="format">boilerplate: format</span>'
    '<span class="connecting">boilerplate: connecting</span></p>'
)
FORMAT = re.compile(
    r'^[ \t]*[A-Z][\w ]{0,30}:|"[^"\n]{0,40}"\s*:|[{}\[\]"][:,]*|\s+', re.MULTILINE)

# A figure's size and the edges of its axes in SVG units, which are about pixels
WIDTH = 440
HEIGHT = 250
LEFT = 50
TOP = 42
BOTTOM = 212
LINE_HEIGHT = 14
LINE_COLOURS = 8


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


def sample_html(name: str, given: str, tokens: list[tuple[str, str, str]]) -> str:
    """One sample: its name, its input, and its output tokens (text, kind, hover).

    A kind is "reasoning", "format" or "connecting". `hover` is shown while the pointer rests on
    the token, or once it is tapped. All of it is text, not HTML.
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
    is_reasoning: np.ndarray, samples_html: str,
) -> str:
    """The body of labels.html.

    `summary_text` is the run's summary and `shares_text` the share of each kind among the tokens
    shown; `difference` (n,) and `is_reasoning` (n,) are those of all output tokens, and
    `samples_html` is the samples from `sample_html`, joined.
    """
    return (
        f"{summary_html(summary_text)}"
        "<h2>Loss difference</h2>\n"
        f"{histogram_svg(difference, is_reasoning)}\n"
        '<p class="note">LD = loss of the tuned model &minus; loss of the base model, in nats, of '
        f"all {len(difference):,} output tokens, clipped to &plusmn;8. Heights are square roots of "
        "counts, or the peak would hide the rest.</p>\n"
        f"<h2>Samples</h2>\n{KEY}\n"
        f'<p class="note">Of the tokens below: {html.escape(shares_text)}. SHAD tells reasoning '
        f"(LD &gt; {threshold:g}) from boilerplate; format and connecting are told apart by the "
        "shape of the text. Point at a token, or tap it, for its losses.</p>\n"
        f"{samples_html}"
    )


# -------------------------------------------------------------------------------------------------
# Figures: inline SVG whose colours come from the page's style

def svg(title: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{content}</svg>\n"
    )


def svg_text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{html.escape(text)}</text>"
    )


def axis(low: float, high: float, start: float, end: float, scale=np.asarray):
    """An axis that runs from value low at place `start` to value high at `end`.

    Values are evenly spaced in scale(value): np.asarray, np.log10 or np.sqrt. Returns a function
    from values to places, and the ticks, round values as (place, label).
    """
    def place(values):
        return start + (end - start) * (scale(values) - scale(low)) / (scale(high) - scale(low))

    decades = 10.0 ** np.arange(-9, 10)
    rounds = np.outer(decades, (1, 2, 5)).ravel()
    if scale is np.asarray:
        step = rounds[rounds >= (high - low) / 6].min()
        values = np.arange(np.ceil(low / step), high / step + 1e-6) * step
    else:
        values = rounds if scale is np.log10 and high < 5000 * low else decades
        values = values[(low <= values) & (values <= high)]
    labels = [f"{value:,g}".replace("-", "\N{MINUS SIGN}") for value in values.round(9)]
    return place, list(zip(place(values), labels, strict=True))


def axes(x_label: str, x_ticks: list, y_ticks: list, right: float) -> str:
    """Both axes as they are drawn: a line across at each y tick, labels below and on the left."""
    parts = [svg_text((LEFT + right) / 2, BOTTOM + 33, x_label, "middle")]
    for x, label in x_ticks:
        parts.append(svg_text(x, BOTTOM + 17, label, "middle"))
    for y, label in y_ticks:
        parts.append(f'<line x1="{LEFT}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(LEFT - 4, y + 4, label, "end"))
    return "".join(parts)


def histogram_svg(difference: np.ndarray, is_reasoning: np.ndarray) -> str:
    """A histogram of LD (n,), clipped to +-8 nats, of the reasoning and the boilerplate tokens.

    Heights are square roots of counts, or the peak would hide the rest.
    """
    edges = np.linspace(-8, 8, 65)
    clipped = np.clip(difference, -8, 8)
    boilerplate, _ = np.histogram(clipped[~is_reasoning], edges)
    reasoning, _ = np.histogram(clipped[is_reasoning], edges)
    most = max(1, boilerplate.max(), reasoning.max())
    x, x_ticks = axis(-8, 8, LEFT, WIDTH)
    y, y_ticks = axis(0, most, BOTTOM, TOP, np.sqrt)
    y_ticks = [tick for tick in y_ticks if BOTTOM - tick[0] > LINE_HEIGHT]      # lower ones crowd

    parts = [axes("loss difference LD (nats)", x_ticks, y_ticks, WIDTH)]
    for name, counts, colour, place, anchor in (
        ("boilerplate", boilerplate, 5, LEFT, "start"),
        ("reasoning", reasoning, 1, WIDTH, "end"),
    ):
        label = svg_text(place, 12, f"{name}: {counts.sum():,} tokens", anchor, "label")
        parts.append(f'<g style="color:var(--line{colour})">{label}')
        for left, right, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                top = y(count)
                parts.append(
                    f'<rect x="{x(left):.1f}" y="{top:.1f}" width="{x(right) - x(left) - 1:.1f}" '
                    f'height="{BOTTOM - top:.1f}"><title>{name}, LD {left:.2f} to {right:.2f}: '
                    f"{count:,} tokens</title></rect>"
                )
        parts.append("</g>")
    return svg("Histogram of the loss difference", "".join(parts))


def spread(wanted: list[float], gap: float, low: float, high: float) -> np.ndarray:
    """Places near the wanted ones, at least `gap` apart, and between low and high if they fit."""
    places = np.clip(wanted, low, high)
    order = np.argsort(places, kind="stable")
    for before, after in zip(order, order[1:], strict=False):
        places[after] = max(places[after], places[before] + gap)
    for i in order[::-1]:
        places[i] = min(places[i], high)
        high = places[i] - gap
    return places


def line_plot(title: str, x_label: str, y_label: str, series: dict, log_y: bool = False) -> str:
    """A figure of lines {name: (x, y)}, each named at its end.

    A logarithmic y axis begins at a ten-thousandth of the largest value if there are smaller ones.
    """
    all_x = np.concatenate([xs for xs, ys in series.values()])
    all_y = np.concatenate([ys for xs, ys in series.values()])
    low = all_y.min()
    high = all_y.max()
    if log_y:
        low = 0.8 * max(low, high / 10_000)
        high = 1.1 * high
    right = WIDTH - 18 - 7 * max(map(len, series))              # leaves room for the names
    x, x_ticks = axis(all_x.min(), max(all_x.max(), all_x.min() + 1), LEFT, right)
    y, y_ticks = axis(low, high, BOTTOM, TOP, np.log10 if log_y else np.asarray)
    parts = [
        svg_text(0, 12, title, "start", "title"),
        svg_text(0, 28, y_label),
        axes(x_label, x_ticks, y_ticks, right),
    ]

    # where lines end close together their names are pushed apart; each is tied to its line
    ends = [y(max(ys[-1], low)) for xs, ys in series.values()]
    places = spread(ends, LINE_HEIGHT, TOP, BOTTOM)
    for i, (name, (xs, ys)) in enumerate(series.items()):
        points = zip(x(xs), y(np.maximum(ys, low)), strict=True)
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<g style="color:var(--line{i % LINE_COLOURS})"><polyline points="{path}">'
            f"<title>{html.escape(name)}</title></polyline>"
            f'<polyline class="tie" points="{x(xs[-1]):.1f},{ends[i]:.1f} '
            f'{right + 10:.1f},{places[i]:.1f}"/>'
            f'{svg_text(right + 13, places[i] + 4, name, "start", "label")}</g>'
        )
    return svg(f"{title}: {y_label}", "".join(parts))


def curves_svg(title: str, curves: dict[str, list[float | None]]) -> str:
    """Training curves {name: loss of each step}, smoothed over a fortieth of the steps.

    A step without a loss (None) is filled in from its neighbours; a curve without any is left out.
    """
    series = {}
    for name, curve in curves.items():
        losses = np.array(curve, float)                         # None becomes NaN
        known = np.isfinite(losses)
        if known.any():
            steps = np.arange(1, len(losses) + 1)
            losses = np.interp(steps, steps[known], losses[known])
            window = max(1, len(losses) // 40)
            padded = np.pad(losses, (window // 2, window - 1 - window // 2), "edge")
            series[name] = (steps, np.convolve(padded, np.ones(window) / window, "valid"))
    return line_plot(title, "step", "training loss (nats)", series, log_y=True) if series else ""


def report_html(runs: dict[str, list[dict]], summaries: dict[str, dict]) -> str:
    """The comparison: training curves of {name: metrics} by group of tokens, and the table."""
    panels = []
    for group in ("reasoning", "boilerplate"):
        curves = {}
        for name, metrics in runs.items():
            curves[name] = [step[f"loss_{group}"] for step in metrics]
        panels.append(curves_svg(f"{group.capitalize()} tokens", curves))
    return (
        f'<h2>Training curves</h2>\n<div class="panels">\n{"".join(panels)}</div>\n'
        "<h2>Losses and success: held-in / held-out</h2>\n"
        f"{table_html(comparison_rows(summaries))}\n"
        '<p class="note">Mean loss in nats by the true role of the tokens, and the share of calls '
        "that are exactly right. Held-in tasks are made of the words and phrases of the training "
        "data; held-out tasks have other tools, arguments, values and wordings.</p>\n"
    )
