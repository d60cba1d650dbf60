"""Evaluation of any checkpoint: loss by token role, and benchmarks.

    python eval.py toy --model out/rft/model --out out/eval         # exact match of tool, arguments
    python eval.py BENCH --model DIR --data FOLDER --out OUT        # generate, greedily, and judge
    python eval.py BENCH --predictions FILE.jsonl --data FOLDER [--out OUT]
                                                # judge {"id": ..., "output": "text"} lines
    python eval.py stabletoolbench --model DIR --data FOLDER --server URL \\
                                   --judge-url URL --judge-model NAME --out OUT
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out OUT
                                                # mean loss by group of tokens

BENCH: bfcl, nexus, teval, stabletoolbench or toy. Writes OUT/summary.json and, for a benchmark,
OUT/verdicts.jsonl: one line per item, with the reason. Outputs are saved in OUT/outputs.*.jsonl as
they are generated; the same command resumes an interrupted run. Under torchrun the ranks share the
items.
"""
import hashlib
import importlib
import json
import math
import os
import platform
import shlex
import signal
from collections import Counter
from dataclasses import dataclass

if __name__ == "__main__":      # Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from benchmarks import Item, count_verdicts, judge_outputs, read_predictions, toy
from data import Dataset
from model import CheckpointError, Transformer, checkpoint_files, resolve
from shad import load_labels, token_losses
from support.cli import HELP, DataError, option, parse_options, printable, run_script
from support.distributed import (
    init_distributed,
    limit_threads,
    mixed_precision,
    on_rank_0,
    rank_and_world,
    uses_bf16,
)
from support.embed import sentence_encoder
from support.files import claim, release, replacing, write_json
from support.generate import generate_stream
from support.outputs import ask_saving
from support.readers import SPAN_ROLES, toy_samples
from support.templates import Renderer


@dataclass
class Options:
    bench: str = option("toy", "what to evaluate", positional=True,
                        choices=["loss", "toy", "bfcl", "nexus", "teval", "stabletoolbench"])
    model: str = option("", "checkpoint: a Hugging Face directory or hub id")
    out: str = option("", "directory for summary.json, verdicts.jsonl and outputs; "
                          "may be left out with --predictions")
    predictions: str = option(None, 'judge these {"id", "output"} lines instead of generating')
    data: list = option([], "the benchmark's folder, or the data files of loss")
    categories: list = option([], "ask only these categories of the benchmark")
    limit: int = option(0, "ask only the first so many items of each category; 0: all")
    max_new_tokens: int = option(0, "longest output in tokens; 0: the benchmark's own")
    max_length: int = option(0, "longest sequence in tokens, output included; a prompt without "
                                "room counts as wrong, a sample of loss is dropped; 0: the "
                                "model's context, 2048 for loss")
    cache_tokens: int = option(16384, "tokens that the KV cache holds: sequences generated "
                                      "together times their length", low=1)
    labels: str = option(None, "labels of shad.py for the same data (loss)")
    count: int = option(200, "toy samples of each kind, held-in and held-out", low=1)
    micro_tokens: int = option(4096, "tokens per forward, padding included (loss)", low=1)
    template: str = option("auto", HELP["template"] + "; raw: the text as it is",
                           choices=["auto", "chatml", "plain", "raw"])
    native_calls: bool = option(False, HELP["native_calls"] + " (loss)")
    dtype: str = option("auto", HELP["dtype"], choices=["auto", "float32", "bfloat16"])
    seed: int = option(1, "seed of the toy samples; train.py's are made with others")
    # T-Eval and Nexus
    language: str = option("en", "language of T-Eval's files", choices=["en", "zh"])
    embed: str = option(None, "sentence model for T-Eval (a Hugging Face directory of the BERT or "
                              "MPNet family); without one, a plain lexical comparison")
    prompt: str = option("tools", "how Nexus asks: tools (the prompt of the training data), or "
                                  "raven, NexusRaven's own, with --template raw",
                         choices=["tools", "raven"])
    # StableToolBench: where calls are answered (one of three; without any, none is), and who judges
    server: str = option(None, "address of its server of APIs (key: $TOOLBENCH_KEY)")
    cache: str = option(None, "folder of its cached responses, instead of a server")
    recorded: str = option(None, "file of recorded responses, instead of a server")
    timeout: float = option(120.0, "seconds for one request to the server or the judge", low=0.1)
    max_steps: int = option(17, "turns of the agent before it is stopped", low=1)
    judge_url: str = option(None, "OpenAI-compatible endpoint of the judge, up to /v1 "
                                  "(key: $OPENAI_API_KEY); without one, no pass rate")
    judge_model: str = option(None, "name of the judge's model")
    judge_times: int = option(1, "times that the judge is asked; above 1: mean and spread", low=1)
    against: str = option(None, "OUT or traces of another model's run, for the win rate")


