"""Evaluation of any checkpoint: loss by token role, and success on the toy.

    python eval.py toy --model out/rft/model --out out/eval                        # exact match of tool and arguments
    python eval.py toy --predictions FILE.jsonl --out DIR                          # score {"id": ..., "output": "text"} lines
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out DIR  # mean loss by group of tokens

Writes OUT/summary.json and, for the toy, OUT/verdicts.jsonl: a line an asked item, with the reason.
"""
import html
import json
import os
import re
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data import (DataError, Dataset, Renderer, load_labels, option, parse_options, read_records, run_script, toy_samples)
from model import CheckpointError, Transformer, generate, init_distributed, mixed_precision, rank_and_world, resolve, write_json
from shad import classify, token_losses


@dataclass
class Options:
    bench: str = option("toy", "what to evaluate", positional=True, choices=["toy", "loss"])
    model: str = option("", "checkpoint: a Hugging Face directory or hub id")
    out: str = option("", "directory for summary.json and verdicts.jsonl", required=True)
    predictions: str = option(None, 'score these {"id", "output"} lines instead of generating (toy)')
    data: list = option([], "data files (loss)")
    labels: str = option(None, "labels of shad.py for the same data (loss)")
    count: int = option(200, "toy samples of each kind, held-in and held-out")
    micro_tokens: int = option(4096, "tokens of one forward, padding included")
    max_length: int = option(2048, "longer samples are dropped, in tokens")
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    seed: int = option(1, "seed of the toy samples; train.py's are made with others")


def losses_by_group(losses: np.ndarray, groups: dict) -> dict:
    """Mean loss of each group of tokens: {name: {"loss": nats, "tokens": count}}; groups: {name: (output tokens,) bool}."""
    return {name: {"loss": float(losses[g].mean()) if g.any() else None, "tokens": int(g.sum())} for name, g in groups.items()}


def role_losses(model: Transformer, dataset: Dataset, micro_tokens: int, reasoning=None) -> dict:
    """Mean loss of all output tokens; by the true roles where the data has them; by SHAD's labels where given."""
    losses, roles = token_losses(model, dataset, micro_tokens, "loss"), dataset.true_roles()
    groups = {"all": np.ones(len(losses), bool)}
    if roles is not None:
        groups |= {"reasoning": roles["reasoning"], "boilerplate": ~roles["reasoning"]}
        groups |= {name: roles[name] for name in ("format", "connecting") if roles[name].any()}
    if reasoning is not None:
        groups |= {"SHAD reasoning": reasoning, "SHAD boilerplate": ~reasoning}
    return losses_by_group(losses, groups)


# -----------------------------------------------------------------------------------------------------------------
# The toy: the call must have the right tool and exactly the right arguments

def parse_call(text: str):
    """(tool, arguments) of a Thought / Action / Action Input turn; ValueError says what is missing. Nothing is executed."""
    match = re.search(r"Action: *(\S+)\s+Action Input: *(\{.*\})", text, re.DOTALL)
    if not match:
        raise ValueError("no 'Action: ... Action Input: {...}'")
    return match[1], json.loads(match[2])


def judge_call(output: str, reference: str) -> tuple[bool, str]:
    """(correct, reason) of one output against the reference turn: exact match of tool and arguments."""
    tool, arguments = parse_call(reference)
    try:
        got_tool, got_arguments = parse_call(output)
    except ValueError as e:
        return False, f"not a call: {e}"
    if got_tool != tool:
        return False, f"tool {got_tool}, not {tool}"
    if got_arguments != arguments:
        return False, f"arguments {json.dumps(got_arguments)}, not {json.dumps(arguments)}"
    return True, "correct"


def toy_success(outputs: dict[str, str], samples: dict) -> list[dict]:
    """Verdicts on {sample id: output text}; samples: {category: samples}. A missing output is wrong."""
    return [{"id": s.id, "category": category, "correct": correct, "reason": reason, "output": outputs.get(s.id)}
            for category, group in samples.items() for s in group
            for correct, reason in [judge_call(outputs[s.id], s.messages[-1].text) if s.id in outputs else (False, "no output")]]


def generate_outputs(model: Transformer, renderer: Renderer, samples, max_new_tokens: int = 96, batch: int = 64) -> dict[str, str]:
    """Greedy outputs {sample id: text} for the last turn of each sample."""
    outputs = {}
    for i in tqdm(range(0, len(samples), batch), "generate", unit="batch", disable=rank_and_world()[0] > 0):
        group = samples[i:i + batch]
        with mixed_precision(model.head.device):
            ids = generate(model, [renderer.prompt(s.messages[:-1]) for s in group], max_new_tokens, {renderer.end})
        outputs |= {s.id: renderer.tokenizer.decode(x, skip_special_tokens=False) for s, x in zip(group, ids)}
    return outputs


