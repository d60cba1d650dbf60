"""T-Eval: each ability's rule, parsing and matching against independent code, hostile outputs."""
import itertools
import json
import os
import random
import re
import time

import numpy as np
import pytest

from benchmarks import teval
from benchmarks.teval_replies import parse
from support.cli import DataError
from tiny import write

DATA = os.environ.get("SHAD_RFT_DATA")
PROMPT = [{"role": "system", "content": "You have tools."}, {"role": "user", "content": "Do it."},
          {"role": "function", "content": "42"}, {"role": "user", "content": "And now?"}]
MARKS = {"thought_start": "Goal:", "thought_end": "\n", "action_start": "Name:", "action_end": "\n",
         "args_start": "Args:", "args_end": ""}
KEYS = {"thought": "goal", "action": "name", "args": "args"}
STEP = {"thought": "look for the film", "name": "Film.search",
        "args": {"title": "Up", "year": 2009}}
PLAN = [{"id": 0, "prev": [], "name": "Film.search", "args": {"title": "Up"}},
        {"id": 1, "prev": [0], "name": "Mail.send_text", "args": {"to": "Ann"}},
        {"id": 2, "prev": [1], "name": "FinishAction", "args": {}}]


def record(truth, form="str", **more):
    return {"template": None, "meta_data": {"response_format": form}, "ground_truth": truth,
            "origin_prompt": PROMPT} | more


@pytest.fixture
def items(tmp_path):
    """{category: item}, one of each, read from files of upstream's names."""
    action = {"action": "Film.search", "args": {"title": "Up", "year": 2009}}
    write(tmp_path / "instruct_v2.json", {"a": record(action, "json", template=KEYS),
                                          "b": record(action, "string", template=MARKS)})
    for form in ("json", "str"):
        meta = {"prompt_type": form,
                "API_list": ["Film.search", "Film.search_all", "Mail.send_text"]}
        plan = {"meta": meta, "ground_truth": PLAN, "origin_prompt": PROMPT}
        write(tmp_path / f"plan_{form}_v2.json", {"a": plan})
    write(tmp_path / "reason_retrieve_understand_json_v2.json", {"a": record(STEP, "json")})
    for name, truth in [("reason_str", STEP), ("retrieve_str", STEP),
                        ("understand_str", {"args": "Up"}),
                        ("review_str", {"answer": "B", "thought": ""})]:
        write(tmp_path / f"{name}_v2.json", json.dumps({"a": record(truth)}, indent=1))
    return {i.category: i for i in teval.items(str(tmp_path))}


def parts(items, category, output):
    verdict = teval.judge(items[category], output)
    assert verdict["correct"] == (verdict["score"] == 1)
    assert 0 <= verdict["score"] <= 1
    assert isinstance(verdict["reason"], str)
    return verdict["parts"]


def test_items(items):
    assert list(items) == ["instruct_json", "instruct_string", "plan_json", "plan_str", "rru_json",
                           "reason_str", "retrieve_str", "understand_str", "review_str"]
    assert [m.role for m in items["plan_str"].messages] == ["system", "user", "tool", "user"]
    assert items["plan_str"].id == "plan_str_a"


def test_folder(tmp_path):
    with pytest.raises(DataError, match="plan_json_v1.json"):
        teval.items(str(tmp_path))
    for name in ("review_str_v1.json", "review_str_v2.json"):
        write(tmp_path / name, [])
        with pytest.raises(DataError):
            teval.items(str(tmp_path))
    with pytest.raises(DataError, match="both review_str_v1.json and review_str_v2.json"):
        teval.items(str(tmp_path))


def test_languages_and_subsets(tmp_path):
    english = {"plan_json_v2_subset.json": "a", "review_str_v2_subset.json": "b"}
    chinese = {"plan_json_v2_zh.json": "c", "review_str_v2_subset_zh.json": "d"}
    for name, key in (english | chinese).items():
        truth = PLAN if "plan" in name else {"answer": "B"}
        write(tmp_path / name, {key: record(truth, meta={"API_list": []})})
    assert [i.id for i in teval.items(str(tmp_path))] == ["plan_json_a", "review_str_b"]
    assert [i.id for i in teval.items(str(tmp_path), "zh")] == ["plan_json_c", "review_str_d"]

    write(tmp_path / "review_str_v2.json", {})
    with pytest.raises(DataError, match="both review_str_v2.json and review_str_v2_subset.json"):
        teval.items(str(tmp_path))
    for name in ("review_str_v2.json", *english):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no files in English, but 2 in Chinese.*--language zh"):
        teval.items(str(tmp_path))


