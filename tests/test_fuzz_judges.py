"""Seeded mutations of replies through every judge, and of the benchmarks' own files: a verdict or
one sentence, and soon."""
import json
import random
import subprocess
import sys

import pytest

import test_bfcl
import test_nexus
from benchmarks import bfcl, nexus, servers, stabletoolbench, teval, toy
from benchmarks import read_predictions as read_outputs
from benchmarks.judging import SOLVED
from benchmarks.traces import read_predictions as read_traces
from processes import ROOT
from stable import GIVE_UP, LIST, always_ok, chat, chat_call, finish, query, turn
from test_eval import FOLDERS
from test_eval import folder as folder  # a fixture
from test_fuzz import as_lines, check, mutated_bytes, mutations
from test_native_calls import FORMS
from test_teval import PLAN, STEP
from test_teval import items as items  # a fixture
from tiny import write

# Python's parser warns; in a run the warnings are filtered, which pytest undoes
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")

ODD = [b"", b"\0", b"\xff", b"\\ud83d", b"\\", b"'", b'"', b"(", b")", b"[" * 999, b"{" * 999,
       b"}", b"]", b",", b":", b"=", b";", b"\n", b"9" * 5000, b"-" * 999, b"1e999", b"NaN",
       b"</s>", b"```", b"<tool_call>", b"new HashMap<>(", b"Action:", b" " * 999]


def mutated_replies(replies, rng, count):
    """Replies that are odd somewhere, half surrogate pairs included."""
    for _ in range(count):
        case = mutated_bytes(rng.choice(replies).encode(), rng, ODD)
        yield case.decode(errors="surrogateescape")


def check_verdicts(judge, items, replies, rng, count=600):
    for case in mutated_replies(replies, rng, count):
        for item in items:
            verdict = check(judge, item, case, case=case)
            assert isinstance(verdict["correct"], bool), case
            assert json.dumps(verdict, allow_nan=False), case


def test_replies_to_bfcl(tmp_path):
    calls = json.dumps([{"name": "hotel.book", "arguments": {"city": "NYC", "nights": 2}}])
    replies = {
        "python": ["[hotel.book(city='NYC', nights=2, rooms=[1, 2], guest={'name': 'Ann'})]", calls,
                   *(text for text, _ in FORMS)],
        "java": ['A.f(m=new HashMap<String, Object>() {{ put("a", 1L); }}, '
                 'l=new ArrayList<>(Arrays.asList(1, 2)));'],
        "javascript": ["f({a: [1, 'b'], c: {d: null}}, x => x)", "f(a={b: 1}, c=[2.5, true])"]}
    kinds = {"java": "HashMap", "javascript": "dict"}
    for language, texts in replies.items():
        item = test_bfcl.write(
            tmp_path, f"simple_{language}", [test_bfcl.BOOK], [{"hotel.book": test_bfcl.ACCEPTED}])
        if language in kinds:
            parameters = {"type": "dict", "required": [], "properties": {
                "m": {"type": kinds[language]}, "l": {"type": "ArrayList"}, "a": {"type": "array"}}}
            function = {"name": "f", "description": "", "parameters": parameters}
            item = test_bfcl.write(tmp_path, f"simple_{language}", [function], [{"f": {"a": [1]}}])
        check_verdicts(bfcl.judge, [item], texts, random.Random(language))


def test_replies_to_nexus(tmp_path):
    write(tmp_path / "function_specs.json", {"cve_cpe": [test_nexus.PRICE]})
    write(tmp_path / "cve_cpe_queries.json", test_nexus.PRICE_RECORDS[:1])
    write(tmp_path / "toolalpaca_queries.json", [test_nexus.LAMP_RECORD])
    write(tmp_path / "toolllm_queries.json", [test_nexus.WEATHER_RECORD])
    replies = ["find_price(item='tea', limit=5)", "switch(lamp='desk', on=True, tags=None)",
               "weather(lat=25.26, lon=-55.3)", "Initial Answer: find_price('tea', 5)\nReflection:",
               '[{"name": "find_price", "arguments": {"item": "tea", "limit": 5}}]']
    check_verdicts(nexus.judge, nexus.items(str(tmp_path)), replies, random.Random(0))


