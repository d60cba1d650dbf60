"""Evaluation of any checkpoint: loss by token role, and benchmarks.

    python eval.py toy --model out/rft/model --out out/eval                        # exact match of tool and arguments
    python eval.py BENCH --model DIR --data FOLDER --out OUT                       # generate, greedily, and judge
    python eval.py BENCH --predictions FILE.jsonl --data FOLDER [--out OUT]        # judge {"id": ..., "output": "text"} lines
    python eval.py stabletoolbench --model DIR --data FOLDER --server URL --judge-url URL --judge-model NAME --out OUT
    python eval.py loss --model DIR --data held_out.json [--labels DIR] --out OUT  # mean loss by group of tokens

BENCH: bfcl, nexus, teval, stabletoolbench or toy. Writes OUT/summary.json and, for a benchmark, OUT/verdicts.jsonl: a line an asked
item, with the reason. Outputs are kept in OUT/outputs.*.jsonl as they come, so that the same command takes up a run where it was
stopped. Under torchrun the ranks share the items.
"""
import ast
import functools
import glob
import hashlib
import html
import http.client
import json
import math
import operator
import os
import platform
import re
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Callable, NamedTuple

import numpy as np
import tokenizers
import torch
from tqdm import tqdm

from data import (ROLES, TOOL_PROMPT, DataError, Dataset, Message, Renderer, as_json, load_labels, option, parse_options,
                  read_records, run_script, toy_samples)
from model import (CheckpointError, Transformer, barrier, checkpoint_files, generate, init_distributed, mixed_precision, rank_and_world,
                   resolve, write_json)
from shad import classify, token_losses


@dataclass
class Options:
    bench: str = option("toy", "what to evaluate", positional=True, choices=["loss", "toy", "bfcl", "nexus", "teval", "stabletoolbench"])
    model: str = option("", "checkpoint: a Hugging Face directory or hub id")
    out: str = option("", "directory for summary.json, verdicts.jsonl and outputs; may be left out with --predictions")
    predictions: str = option(None, 'judge these {"id", "output"} lines instead of generating')
    data: list = option([], "the benchmark's folder, or the data files of loss")
    categories: list = option([], "ask these categories of the benchmark only")
    limit: int = option(0, "ask the first so many items of each category; 0: all")
    max_new_tokens: int = option(0, "longest output in tokens; 0: the benchmark's own")
    max_length: int = option(0, "longest sequence in tokens, output included; a prompt without room counts as wrong, a sample of loss is "
                                "dropped; 0: the model's context, 2048 for loss")
    cache_tokens: int = option(16384, "tokens that the KV cache holds: sequences generated together times their length", low=1)
    labels: str = option(None, "labels of shad.py for the same data (loss)")
    count: int = option(200, "toy samples of each kind, held-in and held-out", low=1)
    micro_tokens: int = option(4096, "tokens of one forward, padding included (loss)", low=1)
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    seed: int = option(1, "seed of the toy samples; train.py's are made with others")
    # StableToolBench: where calls are answered (one of three; without any, none is), and who judges
    server: str = option(None, "address of its server of APIs (key: $TOOLBENCH_KEY)")
    cache: str = option(None, "folder of its cached responses, instead of a server")
    recorded: str = option(None, "file of recorded responses, instead of a server")
    max_steps: int = option(12, "turns of the agent before it is stopped", low=1)
    judge_url: str = option(None, "OpenAI-compatible endpoint of the judge, up to /v1 (key: $OPENAI_API_KEY); without one, no pass rate")
    judge_model: str = option(None, "name of the judge's model")
    against: str = option(None, "traces of another model, for the win rate")


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
    """{item id: output} of all OUT/outputs.RANK.jsonl: a first line of settings, then {"id", "output"} lines, the last perhaps torn.

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


def keep_outputs(items: list[Item], folder: str, settings: dict, title: str, work) -> dict:
    """{item id: output} of all items. work(mine, done) makes this rank's share and calls done(item, output) as each is ready.

    Each is appended to folder/outputs.RANK.jsonl; those already there under the same settings are not asked again.
    """
    os.makedirs(folder, exist_ok=True)
    (rank, world), kept = rank_and_world(), read_outputs(folder, settings)
    barrier()                                               # every rank has read before any writes
    mine = [item for item in items if item.id not in kept][rank::world]
    with open_log(os.path.join(folder, f"outputs.{rank}.jsonl"), settings) as log, tqdm(
            total=len(mine), desc=title, unit="item", disable=rank > 0) as bar:
        def done(item, output):
            bar.update()
            log.write(json.dumps({"id": item.id, "output": output}) + "\n")
            log.flush()

        work(mine, done)
    barrier()
    return read_outputs(folder, settings)


def generate_outputs(model: Transformer, renderer: Renderer, items: list[Item], max_new_tokens: int = 96, max_length: int = 0,
                     cache_tokens: int = 16384, folder: str | None = None, settings: dict | None = None) -> dict[str, str | None]:
    """Greedy outputs {item id: text, or None where the prompt leaves no room}.

    With a folder they are kept there and the ranks share them; without, every rank generates all.
    """
    speak = speaker(model, renderer, max_new_tokens, max_length, cache_tokens)
    ask = lambda mine, done: speak([item.messages for item in mine], lambda i, text: done(mine[i], text))
    items = sorted(items, key=lambda item: sum(len(m.text) for m in item.messages))         # a fair share of the long ones
    if folder:
        return keep_outputs(items, folder, settings, "generate", ask)
    outputs = {}
    with tqdm(total=len(items), desc="generate", unit="item", disable=rank_and_world()[0] > 0) as bar:
        ask(items, lambda item, text: (outputs.__setitem__(item.id, text), bar.update()))
    return outputs


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


RECORD_FAULTS = (KeyError, IndexError, TypeError, AttributeError, ValueError, SyntaxError)     # of a benchmark's own broken record
DATA_FAULT = "fault of the benchmark's own record:"                                             # so its verdict's reason begins


def data_faults(verdicts: list[dict]) -> list[str]:
    """The ids of the items whose own record is broken; they count as wrong."""
    return [v["id"] for v in verdicts if v["reason"].startswith(DATA_FAULT)]


def read_object(path: str) -> dict:
    """The one JSON object that a file holds."""
    content = next((record for _, record in read_records(path)), None)
    if not isinstance(content, dict):
        raise DataError(f"{path} does not hold one JSON object; fetch the benchmark's file again.")
    return content


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
    agent = o.bench == "stabletoolbench"
    if o.predictions:
        outputs = (stb_traces if agent else read_predictions)(o.predictions)
        summary["not_asked"] = len(outputs.keys() - {item.id for item in items})
    else:
        path = resolve(o.model)
        model, renderer = Transformer.from_pretrained(path, device=device), Renderer(path, o.template)
        summary["generation"] = {"decoding": "greedy", "max_new_tokens": o.max_new_tokens or bench.max_new_tokens,
                                 "max_length": context_length(model, o.max_length), "template": renderer.template}
        settings = {"bench": o.bench, "model": checkpoint_fingerprint(path), "tokenizer": renderer.fingerprint,
                    "prompts": fingerprint([(item.id, renderer.prompt(item.messages)) for item in items]), **summary["generation"]}
        if agent:
            speak = speaker(model, renderer, settings["max_new_tokens"], o.max_length, o.cache_tokens)
            environment = {"environment": o.server or o.cache or o.recorded, "max_steps": o.max_steps}
            outputs = stb_outputs(o, items, speak, settings | environment)
            summary["generation"] |= environment
        else:
            outputs = generate_outputs(model, renderer, items, settings["max_new_tokens"], o.max_length, o.cache_tokens, o.out, settings)
        if o.bench == "toy":
            summary["losses"] = toy_losses(model, renderer, o.count, o.seed, o.micro_tokens)
    if rank_and_world()[0] > 0:                             # one rank judges
        return {}, []
    verdicts = stb_verdicts(o, items, outputs) if agent else judge_outputs(bench, items, outputs)
    counts = count_verdicts(verdicts)
    if agent:
        del counts["categories"]                            # without a judge none is correct, and that is no accuracy
    return summary | counts | {"figures": bench.summary(verdicts)}, verdicts


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
# BFCL, single turn: the function calls, compared with lists of accepted values as bfcl-eval 2026.3.23 does

BFCL_CATEGORIES = ("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
                   "irrelevance", "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
                   "live_irrelevance", "live_relevance")
BFCL_TYPES = {
    "python": {"string": str, "any": str, "integer": int, "float": float, "boolean": bool, "array": list, "tuple": list,
               "dict": dict},
    "java": {"String": str, "char": str, "any": str, "byte": int, "short": int, "integer": int, "long": int, "float": float,
             "double": float, "boolean": bool, "Array": list, "ArrayList": list, "HashMap": dict},
    "javascript": {"String": str, "any": str, "integer": int, "Bigint": int, "float": float, "Boolean": bool, "array": list,
                   "dict": dict}}
BFCL_LONGEST = 10_000               # characters of an output; patterns and parsers need bounded time on whatever a model writes


def bfcl_language(category: str) -> str:
    return category.removeprefix("simple_") if category in ("simple_java", "simple_javascript") else "python"


def bfcl_items(folder: str) -> list[Item]:
    """The items of every single-turn BFCL_v4_CATEGORY.json in a folder; answers come from possible_answer/ beside it."""
    items = []
    for category in BFCL_CATEGORIES:
        name = f"BFCL_v4_{category}.json"
        path, answer_path = os.path.join(folder, name), os.path.join(folder, "possible_answer", name)
        if not os.path.isfile(path):
            continue
        where = answer_path
        try:
            answers = {} if "relevance" in category else {r["id"]: r["ground_truth"] for _, r in read_records(answer_path)}
            for where, record in read_records(path):
                documents, language = record["function"], bfcl_language(category)
                tools = [bfcl_tool(d if language == "python" else bfcl_as_strings(d, language)) for d in documents]
                system = [TOOL_PROMPT.format(json.dumps(tools, ensure_ascii=False))]
                turns = [Message(turn["role"], turn["content"]) for turn in record["question"][0]]
                if turns[0].role == "system":
                    system.append(turns.pop(0).text)
                reference = {"documents": documents}
                if "relevance" not in category:
                    if record["id"] not in answers:
                        raise DataError(f"{where}: {answer_path} has no answer to {record['id']}; copy both files of one release.")
                    reference["truth"] = answers[record["id"]]
                    reference["fault"] = bfcl_fault(documents, reference["truth"], language)
                items.append(Item(record["id"], category, [Message("system", "\n\n".join(system)), *turns], reference))
        except (KeyError, IndexError, TypeError, AttributeError) as e:
            raise DataError(f"{where} is no record of BFCL ({type(e).__name__}: {e}); copy the release's file again.") from None
    if not items:
        raise DataError(f"{folder} holds no BFCL_v4_*.json of a single-turn category; copy the data folder of bfcl-eval.")
    return items


def bfcl_tool(document: dict) -> dict:
    """A function's document as APIGen's flat specification, which upstream too gives to models trained on APIGen: an argument
    that may be left out says so in its type."""
    required = document["parameters"].get("required", [])
    return document | {"parameters": {name: p | {"type": p["type"] + ", optional" * (name not in required)}
                                      for name, p in document["parameters"]["properties"].items()}}


def bfcl_as_strings(document: dict, language: str) -> dict:
    """A function's document for the prompt of a Java or JavaScript item: every argument is a string of source text."""
    properties, language = {}, {"java": "Java", "javascript": "JavaScript"}[language]
    for name, p in document["parameters"]["properties"].items():
        of = f" of {p['items']['type']}" if "items" in p else ""
        of += f" with the fields {json.dumps(p['properties'])}" if "properties" in p else ""
        note = f"Written as a string: {language} source text of type {p['type']}{of}."
        properties[name] = {"type": "string", "description": f"{p.get('description', '')} {note}".strip()}
    return document | {"parameters": document["parameters"] | {"properties": properties}}


