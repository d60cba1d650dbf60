"""The figures: they show the figures they are given, and their labels do not overlap."""
import re

import numpy as np
import pytest

from pages import Page
from support import figures


def test_intervals_over_runs_are_those_of_students_t():
    mean, half = figures.mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 0.881917, rel=1e-4)
    mean, half = figures.mean_interval(np.zeros((40, 2)) + [1, 2])
    assert mean.tolist() == [1, 2] and half.tolist() == [0, 0]
    rng = np.random.default_rng(0)
    for runs in (2, 5, 11, 30):
        mean, half = figures.mean_interval(rng.normal(size=(runs, 4000)))
        covered = (np.abs(mean) <= half).mean()
        assert 0.94 < covered < 0.98, runs


def bars(page):
    """{group: tokens counted over its bars}, from the texts shown over them."""
    counts = {}
    for tag, text in page.texts:
        if tag == "title":                                      # of a bar
            group, count = re.fullmatch(r"(\w+), LD .*: ([\d,]+) tokens", text).groups()
            counts[group] = counts.get(group, 0) + int(count.replace(",", ""))
    return counts


def test_the_histogram_counts_every_token_in_its_group():
    zeros = Page(figures.histogram_svg(np.zeros(9, np.float32), np.zeros(9, bool)))
    assert bars(zeros) == {"boilerplate": 9}
    assert bars(Page(figures.histogram_svg(np.zeros(0, np.float32), np.zeros(0, bool)))) == {}
    difference = np.random.default_rng(0).normal(0, 6, 5000).astype(np.float32)
    page = Page(figures.histogram_svg(difference, difference > 0.1))
    reasoning = int((difference > 0.1).sum())
    assert bars(page) == {"boilerplate": 5000 - reasoning, "reasoning": reasoning}
    for tag, attributes in page.tags:
        if tag == "rect":
            left = float(attributes["x"])
            assert figures.LEFT <= left <= figures.WIDTH - float(attributes["width"])


def test_labels_are_spread_no_further_than_they_must():
    assert figures.spread([10, 50], 14, 0, 100).tolist() == [10, 50]
    assert figures.spread([50, 49], 14, 0, 100).tolist() == [63, 49]
    assert figures.spread([99, 98, 97], 10, 0, 100).tolist() == [100, 90, 80]
    rng = np.random.default_rng(0)
    for count in range(1, 12):
        wanted = rng.uniform(-20, 120, count)
        places = figures.spread(wanted, 9, 0, 100)
        assert np.diff(np.sort(places)).min(initial=9) > 9 - 1e-9
        assert places.min() >= -1e-9 and places.max() <= 100


def boxes(svg):
    """(text, left, right, top, bottom) of each text of a figure, if letters are 7 wide, 11 high."""
    page = Page(svg)
    places = [attributes for tag, attributes in page.tags if tag == "text"]
    texts = [text for tag, text in page.texts if tag == "text"]
    for attributes, text in zip(places, texts, strict=True):
        width = 7 * len(text)
        shift = {"start": 0, "middle": width / 2, "end": width}[attributes["text-anchor"]]
        left = float(attributes["x"]) - shift
        bottom = float(attributes["y"]) + 2
        yield text, left, left + width, bottom - 11, bottom


def check_that_no_texts_overlap(svg):
    placed = list(boxes(svg))
    for i, (text, left, right, top, bottom) in enumerate(placed):
        assert left >= 0 and right <= figures.WIDTH, text
        assert top >= 0 and bottom <= figures.HEIGHT, text
        for other, left2, right2, top2, bottom2 in placed[:i]:
            apart = right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
            assert apart, (text, other)


@pytest.mark.parametrize("ends", [
    [0.2, 0.2], [0.2, 0.201, 0.199], [1e-3, 5, 1e-3, 5], [1, 1, 1, 1, 1, 1, 1], [1e-9, 3],
])
def test_names_at_the_ends_of_curves_do_not_overlap(ends):
    names = ["sft", "regex", "rho1", "rewardft", "alpha", "regex+rft", "rft"]
    curves = {}
    for name, end in zip(names, ends, strict=False):
        curves[name] = np.geomspace(4, end, 300).tolist()
    svg = figures.curves_svg("Reasoning tokens", curves)
    assert sum(text in names for text, *_ in boxes(svg)) == len(ends)
    check_that_no_texts_overlap(svg)


