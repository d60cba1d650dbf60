"""Do the scores of benchmarks/teval.py agree with upstream's own pipeline on the same texts?

    git clone https://github.com/open-compass/T-Eval
    python -m tests.bench.agree_teval --upstream T-Eval --data DIR      # T-Eval's files

Items are answered with their reference, mostly damaged. Upstream cleans each reply as its test.py
does and scores it by its evaluator; both use the lexical embedding, since the sentence model is
exchangeable. Where upstream's evaluator raises, the reply is left out; how often is printed.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import sys
import types
from collections import Counter

import numpy as np
import torch

from benchmarks import teval
from support.readers import read_object

# what upstream calls the parts of a score
UPSTREAM_PARTS = {
    "instruct_json": {"format": "json_format_metric", "args": "json_args_em_metric"},
    "instruct_string": {"format": "string_format_metric", "args": "string_args_em_metric"},
    "plan": {"f1_upstream": "f1_score", "parsed": "parse_rate"},
    "review": {"answer": "review_quality", "parsed": "parse_rate"},
    "rru_json": {"thought": "thought", "name": "name", "args": "args", "parsed": "parse_rate"},
    "reason": {"thought": "thought"}, "retrieve": {"name": "name"}, "understand": {"args": "args"}}

PIECES = ["```json\n", "```", "`", "<eoa>", "<|im_end|>", "\nuser", "\nassistant", "\nUSER",
          "[INST]", "<|user|>", " ", "\n", "  \n", "'", '"', "{", "}", "[", "]", ":", ",",
          "Answer: ", "FinishAction", "thought", "name", "args", ". ", "None", "null", "true",
          "\\", "é", "查询", "\u00a0", "```python\n", "</s>", "0", "-1", "1e999"]


def right_reply(item, rng) -> str:
    """A reply that deserves the score 1."""
    reference = item.reference
    as_text = rng.choice([json.dumps, str])
    if item.category == "plan_json":
        keys = ("id", "name", "args")
        return as_text([dict(zip(keys, step, strict=True)) for step in reference["plan"]])
    if item.category == "plan_str":
        return "\n".join(f"{i + 1}. Use {name} to {args}" for i, name, args in reference["plan"])
    values = {"thought": "I look it up"} | reference
    if item.category == "instruct_json":
        return as_text({reference["template"][key]: values[key]
                        for key in ("thought", "action", "args")})
    if item.category == "instruct_string":
        text = ""
        for key in ("thought", "action", "args"):
            marks = reference["template"]
            text += marks[f"{key}_start"] + str(values[key]) + marks[f"{key}_end"]
        return text
    if item.category == "rru_json":
        return as_text(reference)
    [text] = reference.values()
    return rng.choice(["", "Answer: "]) + text if item.category == "review_str" else text


def damaged(text: str, rng) -> str:
    """A text with one thing wrong."""
    start = rng.randrange(len(text) + 1)
    end = start + rng.randrange(1, 12)
    lines = text.split(rng.choice(["\n", ", "]))
    rng.shuffle(lines)
    letter = rng.choice("abcdeinst 0123_.:,")
    quotes = rng.choice(["\"'", "'\""])
    return rng.choice([
        "```json\n" + text + rng.choice(["\n```", "```", ""]),
        "```json" + text + rng.choice(["\n```", "```", ""]),
        rng.choice([" ", "\n", "\n\n ", "`", "``"]) + text + rng.choice([" ", "\n", "`", ""]),
        text[:start] + text[end:], text[:start] + rng.choice(PIECES) + text[start:],
        text + rng.choice(PIECES) + rng.choice(["", " and more", text]),
        rng.choice(["Sure! Here: ", "Thought:", "Answer:", "[note] "]) + text,
        text[:start], text[start:], text + text, text.replace(*quotes), text.lower(),
        text.swapcase(), "\n".join(lines), rng.choice(PIECES) + text,
        text.replace(letter, rng.choice(["", "x", " ", "'"]), rng.choice([1, -1]))])


def load_upstream(directory: str):
    """Upstream's score, a function (category, record, text) -> its metrics.

    Stand-ins take the place of what it reads files, runs models and embeds sentences with.
    """
    class SentenceTransformer:
        def __init__(self, name):
            pass

        def encode(self, texts, convert_to_tensor):
            vectors = torch.from_numpy(teval.lexical_trigrams(np.atleast_1d(texts).tolist()))
            return vectors[0] if isinstance(texts, str) else vectors

    def cos_sim(a, b):
        a = torch.nn.functional.normalize(torch.atleast_2d(a))
        b = torch.nn.functional.normalize(torch.atleast_2d(b))
        return (a @ b.T).double()

    models = dict.fromkeys(["HFTransformerCasualLM", "HFTransformerChat", "GPTAPI"])
    for name, content in {
            "mmengine": {"load": lambda dataset: dataset}, "evaluate": {},
            "termcolor": {"colored": None}, "lagent": {}, "lagent.llms": {},
            "lagent.llms.huggingface": models, "lagent.llms.openai": models,
            "sentence_transformers": {"SentenceTransformer": SentenceTransformer,
                                      "util": types.SimpleNamespace(cos_sim=cos_sim)}}.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    sys.path.insert(0, directory)
    path = os.path.join(directory, "test.py")
    spec = importlib.util.spec_from_file_location("upstream_test", path)
    test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test)
    import teval.evaluators as evaluators

    def score(category, record, text):
        dataset = {"item": record | {"prediction": test.split_special_tokens(text)}}
        task, _, form = category.rpartition("_")
        name = {"instruct": "Instruct", "plan": "Planning", "review": "Review"}.get(task)
        evaluator = getattr(evaluators, (name or "ReasonRetrieveUnderstand") + "Evaluator")
        silence = io.StringIO()
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            if name == "Instruct":              # its mean has no value for the format not asked
                instruct = evaluator(dataset)
                instruct._load_dataset()
                return instruct._evaluate(instruct.dataset[0]["response_data_sample"])
            return evaluator(dataset, default_prompt_type=form, eval_type=task).evaluate()
    return score


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="a clone of open-compass/T-Eval")
    parser.add_argument("--data", required=True, help="folder of T-Eval's files")
    parser.add_argument("--language", default="en", choices=["en", "zh"])
    parser.add_argument("--count", type=int, default=5000, help="replies, over all categories")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="print at most so many disagreements")
    options = parser.parse_args()
    records = {}
    for name, path in teval.find_files(options.data, options.language).items():
        for key, record in read_object(path).items():
            records[name, key] = record
    items = {}
    for item, (name, key) in zip(teval.items(options.data, options.language), records,
                                 strict=True):
        items.setdefault(item.category, []).append((item, records[name, key]))
    upstream = load_upstream(options.upstream)
    rng = random.Random(options.seed)
    counts = Counter()

    # Each reply is scored twice, and shown if any part of the two scores differs.
    for _ in range(options.count):
        category = rng.choice(sorted(items))
        item, record = rng.choice(items[category])
        text = right_reply(item, rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5])):
            text = damaged(text, rng)
        try:
            theirs = upstream(category, record, text)
        except Exception:
            counts[category, "raised"] += 1
            continue
        ours = teval.judge(item, text)
        names = UPSTREAM_PARTS.get(category) or UPSTREAM_PARTS[category.rpartition("_")[0]]
        # upstream divides equal arguments by their number + 0.00001
        differ = {part: (value, theirs[names[part]]) for part, value in ours["parts"].items()
                  if part in names and abs(value - theirs[names[part]]) > 2e-5}
        counts[category, "replies"] += 1
        counts[category, "right"] += ours["correct"]
        counts[category, "differ"] += bool(differ)
        if differ and sum(counts[c, "differ"] for c in items) <= options.show:
            print(f"DISAGREE {item.id} (ours, upstream's): {differ}: {text[:300]!r}")

    columns = ("replies", "right", "differ", "raised")
    print(f"{'category':16}" + "".join(f"{name:>9}" for name in columns))
    for category in items:
        print(f"{category:16}" + "".join(f"{counts[category, name]:9,}" for name in columns))


if __name__ == "__main__":
    main()