# --------------------------------------------------------------------------------------------------
# Loss by token role

def evaluate_loss(options: Options, device) -> dict:
    """The losses of a checkpoint on data files, as a summary."""
    path = resolve(options.model)
    dataset = Dataset.load(options.data, path, options.template, options.max_length or 2048,
                           options.native_calls)
    labels = load_labels(options.labels, dataset) if options.labels else None
    model = Transformer.from_pretrained(path, device=device)
    limit_threads(model)
    losses = role_losses(model, dataset, options.micro_tokens, labels)
    return {"losses": losses, "dropped": dataset.dropped}


def role_losses(model: Transformer, dataset: Dataset, micro_tokens: int, labels=None) -> dict:
    """{group: {"loss": mean in nats, "tokens": count}} of a dataset's output tokens.

    Groups: all tokens; the true roles, where the data has them; SHAD's, where labels are given.
    """
    losses = token_losses(model, dataset, micro_tokens, "loss")
    groups = {"all": np.ones(len(losses), bool)}
    roles = dataset.true_roles()
    if roles is not None:
        groups["reasoning"] = roles["reasoning"]
        groups["boilerplate"] = ~roles["reasoning"]
        groups |= {name: roles[name] for name in SPAN_ROLES[1:] if roles[name].any()}
    if labels is not None:
        groups["SHAD reasoning"] = labels[:]
        groups["SHAD boilerplate"] = ~labels[:]
    figures = {}
    for name, group in groups.items():
        loss = float(losses[group].mean()) if group.any() else None
        figures[name] = {"loss": loss, "tokens": int(group.sum())}
    return figures


# --------------------------------------------------------------------------------------------------
# Generation: greedy and batched

def context_length(model: Transformer, max_length: int = 0) -> int:
    """The most tokens in a sequence, output included: the model's context, or max_length."""
    window = model.config.sliding_window or math.inf
    return min(max_length or math.inf, model.config.max_position_embeddings, window)


def make_responder(model: Transformer, renderer: Renderer, max_new_tokens: int, max_length: int = 0,
                   cache_tokens: int = 16384):
    """The generator function respond(conversations), where a conversation is a list of Messages.

    It yields (i, the assistant's next turn in conversation i) as each is finished. The turn is None
    where the conversation leaves no room for max_new_tokens in the context.
    """
    longest = context_length(model, max_length) - max_new_tokens

    def respond(conversations):
        prompts = [renderer.prompt(messages) for messages in conversations]
        asked = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
        for i in sorted(set(range(len(prompts))) - set(asked)):
            yield i, None
        with mixed_precision(model.device):
            outputs = generate_stream(model, [prompts[i] for i in asked], max_new_tokens,
                                      renderer.stop_ids, cache_tokens=cache_tokens)
            for n, ids in outputs:
                yield asked[n], renderer.tokenizer.decode(ids, skip_special_tokens=False)

    return respond


def single_turn(items: list[Item], respond):
    """Yield (item, output) as each is finished: how most benchmarks are asked."""
    for i, text in respond([item.messages for item in items]):
        yield items[i], text


# --------------------------------------------------------------------------------------------------
# A benchmark, from its items to its figures

def load_items(bench, options: Options) -> list[Item]:
    """All items of a benchmark."""
    if bench is toy:
        return toy.items(options.count, options.seed)
    own = {"teval": {"language": options.language}, "nexus": {"prompt": options.prompt}}
    return bench.items(options.data[0], **own.get(options.bench, {}))


def select_items(items: list[Item], options: Options) -> list[Item]:
    """The items that --categories and --limit leave."""
    for name, count in Counter(item.id for item in items).items():
        if count > 1:
            raise DataError(f"{' '.join(options.data)} holds {count} items with the id {name!r}; "
                            "keep one of them.")
    known = list(dict.fromkeys(item.category for item in items))
    unknown = [name for name in options.categories if name not in known]
    if unknown:
        raise DataError(f"--categories {' '.join(unknown)}: not in this benchmark; "
                        f"it has {', '.join(known)}.")
    selected = []
    for name in options.categories or known:
        of_category = [item for item in items if item.category == name]
        selected += of_category[:options.limit or None]
    if not selected:
        raise DataError(f"{' '.join(options.data)} holds no items of {options.bench}; "
                        "see benchmarks/README.md for the folder's layout.")
    return selected


