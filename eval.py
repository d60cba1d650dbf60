"""Evaluation of any checkpoint: loss by token role, and benchmarks.

    python eval.py toy --model out/rft/model --out out/eval                        # exact match of tool and arguments
    python eval.py BENCH --model DIR --data FOLDER --out OUT                       # generate, greedily, and judge
    python eval.py BENCH --predictions FILE.jsonl --data FOLDER [--out OUT]        # judge {"id": ..., "output": "text"} lines
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out OUT  # mean loss by group of tokens

Writes OUT/summary.json and, for a benchmark, OUT/verdicts.jsonl: a line an asked item, with the reason. Outputs are kept in
OUT/outputs.*.jsonl as they come, so that the same command takes up a run where it was stopped. Under torchrun the ranks share
the items.
"""
import hashlib
import html
import json
import math
import os
import platform
import re
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from data import (DataError, Dataset, Message, Renderer, load_labels, option, parse_options, read_records, run_script,
                  toy_samples)
from model import (CheckpointError, Transformer, barrier, checkpoint_files, generate, init_distributed, mixed_precision,
                   rank_and_world, resolve, write_json)
from shad import classify, token_losses


@dataclass
class Options:
    bench: str = option("toy", "what to evaluate", positional=True, choices=["loss", "toy"])
    model: str = option("", "checkpoint: a Hugging Face directory or hub id")
    out: str = option("", "directory for summary.json, verdicts.jsonl and outputs; may be left out with --predictions")
    predictions: str = option(None, 'judge these {"id", "output"} lines instead of generating')
    data: list = option([], "the benchmark's folder, or the data files of loss")
    categories: list = option([], "ask these categories of the benchmark only")
    limit: int = option(0, "ask the first so many items of each category; 0: all")
    max_new_tokens: int = option(0, "longest output in tokens; 0: the benchmark's own")
    max_length: int = option(0, "longest sequence in tokens, output included; a prompt without room counts as wrong, a sample "
                                "of loss is dropped; 0: the model's context, 2048 for loss")
    cache_tokens: int = option(16384, "tokens that the KV cache holds: sequences generated together times their length")
    labels: str = option(None, "labels of shad.py for the same data (loss)")
    count: int = option(200, "toy samples of each kind, held-in and held-out")
    micro_tokens: int = option(4096, "tokens of one forward, padding included (loss)")
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
# What the benchmarks share: items are asked, outputs are kept as they come, judged, and counted

@dataclass
class Item:
    """One asked question of a benchmark."""
    id: str
    category: str
    messages: list[Message]         # what the model is given
    reference: object = None        # what the judge needs


class Bench(NamedTuple):
    """How a benchmark is asked, judged and summed up; and the longest output it needs, in tokens."""
    items: Callable                 # its folder -> [Item]
    judge: Callable                 # Item, output -> {"correct": bool, "reason": str, ... further figures}
    summary: Callable               # verdicts -> its own figures
    max_new_tokens: int = 512


def context_length(model: Transformer, max_length: int = 0) -> int:
    """The longest sequence that is asked of a model, output included: its context, or less."""
    return min(max_length or math.inf, model.config.max_position_embeddings, model.config.sliding_window or math.inf)


def speaker(model: Transformer, renderer: Renderer, max_new_tokens: int, max_length: int = 0, cache_tokens: int = 16384):
    """The function speak(conversations: lists of Messages, finished=None) -> the assistant's next turns, greedily generated.

    A turn is None where its conversation leaves no room for max_new_tokens in the context. `finished(i, text)` is called as each
    is done.
    """
    def speak(conversations, finished=None) -> list[str | None]:
        prompts = [renderer.prompt(messages) for messages in conversations]
        fits = [len(prompt) + max_new_tokens <= context_length(model, max_length) for prompt in prompts]
        asked, texts = [i for i, fit in enumerate(fits) if fit], [None] * len(prompts)

        def done(i, text):
            texts[i] = text
            if finished:
                finished(i, text)

        for i in range(len(prompts)):
            if not fits[i]:
                done(i, None)
        with mixed_precision(model.head.device):
            generate(model, [prompts[i] for i in asked], max_new_tokens, {renderer.end}, cache_tokens=cache_tokens,
                     finished=lambda n, ids: done(asked[n], renderer.tokenizer.decode(ids, skip_special_tokens=False)))
        return texts

    return speak