def test_parse():
    assert parse("Sure: [1, 'a', None] and so on", "[]") == [1, "a", None]
    assert parse("[1, null]", "[]") == [1, None]
    assert parse("{'a': true}", "{}") == {"a": True}
    assert parse('```json\n{"a": 1}\n```') == {"a": 1}
    for text in ("no bracket", "]", "[", "] [", "{'a': }", "it's {'a': b}"):
        with pytest.raises(ValueError):
            parse(text, "[]")


@pytest.mark.parametrize("output, form, args", [
    ('{"goal": "x", "name": "Film.search", "args": {"title": "Up", "year": 2009}}', 1, 1),
    ('```json\n{"goal": "", "name": "F", "args": {"title": "Up"}}\n```', 1, 1 / 3),
    ('{"goal": "x", "name": "Film.search", "args": "none"}', 1, 1 / 3),
    ('{"name": "Film.search", "args": {}}', 0, 0),
    ("Here: {}", 0, 0), ("[1]", 0, 0), ("7", 0, 0)])
def test_instruct_json(items, output, form, args):
    assert parts(items, "instruct_json", output) == pytest.approx({"format": form, "args": args})


@pytest.mark.parametrize("output, form, args", [
    ("Goal: x\nName: Film.search \nArgs: {'title': 'Up', 'year': 2009}", 1, 1),
    ("Goal:\nName:F\nArgs:{'year': 2009.0}", 1, 1 / 3),
    ("Goal: x\nName: Film.search\nArgs: {'title': broken", 1, 1 / 3),
    ("Goal: x\nName: Film.search", 0, 0), ("Name: F\nArgs: {}", 0, 0), ("", 0, 0)])
def test_instruct_string(items, output, form, args):
    assert parts(items, "instruct_string", output) == pytest.approx({"format": form, "args": args})


def test_instruct_string_is_the_greedy_pattern():
    """Upstream reads the marks with one regular expression of greedy groups.

    Ours finds the same without its backtracking.
    """
    rng = random.Random(0)
    pieces = ["Goal:", "\nName:", "\nArgs:", "x", "y", "{'k': 1}", "!", "\n"]
    found = 0
    for end in ("", "!"):
        template = MARKS | {"args_end": end}
        pattern = "Goal:(.*)\nName:(.*)\nArgs:(.*)" + end
        for _ in range(3000):
            text = "".join(rng.choices(pieces, k=rng.randint(3, 12)))
            match = re.search(pattern, text, re.DOTALL)
            action = match[2].strip() if match else ""
            reference = {"template": template, "action": action, "args": {"k": 1}}
            expected = {"format": 0.0, "args": 0.0}
            if match:
                equal = match[3].strip() == "{'k': 1}"
                expected = {"format": 1.0, "args": (1 + equal) / 2}
            assert teval.judge_instruct(reference, text, "string") == expected, text
            found += bool(match)
    assert found > 100


def plan_text(*steps):
    records = [{"id": i, "name": name, "args": str(args)} for i, (name, args) in enumerate(steps)]
    return json.dumps(records)


FILM = ("Film.search", {"title": "Up"})
MAIL = ("Mail.send_text", {"to": "Ann"})
FINISH = ("FinishAction", {})


@pytest.mark.parametrize("output, f1, f1_upstream, parsed", [
    (plan_text(FILM, MAIL, FINISH), 1, 1, 1), ("The plan: " + plan_text(FILM, MAIL), 1, 1, 1),
    (plan_text(MAIL, FILM), 0.5, 0.5, 1), (plan_text(FILM), 2 / 3, 2 / 3, 1),
    (plan_text(FINISH), 0, 0, 1), (plan_text(("Map.zoom", {}), ("Map.pan", {})), 0, 0.5, 1),
    ("no plan", 0, 0, 0), ("[1]", 0, 0, 0), ("[]", 0, 0, 0),
    ('[{"id": NaN, "name": "a", "args": ""}]', 0, 0, 0), ('[{"id": 0, "name": "a"}]', 0, 0, 0)])
def test_plan_json(items, output, f1, f1_upstream, parsed):
    got = parts(items, "plan_json", output)
    expected = pytest.approx((f1, f1_upstream, parsed))
    assert (got["f1"], got["f1_upstream"], got["parsed"]) == expected


