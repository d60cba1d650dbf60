"""What people see of SHAD's labels: figures, and the paper's first figure for their own data.

Everything here takes plain arrays, and a Dataset as it is handed over.
"""
import itertools

import numpy as np

from support import report


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative; ties count half."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]      # mean rank among ties, from 1
    p = positive.sum()
    n = (~positive).sum()
    if not p or not n:
        return float("nan")
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * n))


def mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def summarize(difference, reasoning, base, tuned, unshuffled, roles) -> dict:
    """The figures of a run: shares and mean losses by SHAD's groups, `reasoning` and the rest.

    top_tenth_rise: how much the loss of the tokens of the greatest LD rose, on average over a tenth
    of all. Where true roles are known also `truth`, see judge. All arrays: (output tokens,).
    """
    top = np.sort(difference)[-max(1, len(difference) // 10):]
    summary = {"tokens": len(difference), "reasoning_share": mean(reasoning),
               "top_tenth_rise": mean(top)}
    for name, group in (("reasoning", reasoning), ("boilerplate", ~reasoning)):
        summary[f"base_loss_{name}"] = mean(base[group])
        summary[f"tuned_loss_{name}"] = mean(tuned[group])
    if roles is not None:
        scored = unshuffled if unshuffled.any() else ~unshuffled
        true = roles["reasoning"][scored]
        scored_roles = {name: is_role[scored] for name, is_role in roles.items()}
        truth = judge(difference[scored], reasoning[scored], scored_roles)
        truth["shuffled_too"] = not unshuffled.any()
        for name, losses in (("base", base[scored]), ("tuned", tuned[scored])):
            truth[f"{name}_loss_reasoning"] = mean(losses[true])
            truth[f"{name}_loss_boilerplate"] = mean(losses[~true])
        summary["truth"] = truth
    return summary


def judge(difference, reasoning, roles) -> dict:
    """SHAD's groups against the true roles of the same tokens; all arrays: (output tokens,).

    error, auc: over all tokens, where a boundary counts as boilerplate. clear: the figures over the
    tokens of the other roles, which are clearly one or the other. called_reasoning: of each role
    that occurs, the share that SHAD calls reasoning.
    """
    true = roles["reasoning"]
    called = {name: mean(reasoning[is_role]) for name, is_role in roles.items() if is_role.any()}
    clear = ~roles["boundary"]
    return {
        "tokens": len(difference),
        "error": mean(true != reasoning),
        "auc": auc(difference, true),
        "missed_reasoning": mean(~reasoning[true]),
        "boilerplate_called_reasoning": mean(reasoning[~true]),
        "called_reasoning": called,
        "clear": {
            "tokens": int(clear.sum()),
            "error": mean((true != reasoning)[clear]),
            "auc": auc(difference[clear], true[clear]),
            "precision": mean(true[clear & reasoning]),
            "recall": mean(reasoning[true])}}


def format_summary(summary: dict) -> str:
    """The summary as printable text."""
    def number(x):
        return "    -" if x is None else f"{x:5.2f}"

    def losses(figures, group):
        base = number(figures[f"base_loss_{group}"])
        tuned = number(figures[f"tuned_loss_{group}"])
        return f"{group} {base} ->{tuned}"

    rows = [f"SHAD: {summary['shuffled']} of {summary['samples']} samples shuffled; "
            f"{summary['tokens']:,} output tokens labelled, "
            f"{summary['reasoning_share']:.1%} reasoning"]
    groups = {"SHAD's groups": summary, "true groups": summary.get("truth")}
    for title, figures in groups.items():
        if figures:
            rows.append(f"  {title:14} base -> tuned loss: {losses(figures, 'reasoning')}   "
                        f"{losses(figures, 'boilerplate')}")
    if "truth" in summary:
        rows += format_truth(summary["truth"])
    if "check" in summary:
        rows.append(format_check(summary["check"], summary["top_tenth_rise"]))
    return "\n".join(rows)


def format_truth(truth: dict) -> list[str]:
    """The lines of a summary that say how far SHAD's groups are the true ones."""
    def percent(x):
        return "-" if x is None else f"{x:.1%}"

    where = "samples not shuffled"
    if truth["shuffled_too"]:
        where = "all samples, shuffled ones too"
    clear = truth["clear"]
    called = [f"{percent(share)} of {name}" for name, share in truth["called_reasoning"].items()]
    rows = [f"  against the true roles of {truth['tokens']:,} tokens of {where}: "
            f"error {truth['error']:.2%}, AUC {truth['auc']:.3f}"]
    if "boundary" in truth["called_reasoning"]:
        rows.append(f"    without boundaries, {clear['tokens']:,} tokens: "
                    f"error {clear['error']:.2%}, AUC {clear['auc']:.3f}, "
                    f"precision {percent(clear['precision'])}, recall {percent(clear['recall'])}")
    rows.append(f"    called reasoning: {', '.join(called)}")
    return rows


def format_check(check: dict, top_tenth_rise: float) -> str:
    """The line of a summary that says whether the discriminator has unlearned to use its input."""
    right = check["loss_right_input"]
    wrong = check["loss_wrong_input"]
    losses = f"loss {right:.2f} with the right input, {wrong:.2f} with a wrong one"
    if check["uses_input"]:
        return f"  the discriminator still uses its input ({losses}): raise --lr or --shuffle"
    return (f"  the discriminator has unlearned to use its input ({losses}); "
            f"the loss of the top tenth of tokens rose by {top_tenth_rise:.2f}")


def output_pieces(dataset, i: int) -> list[tuple[str, bool]]:
    """(text, is format) of each output token of sample i."""
    pieces = []
    for turn in filter(None, dataset.renderer.output_pieces(dataset.samples[i])):
        *said, end_of_turn = turn
        ends = list(itertools.accumulate(len(piece) for piece in said))
        pieces += report.split_pieces("".join(said), [(0, end) for end in ends])
        pieces.append((end_of_turn, True))
    return pieces


def colored_tokens(dataset, i: int, kinds, values) -> list[tuple[str, str, str]]:
    """(text, kind, hover text) of each output token of sample i.

    kinds: (tokens of this output,) str; where one is "", the shape of the text tells format from
    connecting. values: {name: array (tokens of this output,)} for the hover text.
    """
    tokens = []
    for k, (text, is_format) in enumerate(output_pieces(dataset, i)):
        shape = "format" if is_format else "connecting"
        lines = [repr(text)]
        lines += [f"{name} {array[k]:.3f}" for name, array in values.items()]
        tokens.append((text, kinds[k] or shape, "\n".join(lines)))
    return tokens


def sample_html(dataset, i: int, tokens) -> str:
    """Sample i on a page: its input, and its output tokens in their colours."""
    sample = dataset.samples[i]
    given = "\n".join(f"{m.role}: {m.text}" for m in sample.messages if not m.is_output)
    return report.sample_html(sample.id, given, tokens)


def labels_page(dataset, difference, is_reasoning, threshold, losses, summary, count=40) -> str:
    """The body of labels.html: `count` samples, the shares of the groups and the histogram."""
    places = np.linspace(0, len(dataset.kept) - 1, min(count, len(dataset.kept)))
    shown = dataset.kept[places.round().astype(int)]
    kinds = []
    samples = []
    for i in shown:
        own = slice(*dataset.output_starts[i:i + 2])
        values = {name: array[own] for name, array in (losses | {"LD": difference}).items()}
        tokens = colored_tokens(dataset, i, np.where(is_reasoning[own], "reasoning", ""), values)
        kinds += [kind for _, kind, _ in tokens]
        samples.append(sample_html(dataset, i, tokens))
    shares = []
    for kind in ("reasoning", "format", "connecting"):
        shares.append(f"{kind} {kinds.count(kind) / max(1, len(kinds)):.0%}")
    return report.labels_body(format_summary(summary), ", ".join(shares), threshold, difference,
                              is_reasoning, "".join(samples))


def shad_views(dataset, difference, is_reasoning) -> dict:
    """What SHAD calls reasoning, and the true roles, for sample_views."""
    roles = dataset.true_roles()
    key = report.KINDS | {"boundary": "boilerplate: boundary, which ends a name or value"}
    values = {"LD": difference}
    return {
        "SHAD": (report.KINDS, np.where(is_reasoning, "reasoning", ""), values),
        "true roles": (key, np.select(list(roles.values()), list(roles), ""), values),
    }


def sample_views(dataset, count: int, views: dict) -> str:
    """The first `count` samples, with buttons that choose by what their tokens are coloured.

    views: {title: (key, kinds, values)}: what each kind is called; kinds and values as in
    colored_tokens, but of the output tokens of all samples.
    """
    bodies = {}
    for title, (key, kinds, values) in views.items():
        body = report.key_html(key)
        for i in dataset.kept[:count]:
            own = slice(*dataset.output_starts[i:i + 2])
            shown = {name: array[own] for name, array in values.items()}
            body += sample_html(dataset, i, colored_tokens(dataset, i, kinds[own], shown))
        bodies[title] = body
    return report.choice_html("view", bodies)