def test_replies_to_teval(items):
    replies = [json.dumps(PLAN), json.dumps(STEP), "Goal: x\nName: Film.search\nArgs: {'a': 1}",
               '{"goal": "x", "name": "Film.search", "args": {"title": "Up", "year": 2009}}', "B",
               '```json\n[{"id": 0, "name": "Map.zoom", "args": ""}]\n```', "Film.search"]
    check_verdicts(teval.judge, items.values(), replies, random.Random(0))


def test_replies_to_the_toy():
    items = toy.items(1, 1)
    check_verdicts(toy.judge, items, [item.reference for item in items], random.Random(0))


def test_replies_of_the_agent_and_of_its_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(servers.time, "sleep", lambda seconds: None)        # between attempts
    write(tmp_path / "G1_tool.json", [query(7)])
    item, = stabletoolbench.items(str(tmp_path))
    replies = [turn(LIST, '{"town": "Bern"}'), finish("leek"), GIVE_UP,
               json.dumps([{"name": LIST, "arguments": {"town": "Bern"}}])]
    rng = random.Random(0)

    def solved(question, **fields):
        return "Solved", ""

    for case in mutated_replies(replies, rng, 300):
        trace = check(stabletoolbench.run_turn, item, case, always_ok, case=case)
        verdict = check(stabletoolbench.judge, item, trace, solved, case=case)
        assert json.dumps(verdict, allow_nan=False)

    ask = servers.judge_endpoint("http://judge", "m")
    replies = [chat('{"answer_status": "Solved"}'), chat_call(answer_status="Unsure", reason="x")]
    for reply in replies:
        for case in mutations(reply, rng, 150):
            monkeypatch.setattr(servers, "fetch", lambda *_, case=case: case)
            status, reason = check(lambda: ask(SOLVED, query="q", answer="a"), case=case)
            assert status in (None, *SOLVED.choices), case
            assert reason.encode()


PARSE_ALL = r"""
import ast
from benchmarks import bfcl_calls, nexus, servers, teval_replies
text = r"f(a='\x1b\d', b=1if 1else 2)"
for parse, *arguments in [(bfcl_calls.decode, "[" + text + "]", "python"),
                          (nexus.parse_call, text), (teval_replies.parse, r"['\d']"),
                          (servers.parse_object, r"{'\d': 1}", ast.literal_eval)]:
    try:
        parse(*arguments)
    except ValueError:
        pass
"""


def test_the_parser_does_not_warn_of_what_a_model_wrote():
    result = subprocess.run([sys.executable, "-W", "default", "-c", PARSE_ALL], cwd=ROOT,
                            capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", FOLDERS)
def test_mutated_files_of_a_benchmark(name, folder):
    bench = {"bfcl": bfcl, "nexus": nexus, "teval": teval, "stabletoolbench": stabletoolbench}[name]
    files, _, right = FOLDERS[name]
    rng = random.Random(name)
    if name == "stabletoolbench":
        right = [{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": "x"}}]
    read = 0
    for file, content in files.items():
        for case in mutations(content, rng, 150):
            (folder / file).write_bytes(case)
            for item in check(bench.items, str(folder), case=case) or []:
                read += 1
                assert json.dumps(check(bench.judge, item, right, case=case)), case
        write(folder / file, json.dumps(content) + "\n")
    assert read > 20


def test_mutated_predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    steps = [{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": "x"}}]
    rng = random.Random(0)
    for read, record in ((read_outputs, {"id": 1, "output": "f(x)"}),
                         (read_traces, {"id": 1, "trace": steps})):
        for case in mutations([record, record | {"id": "b"}], rng, 150, as_lines):
            path.write_bytes(case)
            assert json.dumps(check(read, str(path), case=case)), case
