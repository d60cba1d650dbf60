"""The page of tests/bench/methods.py, methods.html: figures and tables of finished runs.

Runs are what SEED.json holds: {name: {"summary", "metrics", and perhaps "history"}}. A setting of
RFT, or evaluations over training, may be missing in some of them.
"""
import os

import numpy as np

import shad
import train
from baselines.regex_labels import regex_labels
from data import Dataset
from model import Transformer
from rft import METHODS
from support import report
from support.figures import band, dots_plot, line_plot, mean_interval
from support.label_report import sample_views, shad_views
from support.readers import read_object
from toy import reproduce

SUCCESS = "held-out right calls (%)"
LOSS = "held-out reasoning loss"
FIGURES = {
    "held-in right calls (%)": lambda s: 100 * s["success"]["held_in"],
    "held-out right calls (%)": lambda s: 100 * s["success"]["held_out"],
    "held-in reasoning loss": lambda s: s["losses"]["held_in"]["reasoning"]["loss"],
    "held-out reasoning loss": lambda s: s["losses"]["held_out"]["reasoning"]["loss"],
    "held-out boilerplate loss": lambda s: s["losses"]["held_out"]["boilerplate"]["loss"],
}
FORMS = {title: ".1f" if "%" in title else ".3f" for title in FIGURES}
SIGNED_FORMS = {title: f"+{form}" for title, form in FORMS.items()}

# the paper's table 1: the average of four benchmarks in percent, of Llama 3 8B and Llama 3.1 8B
PAPER = {
    "sft": (52.5, 55.4),
    "regex": (44.5, 49.3),
    "rho1": (48.7, 52.0),
    "rewardft": (52.0, 55.5),
    "alpha": (57.9, 57.5),
    "regex+rft": (49.6, 50.2),
    "rft": (59.3, 60.0),
}


def figures(runs: list[dict], names, minus: str | None = None) -> dict:
    """{name: {figure: a value per run}}, or the differences to another name in the same run."""
    results = {}
    for name in names:
        results[name] = {}
        for title, figure in FIGURES.items():
            values = np.array([figure(run[name]["summary"]) for run in runs])
            if minus:
                values -= [figure(run[minus]["summary"]) for run in runs]
            results[name][title] = values
    return results


def complete(runs: list[dict], variants: dict) -> list[dict]:
    """The runs that hold all settings of RFT."""
    return [run for run in runs if all(name in run for name in variants)]


def tables(runs: list[dict], variants: dict) -> dict[str, list]:
    """Rows of every figure's mean and 95 % interval.

    "means", "differences" to SFT, and "settings": differences to the default RFT, where any run
    holds them.
    """
    others = [name for name in METHODS if name != "sft"]
    rows = {"means": report.mean_rows(figures(runs, ["base", *METHODS]), FORMS)}
    rows["differences"] = report.mean_rows(figures(runs, others, minus="sft"), SIGNED_FORMS)
    rows["differences"][0][0] = "minus SFT"
    full = complete(runs, variants)
    if full:
        differences = figures(full, ["sft", *variants], minus="rft")
        rows["settings"] = report.mean_rows(differences, SIGNED_FORMS)
        rows["settings"][0][0] = f"minus default RFT, {len(full)} seeds"
    return rows


def panels(*content: str) -> str:
    return f'<div class="panels">\n{"".join(content)}</div>\n'


def comparison_html(runs: list[dict], rows: dict[str, list], command: str) -> str:
    """Every method's figures, and its paired differences to SFT; rows: those of tables()."""
    success = {}
    losses = {}
    for name, row in figures(runs, METHODS).items():
        success[name] = row[SUCCESS]
        losses[name] = row[LOSS]
    dots = panels(dots_plot("Held-out success", "right calls (%)", success),
                  dots_plot("Held-out reasoning loss", "loss (nats)", losses))
    dots_caption = (
        f"Large dots are means in their 95 % intervals (Student's t), small ones below the "
        f"{len(runs)} seeds. An interval without a mark at its end goes on."
    )
    means_caption = (
        f"Mean \N{PLUS-MINUS SIGN} 95 % interval over {len(runs)} seeds. A call is right if its "
        "tool and arguments are exactly so, decoded greedily. Losses in nats per token, by the "
        "tokens' true roles. Held-out tasks have other tools, values and wordings."
    )
    differences_caption = "Paired differences to SFT on the same seed and batches."
    intro = (
        f"{len(runs)} seeds, each with its own samples, labels and reference models. All methods "
        "start from the same base model and see the same batches, one epoch."
    )
    return (
        f"<p>{intro}</p>\n<h2>All methods</h2>\n" + report.figure_html(dots, dots_caption, command)
        + report.figure_html(report.table_html(rows["means"]), means_caption, command)
        + "<h2>Minus SFT</h2>\n"
        + report.figure_html(report.table_html(rows["differences"]), differences_caption, command)
    )