def evaluate_bench(options: Options, device) -> tuple[dict, list[dict]]:
    """(summary, verdicts) of a checkpoint, or of predictions made elsewhere, on a benchmark."""
    bench = importlib.import_module(f"benchmarks.{options.bench}")
    if hasattr(bench, "check_options"):
        bench.check_options(options)
    all_items = load_items(bench, options)
    items = select_items(all_items, options)
    texts = []
    for item in all_items:
        messages = [(m.role, m.text) for m in item.messages]
        texts.append((item.id, item.category, messages, item.reference))
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "tokenizers": tokenizers.__version__}
    summary = {"versions": versions, "data_sha256": fingerprint(texts),
               "limit": options.limit or None}

    # the outputs: made elsewhere, or generated now
    if options.predictions:
        outputs = getattr(bench, "read_predictions", read_predictions)(options.predictions)
        summary["not_asked"] = len(outputs.keys() - {item.id for item in items})
        if outputs and not outputs.keys() & {item.id for item in all_items}:
            raise DataError(f"{options.predictions} matches no item: its ids are like "
                            f"{next(iter(outputs))!r}, the benchmark's like {items[0].id!r}.")
    else:
        outputs, about = generate_outputs(bench, items, options, device)
        summary |= about

    # one rank judges
    if rank_and_world()[0] > 0:
        return {}, []
    if hasattr(bench, "judge_outputs"):
        verdicts = bench.judge_outputs(items, outputs, options)
    else:
        judge_options = {}
        if options.bench == "teval" and options.embed:
            judge_options["embed"] = sentence_encoder(options.embed, device)
        verdicts = judge_outputs(bench, items, outputs, **judge_options)
    summary |= count_verdicts(verdicts)
    if not getattr(bench, "HAS_ACCURACY", True):
        del summary["categories"]
    return summary | {"figures": bench.summary(verdicts)}, verdicts


def generate_outputs(bench, items, options: Options, device) -> tuple[dict, dict]:
    """({item id: output}, what the summary says of them) of a checkpoint; saved in options.out."""
    path = resolve(options.model)
    # decoding reads every weight for each token; the losses of the toy want them in float32
    dtype = torch.bfloat16 if uses_bf16(device) and bench is not toy else torch.float32
    model = Transformer.from_pretrained(path, dtype, device)
    limit_threads(model)
    renderer = Renderer(path, options.template)

    # what must be the same for a run that resumes
    generation = {"decoding": "greedy",
                  "weights": str(dtype).removeprefix("torch."),
                  "max_new_tokens": options.max_new_tokens or bench.MAX_NEW_TOKENS,
                  "max_length": context_length(model, options.max_length),
                  "template": renderer.template}
    if hasattr(bench, "run_settings"):
        generation |= bench.run_settings(options)
    settings = {"bench": options.bench, "model": checkpoint_fingerprint(path),
                "tokenizer": renderer.fingerprint,
                "prompts": fingerprint([(i.id, renderer.prompt(i.messages)) for i in items]),
                **renderer.dated, **generation}

    # ask: one turn per item, or as the benchmark itself leads the conversations
    on_rank_0(claim_out, options)
    respond = make_responder(model, renderer, generation["max_new_tokens"], options.max_length,
                             options.cache_tokens)

    def all_responses(conversations):
        texts = dict(respond(conversations))
        return [texts[i] for i in range(len(conversations))]

    if hasattr(bench, "run"):
        outputs = ask_saving(items, options.out, settings,
                             lambda mine: bench.run(mine, all_responses, options))
    else:
        outputs = ask_saving(by_length(items), options.out, settings,
                             lambda mine: single_turn(mine, respond))
    about = {"generation": generation}
    if bench is toy:
        about["losses"] = toy_losses(
            model, renderer, options.count, options.seed, options.micro_tokens)
    return outputs, about


def by_length(items: list[Item]) -> list[Item]:
    """Sorted by length, so that each rank gets a fair share of the long ones (see ask_saving)."""
    return sorted(items, key=lambda item: sum(len(m.text) for m in item.messages))


def evaluate_toy(model: Transformer, renderer: Renderer, count: int, seed: int,
                 micro_tokens: int = 4096) -> tuple[dict, list[dict]]:
    """(summary, verdicts) of a model on `count` fresh toy samples of each kind.

    Every rank generates all of them. The summary has losses by true role, and success.
    """
    items = toy.items(count, seed)
    respond = make_responder(model, renderer, toy.MAX_NEW_TOKENS)
    outputs = {}
    silent = rank_and_world()[0] > 0
    answers = single_turn(by_length(items), respond)
    bar = tqdm(answers, "generate", len(items), unit="item", leave=None, disable=silent)
    for item, text in bar:
        outputs[item.id] = text
    verdicts = judge_outputs(toy, items, outputs)
    summary = count_verdicts(verdicts) | toy.summary(verdicts)
    summary["losses"] = toy_losses(model, renderer, count, seed, micro_tokens)
    return summary, verdicts