NAMES = ["Film.search", "Mail.send_text"]


def same(texts):
    """An embedding to which names differ and all other texts are alike."""
    return np.stack([np.arange(2) == NAMES.index(t) if t in NAMES else np.ones(2) for t in texts])


def test_plan_str(items):
    item = items["plan_str"]
    right = "Use Film.search to {'title': 'Up'}. Use Mail.send_text to {'to': 'Ann'}"
    verdict = teval.judge(item, right, same)
    assert verdict["correct"]
    assert verdict["embedding"] == "same"

    # the earliest name of a line is its action; of two that begin at the same place, the first in
    # the list
    longer = "Use Film.search_all to find {'title': 'Up'}"
    assert parts(items, "plan_str", longer)["precision"] == 1
    two = "Before Mail.send_text, Film.search\nMail.send_text"
    assert teval.judge(item, two, same)["parts"]["precision"] == 0.5
    assert set(parts(items, "plan_str", "I do not know. Sorry").values()) == {0}


def test_step_json(items):
    expected = {"thought": 1, "name": 1, "args": 1, "parsed": 1}
    assert parts(items, "rru_json", f"Next: {STEP}") == expected
    close = {"thought": "look for a film", "name": "Film.searches",
             "args": {"title": "Up", "year": "2009", "x": 1}}
    got = parts(items, "rru_json", json.dumps(close))
    assert 0.5 < got["thought"] < 1
    assert (got["name"], got["args"]) == (0, 1)
    assert parts(items, "rru_json", '{"name": "Film.search", "args": ["Up"]}')["args"] == 0
    assert set(parts(items, "rru_json", "none").values()) == {0}
    assert parts(items, "rru_json", "none").keys() == expected.keys()


def test_reason_str(items):
    assert parts(items, "reason_str", "look for the film") == {"thought": 1}


@pytest.mark.parametrize("output, name", [
    ("Film.search", 1), ("call Film.search now", 1), ("Film.search or Mail.send_text", 0),
    ("Film.search, FinishAction", 0), ("search", 0)])
def test_retrieve_str(items, output, name):
    assert parts(items, "retrieve_str", output) == {"name": name}


@pytest.mark.parametrize("output, args", [
    ("Up", 1), ("'Up'", 1), ('"Up"', 1), ("Up.", 0), (" Up", 1)])
def test_understand_str(items, output, args):
    assert parts(items, "understand_str", output) == {"args": args}


@pytest.mark.parametrize("output, answer, parsed", [
    ("Answer: B", 1, 1), ("B", 1, 1), ("Answer: b", 0, 0), ("Answer: F", 0, 0), ("Answer:", 0, 0),
    ("Answer: A", 0, 1)])
def test_review_str(items, output, answer, parsed):
    assert parts(items, "review_str", output) == {"answer": answer, "parsed": parsed}


@pytest.mark.parametrize("args, output, score", [
    ({}, {}, 1), ({}, {"a": 1}, 0), ("Tasks completed.", "Tasks completed.", 1),
    ({"a": 1, "b": 2}, {"a": 1}, 0.5)])
def test_understand_json(tmp_path, args, output, score):
    truth = STEP | {"args": args}
    write(tmp_path / "reason_retrieve_understand_json_v1.json", {"a": record(truth, "json")})
    [item] = teval.items(str(tmp_path))
    assert teval.judge(item, json.dumps({"args": output}))["parts"]["args"] == score


def test_steps_in_order_against_all_matchings():
    rng = np.random.default_rng(0)
    for n, m in [*itertools.product(range(1, 5), range(1, 6))] * 10:
        similarity = 0.7 + 0.3 * rng.random((n, m))
        weight = np.where(similarity > 0.8, similarity, 0)
        best = (0.0, 0)
        for columns in itertools.permutations(range(max(n, m)), n):
            pairs = [(i, j) for i, j in enumerate(columns) if j < m and weight[i, j]]
            total = sum(weight[i, j] for i, j in pairs)
            best = max(best, (total, longest_increasing([j for _, j in pairs])))
        assert teval.steps_in_order(similarity) == best[1]


def longest_increasing(values):
    """By trying all subsequences."""
    for length in range(len(values), 0, -1):
        if any(list(c) == sorted(c) for c in itertools.combinations(values, length)):
            return length
    return 0


