"""T-Eval: six abilities of an agent, each scored against reference steps.

Names, arguments and thoughts are compared by the cosine of their embeddings.
"""
import bisect
import itertools
import os
import re
import zlib

import networkx
import numpy as np

from benchmarks import DATA_FAULT, RECORD_FAULTS, Item, data_faults
from benchmarks.teval_replies import (
    clean,
    parse,
    plan_in_text,
    read_json_action,
    read_marked_action,
    read_plan,
)
from support.cli import DataError
from support.readers import ROLES, Message, read_object

MAX_NEW_TOKENS = 512
MAX_CHARACTERS = 10_000     # of a reply; the longest reference plan has 4,600 in 20 steps

# {ability: {category: the parts of its score that count}}, as upstream averages them: an ability's
# score is the mean over its categories, the overall score is the mean over the six abilities.
ABILITIES = {
    "instruct": {"instruct_json": ("format", "args"), "instruct_string": ("format", "args")},
    "plan": {"plan_json": ("f1",), "plan_str": ("f1",)},
    "reason": {"reason_str": ("thought",), "rru_json": ("thought",)},
    "retrieve": {"retrieve_str": ("name",), "rru_json": ("name",)},
    "understand": {"understand_str": ("args",), "rru_json": ("args",)},
    "review": {"review_str": ("answer",)}}

# {file: category of its items}; of instruct's two categories each record names its own
FILES = {
    "instruct": "instruct_json", "plan_json": "plan_json", "plan_str": "plan_str",
    "reason_retrieve_understand_json": "rru_json",      # upstream's abbreviation
    "reason_str": "reason_str", "retrieve_str": "retrieve_str",
    "understand_str": "understand_str", "review_str": "review_str"}
INSTRUCT = {"json": "instruct_json", "string": "instruct_string"}
LANGUAGES = {"en": "English", "zh": "Chinese"}


def items(folder: str, language: str = "en") -> list[Item]:
    """The items of a folder's files in one language, such as plan_json_v2.json.

    Chinese files ("zh") have _zh in their names, and those of upstream's subset, a fifth of the
    data, have _subset. A folder holds one version of each file and language. An item's id is
    CATEGORY_KEY, its key in the file.
    """
    paths = find_files(folder, language)
    found = []
    for name, path in paths.items():
        for key, record in read_object(path).items():
            category = FILES[name]
            try:
                if name == "instruct":
                    category = INSTRUCT[record["meta_data"]["response_format"]]
                messages = []
                for turn in record["origin_prompt"]:
                    # "" + content raises TypeError unless it is a text
                    messages.append(Message(ROLES[turn["role"]], "" + turn["content"]))
                reference = read_reference(category, record)
            except RECORD_FAULTS as e:
                messages = [Message("user", "")]
                reference = {"fault": f"{type(e).__name__}: {e}"}
            found.append(Item(f"{category}_{key}", category, messages, reference))
    if not found:
        raise DataError(f"the files of {folder} hold no records; fetch T-Eval's data again.")
    return found


def find_files(folder: str, language: str = "en") -> dict[str, str]:
    """{file's name without version and language: path}, in the order of FILES."""
    pattern = re.compile(rf"({'|'.join(FILES)})(_v\d+)?((?:_subset|_zh)*)\.json")
    found = {}
    others = 0                  # files in the other language
    for file in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        match = pattern.fullmatch(file)
        if not match:
            continue
        if ("_zh" in match[3]) != (language == "zh"):
            others += 1
            continue
        if match[1] in found:
            raise DataError(f"{folder} holds both {found[match[1]]} and {file}; "
                            "keep one version of each file in a folder.")
        found[match[1]] = file
    if not found and others:
        other = "en" if language == "zh" else "zh"
        raise DataError(f"{folder} holds no files in {LANGUAGES[language]}, but {others} in "
                        f"{LANGUAGES[other]}; choose them with --language {other}.")
    if not found:
        names = ", ".join(f"{name}_v1.json" for name in FILES)
        raise DataError(f"{folder} holds none of {names}; "
                        "give the folder of T-Eval's data with --data.")
    return {name: os.path.join(folder, found[name]) for name in FILES if name in found}


def read_reference(category: str, record: dict) -> dict:
    """What the judge needs of a record."""
    truth = record["ground_truth"]
    if category.startswith("plan"):
        plan = [(int(step["id"]), str(step["name"]), str(step["args"])) for step in truth]
        apis = [str(name) for name in record["meta"]["API_list"]]
        return {"plan": without_finish(plan), "API_list": apis}
    if category.startswith("instruct"):
        names = ["thought", "action", "args"]           # of keys, or of marks around a text
        if category == "instruct_string":
            names = ["thought_start", "thought_end", "action_start", "action_end",
                     "args_start", "args_end"]
        template = {name: str(record["template"][name]) for name in names}
        return {"template": template, "action": truth["action"], "args": dict(truth["args"])}
    if category == "rru_json":
        # arguments that are no object, such as FinishAction's, count as none
        args = truth["args"] if isinstance(truth["args"], dict) else {}
        return {"thought": str(truth["thought"]), "name": str(truth["name"]), "args": args}
    key = {"reason_str": "thought", "retrieve_str": "name", "understand_str": "args",
           "review_str": "answer"}[category]
    return {key: str(truth[key])}


