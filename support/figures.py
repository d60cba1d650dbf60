"""Figures: lines and histograms as inline SVG, and the statistics they show.

Their colours are the variables of the page they are put into (report.css), so that they follow the
reader's light or dark mode.
"""
import html

import numpy as np

# The 97.5 % quantile of Student's t, for 2 runs (1 degree of freedom), 3 runs, ...
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]

# A figure's size and the edges of its axes in SVG units, which are about pixels
WIDTH = 440
HEIGHT = 250
LEFT = 54
TOP = 42
BOTTOM = 212
LINE_HEIGHT = 14
LINE_COLOURS = 8
# methods keep their colours from figure to figure; other lines take them in turn
METHOD_COLOURS = {"sft": 0, "rft": 1, "alpha": 2, "regex": 3, "regex+rft": 4, "rho1": 5,
                  "rewardft": 6}


def mean_interval(values) -> tuple[np.ndarray, np.ndarray]:
    """The mean over runs, values (runs, ...), and half the width of its 95 % interval.

    Student's t, so a few runs are enough; a single run has no interval (0).
    """
    values = np.asarray(values, float)
    runs = len(values)
    if runs == 1:
        return values[0], np.zeros_like(values[0])
    t = T_975[min(runs, len(T_975) + 1) - 2]                    # beyond the table: a bit too wide
    return values.mean(0), t * values.std(0, ddof=1) / runs**0.5


def svg(title: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{content}</svg>\n"
    )


def colour(name: str, i: int) -> str:
    """The style of what is drawn for a name, the i-th of a figure."""
    return f"color:var(--line{METHOD_COLOURS.get(name.lower(), i % LINE_COLOURS)})"


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

    if low == high:
        low -= 1
        high += 1
    decades = 10.0 ** np.arange(-9, 10)
    rounds = np.outer(decades, (1, 2, 5)).ravel()
    if scale is np.asarray:
        step = rounds[rounds >= (high - low) / 6].min()
        values = np.arange(np.ceil(low / step), high / step + 1e-6) * step
    else:
        values = rounds if scale is np.log10 and high < 5000 * low else decades
        values = values[(low <= values) & (values <= high)]
    values = values.round(9) + 0.0                              # 0.3, not 0.30000000000000004 or -0
    labels = [f"{value:,g}".replace("-", "\N{MINUS SIGN}") for value in values]
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


def limits(values, intervals) -> tuple[float, float]:
    """An axis for values and their intervals, which few runs make very wide.

    It holds all values; intervals at most double its length.
    """
    low = np.min(values)
    high = np.max(values)
    room = (high - low or 1) / 2
    return max(np.min(intervals), low - room), min(np.max(intervals), high + room)


def line_plot(title: str, x_label: str, y_label: str, series: dict, log_y: bool = False) -> str:
    """A figure of lines {name: (x, y)} or, with bands, {name: (x, y, low, high)}.

    Each line is named at its end; up to a dozen points are marked. Bands are cut where they would
    more than double the axis. A logarithmic y axis begins at a ten-thousandth of the largest value
    if there are smaller ones.
    """
    all_x = np.concatenate([line[0] for line in series.values()])
    all_y = np.concatenate([np.ravel(line[1:]) for line in series.values()])
    low, high = limits(np.concatenate([line[1] for line in series.values()]), all_y)
    if log_y:
        low = 0.8 * max(min(np.min(line[1]) for line in series.values()), high / 10_000)
        high = 1.1 * high
    right = WIDTH - 18 - 7 * max(map(len, series))              # leaves room for the names
    x, x_ticks = axis(all_x.min(), all_x.max(), LEFT, right)
    y, y_ticks = axis(low, high, BOTTOM, TOP, np.log10 if log_y else np.asarray)

    def points(xs, ys):
        ys = y(np.clip(ys, low, high))
        return [f"{a:.1f},{b:.1f}" for a, b in zip(x(xs), ys, strict=True)]

    # where lines end close together their names are pushed apart; each is tied to its line
    ends = [y(max(line[1][-1], low)) for line in series.values()]
    places = spread(ends, LINE_HEIGHT, TOP, BOTTOM)
    parts = [
        svg_text(0, 12, title, "start", "title"),
        svg_text(0, 28, y_label),
        axes(x_label, x_ticks, y_ticks, right),
    ]
    for i, (name, (xs, ys, *bounds)) in enumerate(series.items()):
        line = points(xs, ys)
        parts.append(
            f'<g style="{colour(name, i)}"><title>{html.escape(name)}</title>'
            f'<polyline points="{" ".join(line)}"/>'
            f'<polyline class="tie" points="{line[-1]} {right + 10:.1f},{places[i]:.1f}"/>'
            f'{svg_text(right + 13, places[i] + 4, name, "start", "label")}'
        )
        if bounds:
            outline = points(xs, bounds[0]) + points(xs, bounds[1])[::-1]
            parts.append(f'<polygon points="{" ".join(outline)}"/>')
        if len(line) <= 12:
            dots = "".join(f"M{point}h0" for point in line)     # no length, but round ends
            parts.append(f'<path d="{dots}"/>')
        parts.append("</g>")
    return svg(f"{title}: {y_label}", "".join(parts))


def band(x, runs) -> tuple:
    """A line of `line_plot`: the mean of runs (runs, n) over x (n,), with its 95 % interval."""
    mean, half = mean_interval(runs)
    return x, mean, mean - half, mean + half