def bfcl_fault(documents: list[dict], truth: list[dict], language: str) -> str | None:
    """What in an item's own data refuses even a call of its accepted values, if anything does."""
    by_name = {d["name"]: d["parameters"]["properties"] for d in documents}
    for call in truth:
        for name, arguments in call.items():
            if name not in by_name:
                return f"{name} is expected but not among the functions"
            for argument in arguments:
                if argument not in by_name[name]:
                    return f"{name}'s {argument} has accepted values but is not among its parameters"
                document, values = by_name[name][argument], arguments[argument]
                if document["type"] not in BFCL_TYPES[language]:
                    return f"{name}'s {argument} is of the unknown type {document['type']}"
                if not values:
                    return f"{name}'s {argument} has no accepted value"
                if any(type(options) is not list for v in values if type(v) is dict for options in v.values()):
                    return f"{name}'s {argument}: a key has a value where a list of accepted values is due"
                of_any = language == "java" and document.get("items") == {"type": "any"}
                if of_any and any(type(x) is not str for v in values for x in v):
                    return f"{name}'s {argument}: elements of type any are read as text, and other types are expected"


def bfcl_judge(item: Item, output: str) -> dict:
    """The verdict on one output: {"correct", "reason"}, and "fault" where the item's own data are faulty."""
    try:
        reason = bfcl_reason(item, output)
    except Exception as e:          # whatever a model writes gets a verdict: numbers too large to print, nesting too deep ...
        reason = f"the calls cannot be checked: {type(e).__name__}"
    fault = {"fault": item.reference["fault"]} if item.reference.get("fault") else {}
    return {"correct": reason is None, "reason": reason or "correct"} | fault


def bfcl_reason(item: Item, output: str) -> str | None:
    """Why an output is wrong, or None. "parallel" in a category goes before "multiple", which goes before the rest."""
    language, documents = bfcl_language(item.category), item.reference["documents"]
    try:
        calls = bfcl_decode(output, language)
        failure = None
    except Exception as e:          # of ast.parse alone: SyntaxError, ValueError, RecursionError, MemoryError
        calls, failure = [], f"no calls can be read: {e or type(e).__name__}"
    if "irrelevance" in item.category:
        return f"calls {calls[0][0]!r:.100}, where no function fits" if calls else None
    if "relevance" in item.category:
        return None if calls else failure or "no call"
    if failure:
        return failure
    truth = [next(iter(call.items())) for call in item.reference["truth"]]       # (name, {argument: accepted values})
    if len(calls) != len(truth):
        return f"{len(calls)} calls, not {len(truth)}"
    by_name = {d["name"]: d for d in reversed(documents)}
    if "parallel" in item.category:             # each expected call takes the first output that passes; no backtracking
        left = list(calls)
        for name, accepted in truth:
            reasons = [bfcl_check(call, by_name[name], accepted, language) for call in left]
            if None not in reasons:
                return f"no call passes for {name}: " + "; ".join(reasons)
            left.pop(reasons.index(None))
        return None
    name, accepted = truth[0]
    return bfcl_check(calls[0], by_name[name] if "multiple" in item.category else documents[0], accepted, language)


def bfcl_check(call, document: dict, accepted: dict, language: str) -> str | None:
    """Why one call (name, arguments) is wrong, or None. accepted: {argument: its values}, "" among them = may be left out."""
    (name, arguments), properties = call, document["parameters"]["properties"]
    if name != document["name"]:
        return f"function {name!r:.100}, not {document['name']}"
    for argument in document["parameters"].get("required", []):
        if argument not in arguments:
            return f"required argument {argument} is missing"
    for argument, value in arguments.items():
        if argument not in properties or argument not in accepted:
            return f"unexpected argument {argument!r:.100}"
        type_name, types = properties[argument]["type"], BFCL_TYPES[language]
        expected = types[type_name]
        inner_name = properties[argument]["items"]["type"] if type_name in ("array", "tuple", "Array", "ArrayList") else None
        inner = types[inner_name] if inner_name else None
        given = value
        if language != "python":
            if type(value) is not str:
                return f"{argument} = {value!r:.200}: {language} values are written as strings"
            value = (java_value if language == "java" else javascript_value)(value, type_name, inner_name)
        elif type_name == "tuple" and type(value) is tuple:
            value = list(value)
        elif type_name == "float" and type(value) is int:
            value = float(value)
        fits, is_variable = bfcl_type(value, accepted[argument], expected, inner)
        if not fits:
            return f"{argument} = {given!r:.200} is not of type {type_name}" + (f" of {inner_name}" if inner_name else "")
        if not (value in accepted[argument] if is_variable else bfcl_value(value, accepted[argument], expected, inner)):
            return f"{argument} = {given!r:.200} is not among {accepted[argument]!r:.200}"
    for argument, values in accepted.items():
        if argument not in arguments and "" not in values:
            return f"argument {argument} is missing and has no default"
    return None


def bfcl_type(value, accepted: list, expected: type, inner: type | None) -> tuple[bool, bool]:
    """(fits, is a variable): by exact type, the items of a list one level deep. A value of the accepted values' own type
    passes in the place of another: the data write a variable's name so."""
    own = next((type(a) for a in accepted if a != ""), None)
    if type(value) is not expected:
        return type(value) is own, True
    fits = inner is None or any(type(a) is not list or all(bfcl_type(v, a, inner, None)[0] for v in value) for a in accepted)
    return fits, own not in (None, expected)


def standardize(value):
    """Strings are compared without case, spaces and the punctuation ,./-_*^ and with one kind of quote."""
    return re.sub(r"[ ,./\-_*^]", "", value).lower().replace("'", '"') if type(value) is str else value


def bfcl_value(value, accepted: list, expected: type, inner: type | None) -> bool:
    """Is a value of the right type among the accepted ones?"""
    if expected is dict:
        return any(a != "" and all(k in a and standardize(v) in map(standardize, a[k]) for k, v in value.items())
                   and all(k in value or "" in options for k, options in a.items()) for a in accepted)
    if inner is dict:
        return any(len(value) == len(a) and all(type(v) is dict and bfcl_value(v, [b], dict, None) for v, b in zip(value, a))
                   for a in accepted)
    if expected is str:
        return standardize(value) in [standardize(a) for a in accepted if type(a) is str]
    if expected is list:
        return [standardize(v) for v in value] in [[standardize(x) for x in a] for a in accepted]
    return value in accepted


def bfcl_decode(output: str, language: str) -> list[tuple[str, dict]]:
    """The calls [(name, arguments)] of a model's text: a JSON list of {"name", "arguments"}, or the item's language."""
    if len(output) > BFCL_LONGEST:
        raise ValueError(f"longer than {BFCL_LONGEST:,} characters")
    try:
        calls = json.loads(re.sub(r"^```(?:json)?|```$", "", output.strip()))
    except ValueError:
        text = output.strip("`\n ")
        text = (text if text.startswith("[") else "[" + text) + ("" if text.endswith("]") else "]")
        return python_calls(text) if language == "python" else script_call(text[1:-1], language)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(c, dict) and isinstance(c.get("name"), str) and isinstance(c.get("arguments"), dict) for c in calls):
        raise ValueError('JSON, but not a list of {"name": ..., "arguments": {...}}')
    return [(c["name"], c["arguments"]) for c in calls]


