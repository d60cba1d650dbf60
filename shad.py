"""SHAD, the Shuffle-Aware Discriminator: which output tokens are reasoning, which are boilerplate?

    python shad.py --model DIR_OR_HUB_ID --data train.json --out labels        # writes labels.safetensors + labels.html
    torchrun --nproc_per_node 8 shad.py --model ... --data a.json b.json --out labels
    python shad.py --model toy --data toy[:300] --out labels --shuffle 100 --lr 1e-3 --epochs 4     # seconds, offline

Ye et al. 2024 (arXiv 2412.14780), three steps:
  1. shuffle   which output belongs to which input, in a small part of the data;
  2. tune      a copy of the model on it: it can now only learn what is predictable without the input;
  3. classify  every output token of the unshuffled data by its loss difference LD = loss_tuned - loss_base:
               LD <= 0: boilerplate, still predictable without its input;  LD > 0: reasoning, tied to it.
"""
import html
import json
import os
import random
import re
import shlex
import shutil
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm import tqdm

from data import (DataError, Dataset, collate, draw, epoch_batches, load_labels, micro_batches, option, parse_options, run_script,
                  save_labels, shuffle_outputs)
from model import (CheckpointError, Transformer, barrier, clip_gradients, init_distributed, mixed_precision,
                   rank_and_world, resolve, sum_gradients, sum_over_ranks, wants_shards, write_json)


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory or hub id", required=True)
    data: list = option([], "training data, one or more files; a slice may follow: train.json[:300]", required=True)
    out: str = option("", "directory for labels.safetensors and labels.html", required=True)
    # shuffle
    shuffle: float = option(0.01, "share of the samples to shuffle, but no fewer than 96 if there are; above 1: how many")
    # tune: more than one epoch made it worse on a real model, whose outputs are then learned by heart
    epochs: int = option(1, "epochs over the shuffled samples", low=1)
    lr: float = option(2e-5, "learning rate of the discriminator, falling linearly to 0")
    batch_tokens: int = option(4096, "tokens of a global batch", low=1)
    micro_tokens: int = option(4096, "tokens of one forward on one rank, padding included", low=1)
    # classify
    threshold: float = option(0.0, "loss difference above which a token is reasoning, in nats; kept beside the labels", low=float("-inf"))
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    shard: str = option("auto", "split the model over the ranks (FSDP2); auto: with several GPUs", choices=["auto", "yes", "no"])
    seed: int = option(0, "seed of the shuffle and of the batch order")


