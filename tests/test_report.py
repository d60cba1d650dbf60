"""The tables and pages: aligned text, well-formed HTML that hides nothing and needs nothing else,
colours that can be read."""
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pages import Page
from support import figures, report
from toy.task import toy_records, toy_tokenizer

HOSTILE = "</title></style><script>alert('1')</script> & \"x\" <b onclick=\"y\">\n&#10;"


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
    assert report.mean_rows({"sft": {"loss": [-1.0, -2.0]}}, {"loss": "+.1f"})[1] == [
        "sft", "\N{MINUS SIGN}1.5 ± 6.4"]


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
    choice += report.key_html({"reasoning": HOSTILE})
    text = whole_page(tmp_path, HOSTILE, labels + comparison + choice)

    page = Page(text)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not re.search(r"""(src|href)\s*=|@import|url\(""", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    shown = [tag for tag, text in page.texts if text == HOSTILE]
    curve = ["title", "text"]
    sample = ["div", "div", "span"]                             # its name, its input, a token
    comparison = [*curve, *curve, "code", "td", "code"]
    assert shown == ["title", "h1", *sample, *comparison, "label", *sample, "figcaption", "span"]
    assert [a["title"] for a in page.of_class("reasoning") if "title" in a] == [HOSTILE] * 2


def test_the_page_of_labels_says_what_was_found():
    difference = np.array([0.0, 0.0, 2.0, -20.0, 20.0], np.float32)
    is_reasoning = difference > 0.5
    body = report.labels_body("of 9", "reasoning 40%", 0.5, difference, is_reasoning, "SAMPLES")
    for part in ("of 9", "reasoning 40%", "LD &gt; 0.5", "all 5 output tokens", "<svg",
                 report.key_html(report.KINDS)):
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


def test_several_runs_over_training_are_bands_within_what_is_possible():
    histories = {}
    for name, success in (("SFT", (0.0, 0.5)), ("RFT", (0.5, 1.0))):
        histories[name] = []
        for share in success:
            summary = {"losses": losses(0.1, 0.2 + share),
                       "success": {"held_in": 1.0, "held_out": share}}
            histories[name].append({0: SUMMARIES["base"], 150: summary})
    body = report.held_out_html(histories, "the command")
    assert "over 2 seeds" in body and "the command" in body
    bands = re.findall('<polygon points="(.*?)"', body)
    assert len(bands) == 6                                      # two methods in three figures
    for points in bands:
        for point in points.split():
            y = float(point.split(",")[1])
            assert figures.TOP - 0.1 <= y <= figures.BOTTOM + 0.1

    first_runs = {name: runs[:1] for name, runs in histories.items()}
    assert "seeds" not in report.held_out_html(first_runs)
    first_runs["SFT"] = histories["SFT"]
    assert "over 1 or 2 seeds" in report.held_out_html(first_runs)


def test_shad_compared_with_the_truth_has_a_histogram_and_a_roc_curve():
    difference = np.random.default_rng(0).normal(size=500)
    body = report.truth_html(difference, difference > 0.3, "All of them.", "the command")
    assert "All of them." in body and "the command" in body
    labels = [a["aria-label"] for tag, a in Page(body).tags if tag == "svg"]
    assert labels == ["Histogram of the loss difference", "ROC curve of the loss difference"]


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
        for kind in ("reasoning", "format", "connecting", "boundary"):
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