def python_calls(text: str) -> list[tuple[str, dict]]:
    """Calls with keyword arguments, parsed and never evaluated. Positional arguments are ignored, as upstream does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of odd escapes in the model's strings
        body = ast.parse(text, mode="eval").body
    if not isinstance(body, ast.List) or not all(isinstance(call, ast.Call) for call in body.elts):
        raise ValueError("not a list of calls")
    return [python_call(call) for call in body.elts]


def python_call(call: ast.Call) -> tuple[str, dict]:
    names, node = [], call.func
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        names.append(node.id)
    return ".".join(reversed(names)), {k.arg: python_value(k.value) for k in call.keywords}


def python_value(node):
    """The value of a parsed argument: literals, displays, arithmetic; a name or a call without keywords stands for its text."""
    match node:
        case ast.Constant():
            return "..." if node.value is ... else node.value
        case ast.UnaryOp(operand=ast.Constant()):
            return -node.operand.value          # upstream's, whatever the sign: +5 is -5
        case ast.BinOp():
            return arithmetic(node)
        case ast.List():
            return [python_value(e) for e in node.elts]
        case ast.Tuple():
            return tuple(python_value(e) for e in node.elts)
        case ast.Dict():
            return {python_value(k): python_value(v) for k, v in zip(node.keys, node.values)}
        case ast.Name():
            return node.id
        case ast.Call():
            return dict([python_call(node)]) if node.keywords else ast.unparse(node)
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise ValueError(f"no value: {type(node).__name__}")


ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.USub: operator.neg,
              ast.UAdd: operator.pos}


def arithmetic(node):
    """A number written as arithmetic, or strings added."""
    match node:
        case ast.Constant(value=int() | float() | str()):
            return node.value
        case ast.UnaryOp():
            return ARITHMETIC[type(node.op)](arithmetic(node.operand))
        case ast.BinOp():
            left, right = arithmetic(node.left), arithmetic(node.right)
            if str in (type(left), type(right)) and not isinstance(node.op, ast.Add):
                raise ValueError("arithmetic on a string")
            if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * right > 4096:
                raise ValueError("a power too large")
            return ARITHMETIC[type(node.op)](left, right)
    raise ValueError("arithmetic on names or calls")


# Java and JavaScript: one call of assignments, its values source text, converted where the type in the document says so

SCRIPT_TOKEN = re.compile(r"""(?P<space>(?:\s|//[^\n]*|/\*.*?\*/)+)
    | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`)
    | (?P<number>(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<word>[^\W\d][\w$]*|\$[\w$]*)
    | (?P<sign>::|=>|->|[=!<>]=+|\+\+|--|\.\.\.|[-+*/%=<>!&|^~?:;,.(){}\[\]])""", re.S | re.X)
BEFORE_OPERAND = {"new", "instanceof", "typeof", "await", "async", "function", "return", "const", "let", "var", "in", "of"}

RESERVED = {"javascript": set("break case catch class const continue do else enum export extends finally for if import "
                              "switch throw try while with".split())}
RESERVED["java"] = RESERVED["javascript"] | set("boolean byte char double float int long short package private public "
                                                "static".split())


def script_call(text: str, language: str) -> list[tuple[str, dict]]:
    """The one call `name(argument=value, ...)` of a Java or JavaScript text; later statements are not looked at."""
    tokens, position = [], 0
    while position < len(text):
        m = SCRIPT_TOKEN.match(text, position)
        if language == "javascript" and tokens and tokens[-1][1] in "=([{,:":
            m = re.compile(r"(?P<string>/[^/*\s][^/\n]*/[a-z]*)").match(text, position) or m         # a regular expression
        if not m or language == "java" and m[0][0] == "`" or language == "javascript" and m[0][0] == '"' and "\n" in m[0]:
            raise ValueError(f"{text[position]!r} at character {position}")
        position = m.end()
        if m.lastgroup == "number" or m.lastgroup == "word" and language == "java" and tokens and tokens[-1][1] == "new":
            tail = r"<[\w\s,.?<>]*>" if m.lastgroup == "word" else "[lLfFdD]" if language == "java" else "n"
            tail = re.compile(tail).match(text, position)           # new HashMap<String, Object>, 5L, 5n
            position = tail.end() if tail else position
        if m.lastgroup != "space":
            tokens.append((m.lastgroup, text[m.start():position], m.start(), position))
    head = next((i for i, t in enumerate(tokens) if t[1] == "("), 0)
    line_before = r"\s*(?:[a-z]+\s*\n)?\s*" if language == "javascript" else r"\s*"       # the language's name, left of a fence
    name = tokens and re.fullmatch(line_before + r"([^\W\d][\w$]*(?:\.[^\W\d][\w$]*)*)\s*", text[:tokens[head][2]])
    if not name:
        raise ValueError("not a call of a named function")
    stack, pieces = ["("], [[]]
    for end, token in enumerate(tokens[head + 1:], head + 1):
        if token[1] in ("(", "[", "{"):
            stack.append(token[1])
        elif token[1] in (")", "]", "}") and stack.pop() + token[1] not in ("()", "[]", "{}"):
            raise ValueError(f"{token[1]!r} closes nothing")
        if not stack:
            break
        if token[1] == "," and len(stack) == 1:
            pieces.append([])
        else:
            pieces[-1].append(token)
    if stack or tokens[end + 1:] and tokens[end + 1][1] != ";":
        raise ValueError("a bracket is not closed" if stack else "text after the call")
    arguments = {}
    for piece in pieces:
        if not piece and (language == "javascript" or len(pieces) == 1):
            continue
        argument, expression = None, piece
        if [t[0] for t in piece[:1]] == ["word"] and [t[1] for t in piece[1:2]] == ["="]:
            argument, expression = piece[0][1], piece[2:]
        if not expression or argument is None and "=" in [t[1] for t in piece]:
            raise ValueError("an argument without a name or a value")
        check_expression(expression, language)
        if argument is None and (len(piece) > 1 or piece[0][0] != "word"):
            continue                            # upstream ignores positional arguments, except for names
        if argument in arguments:
            raise ValueError(f"{argument} is given twice")
        start, end = expression[0][2], expression[-1][3]
        arguments[argument] = java_source(expression, text) if language == "java" else unquote(text[start:end])
    return [(name[1], arguments)]


def check_expression(tokens, language: str) -> None:
    """Raise ValueError for what no parser takes as a value: operands side by side, operators without operands."""
    depth, words = 0, [t[1] for t in tokens]
    conditional = "?" in words
    if len(words) == 1 and words[0] in RESERVED[language]:
        raise ValueError(f"{words[0]} is no value")
    for (before, previous, *_), (kind, word, *_) in zip([("sign", "=")] + tokens, tokens):
        literal = {"string", "number"} & {before, kind}
        if "sign" not in (before, kind) and not {previous, word} & BEFORE_OPERAND and (literal or not depth):
            raise ValueError(f"{previous:.40} {word:.40} without an operator")
        if word == ";" and not depth or word == ":" and not conditional and (language == "java" or not depth):
            raise ValueError(f"{word!r} in a value that is not quoted")
        if language == "java" and (word == "[" and previous in "=(,[{" or word == "{" and previous not in (*")]>{,", "->")):
            raise ValueError(f"{word!r} begins no value in Java")
        if previous in tuple("=([{,") and word in tuple("*/%.&|?:<>=^"):
            raise ValueError(f"nothing before {word!r}")
        depth += (word in "({") - (word in ")}")
    if words[-1] in tuple("+-*/%.=&|?:<>!^~"):
        raise ValueError(f"nothing after {words[-1]!r}")


def java_source(tokens, text: str) -> str:
    """A value's source text as upstream rebuilds it: a string without its quotes; a method's call as it stands; elsewhere no
    spaces, and no class body after `new T(...)`, so that a map filled in the body counts as empty."""
    if len(tokens) == 1 and tokens[0][0] == "string":
        return tokens[0][1][1:-1]
    source, skipped, called, new = "", 0, 0, False          # depths of a class body, and of a method's arguments
    for (before, previous, _, gap), (kind, word, _, end) in zip([("", "", 0, 0)] + tokens, tokens):
        if word == "{" and not called and (skipped or previous == ")"):
            skipped += 1
        if word == "(" and not skipped and (called or before == "word" and not new):
            called += 1
        if called:
            source += text[gap:end]
        elif not skipped:
            source += "new " if word == "new" else re.sub(r"\s", "", word) if kind == "word" else word
        skipped -= word == "}" and skipped > 0
        called -= word == ")" and called > 0
        new = word == "new" or new and word != "("
    return source


def unquote(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


NUMBERS = {"java": {"byte": (int, ""), "short": (int, ""), "integer": (int, ""), "long": (int, "[lL]"),
                    "float": (float, "[fF]"), "double": (float, "")},
           "javascript": {"integer": (int, ""), "Bigint": (int, "n"), "float": (float, "")}}


def script_number(text: str, type_name: str, language: str):
    """A number as its type's literal writes it (long 5L, float 1.5f, Bigint 5n); any other text stays text."""
    number, suffix = NUMBERS[language][type_name]
    fraction = "" if number is int else r"(?:\.\d+)?" + (r"(?:[eE][+-]?\d+)?" if language == "java" else "")
    m = re.match(rf"(-?\d+{fraction}){suffix}$", text)
    return number(m[1]) if m else text


def plain_value(text: str, language: str):
    """The value of an element whose type no document names."""
    if text in ("true", "false"):
        return text == "true"
    if language == "java":
        m = re.match(r"(-?\d+)[lL]$", text) or re.match(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[fF]$", text)
        if text.startswith('"') and text.endswith('"'):
            return text[1:-1]
        text = m[1] if m else text
        if m and "f" in m[0].lower():
            return float(text)
    elif unquote(text) != text:
        return unquote(text)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def java_value(text: str, type_name: str, inner: str | None = None):
    """A Java value from its source text; what is not written as its type stays text."""
    if type_name in NUMBERS["java"]:
        return script_number(text, type_name, "java")
    if type_name == "boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "ArrayList":
        element = lambda x: x[1:-1] if inner in ("char", "String") else java_value(x, inner)
        if m := re.search(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)", text):
            return [element(x.strip()) for x in m[1].split(",")]
        if m := re.search(r"new\s+ArrayList<\w*>\(\)\s*\{\{(.+?)\}\}", text, re.S):
            return [element(x.strip()) for x in re.findall(r"add\((.+?)\)", m[1])]
        return [] if re.search(r"new\s+ArrayList<\w*>\(\)", text) else text
    if type_name == "Array" and (m := re.search(r"new\s+\w+\[\]\s*\{(.*?)\}", text)):
        return [java_value(x.strip(), inner) for x in m[1].split(",") if x.strip()]
    if type_name == "HashMap":
        if m := re.search(r"new\s+HashMap<.*?>\s*\(\)\s*\{\s*\{?([^}]*)\}", text, re.S):
            return {key: plain_value(value.strip(), "java") for key, value in re.findall(r'put\("(.*?)",\s*(.*?)\)', m[1])}
        return {} if re.search(r"new\s+HashMap<.*?>\s*\(\)", text, re.S) else text
    return text


def javascript_value(text: str, type_name: str, inner: str | None = None):
    """A JavaScript value from its source text; what is not written as its type stays text."""
    if type_name in NUMBERS["javascript"]:
        return script_number(text, type_name, "javascript")
    if type_name == "Boolean" and text in ("true", "false"):
        return text == "true"
    if type_name == "String":
        return unquote(text)
    text = text.strip() if type_name in ("array", "dict") else text
    element = lambda x: javascript_value(x.strip(), inner) if inner else plain_value(x.strip(), "javascript")
    if type_name == "array":
        row = r"\[[^\]\n]*\]\s*"                # upstream's pattern lets a row hold "]", and takes exponential time
        if m := re.match(rf"\[\s*{row}(,\s*{row})*\]|new\s+Array\(\s*{row}(,\s*{row})*\)", text):
            return [[plain_value(x.strip(), "javascript") for x in r.strip().removeprefix("[").split(",")]
                    for r in re.findall(r"\[(.*?)\]", m[0])]
        if m := re.match(r"\[(.*?)\]|new\s+Array\((.*?)\)", text):
            elements = (m[1] if m[1] is not None else m[2]).strip()
            return [element(x) for x in elements.split(",")] if elements else []
    elif type_name == "dict" and (m := re.match(r"\{(.*?)\}", text)):
        pairs = re.findall(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)", m[1])
        return {key.strip().strip("'\""): javascript_field(value.strip()) for key, value in pairs}
    return text


def javascript_field(text: str):
    for opening, closing, type_name in ("[", "]", "array"), ("{", "}", "dict"):
        if text.startswith(opening) and text.endswith(closing):
            return javascript_value(text, type_name)
    return plain_value(text.strip("'\"").strip(), "javascript")


def bfcl_summary(verdicts: list[dict]) -> dict:
    """Accuracy and count of every category present; the groups of upstream's leaderboard, each over the members it names."""
    correct = {c: [v["correct"] for v in verdicts if v["category"] == c] for c in BFCL_CATEGORIES}
    count = {c: len(x) for c, x in correct.items() if x}
    accuracy = {c: sum(correct[c]) / n for c, n in count.items()}

    def group(members, scores, weights=None):
        members = [m for m in members if m in scores]
        weights = {m: weights[m] if weights else 1 for m in members}
        total = sum(scores[m] * weights[m] for m in members)
        return {"accuracy": total / sum(weights.values()), "over": members} if members else None

    groups = {"simple": group(BFCL_CATEGORIES[:3], accuracy)}
    non_live = accuracy | ({"simple": groups["simple"]["accuracy"]} if groups["simple"] else {})
    groups["non_live_ast"] = group(("simple", "multiple", "parallel", "parallel_multiple"), non_live)
    groups["live_ast"] = group(BFCL_CATEGORIES[7:11], accuracy, count)          # by their counts; all others by equal parts
    groups["irrelevance"] = group(("irrelevance", "live_irrelevance"), accuracy)
    groups = {name: g for name, g in groups.items() if g}
    # upstream weights these three 10 : 10 : 10, beside multi-turn (30) and agentic (40), which are not asked here
    of_groups = {name: g["accuracy"] for name, g in groups.items()}
    groups["overall_of_present"] = group(("non_live_ast", "live_ast", "irrelevance"), of_groups)
    return {"categories": {c: {"accuracy": accuracy[c], "count": n} for c, n in count.items()},
            "groups": {name: g for name, g in groups.items() if g},
            "all_items": {"accuracy": sum(v["correct"] for v in verdicts) / max(len(verdicts), 1), "count": len(verdicts)},
            "data_faults": {v["id"]: v["fault"] for v in verdicts if v.get("fault")}}


# -----------------------------------------------------------------------------------------------------------------
# Nexus (NexusRaven V1): one call, right if its name and its full arguments are. Calls are parsed, never executed

NEXUS_SETS = ("cve_cpe", "virustotal", "emailrep", "toolalpaca", "toolllm")


def nexus_items(folder: str) -> list[Item]:
    """The items of the SET_queries.json files in a folder, each asked with the functions of its own set or record."""
    paths = {name: os.path.join(folder, f"{name}_queries.json") for name in NEXUS_SETS}
    paths = {name: path for name, path in paths.items() if os.path.isfile(path)}
    if not paths:
        raise DataError(f"{folder} holds none of {', '.join(f'{name}_queries.json' for name in NEXUS_SETS)}; "
                        "give the folder of NexusRaven's queries with --data.")
    specs = read_object(os.path.join(folder, "function_specs.json")) if paths.keys() - {"toolalpaca", "toolllm"} else {}
    items = []
    for name, path in paths.items():
        for i, (_, record) in enumerate(read_records(path)):
            try:
                if name == "toolalpaca":                            # of a record's turns only the first is asked, as upstream
                    turn = record["turns_1"]
                    query, call = turn["instruction"], json.loads(turn["golden_answer"])[0]
                    functions = [nexus_function(f"{signature}: pass", text.strip('" \n')) for signature, text in re.findall(
                        "<func_start>(.*?)<func_end>.*?<docstring_start>(.*?)<docstring_end>", turn["docstring"], re.DOTALL)]
                elif name == "toolllm":
                    query, call, functions = record["Input"], record["Output"], [nexus_function(f) for f in record["context"]]
                else:
                    query, call, functions = record["query"], record["reference"], specs[name]
                tools = json.dumps([nexus_tool(f) for f in functions], ensure_ascii=False)
                messages = [Message("system", TOOL_PROMPT.format(tools)), Message("user", "" + query)]
                called, *arguments = nexus_call(call)
                function = {f["name"]: f for f in functions}[called]
                reference = {"call": call, "function": function, "arguments": nexus_arguments(function, *arguments)}
            except RECORD_FAULTS as e:
                messages, reference = [Message("user", "")], {"fault": f"{type(e).__name__}: {e}"}
            items.append(Item(f"{name}_{i}", name, messages, reference))
    if not items:
        raise DataError(f"the files of {folder} hold no records; fetch NexusRaven's queries again.")
    return items


def nexus_function(source: str, docstring: str | None = None) -> dict:
    """A function given as Python source, described as function_specs.json describes one; a default is source text."""
    f = ast.parse(source).body[0]
    defaults = [None] * (len(f.args.args) - len(f.args.defaults)) + f.args.defaults
    return {"name": f.name, "docstring": docstring or ast.get_docstring(f) or "",
            "args": [{"name": a.arg, "type": a.annotation and ast.unparse(a.annotation), "required": d is None,
                      "default": d and ast.unparse(d)} for a, d in zip(f.args.args, defaults)]}


def nexus_tool(function: dict) -> dict:
    """A function as APIGen's flat specification: an argument that may be left out says so in its type."""
    parameters = {}
    for a in function["args"]:
        documented = re.search(rf"\b{a['name']} \((\w+)", function["docstring"])        # cve_cpe's types stand there alone
        kind = a["type"] or (documented[1] if documented else "str")
        parameters[a["name"]] = {"type": kind + ", optional" * (not a["required"])}
        if not a["required"] and nexus_default(a) is not None:
            parameters[a["name"]]["default"] = nexus_default(a)
    return {"name": function["name"], "description": function["docstring"].strip(), "parameters": parameters}


def nexus_default(argument: dict):
    """The value of a default; where that is no literal, such as ((2017 - 12) - 20), its text stands for it."""
    try:
        return ast.literal_eval(argument["default"])
    except (ValueError, SyntaxError):
        return argument["default"]


def nexus_call(text: str) -> tuple[str, list, dict]:
    """(name, positional arguments, keywords) of the first call of an output: a JSON call {"name", "arguments"} or Python's
    f(...), r = f(...), nvdlib.f(...), or a list of either. ValueError if there is none."""
    if "Initial Answer:" in text:                                   # NexusRaven's own wording
        text = text.partition("Initial Answer:")[2].strip().partition("\n")[0]
    text = re.sub(r"\A\s*```(\w*\n)?|```\s*\Z", "", text).strip()
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):                            # not JSON: Python, then
        call = None
    call = call[0] if isinstance(call, list) and call else call
    if isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict):
        return call["name"].removeprefix("nvdlib."), [], call["arguments"]
    try:
        call = ast.parse(text).body[0].value
        call = call.elts[0] if isinstance(call, ast.List) else call
        return (ast.unparse(call.func).removeprefix("nvdlib."), [ast.literal_eval(a) for a in call.args],
                {k.arg: ast.literal_eval(k.value) for k in call.keywords})
    except Exception as e:                              # no call; and a model can provoke Syntax-, Recursion-, MemoryError and more
        raise ValueError(f"neither a JSON call nor a Python call with plain values ({type(e).__name__})") from None


def nexus_arguments(function: dict, positional: list, keywords: dict) -> dict:
    """The full arguments of a call, bound as Python binds them, defaults filled in. ValueError says what does not fit."""
    names = [a["name"] for a in function["args"]]
    if len(positional) > len(names):
        raise ValueError(f"{len(positional)} positional arguments, {len(names)} at most")
    given = dict(zip(names, positional))
    for name in keywords:
        if name in given or name not in names:
            raise ValueError(f"argument {str(name)[:80]!r} is {'given twice' if name in given else 'unknown'}")
    given |= keywords
    missing = [a["name"] for a in function["args"] if a["required"] and a["name"] not in given]
    if missing:
        raise ValueError(f"argument {missing[0]!r} is missing")
    full = {a["name"]: given[a["name"]] if a["name"] in given else nexus_default(a) for a in function["args"]}
    try:                                                            # NexusRaven compares floats as integers
        return {k: int(v) if isinstance(v, float) else v for k, v in full.items()}
    except (ValueError, OverflowError):
        raise ValueError("an argument is NaN or infinite") from None


def nexus_judge(item: Item, output: str) -> dict:
    """Right if the first call's name equals the reference's and so do the full arguments, each by Python's =="""
    if "fault" in item.reference:
        return {"correct": False, "reason": f"{DATA_FAULT} {item.reference['fault']}"}
    function, expected = item.reference["function"], item.reference["arguments"]
    try:
        name, *arguments = nexus_call(output)
        if name != function["name"]:
            return {"correct": False, "reason": f"function {name[:80]!r}, not {function['name']!r}"}
        got = nexus_arguments(function, *arguments)
    except ValueError as e:
        return {"correct": False, "reason": str(e)}
    differs = [f"{k} is not {v!r}" for k, v in expected.items() if got[k] != v]
    return {"correct": not differs, "reason": "; ".join(differs) or "correct"}


def nexus_summary(verdicts: list[dict]) -> dict:
    """Accuracy of each set, and its average over sets (each set weighs the same) and over items."""
    sets = {name: [v["correct"] for v in verdicts if v["category"] == name] for name in NEXUS_SETS}
    accuracy = {name: float(np.mean(correct)) for name, correct in sets.items() if correct}
    return {"asked": len(verdicts), "accuracy": accuracy, "average_over_sets": float(np.mean(list(accuracy.values()))),
            "average_over_items": float(np.mean([v["correct"] for v in verdicts])), "data_faults": data_faults(verdicts)}


# -----------------------------------------------------------------------------------------------------------------
# T-Eval: six abilities, scored against reference steps. Names and thoughts are compared by an embedding

# What upstream averages: an ability's score is the mean over its formats, the overall score the mean over the six abilities.
# A format's score is the mean of the parts named here. "rru_json" is upstream's name of reason_retrieve_understand_json.
TEVAL = {"instruct": {"instruct_json": ("format", "args"), "instruct_string": ("format", "args")},
         "plan": {"plan_json": ("f1",), "plan_str": ("f1",)},
         "reason": {"reason_str": ("thought",), "rru_json": ("thought",)},
         "retrieve": {"retrieve_str": ("name",), "rru_json": ("name",)},
         "understand": {"understand_str": ("args",), "rru_json": ("args",)},
         "review": {"review_str": ("answer",)}}
TEVAL_FILES = ("instruct", "plan_json", "plan_str", "reason_retrieve_understand_json", "reason_str", "retrieve_str",
               "understand_str", "review_str")


def teval_items(folder: str) -> list[Item]:
    """The items of T-Eval's files in a folder, such as plan_json_v2.json or review_str_v1_zh.json; one version of each."""
    files = {}
    for file in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        match = re.fullmatch(rf"({'|'.join(TEVAL_FILES)})(_v\d+)?(_zh)?\.json", file)
        if match and match[1] in files:
            raise DataError(f"{folder} holds both {files[match[1]]} and {file}; keep one version of each file in a folder.")
        if match:
            files[match[1]] = file
    if not files:
        raise DataError(f"{folder} holds none of {', '.join(f'{name}_v1.json' for name in TEVAL_FILES)}; "
                        "give the folder of T-Eval's data with --data.")
    items = []
    for name in sorted(files, key=TEVAL_FILES.index):
        for key, record in read_object(os.path.join(folder, files[name])).items():
            category = "instruct_json" if name == "instruct" else name.replace("reason_retrieve_understand", "rru")
            try:
                if name == "instruct":
                    category = {"json": "instruct_json", "string": "instruct_string"}[record["meta_data"]["response_format"]]
                messages = [Message(ROLES[turn["role"]], "" + turn["content"]) for turn in record["origin_prompt"]]
                reference = teval_reference(category, record)
            except RECORD_FAULTS as e:
                messages, reference = [Message("user", "")], {"fault": f"{type(e).__name__}: {e}"}
            items.append(Item(f"{category}_{key}", category, messages, reference))
    if not items:
        raise DataError(f"the files of {folder} hold no records; fetch T-Eval's data again.")
    return items


def teval_reference(category: str, record: dict) -> dict:
    """What the judge needs of a record."""
    truth = record["ground_truth"]
    if category.startswith("plan"):
        plan = [(int(step["id"]), str(step["name"]), str(step["args"])) for step in truth]
        return {"plan": without_finish(plan), "API_list": list(map(str, record["meta"]["API_list"]))}
    if category.startswith("instruct"):
        ends = ("",) if category == "instruct_json" else ("_start", "_end")
        template = {key + end: str(record["template"][key + end]) for key in ("thought", "action", "args") for end in ends}
        return {"template": template, "action": truth["action"], "args": dict(truth["args"])}
    if category == "rru_json":                          # arguments that are no object, such as FinishAction's, count as none
        args = truth["args"] if isinstance(truth["args"], dict) else {}
        return {"thought": str(truth["thought"]), "name": str(truth["name"]), "args": args}
    part = {"reason_str": "thought", "retrieve_str": "name", "understand_str": "args", "review_str": "answer"}[category]
    return {part: str(truth[part])}


def lexical_trigrams(texts: list[str]) -> np.ndarray:
    """(n, 1024) float32: how often each character trigram occurs, hashed. The plain stand-in for a sentence model."""
    counts = []
    for text in (f"  {text.lower()}  " for text in texts):
        grams = [zlib.crc32(text[i:i + 3].encode("utf-8", "surrogatepass")) % 1024 for i in range(len(text) - 2)]
        counts.append(np.bincount(grams, minlength=1024))
    return np.stack(counts).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) cosines of the rows of a (n, d) and b (m, d), clipped at 0; rounded, so that a text is exactly like itself."""
    unit = lambda x: np.asarray(x) / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return np.maximum(unit(a) @ unit(b).T, 0).astype(np.float64).round(5)


def teval_judge(item: Item, output: str, embed=lexical_trigrams) -> dict:
    """Scores in [0, 1] of one output by T-Eval's rules: {"score", "parts": {name: score}}; correct if the score is 1.

    embed(texts) -> (n, d) array compares names, arguments and thoughts in Plan and Reason; upstream's is the sentence model
    all-mpnet-base-v2, the default is lexical_trigrams. Plan scores "f1"; "f1_upstream" is what upstream reports for it.
    """
    if "fault" in item.reference:
        return {"correct": False, "reason": f"{DATA_FAULT} {item.reference['fault']}", "score": 0.0, "parts": {}}
    task, _, form = item.category.rpartition("_")
    if task == "instruct":
        parts = judge_instruct(item.reference, output, form)
    elif task == "plan":
        parts = judge_plan(item.reference, output, form, embed)
    elif task == "review":                              # "Answer: B", or anything after the first ":", by its first letter
        letter = output[output.find(":") + 1:].strip()[:1]
        parts = {"answer": float(letter == item.reference["answer"]), "parsed": float(letter in tuple("ABCDE"))}
    else:
        parts = judge_step(item.reference, output, form, embed)
    scored = [parts[part] for formats in TEVAL.values() for part in formats.get(item.category, ())]
    score = float(np.mean(scored))
    reason = "correct" if score == 1 else ", ".join(f"{part} {value:.3g}" for part, value in parts.items())
    return {"correct": score == 1, "reason": reason, "score": score, "parts": parts, "embedding": embed.__name__}


def teval_parse(text: str, brackets: str = ""):
    """A reply as a Python literal, else JSON, else JSON with ' for "; with `brackets`, from the first to the last of them."""
    if "```json" in text:
        text = text.partition("```json")[2].strip("`")
    if brackets:
        text = text[text.find(brackets[0]):text.rfind(brackets[1]) + 1]
    for parse in (ast.literal_eval, json.loads, lambda text: json.loads(text.replace("'", '"'))):
        try:
            return parse(text)
        except Exception:                               # a model can provoke Syntax-, Value-, Recursion-, MemoryError and more
            pass
    raise ValueError("neither a Python literal nor JSON")


def judge_instruct(reference: dict, output: str, form: str) -> dict:
    """format: the reply has the asked form. args: (action right + number of equal arguments) / (number of arguments + 1)."""
    template, args = reference["template"], {}
    if form == "json":
        try:
            reply = teval_parse(output)
            _, action, args = (reply[template[key]] for key in ("thought", "action", "args"))
        except (ValueError, KeyError, TypeError):
            return {"format": 0.0, "args": 0.0}
    else:
        # the template's marks follow one another; of a mark that occurs more than once the last counts, as in upstream's
        # pattern of greedy groups
        to_action, to_args = template["thought_end"] + template["action_start"], template["action_end"] + template["args_start"]
        end = max(output.rfind(template["args_end"]), 0)
        middle = output.rfind(to_args, 0, end)
        first = output.rfind(to_action, 0, max(middle, 0))
        if not 0 <= output.find(template["thought_start"]) <= first - len(template["thought_start"]):
            return {"format": 0.0, "args": 0.0}
        action = output[first + len(to_action):middle].strip()
        try:
            args = ast.literal_eval(output[middle + len(to_args):end].strip())
        except Exception:                               # see teval_parse; the form is right all the same
            pass
    args = args if isinstance(args, dict) else {}
    equal = sum(args.get(key, "") == value for key, value in reference["args"].items())
    return {"format": 1.0, "args": ((action == reference["action"]) + equal) / (len(reference["args"]) + 1)}


def judge_plan(reference: dict, output: str, form: str, embed) -> dict:
    """F1 of the steps that a maximum-weight matching finds in the reference plan, in the same order."""
    steps = []
    if form == "json":
        try:
            reply = teval_parse(output, "[]")
            steps = [(int(s["id"]), str(s["name"]), str(s["args"])) for s in reply] if isinstance(reply, list) else []
        except Exception:                               # no list, no step, NaN as id, an integer too long to print
            pass
    else:                                               # of each line or sentence: the API named first, the text its arguments
        for i, line in enumerate(output.replace(". ", "\n").split("\n")):
            names = [name for name in reference["API_list"] if name in line]
            steps += [(i, min(names, key=line.find), line)] if names else []
    plan, truth = without_finish(steps), reference["plan"]
    correct = 0
    if plan and truth:
        similar = lambda part: cosine(embed([step[part] for step in plan]), embed([step[part] for step in truth]))
        weight = 0.75 * similar(1) + 0.25 * similar(2)
        # of matchings of equal weight (a plan may repeat a step) the one nearest to the order; upstream takes any
        apart = np.subtract.outer(np.arange(len(plan)), np.arange(len(truth))) / (len(plan) + len(truth))
        matched = [j for _, j in best_matching(np.where(weight > 0.8, weight - 1e-7 * apart ** 2, 0))]
        longest = []                                    # longest[k]: of the increasing subsequences that end with matched[k]
        for j in matched:
            longest.append(1 + max((n for n, other in zip(longest, matched) if other < j), default=0))
        correct = max(longest, default=0)
    f1 = lambda correct: 2 * correct / max(len(plan) + len(truth), 1)
    # upstream counts every step as a subsequence of length 1, matched or not, so that no plan with a step in it scores 0
    return {"f1": f1(correct), "f1_upstream": f1(max(correct, 1)) if plan and truth else 0.0,
            "precision": correct / max(len(plan), 1), "recall": correct / max(len(truth), 1), "parsed": float(bool(steps))}


def without_finish(plan: list[tuple]) -> list[tuple]:
    """A plan of (id, name, arguments) in the order of its ids, without FinishAction at its end."""
    plan = sorted(plan, key=lambda step: step[0])
    return plan[:-1] if plan and plan[-1][1] == "FinishAction" else plan


def judge_step(reference: dict, output: str, form: str, embed) -> dict:
    """Reason, Retrieve and Understand: the next step's thought, name and arguments, all in JSON or one as plain text."""
    if form == "json":
        try:
            reply = teval_parse(output, "{}")
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            return {"thought": 0.0, "name": 0.0, "args": 0.0, "parsed": 0.0}
        args, expected = reply.get("args"), reference["args"]
        args = args if isinstance(args, dict) else {}
        equal = sum(key in args and plain(args[key]) == str(value) for key, value in expected.items())
        return {"thought": float(cosine(embed([plain(reply.get("thought", ""))]), embed([reference["thought"]]))[0, 0]),
                "name": float(plain(reply.get("name", "")) == reference["name"]),
                "args": equal / len(expected) if expected else float(not args), "parsed": 1.0}
    if "thought" in reference:
        return {"thought": float(cosine(embed([output]), embed([reference["thought"]]))[0, 0])}
    if "name" in reference:                             # the name occurs, and no other that looks like an API's
        names = re.findall(r"(?<!\w)\w+\.\w+|FinishAction", output)
        return {"name": float(reference["name"] in output and all(name == reference["name"] for name in names))}
    return {"args": float(output.strip("'").strip('"') == reference["args"])}


def plain(value) -> str:
    """str(value), or "" for what Python refuses to print: integers of thousands of digits, nesting too deep."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return ""


def best_matching(weight: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (i, j), by i, of a maximum-weight matching of a bipartite graph: weight (n, m), 0 where there is no edge.

    The Hungarian method: rows enter one at a time, along the path of least reduced cost cost[i, j] - u[i] - v[j] to a free
    column. Row and column 0 stand for none. O(n² m), n the smaller side.
    """
    if len(weight) > weight.shape[1]:
        return sorted((i, j) for j, i in best_matching(weight.T))
    n, m = weight.shape
    cost, u, v = np.pad(-weight, ((1, 0), (1, 0))), np.zeros(n + 1), np.zeros(m + 1)
    row = np.zeros(m + 1, int)                          # row[j]: the row that column j is matched to
    for i in range(1, n + 1):
        row[0], j = i, 0
        least, before, seen = np.full(m + 1, np.inf), np.zeros(m + 1, int), np.zeros(m + 1, bool)
        while row[j]:
            seen[j] = True
            slack = cost[row[j]] - u[row[j]] - v
            closer = ~seen & (slack < least)
            least[closer], before[closer] = slack[closer], j
            j = int(np.argmin(np.where(seen, np.inf, least)))
            step = least[j]
            u[row[seen]] += step
            v[seen] -= step
            least[~seen] -= step
        while j:                                        # shift the matches along the path
            row[j] = row[before[j]]
            j = before[j]
    return sorted((int(row[j]) - 1, j - 1) for j in range(1, m + 1) if row[j] and weight[row[j] - 1, j - 1] > 0)


def teval_summary(verdicts: list[dict]) -> dict:
    """Upstream's figures over the formats present: parts by format, scores by ability, the mean over abilities; and which
    formats are missing. "plan" is from the mended F1; names ending in _upstream keep upstream's."""
    formats, missing = {}, []
    for name in dict.fromkeys(name for table in TEVAL.values() for name in table):
        group = [v.get("parts", {}) for v in verdicts if v["category"] == name]
        names = dict.fromkeys([p for table in TEVAL.values() for p in table.get(name, ())] + [p for parts in group for p in parts])
        if group:
            formats[name] = {"asked": len(group)} | {p: float(np.mean([parts.get(p, 0) for parts in group])) for p in names}
        else:
            missing.append(name)
    score = lambda table: float(np.mean([formats[name].get(p, 0) for name, ps in table.items() if name in formats for p in ps]))
    abilities = {ability: score(table) for ability, table in TEVAL.items() if table.keys() & formats.keys()}
    upstream = abilities | {"plan": score(dict.fromkeys(TEVAL["plan"], ("f1_upstream",)))} if "plan" in abilities else abilities
    return {"asked": len(verdicts), "embedding": ", ".join(sorted({v["embedding"] for v in verdicts if "embedding" in v})),
            "overall": float(np.mean(list(abilities.values()))), "overall_upstream": float(np.mean(list(upstream.values()))),
            "abilities": abilities, "plan_upstream": upstream.get("plan"), "formats": formats, "missing": missing,
            "data_faults": data_faults(verdicts)}


# -----------------------------------------------------------------------------------------------------------------
# StableToolBench: an agent calls APIs until it finishes, then a judge model says whether its answer solves the query

STB_PROMPT = """You are an agent that does the task below with the help of many tools (functions).
At each step, think about where you stand and what to do next, and make a function call. Your output should follow this format:
Thought:
Action
Action Input:

You then get the result of the call and go on from there, one thought and call after the other, until you can give the answer.
Remember:
1.a call cannot be taken back; to begin the task afresh, give up and restart.
2.keep every thought short, five sentences at most.
3.you may try several things, one in each call.
Task description: Use the functions to help with the user's query. Remember:
1.ALWAYS call "Finish" at the end of the task, with a final answer that holds all that the user should be told. If you cannot do \
the task, or the functions always fail, use Finish->give_up_and_restart.
2.Use the functions' names, not the names of the tools.
You have access of the following tools:
{tools}
Specifically, you have access to the following APIs: {functions}"""
STB_FINISH = {"name": "Finish", "description": "Ends the task: with the final answer, which is all that the user will see, or by "
              "giving up where no answer can be had. ALWAYS call it at the end.", "parameters": {
                  "type": "object", "required": ["return_type"], "properties": {
                      "return_type": {"type": "string", "enum": ["give_answer", "give_up_and_restart"]},
                      "final_answer": {"type": "string", "description": 'The answer, if "return_type"=="give_answer"'}}}}
STB_ATTEMPTS = 3            # of a request that times out, fails with 5xx or 429, or is answered with nonsense
STB_STATUSES = ("Solved", "Unsure", "Unsolved")
STB_SOLVED = """Does the answer solve the user's query?
Unsolved: it apologises, or does not respond to the query. Unsure: it responds, but one cannot tell from it alone whether the \
query is solved. Solved or Unsolved: it responds, and one can tell.

Query: {query}

Answer: {answer}"""
STB_SOLVED_IN_DETAIL = """Does the answer solve the user's query? Check it against the calls that were made for it.
Unsolved: every call failed, or the calls' results contradict the answer. Unsure: the calls do not show whether the answer is \
true. Solved: calls succeeded, and what they returned does solve the query.

Query: {query}

Answer: {answer}

Calls: {trace}"""
STB_BETTER = """Which of two answers serves the user's query better? Compare how informative, how true to the calls' results and how \
well reasoned they are; then how much of the query the calls dealt with; then how few calls were needed.

Query: {query}

Answer 0: {0}
Calls 0: {1}

Answer 1: {2}
Calls 1: {3}"""


def stb_items(folder: str) -> list[Item]:
    """The queries of solvable_queries/test_instruction/G*.json below `folder`, or of the folder itself; id is the query_id.

    A record that lacks what is needed stays in, without messages and with its fault as the reference: asked, and unsolved.
    """
    files = sorted(path for below in ("", "test_instruction", "solvable_queries/test_instruction")
                   for path in glob.glob(os.path.join(glob.escape(folder), below, "G[123]_*.json")))
    if not files:
        raise DataError(f"{folder} holds no solvable_queries/test_instruction/G*.json; name StableToolBench's folder.")
    items = []
    for path in files:
        category = os.path.basename(path)[:-len(".json")]
        for where, record in read_records(path):
            try:
                items.append(stb_item(record, category))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                items.append(Item(where, category, [], {"fault": f"{type(e).__name__}: {e}"}))
    return items


def stb_item(record: dict, category: str) -> Item:
    apis = record["api_list"]
    documents = [stb_function(api) for api in apis]
    functions = {}              # name -> (category, tool, api); names are cut, so a few collide: the first has it, as upstream
    for api, document in zip(apis, documents):
        names = api["category_name"], stb_name(api["tool_name"]), stb_name(api["api_name"], True)
        functions.setdefault(document["name"], names)
    # upstream describes each tool from its own files, which the queries do not hold; without a description it says None
    names = dict.fromkeys(stb_name(api["tool_name"]) for api in apis)
    tools = "".join(f"{i}.{name}: None\n" for i, name in enumerate(names, 1))
    return Item(str(record["query_id"]), category, [
        Message("system", STB_PROMPT.format(tools=tools, functions=[*documents, STB_FINISH])),
        Message("user", f"{record['query']}\nBegin!")],
        {"query": record["query"], "functions": functions,
         "relevant": sorted({stb_function_name(tool, api) for tool, api in record["relevant APIs"]})})


def stb_name(text: str, reserved: bool = False) -> str:
    """ToolBench's name of a tool (or, with `reserved`, of an API or a parameter, which may be no word of Python's)."""
    name = re.sub("_+", "_", re.sub(r"[^\u4e00-\u9fa5a-zA-Z0-9_^]", "_", text)).lower().strip("_")
    name = "get_" + name if name[:1].isdigit() else name
    return "is_" + name if reserved and name in ("from", "class", "return", "false", "true", "id", "and") else name


def stb_function_name(tool: str, api: str) -> str:
    return f"{stb_name(api, True)}_for_{stb_name(tool)}"[-64:]


def stb_function(api: dict) -> dict:
    """ToolBench's document of one function: its name is api_for_tool, and texts end at 256 characters."""
    name = stb_function_name(api["tool_name"], api["api_name"])
    description = f'This is the subfunction for tool "{stb_name(api["tool_name"])}", you can use this tool.'
    if (about := (api["api_description"] or "").strip()):
        description += f'The description of this function is: "{about.replace(api["api_name"], name)[:256]}"'
    properties, lists = {}, {"required": [], "optional": []}
    # ToolBench shows optional parameters only beside required ones; its training data does, so the prompt does
    for kind in lists if api["required_parameters"] else ():
        for p in api[f"{kind}_parameters"]:
            kind_of_value = {"NUMBER": "integer", "BOOLEAN": "boolean"}.get(p["type"], "string")
            example = {} if str(p["default"]) == "" else {"example_value": p["default"]}
            properties[stb_name(p["name"], True)] = {"type": kind_of_value, "description": p["description"][:256]} | example
            lists[kind].append(stb_name(p["name"], True))
    return {"name": name, "description": description, "parameters": {"type": "object", "properties": properties, **lists}}


def stb_calls(output: str) -> tuple[str, list[tuple[str, object]]]:
    """(thought, [(action, input)]) of a turn: Thought / Action / Action Input, or APIGen's JSON list of calls; else []."""
    head, found, tool_input = output.partition("Action Input:")
    thought, found_action, action = head.rpartition("Action:")
    if found and found_action:
        return thought.replace("Thought:", "", 1).strip(), [(action.strip(), stb_input(tool_input))]
    try:
        calls = json.loads(output[output.index("["):output.rindex("]") + 1], strict=False)
        return output[:output.index("[")].strip(), [(str(c["name"]), stb_input(as_json(c["arguments"]))) for c in calls]
    except (ValueError, KeyError, TypeError, RecursionError):
        return output.strip(), []


def stb_input(text: str):
    """The dict that a call's input spells, in JSON or as a Python literal; {} for no text; else the text as it is."""
    if text.count("{") + text.count("[") > 300:         # no API's input nests so deep, and nothing below may run out of stack
        return text
    for parse in (lambda t: json.loads(t, strict=False), ast.literal_eval):
        try:
            value = parse(text.strip() or "{}")
            if isinstance(value, dict) and json.dumps(value, sort_keys=True):       # it can be sent, and compared in any order
                return value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def stb_end(trace: list[dict]) -> tuple[str | None, str]:
    """("give_answer", the answer), ("give_up_and_restart", "") or (None, what is wrong): how the last step ends the trace."""
    if not trace or trace[-1].get("action") != "Finish":
        return None, "no Finish"
    given = trace[-1].get("input", "")
    if isinstance(given, dict):
        kind, answer = given.get("return_type"), given.get("final_answer")
    else:                                   # broken JSON, cut short perhaps: the fields are searched for, as upstream does
        kind, answer = (found and found[1] for found in (re.search(r'"return_type": ?"(\w+)', given),
                                                         re.search(r'"final_answer": ?"(.*)', given, re.DOTALL)))
    if kind == "give_up_and_restart":
        return kind, ""
    if kind != "give_answer" or answer is None:
        return None, 'must have "final_answer"' if kind == "give_answer" else 'must have "return_type"'
    answer = answer if isinstance(answer, str) else json.dumps(answer)
    return kind, answer.encode("utf-8", "replace").decode()                 # a lone surrogate cannot be written to a file


def stb_run(items: list[Item], speak, call, max_steps: int = 12, done=lambda item, trace: None) -> dict[str, list[dict]]:
    """Let the agent answer all items side by side; returns {item id: trace}, and calls done(item, trace) as each one finishes.

    speak(conversations) -> outputs, None for a conversation that has grown too long; call: one of the environments below.
    A trace is a list of steps {"thought", "action", "input", "observation"}, with "source" (or "fault") of a call's response.
    max_steps counts turns. (Upstream's 12 counts thought, action and input each for one: its ToolLLaMA stops after 4 turns.)
    """
    active = [(item, list(item.messages), []) for item in items]
    traces = {item.id: trace for item, _, trace in active}
    with ThreadPoolExecutor(8) as pool:                 # a call waits for the environment, not for this machine
        for turn in range(max_steps + 1):
            over = [turn == max_steps or not talk or stb_end(trace)[0] or any("stopped" in step for step in trace)
                    for _, talk, trace in active]
            for entry, is_over in zip(active, over):
                if is_over:
                    done(entry[0], entry[2])
            active = [entry for entry, is_over in zip(active, over) if not is_over]
            if not active:
                return traces
            outputs = speak([talk for _, talk, _ in active])
            turns = pool.map(lambda entry, output: stb_turn(entry[0], output, call), active, outputs)
            for (_, talk, trace), output, steps in zip(active, outputs, turns, strict=True):
                trace += steps
                talk += [Message("assistant", (output or "").strip("\n")), *(Message("tool", s["observation"]) for s in steps)]


def stb_turn(item: Item, output: str | None, call) -> list[dict]:
    """The steps of one turn, a call each, with what the environment observes."""
    if output is None:
        return [{"thought": "", "action": "", "input": "", "observation": "", "stopped": "the conversation grew too long"}]
    thought, calls = stb_calls(output)
    steps = []
    for action, given in calls or [("", "")]:
        steps.append(step := {"thought": thought, "action": action, "input": given})
        if action == "Finish":
            kind, problem = stb_end([step])
            reply = {"error": "" if kind else problem, "response": ""}
        elif action in item.reference["functions"]:
            reply = call(*item.reference["functions"][action], given)
            step |= {key: reply[key] for key in ("source", "fault") if key in reply}
        else:
            reply = {"error": f"No such function name: {action}", "response": ""}
        text = json.dumps({key: reply[key] for key in ("error", "response")})
        step["observation"] = text if len(text) <= 1024 else text[:1024] + "..."
        thought = ""
        if action == "Finish" and kind:
            break
    return steps


def stb_post(url: str, body: dict, headers: dict, timeout: float, read):
    """(read(the JSON answer), None) of a POST, or (None, fault): "timeout", "unreachable", "http CODE" or "nonsense"."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)                        # keys go to this host only
    for attempt in range(STB_ATTEMPTS):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return read(json.loads(answer.read(1 << 24))), None
        except urllib.error.HTTPError as e:
            e.close()
            fault = f"http {e.code}"
            if e.code < 500 and e.code != 429:
                break
        except OSError as e:
            fault = "timeout" if isinstance(getattr(e, "reason", e), TimeoutError) else "unreachable"
        except (http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            fault = "nonsense"
    return None, fault


def stb_reply(value: dict) -> dict:
    return {"error": value["error"], "response": value["response"]}


def stb_failure(fault: str) -> dict:
    """What the agent sees, in upstream's words, when the environment itself fails; the fault is counted in the summary."""
    status = f". status_code={fault[5:]}" if fault.startswith("http ") else ""
    error = "Timeout error..." if fault == "timeout" else f"request invalid, data error{status}"
    return {"error": error, "response": "", "fault": fault}


def stb_server(url: str, key: str = "", timeout: float = 60.0):
    """The environment behind StableToolBench's own server: call(category, tool, api, input) posts to URL/virtual."""
    url = checked_url(url).removesuffix("/virtual") + "/virtual"

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        body = {"category": category, "tool_name": tool, "api_name": api, "tool_input": tool_input, "strip": "truncate",
                "toolbench_key": key}
        reply, fault = stb_post(url, body, {"toolbench_key": key}, timeout, stb_reply)
        return stb_failure(fault) if fault else reply | {"source": "server"}
    return call


def checked_url(url: str) -> str:
    if not re.match(r"https?://[^/]", url):
        raise DataError(f"{url!r} is no address; give one that begins with http:// or https://.")
    return url.rstrip("/")


def stb_stored(find):
    """The environment of stored responses: find(category, tool, api) gives {input: {"error", "response"}}, or raises.

    The server looks up str() of the input's dict, so the order of keys counts; here any will do, and "source" says which hit.
    """
    @functools.lru_cache(512)
    def table(category: str, tool: str, api: str) -> tuple[dict, dict]:
        inputs = [(stb_input(key), reply) for key, reply in find(category, tool, api).items()]
        return {str(value): reply for value, reply in inputs}, {json.dumps(v, sort_keys=True): reply for v, reply in inputs}

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        try:
            exact, any_order = table(category, tool, api)
            if str(tool_input) in exact:
                return stb_reply(exact[str(tool_input)]) | {"source": "stored"}
            if (key := json.dumps(tool_input, sort_keys=True)) in any_order:
                return stb_reply(any_order[key]) | {"source": "stored, keys in another order"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return stb_failure("nonsense")
        if isinstance(tool_input, str):
            return {"error": "Tool input parse error...\n", "response": "", "source": "no JSON"}
        return {"error": "no response is stored for this input", "response": "", "source": "not stored"}
    return call


def stb_cache(folder: str):
    """The environment of a cache folder in the server's layout: <Category>/<tool>_for_<Category>/<api>.json."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder; name the cache's, with <Category>/<tool>_for_<Category>/<api>.json in it.")

    def find(category: str, tool: str, api: str) -> dict:
        category = re.sub("[ ,/]", "_", category).replace("__", "_")
        path = os.path.join(folder, category, f"{tool}_for_{category}", f"{api}.json")
        if not os.path.isfile(path):
            return {}
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    return stb_stored(find)


def stb_recorded(path: str):
    """The environment of responses seen in earlier runs: a JSON object {function: {input as text: {"error", "response"}}}."""
    recorded = dict(pair for _, record in read_records(path) if isinstance(record, dict) for pair in record.items())
    if not all(isinstance(responses, dict) for responses in recorded.values()) or not recorded:
        raise DataError(f'{path} must be a JSON object {{function: {{input: {{"error", "response"}}}}}}.')
    return stb_stored(lambda category, tool, api: recorded.get(f"{api}_for_{tool}"[-64:], {}))


def stb_traces(path: str) -> dict[str, list[dict]]:
    """Traces {id: steps} of a file of {"id", "trace": [{"action", "input", "observation"}, ...]} lines, as the run writes them.

    {"id", "output": "the final answer"} will do where the steps are unknown. A later line of an id replaces an earlier one.
    """
    traces = {}
    for where, record in read_records(path):
        try:
            trace = record["trace"] if "trace" in record else [{"action": "Finish", "input": {
                "return_type": "give_answer", "final_answer": record["output"] or ""}}]
            traces[str(record["id"])] = [step | {"action": step["action"].strip(), "input": stb_input(as_json(step["input"]))}
                                         for step in trace]
        except (KeyError, TypeError, AttributeError):
            raise DataError(f'{where}: expected {{"id", "trace": [{{"action": "...", "input": ...}}]}} '
                            'or {"id", "output": "..."}.') from None
    return traces


def stb_outputs(o: Options, items: list[Item], speak, settings: dict) -> dict[str, list[dict]]:
    """The traces of all items; they are kept in OUT/outputs.RANK.jsonl as they end, and the ranks share those not there yet."""
    call = (stb_server(o.server, os.environ.get("TOOLBENCH_KEY", "")) if o.server else stb_cache(o.cache) if o.cache
            else stb_recorded(o.recorded) if o.recorded else stb_stored(lambda *_: {}))
    return keep_outputs(items, o.out, settings, "agent", lambda mine, done: stb_run(mine, speak, call, o.max_steps, done))


def stb_verdicts(o: Options, items: list[Item], traces: dict[str, list[dict]]) -> list[dict]:
    """A verdict on every asked item, with its win over --against where given; judged side by side."""
    if bool(o.judge_url) != bool(o.judge_model) or o.against and not o.judge_url:
        raise DataError("a judge needs both --judge-url and --judge-model" + "; --against needs a judge." * bool(o.against))
    judge = stb_endpoint(o.judge_url, o.judge_model, os.environ.get("OPENAI_API_KEY", "")) if o.judge_url else None
    others = stb_traces(o.against) if o.against else {}

    def verdict(item):
        trace, other = traces.get(item.id, []), others.get(item.id, [])
        ours = stb_judge(item, trace, judge)
        return ours | (stb_compare(item, (ours, trace), (stb_judge(item, other, judge), other), judge) if o.against else {})

    with ThreadPoolExecutor(8) as pool:
        return list(tqdm(pool.map(verdict, items), "judge", total=len(items), unit="query", disable=not judge))


def stb_endpoint(url: str, model: str, key: str = "", timeout: float = 120.0):
    """The judge behind an OpenAI-compatible endpoint: judge(prompt, choices) -> (choice, its reasons), or (None, fault)."""
    url = checked_url(url) + "/chat/completions"

    def judge(prompt: str, choices: tuple) -> tuple[str | None, str]:
        ask = f'{prompt}\n\nGive your reasons briefly, then end with {{"verdict": "..."}}: one of {", ".join(choices)}.'

        def read(reply: dict) -> tuple[str, str]:
            text = reply["choices"][0]["message"]["content"]
            verdict = re.findall(r'"verdict"\s*:\s*"?(\w+)', text)[-1]
            return choices[choices.index(verdict)], text.encode("utf-8", "replace").decode()[:1000]
        verdict, fault = stb_post(url, {"model": model, "temperature": 0, "messages": [{"role": "user", "content": ask}]},
                                  {"Authorization": f"Bearer {key}"} if key else {}, timeout, read)
        return (None, fault) if fault else verdict
    return judge


def stb_judge(item: Item, trace: list[dict], judge=None) -> dict:
    """The verdict on a trace: "status" Solved, Unsure or Unsolved, "score" 1, 0.5 or 0; "not judged" and 0 without a judge's word.

    The judge sees the answer alone, and if Unsure of that once more with the calls. What has no answer is Unsolved unasked.
    """
    query, functions = item.reference.get("query"), item.reference.get("functions", {})
    kind, answer = stb_end(trace)
    status, reason, errors = "Unsolved" if judge else "not judged", None, []
    if "fault" in item.reference:
        reason = f"the query is broken: {item.reference['fault']}"
    elif not trace:
        reason = "no output"
    elif kind != "give_answer":
        reason = "gave up" if kind else trace[-1].get("stopped") or answer
    elif not answer.strip():
        reason = "empty answer"
    elif judge is None:
        reason = "finished, but there is no judge"
    else:
        status, reason = judge(STB_SOLVED.format(query=query, answer=answer), STB_STATUSES)
        if status == "Unsure":
            prompt = STB_SOLVED_IN_DETAIL.format(query=query, answer=answer, trace=json.dumps(trace))
            status, reason = judge(prompt, STB_STATUSES)
        if status is None:
            status, reason, errors = "not judged", f"the judge failed: {reason}", [reason]
    steps = [step for step in trace if "stopped" not in step][:-1 if kind else None]            # all but the Finish
    return {"id": item.id, "category": item.category, "correct": status == "Solved", "reason": reason,
            "output": answer if kind == "give_answer" else None, "status": status,
            "score": {"Solved": 1.0, "Unsure": 0.5}.get(status, 0.0), "end": kind, "steps": len(steps),
            "valid_actions": sum(step["action"] in functions or step["action"] == "Finish" for step in steps),
            "valid_json": sum(isinstance(step["input"], dict) for step in steps),
            "relevant": len(item.reference.get("relevant", [])),
            "relevant_called": len({step["action"] for step in steps} & set(item.reference.get("relevant", []))),
            "sources": dict(Counter(str(step["source"]) for step in steps if "source" in step)),
            "server_errors": dict(Counter(str(step["fault"]) for step in steps if "fault" in step)),
            "judge_errors": dict(Counter(errors))}


def stb_compare(item: Item, ours: tuple[dict, list], theirs: tuple[dict, list], judge) -> dict:
    """{"win": "win" | "tie" | "lose" | "not judged", "win_reason"} of two (verdict, trace) on an item, to be merged into our verdict.

    The better status wins, and a missing answer loses to any. Between equals the judge chooses, asked in both orders: a tie if
    it wavers. (Upstream asks twice in the same order, and tosses a coin between equal answers.)
    """
    (verdict, trace), (other, other_trace) = ours, theirs
    if "not judged" in (verdict["status"], other["status"]):
        return {"win": "not judged", "win_reason": "not both answers are judged"}
    status, other_status = (v["status"] if (v["output"] or "").strip() else "no answer" for v in (verdict, other))
    ranks = (*STB_STATUSES, "no answer")
    if status != other_status:
        win = "win" if ranks.index(status) < ranks.index(other_status) else "lose"
        return {"win": win, "win_reason": f"{status} against {other_status}"}
    if verdict["output"] == other["output"] or status == "no answer":
        return {"win": "tie", "win_reason": "no answer from either" if status == "no answer" else "the same answer"}
    sides = [(verdict["output"], json.dumps(trace)), (other["output"], json.dumps(other_trace))]
    (first, why), (second, why_too) = (judge(STB_BETTER.format(*a, *b, query=item.reference["query"]), ("0", "1"))
                                       for a, b in (sides, sides[::-1]))
    if None in (first, second):
        fault = why if first is None else why_too
        return {"win": "not judged", "win_reason": f"the judge failed: {fault}",
                "judge_errors": dict(Counter(verdict["judge_errors"]) + Counter([fault]))}
    return {"win": {("0", "1"): "win", ("1", "0"): "lose"}.get((first, second), "tie"), "win_reason": f"{why} / {why_too}"}


def stb_summary(verdicts: list[dict]) -> dict:
    """Figures over the asked queries: the solvable pass rate (solved + 0.5 unsure) / N and the win rate where there was a judge;
    and what needs none and is no pass rate: finished, calls of existing functions and in valid JSON, relevant APIs called."""
    def rates(group: list[dict]) -> dict:
        total = lambda key: sum(v[key] for v in group)
        share = lambda part, whole: part / whole if whole else None
        figures = {"asked": len(group), "finish_rate": share(sum(v["end"] == "give_answer" for v in group), len(group)),
                   "give_up_rate": share(sum(v["end"] == "give_up_and_restart" for v in group), len(group)),
                   "valid_action_rate": share(total("valid_actions"), total("steps")),
                   "valid_json_rate": share(total("valid_json"), total("steps")),
                   "relevant_apis_called": share(total("relevant_called"), total("relevant")), "steps": total("steps")}
        if judged:
            figures |= {"pass_rate": share(total("score"), len(group))}
            figures |= {status: sum(v["status"] == status for v in group) for status in (*STB_STATUSES, "not judged")}
        if compared:
            count = Counter(v.get("win", "not judged") for v in group)
            figures |= {f"{outcome}_rate": share(count[outcome], len(group)) for outcome in ("win", "tie", "lose")}
            figures |= {"not compared": count["not judged"]}
        return figures

    judged = any(v["status"] != "not judged" or v["judge_errors"] for v in verdicts)
    compared = any("win" in v for v in verdicts)
    categories = {c: rates([v for v in verdicts if v["category"] == c]) for c in dict.fromkeys(v["category"] for v in verdicts)}
    summary = rates(verdicts) | {"categories": categories}
    if judged and categories:
        summary["pass_rate_mean_of_categories"] = sum(c["pass_rate"] for c in categories.values()) / len(categories)
    for key in ("sources", "server_errors", "judge_errors"):
        summary[key] = dict(sum((Counter(v[key]) for v in verdicts), Counter()))
    broken = [f"{v['id']}: {v['reason']}" for v in verdicts if v["reason"].startswith("the query is broken")]
    return summary | {"broken_queries": broken}


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
    lowest = min(v[-1] for v in smooth.values())            # its name goes below its line, the others' above theirs
    marks = [m * 10.0 ** e for e in range(-3, 2) for m in (1, 2, 5) if low < m * 10.0 ** e < high]
    parts = [f'<text x="44" y="12" font-size="13" font-weight="600">{title}</text>']
    parts += [f'<line x1="44" x2="420" y1="{y(m):.0f}" y2="{y(m):.0f}" stroke="#e3e3e3"/><text x="40" y="{y(m) + 4:.0f}" font-size="11" '
              f'text-anchor="end">{m:g}</text>' for m in marks]
    for (name, v), colour in zip(smooth.items(), ("#888888", "#1a7f4b", "#b5543a")):
        x = np.linspace(44, 420, len(v))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="'
                     + " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(v))) + f'"><title>{name}</title></polyline>'
                     f'<text x="424" y="{y(v[-1]) + (11 if v[-1] == lowest else -3):.0f}" font-size="12" fill="{colour}">{name}</text>')
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


BENCHES = {"toy": Bench(toy_items, toy_judge, toy_summary, 96), "bfcl": Bench(bfcl_items, bfcl_judge, bfcl_summary),
           "nexus": Bench(nexus_items, nexus_judge, nexus_summary), "teval": Bench(teval_items, teval_judge, teval_summary),
           "stabletoolbench": Bench(stb_items, stb_judge, stb_summary)}


def flat(figures: dict, path: str = ""):
    """Yield (name, number) of the figures of a benchmark that are no mere detail of a category."""
    for name, value in figures.items():
        if isinstance(value, float):
            yield path + name, value
        elif isinstance(value, dict) and name not in ("categories", "formats", "data_faults"):
            yield from flat(value, f"{path}{name} ")


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
    if summary.get("too_long") or summary.get("missing"):
        print(f"counted as wrong: {summary['too_long']} prompts too long for the model, {summary['missing']} items without output")
    for name, value in flat(summary.get("figures", {}) if o.bench != "toy" else {}):
        print(f"{name} {value:.4f}")
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