def without_finish(plan: list[tuple]) -> list[tuple]:
    """A plan of (id, name, arguments) in the order of its ids, without FinishAction at its end."""
    plan = sorted(plan, key=lambda step: step[0])
    return plan[:-1] if plan and plan[-1][1] == "FinishAction" else plan


def lexical_trigrams(texts: list[str]) -> np.ndarray:
    """(n, 1024) float32: how often each character trigram occurs, by its hash.

    A simple substitute for a sentence model.
    """
    rows = []
    for text in texts:
        padded = f"  {text.lower()}  "
        trigrams = [padded[i:i + 3] for i in range(len(padded) - 2)]
        hashes = [zlib.crc32(t.encode("utf-8", "surrogatepass")) % 1024 for t in trigrams]
        rows.append(np.bincount(hashes, minlength=1024))
    return np.stack(rows).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, m) float64 cosines of the rows of a (n, d) and b (m, d), clipped at 0."""
    a = np.asarray(a) / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)
    b = np.asarray(b) / np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1e-12)
    return np.maximum(a @ b.T, 0).astype(np.float64)


def judge(item: Item, output: str, embed=lexical_trigrams) -> dict:
    """The score in [0, 1] of one output by T-Eval's rules, and its parts; correct if it is 1.

    embed(texts) -> (n, d) array compares names, arguments and thoughts in Plan and Reason;
    upstream's is the sentence model all-mpnet-base-v2, in Chinese gte-large-zh. Plan's score is
    "f1"; "f1_upstream" is what upstream reports.
    """
    fault = item.reference.get("fault")
    output = clean(output)
    if fault or len(output) > MAX_CHARACTERS:
        too_long = f"longer than {MAX_CHARACTERS:,} characters"
        reason = f"{DATA_FAULT} {fault}" if fault else too_long
        return {"correct": False, "reason": reason, "score": 0.0, "parts": {}}
    task, _, form = item.category.rpartition("_")       # form: json, string or str
    if task == "instruct":
        parts = judge_instruct(item.reference, output, form)
    elif task == "plan":
        parts = judge_plan(item.reference, output, form, embed)
    elif task == "review":
        parts = judge_review(item.reference, output)
    elif form == "json":
        parts = judge_step(item.reference, output, embed)
    else:
        parts = judge_text(item.reference, output, embed)
    counted = []
    for categories in ABILITIES.values():
        counted += [parts[name] for name in categories.get(item.category, ())]
    score = float(np.mean(counted))
    reason = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    return {"correct": score == 1, "reason": "correct" if score == 1 else reason, "score": score,
            "parts": parts, "embedding": embed.__name__}


def judge_instruct(reference: dict, output: str, form: str) -> dict:
    """format: whether the reply has the form that was asked for.

    args: (action is right + number of equal arguments) / (number of arguments + 1).
    """
    read = read_json_action if form == "json" else read_marked_action
    try:
        action, args = read(reference["template"], output)
    except ValueError:
        return {"format": 0.0, "args": 0.0}
    if not isinstance(args, dict):
        args = {}
    expected = reference["args"]
    equal = int(action == reference["action"])
    for name, value in expected.items():
        equal += args.get(name, "") == value
    return {"format": 1.0, "args": equal / (len(expected) + 1)}


def judge_plan(reference: dict, output: str, form: str, embed) -> dict:
    """F1 of the steps that are matched to the reference plan's and stand in the same order."""
    steps = read_plan(output) if form == "json" else plan_in_text(output, reference["API_list"])
    plan = without_finish(steps)
    truth = reference["plan"]
    correct = upstream = 0
    if plan and truth:
        names = cosine(embed([step[1] for step in plan]), embed([step[1] for step in truth]))
        args = cosine(embed([step[2] for step in plan]), embed([step[2] for step in truth]))
        # upstream's subsequences are at least 1 long, matched or not: no plan of steps scores 0
        upstream = max(steps_in_order(0.75 * names + 0.25 * args), 1)

        # A plan may repeat a step, so that matchings weigh the same but for noise in the last
        # digits, and upstream takes any. Here it is the one that is nearest to the order.
        distance = np.subtract.outer(np.arange(len(plan)), np.arange(len(truth)))
        distance = distance / (len(plan) + len(truth))
        weight = 0.75 * names.round(5) + 0.25 * args.round(5)
        correct = steps_in_order(weight - 1e-7 * distance ** 2)
    total = max(len(plan) + len(truth), 1)
    return {"f1": 2 * correct / total, "f1_upstream": 2 * upstream / total,
            "precision": correct / max(len(plan), 1), "recall": correct / max(len(truth), 1),
            "parsed": float(bool(steps))}


