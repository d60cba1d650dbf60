"""The tables and pages: aligned text, well-formed HTML that hides nothing and needs nothing else,
colours that can be read, labels that do not overlap."""
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from support import figures, report
from toy.task import toy_records, toy_tokenizer

HOSTILE = "</title></style><script>alert('1')</script> & \"x\" <b onclick=\"y\">\n&#10;"


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps the tags, the texts and the attributes."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.tags = []
        self.texts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of_class(self, name):
        return [attributes for _, attributes in self.tags if attributes.get("class") == name]


def losses(held_in, held_out):
    return {
        "held_in": {"reasoning": {"loss": held_in}, "boilerplate": {"loss": 2 * held_in}},
        "held_out": {"reasoning": {"loss": held_out}, "boilerplate": {"loss": 2 * held_out}},
    }


SUMMARIES = {
    "base": {"losses": losses(1.3349, 1.1761), "success": {"held_in": 0.0, "held_out": 0.0}},
    "SFT": {"losses": losses(0.0041, 5.1804), "success": {"held_in": 1.0, "held_out": 0.125}},
}


def metrics(start, steps=50):
    rows = []
    for step in range(steps):
        loss = start / (1 + step)
        rows.append({"step": step + 1, "loss_reasoning": loss, "loss_boilerplate": 3 * loss})
    return rows


def whole_page(tmp_path, title, body):
    report.write_page(str(tmp_path / "page.html"), title, body)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    return (tmp_path / "page.html").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------
# Tables

def test_the_table_on_the_terminal():
    assert report.format_table(report.comparison_rows(SUMMARIES)) == "\n".join([
        "held-in / held-out  reasoning loss  boilerplate loss         success",
        "base                 1.335 / 1.176     2.670 / 2.352     0.0% / 0.0%",
        "SFT                  0.004 / 5.180    0.008 / 10.361  100.0% / 12.5%",
    ])


def test_the_table_on_a_page_has_the_same_cells():
    rows = report.comparison_rows(SUMMARIES) + [[HOSTILE, "", "a & b", "<td>"]]
    page = Page(report.table_html(rows))
    cells = [text for tag, text in page.texts if tag in ("th", "td")]
    assert cells == [cell for cell in sum(rows, []) if cell]
    assert [tag for tag, _ in page.tags].count("th") == 4


def test_intervals_over_runs_are_those_of_students_t():
    mean, half = report.mean_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * 0.881917, rel=1e-4)
    mean, half = report.mean_interval(np.zeros((40, 2)) + [1, 2])
    assert mean.tolist() == [1, 2] and half.tolist() == [0, 0]
    rng = np.random.default_rng(0)
    for runs in (2, 5, 11, 30):
        mean, half = report.mean_interval(rng.normal(size=(runs, 4000)))
        covered = (np.abs(mean) <= half).mean()
        assert 0.94 < covered < 0.98, runs


def test_rows_of_means_over_runs():
    results = {
        "sft": {"success": [0.25, 0.35], "loss": [1.0, 1.0], "not shown": [0, 0]},
        "rft": {"success": [0.5], "loss": [0.75]},
    }
    assert report.mean_rows(results, {"success": ".1%", "loss": ".2f"}) == [
        ["method", "success", "loss"],
        ["sft", "30.0% ± 63.5%", "1.00 ± 0.00"],
        ["rft", "50.0%", "0.75"],
    ]


# -------------------------------------------------------------------------------------------------
# Pages

def test_a_page_is_well_formed_and_self_contained_whatever_the_text(tmp_path):
    tokens = [(HOSTILE, "reasoning", HOSTILE), ("b", "format", ""), ("c", "connecting", "LD")]
    sample = report.sample_html(HOSTILE, HOSTILE, tokens)
    difference = np.array([1.0, -1.0, -20.0], np.float32)
    labels = report.labels_body(HOSTILE, HOSTILE, 0.0, difference, difference > 0, sample)
    runs = {HOSTILE: metrics(2.0), "b": metrics(1.0)}
    comparison = report.report_html(runs, {HOSTILE: SUMMARIES["SFT"]}, HOSTILE)
    choice = report.choice_html("c", {HOSTILE: report.figure_html(sample, HOSTILE)})
    text = whole_page(tmp_path, HOSTILE, labels + comparison + choice)

    page = Page(text)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    shown = [tag for tag, text in page.texts if text == HOSTILE]
    curve = ["title", "text"]
    sample = ["div", "div", "span"]                             # its name, its input, a token
    comparison = [*curve, *curve, "code", "td", "code"]
    assert shown == ["title", "h1", *sample, *comparison, "label", *sample, "figcaption"]
    assert [a["title"] for a in page.of_class("reasoning") if "title" in a] == [HOSTILE] * 2


