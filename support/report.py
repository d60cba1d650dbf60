"""Tables for the terminal, pages for the browser."""
import html
import os
import re

import numpy as np


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}svg{max-width:100%;height:auto}table{border-collapse:collapse}
td,th{padding:.25rem .9rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.sample{border:1px solid #ddd;border-radius:6px;padding:.6rem .8rem;margin:.7rem 0;overflow-wrap:anywhere}
.input{color:#777;white-space:pre-wrap;max-height:7.5rem;overflow:auto;font-size:.85rem}
.output{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:.9rem}
.reasoning{background:#b7e4c0}.format{background:#fdeaa8}.connecting{background:#c5dcf7}
.output span,.key{border-radius:3px;padding:1px 0}.key{padding:1px 6px;margin-right:.6rem}.note{color:#555;font-size:.9rem}
"""


def write_page(path: str, title: str, body: str) -> None:
    """Write one self-contained HTML file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
                f'<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n')
    os.replace(path + ".tmp", path)


# boilerplate is of two kinds: format (field markers, JSON keys, brackets and quotes), and template-connecting words
FORMAT = re.compile(r'^[ \t]*[A-Z][\w ]{0,30}:|"[^"\n]{0,40}"\s*:|[{}\[\]"][:,]*|\s+', re.MULTILINE)
KEY = ('<p><span class="key reasoning">reasoning</span><span class="key format">boilerplate: format</span>'
       '<span class="key connecting">boilerplate: connecting</span></p>')


def output_pieces(dataset: Dataset, i: int) -> list[tuple[str, bool]]:
    """(text, is format) of each output token of sample i: the pieces tile the text, white space going with what follows."""
    pieces = []
    for message in dataset.samples[i].messages:
        if message.is_output:
            spans = [m.span() for m in FORMAT.finditer(message.text)]
            end = 0
            for _, stop in dataset.renderer.tokenizer.encode(message.text, add_special_tokens=False).offsets:
                text = message.text[end:stop]
                first = end + len(text) - len(text.lstrip()) if text.strip() else end
                pieces.append((text, any(a <= first < b for a, b in spans)))
                end = max(end, stop)
            pieces.append(("⏎\n", True))
    return pieces


def sample_html(dataset: Dataset, i: int, difference, threshold: float, details=None) -> str:
    """One sample, its output tokens coloured by group. details: arrays {name: (output tokens,)} for the hover text."""
    here = slice(dataset.offsets[i], dataset.offsets[i + 1])
    sample, spans = dataset.samples[i], []
    for k, ((text, is_format), d) in enumerate(zip(output_pieces(dataset, i), difference[here])):
        kind = "reasoning" if classify(d, threshold) else "format" if is_format else "connecting"
        hover = "".join(f"&#10;{name} {values[here][k]:.3f}" for name, values in (details or {}).items())
        spans.append(f'<span class="{kind}" title="{html.escape(repr(text))}{hover}&#10;LD {d:+.3f}">{html.escape(text)}</span>')
    given = "\n".join(f"{m.role}: {m.text}" for m in sample.messages if not m.is_output)
    return (f'<div class="sample"><div class="note">{html.escape(sample.id)}</div>'
            f'<div class="input">{html.escape(given)}</div><div class="output">{"".join(spans)}</div></div>')


def histogram_svg(difference, threshold: float, low=-8.0, high=8.0, bins=64) -> str:
    """A histogram of LD; heights are square roots, or the peak at zero would hide the rest."""
    groups = [(name, colour, np.histogram(np.clip(difference[mask], low, high - 1e-6), bins, (low, high)))
              for name, colour, mask in (("reasoning", "#4caf6e", classify(difference, threshold)),
                                         ("boilerplate", "#d9b43a", ~classify(difference, threshold)))]
    most, width = max(1, max(counts.max() for _, _, (counts, _) in groups)), 720 / bins
    bars = "".join(f'<rect x="{j * width:.1f}" y="{160 - h:.1f}" width="{width - 1:.1f}" height="{h:.1f}" fill="{colour}" fill-opacity=".8">'
                   f'<title>{name}, LD {edges[j]:.2f} to {edges[j + 1]:.2f}: {counts[j]:,} tokens</title></rect>'
                   for name, colour, (counts, edges) in groups for j, h in enumerate(150 * np.sqrt(counts / most)) if counts[j])
    ticks = "".join(f'<text x="{(v - low) / (high - low) * 720:.0f}" y="176" font-size="11" text-anchor="middle">{v:+d}</text>'
                    for v in range(int(low) + 2, int(high), 2))
    return f'<svg viewBox="0 0 720 182" width="720" role="img" aria-label="histogram of LD">{bars}{ticks}</svg>'


def picture(dataset: Dataset, difference, base, tuned, threshold: float, summary: dict, count: int = 40) -> str:
    """The body of labels.html: `count` samples, the shares of the groups and the histogram."""
    shown = dataset.kept[np.linspace(0, len(dataset.kept) - 1, min(count, len(dataset.kept))).round().astype(int)]
    kinds = [("reasoning" if classify(d, threshold) else "format" if f else "connecting")
             for i in shown for (_, f), d in zip(output_pieces(dataset, i), difference[dataset.offsets[i]:])]
    shares = ", ".join(f"{k} {kinds.count(k) / max(1, len(kinds)):.0%}" for k in ("reasoning", "format", "connecting"))
    return (f"<pre>{html.escape(describe(summary))}</pre>{KEY}"
            f'<p class="note">Of the tokens below: {shares}. SHAD tells reasoning (LD &gt; {threshold:g}) from boilerplate; format and '
            "connecting are told apart by the shape of the text. Hover over a token for its losses.</p>"
            f"<h2>Loss difference, LD = loss of the tuned &minus; loss of the base (nats)</h2>{histogram_svg(difference, threshold)}"
            f'<p class="note">All {len(difference):,} output tokens, clipped to &plusmn;8; heights are square roots of counts.</p><h2>Samples</h2>'
            + "".join(sample_html(dataset, i, difference, threshold, {"base": base, "tuned": tuned}) for i in shown))


def comparison_rows(summaries: dict[str, dict]) -> list[list[str]]:
    """A header and a row a model: losses by true role and success, held-in / held-out."""
    both = lambda f, form: " / ".join(format(f(kind), form) for kind in ("held_in", "held_out"))
    return [["held-in / held-out", "reasoning loss", "boilerplate loss", "success"]] + [
        [name, both(lambda k: s["losses"][k]["reasoning"]["loss"], ".3f"),
         both(lambda k: s["losses"][k]["boilerplate"]["loss"], ".3f"), both(lambda k: s["success"][k], ".1%")]
        for name, s in summaries.items()]


def format_table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) if j == 0 else cell.rjust(w) for j, (cell, w) in enumerate(zip(row, widths))) for row in rows)


def curves_svg(title: str, curves: dict[str, list[float]]) -> str:
    """One panel of training curves, {name: loss of each step}, smoothed over a few steps, on a logarithmic loss axis."""
    window = max(1, max(map(len, curves.values())) // 40)
    smooth = {n: np.convolve(np.pad(v, (window // 2, window - 1 - window // 2), "edge"), np.ones(window) / window, "valid")
              for n, v in curves.items()}
    low = max(1e-3, min(v.min() for v in smooth.values())) * 0.8
    high = max(v.max() for v in smooth.values()) * 1.1
    y = lambda v: 20 + 190 * (np.log(high) - np.log(np.maximum(v, low))) / (np.log(high) - np.log(low))
    lowest = min(v[-1] for v in smooth.values())            # its name goes below its line, the others' above theirs
    marks = [m * 10.0 ** e for e in range(-3, 2) for m in (1, 2, 5) if low < m * 10.0 ** e < high]
    parts = [f'<text x="44" y="12" font-size="13" font-weight="600">{title}</text>']
    parts += [f'<line x1="44" x2="420" y1="{y(m):.0f}" y2="{y(m):.0f}" stroke="#e3e3e3"/><text x="40" y="{y(m) + 4:.0f}" font-size="11" '
              f'text-anchor="end">{m:g}</text>' for m in marks]
    for (name, v), colour in zip(smooth.items(), ("#888888", "#1a7f4b", "#b5543a")):
        x = np.linspace(44, 420, len(v))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(v))) + f'"><title>{name}</title></polyline>'
                     f'<text x="424" y="{y(v[-1]) + (11 if v[-1] == lowest else -3):.0f}" font-size="12" fill="{colour}">{name}</text>')
    steps = len(next(iter(smooth.values())))
    parts.append(f'<text x="420" y="228" font-size="11" text-anchor="end">step {steps}</text><text x="44" y="228" font-size="11">1</text>')
    return f'<svg viewBox="0 0 470 236" width="470" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def report_html(runs: dict[str, list[dict]], summaries: dict[str, dict]) -> str:
    """The comparison as HTML: training curves of {name: metrics} by group, and the table."""
    rows = comparison_rows(summaries)
    cells = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
    panels = "".join(curves_svg(f"{group} tokens, training loss (nats)", {n: [m[f"loss_{group}"] or 0 for m in ms] for n, ms in runs.items()})
                     for group in ("reasoning", "boilerplate"))
    return f"<h2>Training curves</h2>{panels}<h2>Held-out evaluation</h2><table>{cells(rows[0], 'th')}" \
           f"{''.join(cells(r, 'td') for r in rows[1:])}</table>"