def toy_losses(model, renderer, count: int, seed: int, micro_tokens: int) -> dict:
    """Losses by true role of `count` samples of each kind."""
    losses = {}
    for kind in ("held_in", "held_out"):
        dataset = Dataset(toy_samples(count, seed, kind == "held_out"), renderer)
        losses[kind] = role_losses(model, dataset, micro_tokens)
    return losses


def fingerprint(*parts) -> str:
    """sha256 of bytes, or of the JSON of anything else."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, default=repr).encode())
    return digest.hexdigest()


def checkpoint_fingerprint(path: str) -> str:
    """sha256 of config.json and of each weight file's size, first and last MiB.

    Replaced weights are noticed without reading all of them.
    """
    parts = []
    for name in [os.path.join(path, "config.json"), *checkpoint_files(path)]:
        with open(name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            parts.append(size)
            for place in (0, max(0, size - 2**20)):
                file.seek(place)
                parts.append(file.read(2**20))
    return fingerprint(*parts)


# --------------------------------------------------------------------------------------------------
# What is printed and written

def headline_figures(figures: dict, path: str = ""):
    """Yield (name, number) for a benchmark's figures, without those per category."""
    for name, value in figures.items():
        if isinstance(value, float):
            yield path + name, value
        elif isinstance(value, dict) and name not in ("categories", "formats", "data_faults"):
            yield from headline_figures(value, f"{path}{name} ")


def print_summary(options: Options, summary: dict) -> None:
    for name, c in summary.get("categories", {}).items():
        low, high = c["interval"]
        print(f"{printable(name)} {c['accuracy']:.1%} of {c['asked']:,} "
              f"(95 %: {low:.1%} to {high:.1%})")
    if summary.get("too_long") or summary.get("missing"):
        print(f"counted as wrong: {summary['too_long']} prompts too long for the model, "
              f"{summary['missing']} items without output")
    if options.bench != "toy":
        for name, value in headline_figures(summary.get("figures", {})):
            print(f"{printable(name)} {value:.4f}")
    faults = summary.get("figures", {}).get("data_faults")
    if faults:
        print(f"{len(faults)} items have faulty data: see data_faults in summary.json")
    losses = summary.get("losses", {})
    by_kind = losses if options.bench == "toy" else {"loss": losses}
    for kind, groups in by_kind.items():
        parts = []
        for name, group in groups.items():
            if group["tokens"]:
                parts.append(f"{name} {group['loss']:.4f} ({group['tokens']:,} tokens)")
        if parts:
            print(f"{kind}: {', '.join(parts)}")


def save_summary(options: Options, summary: dict, verdicts) -> None:
    os.makedirs(options.out, exist_ok=True)
    about = {"bench": options.bench, "model": options.model, "predictions": options.predictions}
    write_json(os.path.join(options.out, "summary.json"), about | summary)
    written = f"wrote {options.out}/summary.json"
    if verdicts:
        with replacing(os.path.join(options.out, "verdicts.jsonl")) as file:
            file.writelines(json.dumps(verdict) + "\n" for verdict in verdicts)
        written += " and verdicts.jsonl"
    print(written)


def check_options(options: Options) -> None:
    needed = []
    if not options.model and not options.predictions:
        needed.append("--model")
    if not options.data and options.bench != "toy":
        needed.append("--data")
    if not options.out and not options.predictions:
        needed.append("--out")
    if needed:
        raise DataError(f"eval.py {options.bench} needs {' and '.join(needed)}.")
    if len(options.data) > 1 and options.bench != "loss":
        raise DataError(f"eval.py {options.bench} takes one --data folder, not "
                        f"{len(options.data)}.")


def claim_out(options: Options, create: bool = True) -> None:
    """Take OUT for this evaluation; the summary of another one there is not replaced."""
    evaluation = ["eval.py", options.bench]
    for name in ("model", "predictions", "data"):
        if getattr(options, name):
            evaluation += [f"--{name}", *np.atleast_1d(getattr(options, name))]
    names = ["summary.json", "verdicts.jsonl"]
    names += [f"outputs.{rank}.jsonl" for rank in range(rank_and_world()[1])]
    claim(options.out, names, shlex.join(evaluation), create)


def main():
    options = parse_options(Options, __doc__)
    check_options(options)
    device = init_distributed(options.dtype)
    if options.out:
        on_rank_0(claim_out, options, False)
    if options.bench == "loss":
        summary = evaluate_loss(options, device)
        verdicts = None
    else:
        summary, verdicts = evaluate_bench(options, device)
    if rank_and_world()[0] > 0:
        return
    print_summary(options, summary)
    if options.out:
        claim_out(options)
        save_summary(options, summary, verdicts)
        release(options.out)


if __name__ == "__main__":
    run_script(main, CheckpointError)