def paper_html(runs: list[dict], command: str) -> str:
    """The paper's figures beside those of the toy."""
    means = figures(runs, PAPER)
    differences = figures(runs, PAPER, minus="sft")
    rows = [["right calls (%)", "toy, held-out", "minus SFT", "Llama 3 8B", "minus SFT",
             "Llama 3.1 8B", "minus SFT"]]
    for name, paper in PAPER.items():
        toy = {"mean": means[name][SUCCESS], "difference": differences[name][SUCCESS]}
        _, row = report.mean_rows({name: toy}, {"mean": ".1f", "difference": "+.1f"})
        for score, sft in zip(paper, PAPER["sft"], strict=True):
            row += [f"{score:.1f}", f"{score - sft:+.1f}".replace("-", "\N{MINUS SIGN}")]
        if name == "sft":
            row[2::2] = [""] * 3                        # no difference to itself
        rows.append(row)
    caption = (
        "The paper's columns are its table 1: the average of StableToolBench, BFCL, T-Eval and "
        "Nexus after training on ToolBench, APIGen and ShareGPT. Comparable: the sign of the "
        "differences to SFT, and the order of the methods. Not comparable: their size. The toy's "
        "model has 0.7 M parameters and its calls must match exactly. The paper's fixed weight, "
        "regular expressions, reference and reward models are not public; those here are this "
        "project's own (baselines/README.md)."
    )
    return ("<h2>Beside the paper</h2>\n"
            + report.figure_html(report.table_html(rows), caption, command))


def over_training_html(runs: list[dict], command: str) -> str:
    """Held-out tasks over training, as far as runs hold evaluations, and training losses."""
    histories = {}
    metrics = {}
    for name, (_, kind) in METHODS.items():
        kept = [run[name]["history"] for run in runs if "history" in run[name]]
        if kept:
            histories[name] = [{int(step): s for step, s in history.items()} for history in kept]
        curves = [run[name]["metrics"] for run in runs]
        grouped = [curve for curve in curves if curve[0]["loss_reasoning"] is not None]
        if grouped and kind in (None, "shad"):      # the groups of regular expressions are others
            metrics[name] = grouped
    body = report.held_out_html(histories, command) if histories else ""
    return body + report.training_html(metrics, command)


def verdict(success, loss) -> str:
    """What a setting does, from its paired differences (runs,) in points and in nats."""
    mean, half = mean_interval(success)
    differences = {"": {"points": success, "nats": loss}}
    _, (_, points, nats) = report.mean_rows(differences, {"points": "+.1f", "nats": "+.2f"})
    if len(success) < 2 or abs(mean) <= half:
        effect = "does not clearly change"
    elif mean > 0:
        effect = "raises"
    else:
        effect = "lowers"
    return f"{effect} held-out success ({points} points; loss {nats} nats)"


def settings_html(runs: list[dict], variants: dict[str, dict], command: str) -> str:
    """What matters in RFT: 1/tau, scope, means or sums, weights with or without a gradient.

    variants: {name: options of train.py besides the default}, as in methods.py; all runs hold them.
    """
    differences = figures(runs, ["sft", *variants], minus="rft")
    success = {}
    losses = {}
    for name, row in differences.items():
        title = name.removeprefix("rft, ").replace("tau", "\N{GREEK SMALL LETTER TAU}")
        success[title] = row[SUCCESS]
        losses[title] = row[LOSS]

    # lines over 1/tau; SFT, which has none, is level
    taus = {1 / 3: "rft"} | {1 / v["tau"]: name for name, v in variants.items() if "tau" in v}
    x = sorted(taus)
    means = figures(runs, ["sft", *taus.values()])
    lines = []
    for figure in (SUCCESS, LOSS):
        rft = np.array([means[taus[inverse]][figure] for inverse in x]).T       # (runs, taus)
        sft = np.repeat(means["sft"][figure][:, None], len(x), 1)
        lines.append({"sft": band(x, sft), "rft": band(x, rft)})

    tau = "1/\N{GREEK SMALL LETTER TAU}"
    figure = panels(
        line_plot("Held-out success", tau, "right calls (%)", lines[0]),
        line_plot("Held-out reasoning loss", tau, "loss (nats)", lines[1]),
        dots_plot("Held-out success, minus default RFT", "points", success, level=0),
        dots_plot("Held-out reasoning loss, minus default RFT", "nats", losses, level=0),
    )
    said = {title: verdict(success[title], losses[title]) for title in success}
    small, large, batch, sums, through = list(said.values())[1:]
    text = (
        f"Temperature: {tau} = 0.2 instead of 1/3 {small}, and 0.5 {large}. Scope: one pair of "
        f"weights per batch instead of one per sample {batch}. Formula: taking sums of losses "
        f"instead of means {sums}, and letting the gradient through the weights {through}."
    )
    caption = (
        f"{len(runs)} seeds, 95 % intervals. First the paper's sweep of {tau}; SFT has none. Then "
        f"paired differences to the default ({tau} = 1/3, scope sample, means, detached weights), "
        "which is the line at 0. Bands, and intervals without a mark at their end, may go on."
    )
    return (f"<h2>What matters in RFT</h2>\n{report.figure_html(figure, caption, command)}"
            f"<p>{text}</p>\n")