def test_a_plan_that_repeats_a_step():
    """Whichever of its equal steps are matched, it is right; upstream's matching crosses them."""
    plan = [(0, NAMES[0], "{}"), (1, NAMES[0], "{}"), (2, NAMES[1], "{}")]
    output = plan_text(*((name, args) for _, name, args in plan))
    got = teval.judge_plan({"plan": plan}, output, "json", same)
    assert got["f1"] == 1
    assert got["f1_upstream"] == pytest.approx(2 / 3)


def test_embedding():
    texts = ["", "Film.search", "film.search", "Film.search_all", "查询", "\ud800", "x" * 5000]
    similar = teval.cosine(teval.lexical_trigrams(texts), teval.lexical_trigrams(texts))
    assert np.diag(similar) == pytest.approx(np.ones(7))
    assert similar[1, 2] == pytest.approx(1)
    assert 0.6 < similar[1, 3] < 1
    assert similar[1, 4] < 0.5
    assert teval.cosine(-teval.lexical_trigrams(["a"]), teval.lexical_trigrams(["a"])) == 0


RIGHT = {
    "instruct_json": '{"goal": "x", "name": "Film.search", "args": {"title": "Up", "year": 2009}}',
    "instruct_string": "Goal: x\nName: Film.search\nArgs: {'title': 'Up', 'year': 2009}",
    "plan_json": plan_text(FILM, MAIL), "rru_json": json.dumps(STEP),
    "reason_str": STEP["thought"], "retrieve_str": "Film.search", "understand_str": "Up",
    "review_str": "Answer: B"}


@pytest.mark.parametrize("damage", [
    "```json\n{}\n```", "```json{}```", "`{}`", "  \n{}\n ", "{}<|im_end|>\n", "{}<eoa>{}",
    "{}\nuser: more", "{}\nassistant\n{}", "{}\nUSER: B", "{}[INST] more", "{}<|user|>more",
    "{}<TOKENS_UNUSED_1>", "```json\n{}\n```\n<|im_end|>" + "x" * 1_000_000])
def test_a_reply_is_cleaned_as_upstream_cleans_it(items, damage):
    for category, reply in RIGHT.items():
        output = damage.replace("{}", reply)
        assert teval.judge(items[category], output)["correct"], category


def test_a_reply_that_is_too_long_is_wrong(items):
    for category, item in items.items():
        for output in ("B" * 10_001, "[1]" * 500_000, "Film.search\n" * 100_000):
            start = time.perf_counter()
            verdict = teval.judge(item, output)
            assert time.perf_counter() - start < 1
            assert not verdict["correct"], category
            assert verdict["parts"] == {}
            assert verdict["reason"] == "longer than 10,000 characters"


HUGE = "0x" + "f" * 10_000             # an integer that Python refuses to print
ZOOM = '{"id": 0, "name": "Map.zoom", "args": ""}'
HOSTILE = [
    "[" * 100_000, "{" * 100_000, "[" * 5000 + "]" * 5000, "{" * 5000 + "}" * 5000,
    '{"args":' * 5000 + "1" + "}" * 5000, "[-" + "-" * 100_000 + "1]", "[" + "9" * 10_000 + "]",
    '[{"id": 1e999, "name": 1, "args": 1}]', f'[{{"id": {HUGE}, "name": {HUGE}, "args": 0}}]',
    f'{{"thought": {HUGE}, "name": {HUGE}, "args": {{"title": {HUGE}}}}}',
    '{"args": {"title": ' + "[" * 900 + "]" * 900 + "}}",
    '{"goal": 1, "name": [], "args": {"title": NaN}}', "{[]: 1}", "\0", "\ud800",
    '{"thought": "\\ud800"}', "a" * 1_000_000, "Goal:\nName:\nArgs:" * 20_000,
    "Goal:" * 20_000 + "\nName:" * 20_000, "Goal: \nName: \nArgs: " + "[" * 100_000,
    "é" * 1000 + "." * 1000, "Film.search" * 1000 + ".", ": ", ":", "b'x'", "{1, 2}",
    "[{1, 2}]", "[(1, 2)], [3]", "[" + ", ".join([ZOOM] * 2000) + "]"]


