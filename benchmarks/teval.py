"""T-Eval: six abilities, scored against reference steps. Names and thoughts are compared by an embedding."""
import ast
import json
import os
import re
import zlib

import numpy as np

from benchmarks import DATA_FAULT, RECORD_FAULTS, Item, data_faults
from support.cli import DataError
from support.readers import ROLES, Message, read_object


MAX_NEW_TOKENS = 512


# What upstream averages: an ability's score is the mean over its formats, the overall score the mean over the six abilities.
# A format's score is the mean of the parts named here. "rru_json" is upstream's name of reason_retrieve_understand_json.
TEVAL = {"instruct": {"instruct_json": ("format", "args"), "instruct_string": ("format", "args")},
         "plan": {"plan_json": ("f1",), "plan_str": ("f1",)},
         "reason": {"reason_str": ("thought",), "rru_json": ("thought",)},
         "retrieve": {"retrieve_str": ("name",), "rru_json": ("name",)},
         "understand": {"understand_str": ("args",), "rru_json": ("args",)},
         "review": {"review_str": ("answer",)}}
FILES = ("instruct", "plan_json", "plan_str", "reason_retrieve_understand_json", "reason_str", "retrieve_str",
               "understand_str", "review_str")


def items(folder: str) -> list[Item]:
    """The items of T-Eval's files in a folder, such as plan_json_v2.json or review_str_v1_zh.json; one version of each."""
    files = {}
    for file in sorted(os.listdir(folder) if os.path.isdir(folder) else []):
        match = re.fullmatch(rf"({'|'.join(FILES)})(_v\d+)?(_zh)?\.json", file)
        if match and match[1] in files:
            raise DataError(f"{folder} holds both {files[match[1]]} and {file}; keep one version of each file in a folder.")
        if match:
            files[match[1]] = file
    if not files:
        raise DataError(f"{folder} holds none of {', '.join(f'{name}_v1.json' for name in FILES)}; "
                        "give the folder of T-Eval's data with --data.")
    items = []
    for name in sorted(files, key=FILES.index):
        for key, record in read_object(os.path.join(folder, files[name])).items():
            category = "instruct_json" if name == "instruct" else name.replace("reason_retrieve_understand", "rru")
            try:
                if name == "instruct":
                    category = {"json": "instruct_json", "string": "instruct_string"}[record["meta_data"]["response_format"]]
                messages = [Message(ROLES[turn["role"]], "" + turn["content"]) for turn in record["origin_prompt"]]
                reference = reference(category, record)
            except RECORD_FAULTS as e:
                messages, reference = [Message("user", "")], {"fault": f"{type(e).__name__}: {e}"}
            items.append(Item(f"{category}_{key}", category, messages, reference))
    if not items:
        raise DataError(f"the files of {folder} hold no records; fetch T-Eval's data again.")
    return items


def reference(category: str, record: dict) -> dict:
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


def judge(item: Item, output: str, embed=lexical_trigrams) -> dict:
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


def parse(text: str, brackets: str = ""):
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
            reply = parse(output)
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
        except Exception:                               # see parse; the form is right all the same
            pass
    args = args if isinstance(args, dict) else {}
    equal = sum(args.get(key, "") == value for key, value in reference["args"].items())
    return {"format": 1.0, "args": ((action == reference["action"]) + equal) / (len(reference["args"]) + 1)}


def judge_plan(reference: dict, output: str, form: str, embed) -> dict:
    """F1 of the steps that a maximum-weight matching finds in the reference plan, in the same order."""
    steps = []
    if form == "json":
        try:
            reply = parse(output, "[]")
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
            reply = parse(output, "{}")
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


def summary(verdicts: list[dict]) -> dict:
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