@pytest.mark.parametrize("count", [0, 1, 300, 300_000])
def test_labels_of_the_histogram_do_not_overlap(count):
    difference = np.random.default_rng(0).normal(0, 3, count)
    check_that_no_texts_overlap(figures.histogram_svg(difference, difference > 0))


def points_of(svg, tag):
    """The x and the y of the points of each line or band of a figure."""
    places = []
    for points in re.findall(f'<{tag} points="(.*?)"', svg):
        pairs = [point.split(",") for point in points.split()]
        places.append(np.array(pairs, float).T)
    return places


def test_a_curve_goes_through_its_losses():
    svg = figures.curves_svg("t", {"a": [4.0, 2.0, 1.0]})
    (x, y), = points_of(svg, "polyline")
    first, second = np.diff(y)
    assert first == pytest.approx(second, abs=0.11)             # halves are equally far apart
    assert x[0] == figures.LEFT


def test_curves_may_have_gaps_one_step_or_nothing_to_show():
    gaps = figures.curves_svg("t", {"a": [4.0, None, 1.0], "b": [None, None, None]})
    assert "nan" not in gaps and ">a<" in gaps and ">b<" not in gaps
    assert "nan" not in figures.curves_svg("t", {"a": [4.0]})
    assert figures.curves_svg("t", {"a": [None]}) == ""