def read_outputs(folder: str, settings: dict) -> dict[str, str | None]:
    """{item id: output} of all OUT/outputs.RANK.jsonl: a line of settings, then {"id", "output"} lines, the last perhaps torn.

    Raises DataError, naming what differs, where a file was begun with other settings.
    """
    outputs = {}
    for name in sorted(name for name in os.listdir(folder) if re.fullmatch(r"outputs\.\d+\.jsonl", name)):
        path, differs = os.path.join(folder, name), []
        with open(path, encoding="utf-8", errors="replace") as f:
            lines = f.read().split("\n")[:-1]           # what follows the last newline was cut short by a kill
        for n, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if n == 1:
                    differs = [key for key in settings if record.get(key) != settings[key]]
                else:
                    outputs[record["id"]] = record["output"]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f"{path}, line {n}, is damaged; remove it{' and the rest' * (n == 1)}, to ask again.") from None
        if differs:
            raise DataError(f"{path} was made with other settings ({', '.join(differs)} differ{'s' * (len(differs) == 1)}); "
                            "choose another --out, or remove the file to start anew.")
    return outputs


def generate_outputs(model: Transformer, renderer: Renderer, items: list[Item], max_new_tokens: int = 96, max_length: int = 0,
                     cache_tokens: int = 16384, folder: str | None = None, settings: dict | None = None) -> dict[str, str | None]:
    """Greedy outputs {item id: text, or None where the prompt leaves no room}.

    With a folder each is appended to folder/outputs.RANK.jsonl when it is done, those already there under the same settings are
    not asked again, and the ranks share the rest; without, every rank generates all.
    """
    (rank, world), log, done = rank_and_world() if folder else (0, 1), None, {}
    if folder:
        os.makedirs(folder, exist_ok=True)
        done = read_outputs(folder, settings)
        barrier()                                       # every rank has read before any writes
        log = open_log(os.path.join(folder, f"outputs.{rank}.jsonl"), settings)
    todo = [item for item in items if item.id not in done]
    mine = sorted(todo, key=lambda item: sum(len(m.text) for m in item.messages))[rank::world]     # a fair share of the long ones
    bar = tqdm(total=len(mine), desc="generate", unit="item", disable=rank_and_world()[0] > 0)

    def finished(i, text):
        bar.update()
        if log:
            log.write(json.dumps({"id": mine[i].id, "output": text}) + "\n")
            log.flush()

    speak = speaker(model, renderer, max_new_tokens, max_length, cache_tokens)
    outputs = dict(zip([item.id for item in mine], speak([item.messages for item in mine], finished)))
    bar.close()
    if not folder:
        return outputs
    log.close()
    barrier()
    return read_outputs(folder, settings)


def open_log(path: str, settings: dict):
    """The file to append to, without a torn last line, its first line the settings."""
    with open(path, "ab+") as log:
        log.seek(0)
        log.truncate(log.read().rfind(b"\n") + 1)
    log = open(path, "a", encoding="utf-8")
    if not log.tell():
        log.write(json.dumps(settings) + "\n")
        log.flush()
    return log


def read_predictions(path: str) -> dict[str, str]:
    """{item id: output} of a file of {"id", "output"} lines made elsewhere."""
    outputs = {}
    try:
        for where, record in read_records(path):
            name, output = str(record["id"]), record["output"]
            if not isinstance(output, str):
                raise TypeError
            if name in outputs:
                raise DataError(f"{where}: the id {name!r} was there before; keep one output an item.")
            outputs[name] = output
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DataError(f'{path}: every line must be {{"id": ..., "output": "text"}}.') from None
    return outputs


def judge_outputs(bench: Bench, items: list[Item], outputs: dict[str, str | None]) -> list[dict]:
    """A verdict on every asked item; an item without output is wrong."""
    verdicts = []
    for item in items:
        output = outputs.get(item.id)
        missing = "prompt too long for the model" if item.id in outputs else "no output"
        verdict = bench.judge(item, output) if output is not None else {"correct": False, "reason": missing}
        verdicts.append({"id": item.id, "category": item.category, **verdict, "output": output})
    return verdicts


