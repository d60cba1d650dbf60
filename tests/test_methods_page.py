"""The page of tests/bench/methods.py, from two made-up runs."""
import json
import os
import re

import numpy as np
import pytest

import shad
from data import Dataset, Renderer
from pages import Page
from rft import METHODS
from support.readers import toy_samples
from support.report import write_page
from tests.bench import methods_page
from tests.bench.methods import VARIANTS
from toy.reproduce import TOY


def summary(success, loss):
    losses = {}
    for kind in ("held_in", "held_out"):
        losses[kind] = {"reasoning": {"loss": loss}, "boilerplate": {"loss": loss / 2}}
    return {"losses": losses, "success": {"held_in": 1.0, "held_out": success}}


def made_up_run(seed, history=True, variants=True):
    """SEED.json as it is read again: methods that differ by fixed amounts, and noise they share."""
    noise = np.random.default_rng(seed).normal(0, 0.02)
    run = {"base": {"summary": summary(0.0, 1.2)}}
    names = [*METHODS, *VARIANTS] if variants else [*METHODS]
    for i, name in enumerate(names):
        success = 0.2 + 0.03 * i + noise
        if name == "rft, sums":
            success = 0.01 + noise
        steps = []
        for step in range(1, 31):
            group = 2 / step if METHODS.get(name, (0, 0))[1] in (None, "shad") else None
            steps.append({"step": step, "loss_reasoning": group, "loss_boilerplate": group})
        run[name] = {"summary": summary(success, 2.0 - 0.1 * i + noise), "metrics": steps}
        if history and name in METHODS:
            over_training = {"0": summary(0.0, 1.2), "8": summary(0.4, 1.0)}
            run[name]["history"] = over_training | {"30": run[name]["summary"]}
    return json.loads(json.dumps(run))


@pytest.fixture(scope="module")
def runs():
    return [made_up_run(0), made_up_run(1)]


def headings(body):
    return [text for tag, text in Page(body).texts if tag == "h2"]


def test_the_page_shows_all_that_the_runs_hold(runs, tmp_path):
    body = methods_page.runs_html(runs, VARIANTS, "the command")
    assert headings(body) == ["All methods", "Minus SFT", "Beside the paper",
                              "Held-out tasks over training", "Training curves",
                              "What matters in RFT"]
    page = Page(body)
    figures = [tag for tag, _ in page.tags if tag == "figure"]
    assert [text for tag, text in page.texts if tag == "code"] == ["the command"] * len(figures)
    assert "nan" not in body
    write_page(str(tmp_path / "methods.html"), "All methods on the toy", body)
    text = (tmp_path / "methods.html").read_text()
    Page(text)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|<script""", text)
    assert len(text) < 3_000_000


def test_the_page_copes_with_runs_that_lack_settings_or_evaluations(runs):
    bare = made_up_run(2, history=False, variants=False)
    mixed = methods_page.runs_html([*runs, bare], VARIANTS, "")
    assert headings(mixed) == headings(methods_page.runs_html(runs, VARIANTS, ""))
    assert "over 2 seeds" in mixed and "over 3 seeds" in mixed
    alone = methods_page.runs_html([bare], VARIANTS, "")
    assert headings(alone) == ["All methods", "Minus SFT", "Beside the paper", "Training curves"]


def test_differences_to_sft_are_paired(runs):
    tables = methods_page.tables(runs, VARIANTS)
    means = tables["means"]
    differences = tables["differences"]
    column = means[0].index(methods_page.SUCCESS)
    assert [row[0] for row in means[1:]] == ["base", *METHODS]
    noise = [100 * (run["sft"]["summary"]["success"]["held_out"] - 0.2) for run in runs]
    rows = {row[0]: row[column] for row in means[1:]}
    half = 12.706 * np.std(noise, ddof=1) / 2**0.5
    assert rows["sft"] == f"{20 + np.mean(noise):.1f} ± {half:.1f}"
    paired = {row[0]: row[column] for row in differences[1:]}
    assert "sft" not in paired
    for i, name in enumerate(METHODS):
        if name != "sft":
            assert paired[name] == f"+{3 * i:.1f} ± 0.0"


def test_settings_are_compared_with_the_default_where_runs_hold_them(runs):
    bare = made_up_run(2, variants=False)
    header, *rows = methods_page.tables([*runs, bare], VARIANTS)["settings"]
    assert header[0] == "minus default RFT, 2 seeds"
    assert [row[0] for row in rows] == ["sft", *VARIANTS]
    column = header.index(methods_page.SUCCESS)
    assert rows[0][column] == "\N{MINUS SIGN}18.0 ± 0.0"
    assert "settings" not in methods_page.tables([bare], VARIANTS)


def test_the_papers_figures_stand_beside_the_toys(runs):
    page = Page(methods_page.paper_html(runs, ""))
    cells = [text for tag, text in page.texts if tag == "td"]
    rft = cells[cells.index("rft"):]
    assert rft[2:] == ["+18.0 ± 0.0", "59.3", "+6.8", "60.0", "+4.6"]


def test_three_sentences_say_which_settings_matter(runs):
    body = methods_page.settings_html(runs, VARIANTS, "")
    text = body[body.rindex("<p>") + 3:body.rindex("</p>")]
    assert len(re.findall(r"\.(?: |$)", text)) == 3
    assert "means lowers held-out success (\N{MINUS SIGN}37.0 ± 0.0 points" in text
    same = methods_page.verdict(np.array([1.0, -2.0]), np.array([0.1, 0.2]))
    assert same.startswith("does not clearly change held-out success (\N{MINUS SIGN}0.5 ± 19.1")
    assert methods_page.verdict(np.array([3.0]), np.array([0.1])).startswith("does not clearly")
    assert methods_page.verdict(np.array([3.0, 3.1]), np.array([0.1, 0.1])).startswith("raises")


def test_samples_show_the_labels_that_are_there(tmp_path):
    dataset = Dataset(toy_samples(14, 0), Renderer(TOY))
    true = dataset.true_roles()["reasoning"]
    difference = np.where(true, 1.0, -1.0).astype(np.float32)
    difference[:3] *= -1
    for folder in ("0", "1"):
        labels = tmp_path / folder / "labels"
        labels.mkdir(parents=True)
        shad.save_labels(labels, difference, dataset, {"threshold": 0.0})
        (labels / "summary.json").write_text('{"truth": {"error": 0.0143, "auc": 0.97}}')
    (tmp_path / "0" / "reference").mkdir()
    os.symlink(TOY, tmp_path / "0" / "reference" / "model")

    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    body = methods_page.labels_html(folders, dataset, "the command", count=4)
    page = Page(body)
    buttons = [text for tag, text in page.texts if tag == "label"]
    assert buttons == ["SHAD", "true roles", "regular expressions", "Rho-1"]
    assert "error 1.43% ± 0.00%, AUC 0.970 ± 0.000" in body
    assert "RewardFT" not in body                               # its model is not there
    assert sum(a.get("class") == "sample" for _, a in page.tags) == 4 * len(buttons)