@pytest.mark.parametrize("output", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_outputs_are_wrong(items, output):
    for item in items.values():
        verdict = teval.judge(item, output)
        assert not verdict["correct"]
        assert np.isfinite(verdict["score"])
        json.dumps(verdict, ensure_ascii=False, allow_nan=False).encode()


def judge_all(items, outputs):
    """The verdicts on {category: output}, where a category may have none."""
    verdicts = []
    for item in items.values():
        verdict = {"correct": False, "reason": "no output"}
        if item.category in outputs:
            verdict = teval.judge(item, outputs[item.category])
        verdicts.append({"id": item.id, "category": item.category, **verdict})
    return verdicts


def test_summary(items):
    outputs = {"instruct_json": '{"goal": "", "name": "Film.search", "args": {}}',
               "plan_json": plan_text(("Map.zoom", {})), "plan_str": "Mail.send_text",
               "rru_json": str(STEP), "reason_str": STEP["thought"], "retrieve_str": "no",
               "review_str": "B"}
    summary = teval.summary(judge_all(items, outputs))
    # instruct: json (1 + 1/3) / 2, string 0 (no output)
    expected = {"instruct": 1 / 3, "plan": 0, "reason": 1, "retrieve": 0.5, "understand": 0.5,
                "review": 1}
    assert summary["abilities"] == pytest.approx(expected)
    assert summary["overall"] == pytest.approx(sum(expected.values()) / 6)
    # with upstream's count of 1 each plan scores 2/3
    assert summary["plan_upstream"] == pytest.approx(2 / 3)
    assert summary["overall_upstream"] == pytest.approx((sum(expected.values()) + 2 / 3) / 6)
    assert summary["embedding"] == "lexical_trigrams"
    assert summary["asked"] == 9
    assert summary["missing"] == summary["data_faults"] == []


def test_summary_of_one_category(items):
    summary = teval.summary(judge_all({"review_str": items["review_str"]}, {}))
    assert summary["abilities"] == {"review": 0}
    assert summary["overall"] == 0
    assert len(summary["missing"]) == 8
    assert summary["plan_upstream"] is None


def test_broken_records_are_named(tmp_path):
    truth = {"answer": "B"}
    write(tmp_path / "review_str_v1.json", {
        "a": record(truth), "b": {"ground_truth": {}},
        "c": record(truth, origin_prompt=[{"role": "king"}]),
        "d": record(truth, origin_prompt=[{"role": "user", "content": None}])})
    action = {"action": "", "args": {}}
    write(tmp_path / "instruct_v1.json", {"a": {}, "b": record(action, "xml"),
                                          "c": record(action, "string", template={})})
    verdicts = []
    for item in teval.items(str(tmp_path)):
        verdicts.append({"id": item.id, "category": item.category, **teval.judge(item, "B")})
    summary = teval.summary(verdicts)
    assert summary["data_faults"] == ["instruct_json_a", "instruct_json_b", "instruct_string_c",
                                      "review_str_b", "review_str_c", "review_str_d"]
    assert summary["abilities"] == {"instruct": 0, "review": 0.25}


def right_output(item):
    """An output that deserves the score 1."""
    reference = item.reference
    if item.category == "plan_json":
        return plan_text(*((name, args) for _, name, args in reference["plan"]))
    if item.category == "plan_str":
        return "\n".join(f"Use {name} to {args}" for _, name, args in reference["plan"])
    if item.category == "instruct_json":
        keys = ("thought", "action", "args")
        return json.dumps({reference["template"][key]: reference.get(key) for key in keys})
    if item.category == "instruct_string":
        text = ""
        for key in ("thought", "action", "args"):
            start = reference["template"][f"{key}_start"]
            text += start + str(reference.get(key)) + reference["template"][f"{key}_end"]
        return text
    [text] = reference.values()
    return text


@pytest.mark.skipif(not DATA, reason="set SHAD_RFT_DATA to a folder with teval/")
def test_every_reference_is_right(tmp_path):
    folder = os.path.join(DATA, "teval")
    found = teval.items(folder)
    # of the other categories there are a few records in the same schema
    for schema, name in [("instruct", "instruct"), ("reason", "reason_str"),
                         ("retrieve", "retrieve_str"), ("understand", "understand_str")]:
        source = os.path.join(folder, f"schema_zh_{schema}.json")
        os.symlink(source, tmp_path / f"{name}_v1_zh.json")
    found += teval.items(str(tmp_path), "zh")
    assert len(found) == 850

    verdicts = []
    for item in found:
        verdict = teval.judge(item, right_output(item))
        verdicts.append({"id": item.id, "category": item.category, **verdict})
    assert [v["id"] for v in verdicts if not v["correct"]] == []
    assert teval.summary(verdicts)["overall"] == 1
    assert teval.summary(verdicts)["missing"] == ["rru_json"]