def wilson(correct: int, asked: int, z: float = 1.96) -> list[float]:
    """The 95 % interval of a share (Wilson 1927): honest for small counts and near 0 and 1."""
    p, n = correct / asked, asked
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def count_verdicts(verdicts: list[dict]) -> dict:
    """The counts that every benchmark has: asked, answered, and accuracy by category with its 95 % interval."""
    categories = {}
    for name in dict.fromkeys(v["category"] for v in verdicts):
        correct = [v["correct"] for v in verdicts if v["category"] == name]
        categories[name] = {"asked": len(correct), "correct": sum(correct), "accuracy": sum(correct) / len(correct),
                            "interval": wilson(sum(correct), len(correct))}
    answered = sum(v["output"] is not None for v in verdicts)
    return {"asked": len(verdicts), "answered": answered, "missing": sum(v["reason"] == "no output" for v in verdicts),
            "too_long": sum(v["output"] is None and v["reason"] != "no output" for v in verdicts), "categories": categories}


def fingerprint(*parts) -> str:
    """sha256 of bytes, or of the JSON of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, default=repr).encode())
    return digest.hexdigest()


def checkpoint_fingerprint(path: str) -> str:
    """sha256 of config.json and of each weight file's size, first and last MiB: other weights in the same folder are noticed."""
    parts = []
    for file in [os.path.join(path, "config.json"), *checkpoint_files(path)]:
        with open(file, "rb") as f:
            size = f.seek(0, os.SEEK_END)
            parts.append(size)
            for place in (0, max(0, size - 2**20)):
                f.seek(place)
                parts.append(f.read(2**20))
    return fingerprint(*parts)


def ask(o: Options, items: list[Item]) -> list[Item]:
    """The items that --categories and --limit leave."""
    known = list(dict.fromkeys(item.category for item in items))
    unknown = [name for name in o.categories if name not in known]
    if unknown:
        raise DataError(f"--categories {' '.join(unknown)}: not in this benchmark; it has {', '.join(known)}.")
    asked = []
    for name in o.categories or known:
        asked += [item for item in items if item.category == name][:o.limit or None]
    if not asked:
        raise DataError(f"{' '.join(o.data)} holds no items of {o.bench}; see the README for the folder's layout.")
    return asked