def dots_plot(title: str, x_label: str, rows: dict, level: float | None = None) -> str:
    """A row per name of {name: values (runs,)}: the mean in its 95 % interval, below it each run.

    An interval that would make the axis more than twice as long is cut, and has no mark at that
    end. level: a line across all rows, such as that of no difference.
    """
    values = np.concatenate([np.ravel(row) for row in rows.values()])
    if level is not None:
        values = np.append(values, level)
    bounds = []
    for row in rows.values():
        mean, half = mean_interval(row)
        bounds += [mean - half, mean + half]
    low, high = limits(values, np.append(values, bounds))
    left = 12 + 6.5 * max(map(len, rows))                       # leaves room for the names
    x, x_ticks = axis(low, high, left, WIDTH - 12)
    step = (BOTTOM - TOP) / len(rows)

    # the axis
    parts = [svg_text(0, 12, title, "start", "title"), axes(x_label, x_ticks, [], WIDTH + left)]
    for place, _ in x_ticks:
        parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{TOP - 8}" y2="{BOTTOM}"/>')
    if level is not None:
        parts.append(f'<polyline class="tie" points="{x(level):.1f},{TOP - 8} '
                     f'{x(level):.1f},{BOTTOM}"/>')

    # a name, its runs, its interval with a mark at each end that is not cut, and its mean
    for i, (name, row) in enumerate(rows.items()):
        y = TOP + step * (i + 0.5)
        mean, half = mean_interval(row)
        first, last = np.clip([mean - half, mean + half], low, high)
        runs = "".join(f"M{x(value):.1f},{y + 6:.1f}h0" for value in row)
        ends = ""
        for end, wanted in ((first, mean - half), (last, mean + half)):
            if end == wanted:
                ends += f"M{x(end):.1f},{y - 4:.1f}v8"
        parts.append(
            f'<g style="{colour(name, i)}">'
            f'<title>{html.escape(name)}: {mean:.3g} \N{PLUS-MINUS SIGN} {half:.2g}</title>'
            f'{svg_text(0, y + 4, name, "start", "label")}<path class="run" d="{runs}"/>'
            f'<path class="whisker" d="M{x(first):.1f},{y:.1f}H{x(last):.1f}{ends}"/>'
            f'<path d="M{x(mean):.1f},{y:.1f}h0"/></g>'
        )
    return svg(f"{title}: {x_label}", "".join(parts))


def roc_curve(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of the negatives and of the positives above each threshold, from none to all.

    scores (n,) are cut at 400 of their quantiles; both kinds must occur in positive (n,).
    """
    thresholds = np.append(np.quantile(scores, np.linspace(1, 0, 400)), -np.inf)
    below = []
    for group in (~positive, positive):
        ordered = np.sort(scores[group])
        below.append(np.searchsorted(ordered, thresholds, "right") / len(ordered))
    return 1 - below[0], 1 - below[1]


def roc_svg(difference: np.ndarray, positive: np.ndarray, threshold: float = 0.0) -> str:
    """The ROC curve of LD (n,) against the true reasoning tokens (n,), with the threshold on it."""
    false, true = roc_curve(difference, positive)
    called = difference > threshold
    hit = called[positive].mean()
    false_alarm = called[~positive].mean()
    x, x_ticks = axis(0, 1, LEFT, WIDTH - 12)
    y, y_ticks = axis(0, 1, BOTTOM, TOP)
    points = [f"{a:.1f},{b:.1f}" for a, b in zip(x(false), y(true), strict=True)]
    label = f"LD > {threshold:g}: {hit:.1%} of reasoning, {false_alarm:.1%} of boilerplate"
    return svg("ROC curve of the loss difference", (
        f'{svg_text(0, 12, "LD as a test for reasoning", "start", "title")}'
        f'{svg_text(0, 28, "share of reasoning tokens above a threshold")}'
        f'{axes("share of boilerplate tokens above it", x_ticks, y_ticks, WIDTH - 12)}'
        f'<g style="color:var(--line1)"><polyline points="{" ".join(points)}"/>'
        f'<path d="M{x(false_alarm):.1f},{y(hit):.1f}h0"/>'
        f'{svg_text(x(false_alarm) + 12, min(y(hit) + 24, BOTTOM - 6), label, "start", "label")}'
        f'</g>'
    ))


def smooth(losses: np.ndarray) -> np.ndarray:
    """Losses (steps,) averaged over a fortieth of the steps; missing ones (NaN) are filled in."""
    steps = np.arange(len(losses))
    known = np.isfinite(losses)
    losses = np.interp(steps, steps[known], losses[known])
    window = max(1, len(losses) // 40)
    padded = np.pad(losses, (window // 2, window - 1 - window // 2), "edge")
    return np.convolve(padded, np.ones(window) / window, "valid")


def curves_svg(title: str, curves: dict[str, list]) -> str:
    """Training curves {name: loss of each step, or a list of such curves, one per run}.

    Several runs are shown as their mean and its 95 % interval. A step without a loss has None; a
    curve without any loss is left out.
    """
    series = {}
    for name, curve in curves.items():
        runs = np.atleast_2d(np.array(curve, float))            # (runs, steps); None becomes NaN
        smoothed = [smooth(run) for run in runs if np.isfinite(run).any()]
        if smoothed:
            series[name] = band(np.arange(1, runs.shape[1] + 1), smoothed)
    return line_plot(title, "step", "training loss (nats)", series, log_y=True) if series else ""


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
