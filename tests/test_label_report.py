"""What people see of SHAD's labels: the area under the curve, the summary, the coloured pieces."""
import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from data import Dataset
from pages import Page
from shad import classify
from support.label_report import (
    auc,
    format_summary,
    judge,
    output_pieces,
    sample_views,
    shad_views,
    summarize,
)
from support.readers import toy_samples
from support.report import histogram_svg
from support.templates import Renderer
from tiny import talk
from toy.task import toy_tokenizer


def brute_force_auc(scores, positive):
    """The share of pairs in which the positive scores above the negative; ties count half."""
    wins = []
    for p in scores[positive]:
        for q in scores[~positive]:
            wins.append(0.5 if p == q else float(p > q))
    return sum(wins) / len(wins)


@pytest.mark.parametrize("n, levels", [(2, 2), (30, 3), (80, 7), (200, 10**6)])
def test_auc_is_the_chance_that_a_positive_scores_above_a_negative(n, levels):
    rng = np.random.default_rng(0)
    for _ in range(3):
        scores = rng.integers(levels, size=n).astype(np.float32)
        positive = rng.random(n) < 0.4
        positive[:2] = True, False
        expected = brute_force_auc(scores, positive)
        assert auc(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_auc_is_nan_where_a_group_is_empty():
    assert np.isnan(auc(np.zeros(3, np.float32), np.ones(3, bool)))


def assert_one_piece_per_output_token(dataset):
    for i, sample in enumerate(dataset.samples):
        pieces = output_pieces(dataset, i)
        assert len(pieces) == dataset.is_output[i].sum()        # so that each has its LD
        text = "".join(m.text + "⏎\n" for m in sample.messages if m.is_output)
        assert "".join(piece for piece, _ in pieces) == text


@pytest.mark.parametrize("trim_offsets", [None, True, False],
                         ids=["no post-processor", "trimmed", "not trimmed"])
def test_output_pieces_tile_the_outputs(chatml, tmp_path, trim_offsets):
    tokenizer = Tokenizer.from_file(chatml + "/tokenizer.json")
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    outputs = ["Thought: I see.\nAction: find\nAction Input: {\"a\": [1, 2]}", "  spaces  ",
               "Köln 東京 🎈🎈", "a\n\n", "", "\t", "<|im_end|> & <b>"]
    samples = []
    for k, text in enumerate(outputs):
        samples.append(talk(("user", "q"), ("assistant", text),
                            ("user", "more"), ("assistant", outputs[k - 1])))
    assert_one_piece_per_output_token(Dataset(samples, Renderer(str(tmp_path))))


def test_output_pieces_of_the_toy_mark_its_format(tmp_path):
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    dataset = Dataset(toy_samples(40, 0), Renderer(str(tmp_path)))
    assert_one_piece_per_output_token(dataset)
    formats = set()
    for i in range(40):
        formats |= {text.strip() for text, is_format in output_pieces(dataset, i) if is_format}
    assert {"Thought", "Action", "Input", ":", '{"', '":"', '"}'} <= formats


def test_true_roles_are_scored_on_samples_that_were_not_shuffled():
    difference = np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    roles = {"reasoning": np.array([True, False, False, True]), "boundary": np.zeros(4, bool)}
    losses = np.zeros(4, np.float32)

    unshuffled = np.array([True, True, False, False])
    truth = summarize(difference, difference > 0, losses, losses, unshuffled, roles)["truth"]
    assert truth["tokens"] == 2
    assert truth["error"] == 0
    assert truth["auc"] == 1

    unshuffled = np.ones(4, bool)
    truth = summarize(difference, difference > 0, losses, losses, unshuffled, roles)["truth"]
    assert truth["error"] == 0.5
    assert truth["missed_reasoning"] == 0.5
    assert truth["boilerplate_called_reasoning"] == 0.5


@pytest.mark.parametrize("unshuffled, where", [(False, "shuffled ones too"),
                                               (True, "samples not shuffled")])
def test_the_summary_says_which_samples_are_scored(unshuffled, where):
    difference = np.array([1.0, -1.0], np.float32)
    losses = np.zeros(2, np.float32)
    roles = {"reasoning": np.array([True, False]), "boundary": np.zeros(2, bool)}
    summary = summarize(
        difference, difference > 0, losses, losses, np.full(2, unshuffled), roles)
    assert where in format_summary(summary | {"samples": 2, "shuffled": 2})


def test_each_role_is_judged_and_boundaries_are_left_out_of_the_clear_figures():
    names = ["reasoning"] * 4 + ["format"] * 4 + ["boundary"] * 2
    difference = np.array([2, 1, 1, -1, 3, -1, -1, -1, 9, -9], np.float32)
    roles = {}
    for role in ("reasoning", "format", "connecting", "boundary"):
        roles[role] = np.array([name == role for name in names])
    figures = judge(difference, difference > 0, roles)
    assert figures["error"] == pytest.approx(3 / 10)
    assert figures["called_reasoning"] == {"reasoning": 0.75, "format": 0.25, "boundary": 0.5}
    clear = figures["clear"]
    assert clear["tokens"] == 8
    assert clear["error"] == pytest.approx(2 / 8)
    assert clear["auc"] == brute_force_auc(difference[:8], roles["reasoning"][:8])
    assert clear["precision"] == pytest.approx(3 / 4)
    assert clear["recall"] == pytest.approx(3 / 4)

    losses = np.zeros(10, np.float32)
    summary = summarize(difference, difference > 0, losses, losses, np.ones(10, bool), roles)
    assert summary["top_tenth_rise"] == 9
    text = format_summary(summary | {"samples": 2, "shuffled": 1})
    assert "error 30.00%" in text
    assert "without boundaries, 8 tokens: error 25.00%" in text
    assert "precision 75.0%, recall 75.0%" in text
    assert "called reasoning: 75.0% of reasoning, 25.0% of format, 50.0% of boundary" in text


@pytest.mark.parametrize("uses_input, said", [
    (True, "still uses its input (loss 1.00 with the right input, 3.50 with a wrong one): "
           "raise --lr or --shuffle"),
    (False, "unlearned to use its input (loss 1.00 with the right input, 3.50 with a wrong one)")])
def test_the_summary_says_whether_the_discriminator_still_uses_its_input(uses_input, said):
    zeros = np.zeros(3, np.float32)
    summary = summarize(zeros, zeros > 0, zeros, zeros, np.ones(3, bool), None)
    check = {"samples": 2, "loss_right_input": 1.0, "loss_wrong_input": 3.5,
             "uses_input": uses_input}
    assert said in format_summary(summary | {"samples": 3, "shuffled": 1, "check": check})


def test_the_histogram_shows_an_ld_of_0_as_boilerplate():
    zeros = np.zeros(9, np.float32)
    svg = histogram_svg(zeros, classify(zeros))
    assert "boilerplate, LD" in svg
    assert "reasoning, LD" not in svg


def test_views_colour_the_same_tokens_by_what_each_says(tmp_path):
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    dataset = Dataset(toy_samples(5, 0), Renderer(str(tmp_path)))
    difference = np.arange(-50, dataset.output_starts[-1] - 50, dtype=np.float32)
    views = shad_views(dataset, difference, classify(difference))
    _, true, _ = views["true roles"]
    roles = dataset.true_roles()
    for role, is_role in roles.items():
        assert ((true == role) == is_role).all()
    weight = np.zeros(len(difference))
    views["weights"] = ({"rest": "all"}, np.full(len(difference), "rest"), {"weight": weight})

    page = Page(sample_views(dataset, 3, views))
    assert [text for tag, text in page.texts if tag == "label"] == [*views]
    assert sum(a.get("class") == "sample" for _, a in page.tags) == 3 * len(views)
    tokens = [a for tag, a in page.tags if tag == "span" and "title" in a]
    shown = dataset.output_starts[3]
    assert len(tokens) == 3 * shown                             # three views
    kinds = [a["class"] for a in tokens]
    assert [kind == "reasoning" for kind in kinds[:shown]] == (difference[:shown] > 0).tolist()
    assert kinds[shown:2 * shown] == true[:shown].tolist()
    assert set(kinds[2 * shown:]) == {"rest"}
    assert tokens[0]["title"].endswith("LD -50.000")
    assert tokens[-1]["title"].endswith("weight 0.000")