def steps_in_order(similarity: np.ndarray) -> int:
    """The longest increasing subsequence of a maximum-weight matching of similar steps.

    similarity: (steps of a plan, steps of the reference) floats. The graph's edges are entered in
    upstream's order, so that of matchings of equal weight networkx chooses the same.
    """
    graph = networkx.Graph()
    for i, j in np.argwhere(similarity > 0.8).tolist():
        graph.add_edge(i, len(similarity) + j, weight=float(similarity[i, j]))
    pairs = sorted(sorted(pair) for pair in networkx.max_weight_matching(graph))
    ends = []                   # ends[k]: the least end of a subsequence of length k + 1
    for _, j in pairs:
        k = bisect.bisect_left(ends, j)
        ends[k:k + 1] = [j]
    return len(ends)


def judge_review(reference: dict, output: str) -> dict:
    """Review: "Answer: B", or anything after the first ":", by its first letter."""
    letter = output[output.find(":") + 1:].strip()[:1]
    return {"answer": float(letter == reference["answer"]),
            "parsed": float(letter in ("A", "B", "C", "D", "E"))}


def judge_step(reference: dict, output: str, embed) -> dict:
    """Reason, Retrieve and Understand in one JSON object: the next step's thought, name, args."""
    try:
        reply = parse(output, "{}")
    except ValueError:
        reply = None
    if not isinstance(reply, dict):
        return {"thought": 0.0, "name": 0.0, "args": 0.0, "parsed": 0.0}
    thought = safe_str(reply.get("thought", ""))
    name = safe_str(reply.get("name", ""))
    args = reply.get("args")
    if not isinstance(args, dict):
        args = {}
    expected = reference["args"]
    if expected:
        equal = sum(k in args and safe_str(args[k]) == str(v) for k, v in expected.items())
        args_score = equal / len(expected)
    else:
        args_score = float(not args)
    return {"thought": similarity(thought, reference["thought"], embed),
            "name": float(name == reference["name"]), "args": args_score, "parsed": 1.0}


def judge_text(reference: dict, output: str, embed) -> dict:
    """Reason, Retrieve or Understand as plain text: the next step's thought, name or argument."""
    if "thought" in reference:
        return {"thought": similarity(output, reference["thought"], embed)}
    if "name" in reference:         # it occurs, and no other name that looks like an API's
        names = re.findall(r"(?<!\w)\w+\.\w+|FinishAction", output)
        alone = all(name == reference["name"] for name in names)
        return {"name": float(reference["name"] in output and alone)}
    return {"args": float(output.strip("'").strip('"') == reference["args"])}


def similarity(text: str, other: str, embed) -> float:
    """The cosine of two texts' embeddings, clipped at 0; rounded, so that a text is like itself."""
    return float(cosine(embed([text]), embed([other]))[0, 0].round(5))


def safe_str(value) -> str:
    """str(value), or "" where Python refuses: integers of thousands of digits, deep nesting."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return ""


def summary(verdicts: list[dict]) -> dict:
    """Upstream's figures over the categories present, and which categories are missing.

    "formats" has the mean of each part per category, "abilities" the score of each ability, and
    "overall" their mean. Plan is scored by its corrected F1; names that end in "_upstream" keep
    upstream's.
    """
    formats = {}
    missing = []
    for category in dict.fromkeys(itertools.chain(*ABILITIES.values())):
        group = [v.get("parts", {}) for v in verdicts if v["category"] == category]
        if not group:
            missing.append(category)
            continue
        # the parts that count come first; an item without output has none, and counts as 0
        names = []
        for table in ABILITIES.values():
            names += table.get(category, ())
        for parts in group:
            names += parts
        formats[category] = {"asked": len(group)}
        for name in dict.fromkeys(names):
            formats[category][name] = float(np.mean([parts.get(name, 0) for parts in group]))

    def score(table):
        """The mean over the parts that count, of the categories present."""
        values = []
        for category, names in table.items():
            if category in formats:
                values += [formats[category].get(name, 0) for name in names]
        return float(np.mean(values))

    abilities = {}
    for ability, table in ABILITIES.items():
        if table.keys() & formats.keys():
            abilities[ability] = score(table)
    upstream = dict(abilities)
    if "plan" in abilities:
        upstream["plan"] = score(dict.fromkeys(ABILITIES["plan"], ("f1_upstream",)))
    embeddings = sorted({v["embedding"] for v in verdicts if "embedding" in v})
    return {"asked": len(verdicts), "embedding": ", ".join(embeddings),
            "overall": float(np.mean(list(abilities.values()))),
            "overall_upstream": float(np.mean(list(upstream.values()))),
            "abilities": abilities, "plan_upstream": upstream.get("plan"), "formats": formats,
            "missing": missing, "data_faults": data_faults(verdicts)}