def labels_html(folders: list[str], dataset: Dataset, command: str, count: int = 12) -> str:
    """SHAD against the truth, and samples in the colours of each method's labels.

    folders: what methods.py left of each seed; dataset: the samples of the first.
    """
    labels = shad.load_labels(os.path.join(folders[0], "labels"), dataset)
    roles = dataset.true_roles()
    figures = {"error": [], "auc": []}
    for folder in folders:
        truth = read_object(os.path.join(folder, "labels", "summary.json"))["truth"]
        for name, values in figures.items():
            values.append(truth[name])
    _, (_, error, auc) = report.mean_rows({"": figures}, {"error": ".2%", "auc": ".3f"})
    note = (
        "All samples of the first seed, those shuffled for SHAD too. Of the other samples, over "
        f"{len(folders)} seeds: error {error}, AUC {auc}."
    )
    views = shad_views(dataset, labels.difference[:], labels[:])
    views |= method_views(folders[0], Dataset(dataset.samples.select(range(count)),
                                              dataset.renderer))
    explanation = "SHAD and the expressions know nothing of the true roles. "
    if "Rho-1" in views:
        explanation += (
            "Rho-1 selects anew in each batch; here, the 60 % of these tokens whose loss by the "
            "base model exceeds that of the reference model most. "
        )
    if "RewardFT" in views:
        explanation += (
            "RewardFT weighs a token by the sigmoid of what a model tuned by DPO has gained on it."
        )
    return (
        "<h2>SHAD compared with the true roles</h2>\n"
        + report.truth_html(labels.difference[:], roles["reasoning"], note, command)
        + "<h2>Coloured samples</h2>\n"
        + report.figure_html(sample_views(dataset, count, views), explanation, command)
    )


def method_views(folder: str, dataset: Dataset) -> dict:
    """What regular expressions, Rho-1 and RewardFT make of a dataset, for sample_views.

    folder: what methods.py left of a seed. A method whose model is not there is left out.
    """
    kinds = np.where(regex_labels(dataset), "reasoning", "format")
    views = {"regular expressions": ({"reasoning": "not format", "format": "format"}, kinds, {})}
    losses = {}
    for name, path in (("base", reproduce.TOY), ("reference", f"{folder}/reference/model"),
                       ("dpo", f"{folder}/dpo")):
        if os.path.isdir(path):
            model = Transformer.from_pretrained(path)
            losses[name] = shad.token_losses(model, dataset, 4096, f"losses of {name}")
    if "reference" in losses:
        excess = losses["base"] - losses["reference"]
        selected = excess >= np.quantile(excess, 1 - train.Options().keep_share)
        key = {"reasoning": "selected", "rest": "not selected"}
        views["Rho-1"] = (key, np.where(selected, "reasoning", "rest"), {"excess loss": excess})
    if "dpo" in losses:
        weights = 1 / (1 + np.exp(losses["dpo"] - losses["base"]))
        key = {"reasoning": "weight above 0.5", "rest": "at most 0.5"}
        views["RewardFT"] = (key, np.where(weights > 0.5, "reasoning", "rest"),
                             {"weight": weights})
    return views


def runs_html(runs: list[dict], variants: dict[str, dict], command: str) -> str:
    """What the runs alone show: the body of methods.html but for the labels."""
    rows = tables(runs, variants)
    body = (
        comparison_html(runs, rows, command)
        + paper_html(runs, command)
        + over_training_html(runs, command)
    )
    if "settings" in rows:
        body += settings_html(complete(runs, variants), variants, command)
        caption = "Paired differences to the default of RFT, of all figures."
        body += report.figure_html(report.table_html(rows["settings"]), caption, command)
    return body