def token_losses(model: Transformer, dataset: Dataset, micro_tokens: int, title: str, directory: str | None = None):
    """The loss of every output token of a dataset, (output tokens,) float32 in nats, in data order; ranks share the work.

    The data is cut into parts that do not depend on the number of ranks, so neither do the losses. With a directory every part
    becomes a file there once it is done, parts that exist already are not computed again, and only rank 0 is given the losses.
    """
    (rank, world), device = rank_and_world(), model.head.device
    ends = np.cumsum(dataset.lengths[dataset.kept])
    part_tokens = max(8 * micro_tokens, ends[-1] // 1000)                           # at most about 1,000 parts
    parts = np.split(dataset.kept, np.flatnonzero(np.diff(ends // part_tokens)) + 1)    # cut where `ends` passes a multiple
    file = lambda p: os.path.join(directory, f"{p:04}.npy")
    exists = torch.zeros(len(parts), device=device)
    if directory and rank == 0:                                                     # one rank looks, or ranks might differ
        os.makedirs(directory, exist_ok=True)
        exists += torch.tensor([float(os.path.exists(file(p))) for p in range(len(parts))], device=device)
    sum_over_ranks(exists)
    todo = np.flatnonzero(exists.cpu().numpy() == 0)
    losses = np.zeros(0 if directory else dataset.offsets[-1], np.float32)
    tokens_of = lambda samples: int(dataset.lengths[samples].sum())
    bar = tqdm(total=int(ends[-1]), initial=int(ends[-1]) - sum(tokens_of(parts[p]) for p in todo), desc=title, unit="token",
               unit_scale=True, disable=rank > 0)
    for first in range(0, len(todo), world):
        plans = [micro_batches(parts[p], dataset.lengths, micro_tokens) for p in todo[first:first + world]]
        plans += [[]] * (world - len(plans))
        each = {}
        for k in range(max(map(len, plans))):           # as many forwards on every rank, since sharded ranks work together
            indices = plans[rank][k] if k < len(plans[rank]) else []
            tokens, targets, _ = collate(dataset, indices, device=device)
            with torch.no_grad(), mixed_precision(device):
                rows = model(tokens, targets)                                                   # (B, T)
            each |= {i: row[target != -100].cpu() for i, row, target in zip(indices, rows, targets)}
            bar.update(sum(tokens_of(plan[k]) for plan in plans if k < len(plan)))
        if each:
            p, done = todo[first + rank], torch.cat([each[i] for i in sorted(each)]).numpy()
            if directory:
                with open(file(p) + ".tmp", "wb") as f:
                    np.save(f, done)
                os.replace(file(p) + ".tmp", file(p))
            else:
                losses[dataset.offsets[parts[p][0]]:dataset.offsets[parts[p][-1] + 1]] = done
    bar.close()
    if hasattr(model, "reshard"):                       # FSDP's root stays whole until a backward, and an optimizer made now
        model.reshard()                                 # would hold copies of its parameters, not the shards
    if directory:
        barrier()
        return np.concatenate([np.load(file(p)) for p in range(len(parts))]) if rank == 0 else None
    total = torch.from_numpy(losses).to(device)
    sum_over_ranks(total)                               # each token was filled in by one rank and is 0 on the others
    return total.cpu().numpy()


def tune(model: Transformer, dataset: Dataset, o: Options) -> None:
    """Step 2: ordinary fine-tuning on the shuffled samples, in place; all parameters, mean loss of the output tokens."""
    (rank, world), device = rank_and_world(), model.head.device
    batches = [batch for epoch in range(o.epochs)
               for batch in epoch_batches(dataset.lengths, dataset.kept, o.batch_tokens, o.seed, epoch)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, weight_decay=0.0, fused=True)
    for step, batch in enumerate(tqdm(batches, "tune on shuffled", unit="step", disable=rank > 0)):
        optimizer.param_groups[0]["lr"] = o.lr * (1 - step / len(batches))
        n = dataset.outputs[batch].sum()
        for indices in micro_batches(batch, dataset.lengths, o.micro_tokens, rank, world):
            tokens, targets, _ = collate(dataset, indices, device=device)
            with mixed_precision(device):
                loss = model(tokens, targets).sum() / n
            loss.backward()
        sum_gradients(model)
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def loss_difference(tuned_losses, base_losses):
    """LD = loss_tuned - loss_base of every token, in nats: what is lost when outputs may no longer depend on inputs."""
    return tuned_losses - base_losses


def classify(loss_difference, threshold: float = 0.0):
    """True for reasoning tokens (LD > threshold), False for boilerplate (LD <= threshold)."""
    return loss_difference > threshold


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive scores above a negative, a tie counting half (the area under the ROC curve)."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]                  # mean rank among ties, from 1
    p, n = positive.sum(), (~positive).sum()
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * n)) if p and n else float("nan")


def run(o: Options, dataset: Dataset, model: Transformer) -> np.ndarray:
    """SHAD on a dataset; writes o.out and returns LD (output tokens,) float32. `model` ends as the discriminator: only one
    copy is ever held, since the base losses are taken before it is tuned. A run that was killed goes on from what it left in
    o.out/parts: losses, and the tuned model."""
    parts, (rank, _), clock = os.path.join(o.out, "parts"), rank_and_world(), [time.perf_counter()]
    # 1. shuffle
    count = o.shuffle if o.shuffle > 1 else max(96, o.shuffle * len(dataset.kept))              # fewer teach nothing
    fraction = min(1.0, count / len(dataset.kept))
    shuffled_samples = shuffle_outputs(dataset.samples.pick(dataset.kept), fraction, o.seed)
    shuffled = Dataset(shuffled_samples, dataset.renderer, 2 * dataset.max_length)  # another's output may be a longer one
    take_up(parts, dataset.fingerprint | {k: v for k, v in asdict(o).items() if k not in ("out", "data", "threshold", "shard")})
    base_losses = token_losses(model, dataset, o.micro_tokens, "losses of the base", os.path.join(parts, "base losses"))
    clock.append(time.perf_counter())
    # 2. tune
    tuned_model = os.path.join(parts, "tuned model")
    if os.path.isdir(tuned_model):
        model.load_weights(tuned_model)
    else:
        tune(model, shuffled, o)
        model.save_pretrained(tuned_model + ".tmp")
        if rank == 0:
            os.rename(tuned_model + ".tmp", tuned_model)
    clock.append(time.perf_counter())
    tuned_losses = token_losses(model, dataset, o.micro_tokens, "losses of the tuned", os.path.join(parts, "tuned losses"))
    clock.append(time.perf_counter())
    # 3. classify
    if rank == 0:
        difference = loss_difference(tuned_losses, base_losses)
        others = np.ones(len(dataset.samples), bool)
        others[dataset.kept[draw(len(dataset.kept), fraction, random.Random(o.seed))]] = False  # as shuffle_outputs drew them
        summary = summarize(difference, base_losses, tuned_losses, np.repeat(others, dataset.outputs), dataset.true_roles(), o.threshold)
        summary |= {"samples": len(dataset.kept), "shuffled": len(shuffled_samples), "dropped": dataset.dropped,
                    "seconds": dict(zip(("base", "tune", "tuned"), np.diff(clock).round(1).tolist()))}
        write_json(os.path.join(o.out, "summary.json"), summary)
        write_page(os.path.join(o.out, "labels.html"), "SHAD: reasoning and boilerplate tokens",
                   picture(dataset, difference, base_losses, tuned_losses, o.threshold, summary))
        save_labels(o.out, difference, dataset, o.model, o.threshold, o.seed)      # last: their presence says that all is there
        shutil.rmtree(parts)
        print(describe(summary))
    barrier()                                                                       # the other ranks read what rank 0 wrote
    return load_labels(o.out, dataset)[0]


def take_up(parts: str, settings: dict) -> None:
    """Make the folder of a run's parts, or find what a run with the same settings left. Raises DataError for other settings."""
    path, (rank, _) = os.path.join(parts, "settings.json"), rank_and_world()
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            differs = [key for key, value in json.load(f).items() if settings.get(key) != value]
        if differs:
            raise DataError(f"{parts} was left by an unfinished run with another {' and '.join(differs)}; remove it, or choose another --out.")
    elif rank == 0:
        shutil.rmtree(parts, ignore_errors=True)                # killed while it was removed
    barrier()                                                   # every rank has looked
    if rank == 0:
        os.makedirs(parts, exist_ok=True)
        write_json(path, settings)


def summarize(difference, base, tuned, others, roles, threshold) -> dict:
    """The figures of a run: shares and mean losses by SHAD's groups, and, where true roles are known, the error against them
    on `others`, the tokens of samples that were not shuffled (on all, if all were)."""
    reasoning, mean = classify(difference, threshold), lambda x: float(x.mean()) if len(x) else None
    summary = {"tokens": len(difference), "reasoning_share": mean(reasoning)}
    for name, group in (("reasoning", reasoning), ("boilerplate", ~reasoning)):
        summary |= {f"base_loss_{name}": mean(base[group]), f"tuned_loss_{name}": mean(tuned[group])}
    if roles is not None:
        judged = others if others.any() else ~others
        true, predicted = roles["reasoning"][judged], reasoning[judged]
        summary["truth"] = {
            "tokens": int(judged.sum()), "shuffled_too": not others.any(), "error": mean(true != predicted), "auc": auc(difference[judged], true),
            "missed_reasoning": mean(~predicted[true]), "boilerplate_called_reasoning": mean(predicted[~true]),
            "base_loss_reasoning": mean(base[judged][true]), "base_loss_boilerplate": mean(base[judged][~true]),
            "tuned_loss_reasoning": mean(tuned[judged][true]), "tuned_loss_boilerplate": mean(tuned[judged][~true])}
    return summary


def describe(s: dict) -> str:
    """A summary for people."""
    rows = [f"SHAD: {s['shuffled']} of {s['samples']} samples shuffled; {s['tokens']:,} output tokens labelled, "
            f"{s['reasoning_share']:.1%} reasoning"]
    number = lambda x: "    -" if x is None else f"{x:5.2f}"
    for title, d in (("SHAD's groups", s), ("true groups", s.get("truth", {}))):
        if d:
            rows.append(f"  {title:14} base -> tuned loss: reasoning {number(d['base_loss_reasoning'])} ->{number(d['tuned_loss_reasoning'])}"
                        f"   boilerplate {number(d['base_loss_boilerplate'])} ->{number(d['tuned_loss_boilerplate'])}")
    if "truth" in s:
        t = s["truth"]
        rows.append(f"  against the true roles of {t['tokens']:,} tokens of {'all samples, shuffled ones too' if t['shuffled_too'] else 'samples not shuffled'}: "
                    f"error {t['error']:.2%}, AUC {t['auc']:.3f}")
    return "\n".join(rows)


# -----------------------------------------------------------------------------------------------------------------
# The picture: the paper's first figure, for the user's own data

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}svg{max-width:100%;height:auto}table{border-collapse:collapse}
td,th{padding:.25rem .9rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.sample{border:1px solid #ddd;border-radius:6px;padding:.6rem .8rem;margin:.7rem 0;overflow-wrap:anywhere}
.input{color:#777;white-space:pre-wrap;max-height:7.5rem;overflow:auto;font-size:.85rem}
.output{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:.9rem}
.reasoning{background:#b7e4c0}.format{background:#fdeaa8}.connecting{background:#c5dcf7}
.output span,.key{border-radius:3px;padding:1px 0}.key{padding:1px 6px;margin-right:.6rem}.note{color:#555;font-size:.9rem}
"""


def write_page(path: str, title: str, body: str) -> None:
    """Write one self-contained HTML file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
                f'<style>{STYLE}</style>\n<h1>{title}</h1>\n{body}\n</html>\n')
    os.replace(path + ".tmp", path)


# boilerplate is of two kinds: format (field markers, JSON keys, brackets and quotes), and template-connecting words
FORMAT = re.compile(r'^[ \t]*[A-Z][\w ]{0,30}:|"[^"\n]{0,40}"\s*:|[{}\[\]"][:,]*|\s+', re.MULTILINE)
KEY = ('<p><span class="key reasoning">reasoning</span><span class="key format">boilerplate: format</span>'
       '<span class="key connecting">boilerplate: connecting</span></p>')


def output_pieces(dataset: Dataset, i: int) -> list[tuple[str, bool]]:
    """(text, is format) of each output token of sample i: the pieces tile the text, white space going with what follows."""
    pieces = []
    for message in dataset.samples[i].messages:
        if message.is_output:
            spans = [m.span() for m in FORMAT.finditer(message.text)]
            end = 0
            for _, stop in dataset.renderer.tokenizer.encode(message.text, add_special_tokens=False).offsets:
                text = message.text[end:stop]
                first = end + len(text) - len(text.lstrip()) if text.strip() else end
                pieces.append((text, any(a <= first < b for a, b in spans)))
                end = max(end, stop)
            pieces.append(("⏎\n", True))
    return pieces


def sample_html(dataset: Dataset, i: int, difference, threshold: float, details=None) -> str:
    """One sample, its output tokens coloured by group. details: arrays {name: (output tokens,)} for the hover text."""
    here = slice(dataset.offsets[i], dataset.offsets[i + 1])
    sample, spans = dataset.samples[i], []
    for k, ((text, is_format), d) in enumerate(zip(output_pieces(dataset, i), difference[here])):
        kind = "reasoning" if classify(d, threshold) else "format" if is_format else "connecting"
        hover = "".join(f"&#10;{name} {values[here][k]:.3f}" for name, values in (details or {}).items())
        spans.append(f'<span class="{kind}" title="{html.escape(repr(text))}{hover}&#10;LD {d:+.3f}">{html.escape(text)}</span>')
    given = "\n".join(f"{m.role}: {m.text}" for m in sample.messages if not m.is_output)
    return (f'<div class="sample"><div class="note">{html.escape(sample.id)}</div>'
            f'<div class="input">{html.escape(given)}</div><div class="output">{"".join(spans)}</div></div>')


def histogram_svg(difference, threshold: float, low=-8.0, high=8.0, bins=64) -> str:
    """A histogram of LD; heights are square roots, or the peak at zero would hide the rest."""
    groups = [(name, colour, np.histogram(np.clip(difference[mask], low, high - 1e-6), bins, (low, high)))
              for name, colour, mask in (("reasoning", "#4caf6e", classify(difference, threshold)),
                                         ("boilerplate", "#d9b43a", ~classify(difference, threshold)))]
    most, width = max(1, max(counts.max() for _, _, (counts, _) in groups)), 720 / bins
    bars = "".join(f'<rect x="{j * width:.1f}" y="{160 - h:.1f}" width="{width - 1:.1f}" height="{h:.1f}" fill="{colour}" fill-opacity=".8">'
                   f'<title>{name}, LD {edges[j]:.2f} to {edges[j + 1]:.2f}: {counts[j]:,} tokens</title></rect>'
                   for name, colour, (counts, edges) in groups for j, h in enumerate(150 * np.sqrt(counts / most)) if counts[j])
    ticks = "".join(f'<text x="{(v - low) / (high - low) * 720:.0f}" y="176" font-size="11" text-anchor="middle">{v:+d}</text>'
                    for v in range(int(low) + 2, int(high), 2))
    return f'<svg viewBox="0 0 720 182" width="720" role="img" aria-label="histogram of LD">{bars}{ticks}</svg>'


def picture(dataset: Dataset, difference, base, tuned, threshold: float, summary: dict, count: int = 40) -> str:
    """The body of labels.html: `count` samples, the shares of the groups and the histogram."""
    shown = dataset.kept[np.linspace(0, len(dataset.kept) - 1, min(count, len(dataset.kept))).round().astype(int)]
    kinds = [("reasoning" if classify(d, threshold) else "format" if f else "connecting")
             for i in shown for (_, f), d in zip(output_pieces(dataset, i), difference[dataset.offsets[i]:])]
    shares = ", ".join(f"{k} {kinds.count(k) / max(1, len(kinds)):.0%}" for k in ("reasoning", "format", "connecting"))
    return (f"<pre>{html.escape(describe(summary))}</pre>{KEY}"
            f'<p class="note">Of the tokens below: {shares}. SHAD tells reasoning (LD &gt; {threshold:g}) from boilerplate; format and '
            "connecting are told apart by the shape of the text. Hover over a token for its losses.</p>"
            f"<h2>Loss difference, LD = loss of the tuned &minus; loss of the base (nats)</h2>{histogram_svg(difference, threshold)}"
            f'<p class="note">All {len(difference):,} output tokens, clipped to &plusmn;8; heights are square roots of counts.</p><h2>Samples</h2>'
            + "".join(sample_html(dataset, i, difference, threshold, {"base": base, "tuned": tuned}) for i in shown))


def main():
    o = parse_options(Options, __doc__)
    device, (rank, _) = init_distributed(), rank_and_world()
    o.model = resolve(o.model)
    if os.path.exists(os.path.join(o.out, "labels.safetensors")):
        raise DataError(f"{o.out}/labels.safetensors is there already; choose another --out, or remove it.")
    barrier()                                                   # every rank has looked
    dataset = Dataset.load(o.data, o.model, o.template, o.max_length)
    if rank == 0:
        print(dataset.describe())
    sharded = wants_shards(o.shard, device)
    run(o, dataset, Transformer.from_pretrained(o.model, device=device, sharded=sharded))
    if rank == 0:
        print(f"\nwrote {o.out}/labels.safetensors, summary.json and labels.html (open it in a browser). Next:\n  "
              f"python train.py --model {o.model} --data {' '.join(map(shlex.quote, o.data))} --max-length {o.max_length} "
              f"--template {o.template} --method rft --labels {o.out} --out OUT")


if __name__ == "__main__":
    run_script(main, CheckpointError)