def evaluate_toy(model: Transformer, renderer: Renderer, count: int, seed: int, micro_tokens: int = 4096):
    """(summary, verdicts) of a checkpoint on `count` fresh toy samples of each kind: losses by true role, and success."""
    samples = {"held_in": toy_samples(count, seed), "held_out": toy_samples(count, seed, held_out=True)}
    verdicts = toy_success(generate_outputs(model, renderer, [s for group in samples.values() for s in group]), samples)
    losses = {kind: role_losses(model, Dataset(group, renderer), micro_tokens) for kind, group in samples.items()}
    return summarize_toy(verdicts) | {"losses": losses}, verdicts


def summarize_toy(verdicts: list[dict]) -> dict:
    kinds = ("held_in", "held_out")
    return {"asked": len(verdicts), "success": {k: float(np.mean([v["correct"] for v in verdicts if v["category"] == k])) for k in kinds}}


# -----------------------------------------------------------------------------------------------------------------
# The comparison: a table for the terminal, a report for the browser

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
    marks = [m * 10.0 ** e for e in range(-3, 2) for m in (1, 2, 5) if low < m * 10.0 ** e < high]
    parts = [f'<text x="44" y="12" font-size="13" font-weight="600">{title}</text>']
    parts += [f'<line x1="44" x2="420" y1="{y(m):.0f}" y2="{y(m):.0f}" stroke="#e3e3e3"/><text x="40" y="{y(m) + 4:.0f}" font-size="11" '
              f'text-anchor="end">{m:g}</text>' for m in marks]
    for (name, v), colour in zip(smooth.items(), ("#888888", "#1a7f4b", "#b5543a")):
        x = np.linspace(44, 420, len(v))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(v))) + f'"><title>{name}</title></polyline>'
                     f'<text x="424" y="{y(v[-1]) + (11 if name == "RFT" else -3):.0f}" font-size="12" fill="{colour}">{name}</text>')
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


def main():
    o = parse_options(Options, __doc__)
    device, (rank, _) = init_distributed(), rank_and_world()
    verdicts = None
    if o.bench == "toy" and o.predictions:
        try:
            outputs = {str(r["id"]): r["output"] for _, r in read_records(o.predictions)}
            if not all(isinstance(text, str) for text in outputs.values()):
                raise TypeError
        except (KeyError, TypeError):
            raise DataError(f'{o.predictions}: every line must be {{"id": ..., "output": "text"}}.') from None
        verdicts = toy_success(outputs, {"held_in": toy_samples(o.count, o.seed), "held_out": toy_samples(o.count, o.seed, held_out=True)})
        summary = summarize_toy(verdicts)
    else:
        if not o.model or (o.bench == "loss" and not o.data):
            raise DataError(f"eval.py {o.bench} needs --model{' and --data' if o.bench == 'loss' else ''}.")
        path = resolve(o.model)
        model = Transformer.from_pretrained(path, device=device)
        if o.bench == "toy":
            summary, verdicts = evaluate_toy(model, Renderer(path, o.template), o.count, o.seed, o.micro_tokens)
        else:
            dataset = Dataset.load(o.data, path, o.template, o.max_length)
            reasoning = classify(*load_labels(o.labels, dataset)) if o.labels else None
            summary = {"losses": role_losses(model, dataset, o.micro_tokens, reasoning), "dropped": dataset.dropped}
    if rank > 0:
        return
    os.makedirs(o.out, exist_ok=True)
    write_json(os.path.join(o.out, "summary.json"), {"bench": o.bench, "model": o.model, "predictions": o.predictions, **summary})
    if verdicts:
        with open(os.path.join(o.out, "verdicts.jsonl.tmp"), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(v, ensure_ascii=False) + "\n" for v in verdicts)
        os.replace(os.path.join(o.out, "verdicts.jsonl.tmp"), os.path.join(o.out, "verdicts.jsonl"))
        print("success: " + ", ".join(f"{k} {v:.1%}" for k, v in summary["success"].items()) + f" of {o.count} each")
    losses = summary.get("losses", {})
    for kind, groups in (losses if o.bench == "toy" else {"loss": losses}).items():
        print(f"{kind}: " + ", ".join(f"{n} {g['loss']:.4f} ({g['tokens']:,} tokens)" for n, g in groups.items() if g["tokens"]))
    print(f"wrote {o.out}/summary.json" + (" and verdicts.jsonl" if verdicts else ""))


if __name__ == "__main__":
    run_script(main, CheckpointError)