def test_the_page_of_labels_says_what_was_found():
    difference = np.array([0.0, 0.0, 2.0, -20.0, 20.0], np.float32)
    is_reasoning = difference > 0.5
    body = report.labels_body("of 9", "reasoning 40%", 0.5, difference, is_reasoning, "SAMPLES")
    for part in ("of 9", "reasoning 40%", "LD &gt; 0.5", "all 5 output tokens", "<svg", report.KEY):
        assert body.count(part) == 1, part
    assert body.endswith("SAMPLES")


def test_the_comparison_draws_both_groups_and_says_what_the_table_compares():
    page = Page(report.report_html({"SFT": metrics(2.0), "RFT": metrics(1.0)}, SUMMARIES))
    headings = [text for tag, text in page.texts if tag == "h2"]
    assert headings == ["Training curves", "Losses and success: held-in / held-out"]
    titles = [text for tag, text in page.texts if text.endswith(" tokens")]
    assert titles == ["Reasoning tokens", "Boilerplate tokens"]


def test_figures_say_which_command_they_come_from():
    body = report.report_html({"SFT": metrics(2.0)}, SUMMARIES, "python train.py --seed 1")
    captions = [text for tag, text in Page(body).texts if tag == "code"]
    assert captions == ["python train.py --seed 1"] * 2
    assert "<code>" not in report.figure_html("", "A caption.")


def test_exactly_one_choice_is_shown_at_first():
    page = Page(report.choice_html("m", {"sft": "<p>one</p>", "rft": "<p>two</p>"}))
    buttons = [attributes for tag, attributes in page.tags if tag == "input"]
    labels = [attributes for tag, attributes in page.tags if tag == "label"]
    assert ["checked" in button for button in buttons] == [True, False]
    assert {button["name"] for button in buttons} == {"m"}
    assert [button["id"] for button in buttons] == ["m0", "m1"]
    assert [label["for"] for label in labels] == ["m0", "m1"]
    order = [tag for tag, _ in page.tags if tag in ("input", "label", "section")]
    assert order == ["input", "label", "section"] * 2           # as the style selects them


def luminance(colour):
    channels = []
    for start in (0, 2, 4):
        value = int(colour[start:start + 2], 16) / 255
        channels.append(value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4)
    return np.dot(channels, (0.2126, 0.7152, 0.0722))


def contrast(one, other):
    """The contrast of two colours as WCAG 2 defines it: readable text has 4.5 or more."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark_mode():
    light, dark = report.STYLE.split("prefers-color-scheme: dark")
    for style in (light, dark):
        colours = {}
        for name, digits in re.findall(r"--(\w+): #(\w+);", style):
            colours[name] = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        for kind in ("reasoning", "format", "connecting"):
            assert contrast(colours["ink"], colours[kind]) > 4.5
        names = ["ink", "quiet"] + [f"line{i}" for i in range(figures.LINE_COLOURS)]
        for name in names:
            assert contrast(colours[name], colours["paper"]) > 4.5, name
    rules = dark.split("body {")[1]
    assert not re.search(r"#\w{3}", rules)                      # every rule follows the mode


# -------------------------------------------------------------------------------------------------
# Coloured samples

@pytest.mark.parametrize("trim", [None, True, False], ids=["plain", "trimmed", "not trimmed"])
def test_pieces_tile_an_output(trim):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if trim is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    call = 'Thought: I see.\nAction: find\nAction Input: {"a": [1, 2]}'
    for text in (call, "  spaces  ", "Köln 東京 🎈🎈", "a\n\n", "", "\t", "<|im_end|> & <b>"):
        encoding = tokenizer.encode(text)
        pieces = report.split_pieces(text, encoding.offsets)
        assert len(pieces) == len(encoding.ids)                 # one per token
        assert "".join(piece for piece, _ in pieces) == text


def test_white_space_goes_with_the_token_that_follows():
    pieces = report.split_pieces("one  {x", [(0, 3), (5, 6), (6, 7)])
    assert pieces == [("one", False), ("  {", True), ("x", False)]


def test_format_pieces_of_the_toy():
    tokenizer = toy_tokenizer()
    formats = set()
    for record in toy_records(40, 0):
        text = record["messages"][-1]["content"]
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        pieces = report.split_pieces(text, offsets)
        assert "".join(piece for piece, _ in pieces) == text
        formats |= {piece.strip() for piece, is_format in pieces if is_format}
    assert {"Thought", "Action", "Input", ":", '{"', '":"', '"}'} <= formats


def test_a_sample_shows_each_token_with_its_kind():
    tokens = [("Action", "format", "LD -1.000"), (" find", "reasoning", "' find'\nLD +2.000")]
    page = Page(report.sample_html("toy-0", "user: hello", tokens))
    assert [text for tag, text in page.texts if tag == "span"] == ["Action", " find"]
    assert page.of_class("reasoning")[0]["title"] == "' find'\nLD +2.000"
    assert [text for tag, text in page.texts if tag == "div"][:2] == ["toy-0", "user: hello"]


# -------------------------------------------------------------------------------------------------
# Figures

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