def evaluate_bench(o: Options, device) -> tuple[dict, list[dict]]:
    """(summary, verdicts) of a checkpoint, or of predictions made elsewhere, on a benchmark."""
    bench = BENCHES[o.bench]
    everything = toy_items(o.count, o.seed) if o.bench == "toy" else bench.items(o.data[0])
    items = ask(o, everything)
    summary = {"versions": {"python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__},
               "data_sha256": fingerprint([(i.id, i.category, [(m.role, m.text) for m in i.messages], i.reference) for i in everything]),
               "limit": o.limit or None}
    if o.predictions:
        outputs = read_predictions(o.predictions)
        summary["not_asked"] = len(outputs.keys() - {item.id for item in items})
    else:
        path = resolve(o.model)
        model, renderer = Transformer.from_pretrained(path, device=device), Renderer(path, o.template)
        summary["generation"] = {"decoding": "greedy", "max_new_tokens": o.max_new_tokens or bench.max_new_tokens,
                                 "max_length": context_length(model, o.max_length), "template": renderer.template}
        settings = {"bench": o.bench, "model": checkpoint_fingerprint(path), "tokenizer": renderer.fingerprint,
                    "prompts": fingerprint([(item.id, renderer.prompt(item.messages)) for item in items]), **summary["generation"]}
        outputs = generate_outputs(model, renderer, items, settings["max_new_tokens"], o.max_length, o.cache_tokens, o.out, settings)
        if o.bench == "toy":
            summary["losses"] = toy_losses(model, renderer, o.count, o.seed, o.micro_tokens)
    verdicts = judge_outputs(bench, items, outputs)
    return summary | count_verdicts(verdicts) | bench.summary(verdicts), verdicts


# -----------------------------------------------------------------------------------------------------------------
# The toy: the call must have the right tool and exactly the right arguments

def toy_items(count: int, seed: int) -> list[Item]:
    return [Item(s.id, kind, s.messages[:-1], s.messages[-1].text) for kind in ("held_in", "held_out")
            for s in toy_samples(count, seed, held_out=kind == "held_out")]


def parse_call(text: str):
    """(tool, arguments) of a Thought / Action / Action Input turn; ValueError says what is missing. Nothing is executed."""
    match = re.search(r"Action: *(\S+)\s+Action Input: *(\{.*\})", text, re.DOTALL)
    if not match:
        raise ValueError("no 'Action: ... Action Input: {...}'")
    return match[1], json.loads(match[2])


def toy_judge(item: Item, output: str) -> dict:
    """Exact match of tool and arguments with the reference turn."""
    tool, arguments = parse_call(item.reference)
    try:
        got_tool, got_arguments = parse_call(output)
        got = json.dumps(got_arguments)
    except (ValueError, RecursionError) as e:
        return {"correct": False, "reason": f"not a call: {e}"}
    if got_tool != tool:
        return {"correct": False, "reason": f"tool {got_tool}, not {tool}"}
    if got_arguments != arguments:
        return {"correct": False, "reason": f"arguments {got}, not {json.dumps(arguments)}"}
    return {"correct": True, "reason": "correct"}


def toy_summary(verdicts: list[dict]) -> dict:
    kinds = dict.fromkeys(v["category"] for v in verdicts)
    return {"success": {k: float(np.mean([v["correct"] for v in verdicts if v["category"] == k])) for k in kinds}}


def toy_losses(model: Transformer, renderer: Renderer, count: int, seed: int, micro_tokens: int) -> dict:
    """Losses by true role of `count` samples of each kind."""
    return {kind: role_losses(model, Dataset(toy_samples(count, seed, kind == "held_out"), renderer), micro_tokens)
            for kind in ("held_in", "held_out")}


def evaluate_toy(model: Transformer, renderer: Renderer, count: int, seed: int, micro_tokens: int = 4096):
    """(summary, verdicts) of a checkpoint on `count` fresh toy samples of each kind: losses by true role, and success."""
    items = toy_items(count, seed)
    verdicts = judge_outputs(BENCHES["toy"], items, generate_outputs(model, renderer, items))
    return count_verdicts(verdicts) | toy_summary(verdicts) | {"losses": toy_losses(model, renderer, count, seed, micro_tokens)}, verdicts


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


BENCHES = {"toy": Bench(toy_items, toy_judge, toy_summary, 96)}


def main():
    o = parse_options(Options, __doc__)
    needs = (["--model"] if not o.model and not o.predictions else []) + (["--data"] if not o.data and o.bench != "toy" else []) + (
        ["--out"] if not o.out and not o.predictions else [])
    if needs:
        raise DataError(f"eval.py {o.bench} needs {' and '.join(needs)}.")
    device, (rank, _) = init_distributed(), rank_and_world()
    if o.bench == "loss":
        path = resolve(o.model)
        dataset = Dataset.load(o.data, path, o.template, o.max_length or 2048)
        reasoning = classify(*load_labels(o.labels, dataset)) if o.labels else None
        losses = role_losses(Transformer.from_pretrained(path, device=device), dataset, o.micro_tokens, reasoning)
        summary, verdicts = {"losses": losses, "dropped": dataset.dropped}, None
    else:
        summary, verdicts = evaluate_bench(o, device)
    if rank > 0:
        return
    for name, c in summary.get("categories", {}).items():
        print(f"{name} {c['accuracy']:.1%} of {c['asked']:,} (95 %: {c['interval'][0]:.1%} to {c['interval'][1]:.1%})")
    losses = summary.get("losses", {})
    for kind, groups in (losses if o.bench == "toy" else {"loss": losses}).items():
        if groups:
            print(f"{kind}: " + ", ".join(f"{n} {g['loss']:.4f} ({g['tokens']:,} tokens)" for n, g in groups.items() if g["tokens"]))
    if o.out:
        os.makedirs(o.out, exist_ok=True)
        write_json(os.path.join(o.out, "summary.json"), {"bench": o.bench, "model": o.model, "predictions": o.predictions, **summary})
        if verdicts:
            with open(os.path.join(o.out, "verdicts.jsonl.tmp"), "w", encoding="utf-8") as f:
                f.writelines(json.dumps(v) + "\n" for v in verdicts)
            os.replace(os.path.join(o.out, "verdicts.jsonl.tmp"), os.path.join(o.out, "verdicts.jsonl"))
        print(f"wrote {o.out}/summary.json" + (" and verdicts.jsonl" if verdicts else ""))


if __name__ == "__main__":
    run_script(main, CheckpointError)