@pytest.mark.parametrize("low, high, scale, labels", [
    (1, 400, np.asarray, ["100", "200", "300", "400"]),
    (-0.5, 60, np.asarray, ["0", "20", "40", "60"]),
    (-8, 8, np.asarray, ["\N{MINUS SIGN}5", "0", "5"]),
    (0, 1, np.asarray, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    (0.15, 6, np.log10, ["0.2", "0.5", "1", "2", "5"]),
    (1e-4, 10, np.log10, ["0.0001", "0.001", "0.01", "0.1", "1", "10"]),
    (0, 27000, np.sqrt, ["1", "10", "100", "1,000", "10,000"]),
])
def test_ticks_are_round_numbers(low, high, scale, labels):
    place, ticks = figures.axis(low, high, 100, 300, scale)
    assert [label for _, label in ticks][-len(labels):] == labels
    assert place(low) == pytest.approx(100) and place(high) == pytest.approx(300)
    assert all(100 <= x <= 300 + 1e-6 for x, _ in ticks)


def test_several_runs_are_a_mean_in_a_band():
    runs = [[4.0, 2.0, 1.0], [5.0, 3.0, 2.0], [3.0, 1.0, 0.5]]
    svg = figures.curves_svg("t", {"sft": runs, "rft": [2.0, 1.0, 0.5]})
    line, single = points_of(svg, "polyline")
    band, empty = points_of(svg, "polygon")
    assert line.shape == single.shape == (2, 3) and band.shape == empty.shape == (2, 6)
    low, high = band[1][:3], band[1][:2:-1]
    assert (low > line[1]).all() and (line[1] > high).all()     # y counts from the top
    assert (empty[1][:3] == empty[1][:2:-1]).all()
    check_that_no_texts_overlap(svg)


@pytest.mark.parametrize("x, y", [
    ([0.2, 0.3, 0.5], [40, 46, 41]), ([0, 1], [0, 1]), ([3], [7]), ([0, 150], [0.0, 0.0]),
    ([1000, 100_000], [-3, 2_000_000]),
])
def test_a_line_fills_its_axes(x, y):
    svg = figures.line_plot("Temperature", "1 / τ", "held-out success (%)", {"rft": (x, y)})
    (xs, ys), = points_of(svg, "polyline")
    if len(x) > 1:
        assert xs[0] == figures.LEFT and xs[-1] > 300
    if max(y) > min(y):
        assert ys.max() == figures.BOTTOM and ys.min() == figures.TOP
    assert svg.count("h0") == len(x)                            # few points are marked
    check_that_no_texts_overlap(svg)


def test_a_roc_curve_has_the_area_that_is_the_auc():
    rng = np.random.default_rng(0)
    positive = rng.random(3000) < 0.2
    scores = rng.normal(size=3000) + positive
    false, true = figures.roc_curve(scores, positive)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all() and (np.diff(true) >= 0).all()
    above = scores[positive][:, None] > scores[~positive]
    area = (np.diff(false) * (true[1:] + true[:-1]) / 2).sum()
    assert area == pytest.approx(above.mean(), abs=2e-3)

    scores = np.array([1.0, 1.0, 0.0, 0.0])                     # ties move both shares at once
    false, true = figures.roc_curve(scores, np.array([True, False, True, False]))
    assert set(zip(false.tolist(), true.tolist(), strict=True)) == {(0, 0), (0.5, 0.5), (1, 1)}


def test_the_roc_figure_says_what_the_threshold_finds():
    difference = np.array([1.0, 2.0, -1.0, 3.0, -2.0, -3.0, -1.0, -1.0])
    positive = np.array([True, True, True, True, False, False, False, False])
    svg = figures.roc_svg(difference, positive)
    assert "LD &gt; 0: 75.0% of reasoning, 0.0% of boilerplate" in svg
    assert "LD &gt; -1.5: 100.0% of reasoning, 50.0% of boilerplate" in figures.roc_svg(
        difference, positive, -1.5)
    check_that_no_texts_overlap(svg)


def test_an_axis_holds_all_values_and_is_at_most_twice_as_long():
    assert figures.limits([1, 3], [0.5, 3.5]) == (0.5, 3.5)
    assert figures.limits([1, 3], [-90, 90]) == (0, 4)
    assert figures.limits([2], [2]) == (2, 2)
    assert figures.limits([2], [-90, 90]) == (1.5, 2.5)


DOTS = r'<path class="whisker" d="M(.*?),.*?H(.*?)(M.*?)?"/><path d="M(.*?),'


@pytest.mark.parametrize("rows, level", [
    ({"sft": [10, 12, 11, 13], "rft": [30, 31, 32, 33]}, None),
    ({"sums": [-32.0, -30.0, -31.0], "scope batch": [0.5, -0.5, 0.0]}, 0),
    ({f"setting {i}": [i, i + 1.0, i + 0.5] for i in range(12)}, 0), ({"one run": [4.0]}, None),
])
def test_dots_stand_in_the_middle_of_their_intervals(rows, level):
    svg = figures.dots_plot("Held-out success", "right calls (%)", rows, level)
    found = re.findall(DOTS, svg)
    assert len(found) == len(rows)
    means = []
    for first, last, ends, mean in found:
        assert ends.count("M") == 2                             # nothing is cut
        assert float(mean) == pytest.approx((float(first) + float(last)) / 2, abs=0.11)
        assert 0 <= float(first) <= float(last) <= figures.WIDTH
        means.append(float(mean))
    order = np.argsort([np.mean(row) for row in rows.values()])
    assert (np.argsort(means) == order).all()
    assert svg.count("h0") == sum(map(len, rows.values())) + len(rows)
    assert ('class="tie"' in svg) == (level is not None)
    check_that_no_texts_overlap(svg)


def test_an_interval_that_is_cut_has_no_mark_at_that_end():
    svg = figures.dots_plot("t", "x", {"wide": [0.0, 1.0], "narrow": [2.0, 2.01]})
    (_, _, wide, _), (_, _, narrow, _) = re.findall(DOTS, svg)
    assert (wide.count("M"), narrow.count("M")) == (0, 2)


def test_methods_keep_their_colours():
    both = figures.line_plot("t", "x", "y", {"sft": ([0, 1], [1, 2]), "rft": ([0, 1], [2, 3])})
    alone = figures.line_plot("t", "x", "y", {"rft": ([0, 1], [2, 3])})
    upper = figures.dots_plot("t", "x", {"RFT": [1.0, 2.0]})
    colours = [re.findall(r"color:var\(--(line\d)\)", svg)[-1] for svg in (both, alone, upper)]
    assert len(set(colours)) == 1
