"""StableToolBench: reading, the agent's loop, the three environments, the judge and the figures, over real local servers."""
import ast
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval as bench
from data import DataError
from tiny import write

DATA = os.environ.get("SHAD_RFT_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="set SHAD_RFT_DATA to a folder with stabletoolbench/ and toolbench/")


def api(tool, name, required=(), optional=(), category="Food, Drink", about="Gives it."):
    parameter = lambda p: {"name": p, "type": "NUMBER" if p == "count" else "STRING", "description": f"the {p}", "default": ""}
    return {"category_name": category, "tool_name": tool, "api_name": name, "api_description": about, "method": "GET",
            "required_parameters": [parameter(p) for p in required], "optional_parameters": [parameter(p) for p in optional]}


def query(number=7, text="Which soup is cheap?", apis=None):
    apis = apis or [api("Soup Finder!", "List Soups", ["town", "count"], ["id"]), api("Soup Finder!", "Price", [], ["soup"])]
    return {"query_id": number, "query": text, "api_list": apis,
            "relevant APIs": [[a["tool_name"], a["api_name"]] for a in apis[:1]]}


@pytest.fixture
def items(tmp_path):
    write(tmp_path / "G1_tool.json", [query(7), query(8, "Second?")])
    write(tmp_path / "G2_category.json", [query(9, "Third?")])
    return bench.stb_items(str(tmp_path))


LIST = "list_soups_for_soup_finder"
turn = lambda action, given, thought="hm": f"Thought: {thought}\nAction: {action}\nAction Input: {given}"
finish = lambda answer: turn("Finish", json.dumps({"return_type": "give_answer", "final_answer": answer}))
GIVE_UP = turn("Finish", '{"return_type": "give_up_and_restart"}')
answered = lambda answer: [{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": answer}}]
say = lambda *outputs: lambda talks: [outputs[sum(m.role == "assistant" for m in talk)] for talk in talks]
nothing = lambda *call: {"error": "", "response": "ok", "source": "test"}


@pytest.fixture
def serve(monkeypatch):
    """serve(answer): a server in a thread; answer(path, body, headers) -> JSON to send, (status, text), the address to redirect to,
    or None to fall silent."""
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)          # between attempts
    servers = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
                reply = answer(self.path, body, self.headers)
                if isinstance(reply, str):
                    self.send_response(302)
                    self.send_header("Location", reply)
                    self.end_headers()
                    return
                if reply is None:
                    stop.wait(2)
                    return
                status, text = reply if isinstance(reply, tuple) else (200, json.dumps(reply))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode("utf-8", "surrogateescape"))

            do_GET = do_POST

            def log_message(self, *_):
                pass
        stop = threading.Event()
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append((server, stop))
        return f"http://127.0.0.1:{server.server_address[1]}"
    yield start
    for server, stop in servers:
        stop.set(), server.shutdown(), server.server_close()


# -----------------------------------------------------------------------------------------------------------------
# Reading and names

def test_items(items, tmp_path):
    assert [(i.id, i.category) for i in items] == [("7", "G1_tool"), ("8", "G1_tool"), ("9", "G2_category")]
    assert items[0].reference == {"query": "Which soup is cheap?", "relevant": [LIST], "functions": {
        LIST: ("Food, Drink", "soup_finder", "list_soups"), "price_for_soup_finder": ("Food, Drink", "soup_finder", "price")}}
    system, user = items[0].messages
    assert (system.role, user.role, user.text) == ("system", "user", "Which soup is cheap?\nBegin!")
    assert "\nThought:\nAction\nAction Input:\n" in system.text and "tools:\n1.soup_finder: None\n\nSpecifically" in system.text
    soups, price, end = ast.literal_eval(system.text.split("following APIs: ")[1])
    assert soups["name"] == LIST and end["name"] == "Finish"
    assert soups["parameters"] == {"type": "object", "required": ["town", "count"], "optional": ["is_id"], "properties": {
        "town": {"type": "string", "description": "the town"}, "count": {"type": "integer", "description": "the count"},
        "is_id": {"type": "string", "description": "the id"}}}
    assert price["parameters"]["properties"] == {}              # optional parameters stand only beside required ones
    (tmp_path / "up" / "solvable_queries" / "test_instruction").mkdir(parents=True)
    write(tmp_path / "up" / "solvable_queries" / "test_instruction" / "G3_instruction.json", [query()])
    assert [i.category for i in bench.stb_items(str(tmp_path / "up"))] == ["G3_instruction"]


@pytest.mark.parametrize("text, name", [
    ("Soup of today", "soup_of_today"), ("/soups/List/", "soups_list"), ("24 Soups", "get_24_soups"), ("👋 My  Soup", "my_soup"),
    ("A--B__c", "a_b_c"), ("查询", "查询"), ("", ""), ("ID", "id")])
def test_names(text, name):
    assert bench.stb_name(text) == name
    assert bench.stb_name(text, True) == ("is_id" if name == "id" else name)


def test_function_names_are_cut_at_the_front_and_the_first_of_two_equal_ones_is_called(tmp_path):
    tool = "t" * 60
    write(tmp_path / "G1_tool.json", [query(apis=[api(tool, "one same"), api(tool, "two same")])])
    item, = bench.stb_items(str(tmp_path))
    assert bench.stb_function_name("x", "y") == "y_for_x" and len(bench.stb_function_name(tool, "one")) == 64
    assert item.reference["functions"] == {f"for_{tool}"[-64:]: ("Food, Drink", tool, "one_same")}


def test_bad_folders_and_records(tmp_path):
    with pytest.raises(DataError, match="holds no solvable_queries"):
        bench.stb_items(str(tmp_path))
    broken = query(1)
    del broken["api_list"][0]["tool_name"]
    write(tmp_path / "G1_tool.json", [broken, "text", query(2)])
    items = bench.stb_items(str(tmp_path))
    traces = bench.stb_run(items, say(finish("soup")), nothing)
    summary = bench.stb_summary([bench.stb_judge(i, traces[i.id], lambda *_: ("Solved", "")) for i in items])
    assert summary["asked"] == 3 and summary["Solved"] == 1 and summary["pass_rate"] == pytest.approx(1 / 3)
    assert len(summary["broken_queries"]) == 2
    assert summary["broken_queries"][0].endswith("G1_tool.json, record 1: the query is broken: KeyError: 'tool_name'")


# -----------------------------------------------------------------------------------------------------------------
# One turn

@pytest.mark.parametrize("output, calls", [
    (turn("f", '{"a": 1}'), ("hm", [("f", {"a": 1})])),
    ("Thought: \nAction:f\nAction Input:{'a': True}", ("", [("f", {"a": True})])),
    (turn("f", ""), ("hm", [("f", {})])), (turn("f", "not json"), ("hm", [("f", " not json")])),
    (turn("f", "[1]"), ("hm", [("f", " [1]")])),
    ('I call: [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{}"}]', ("I call:", [("f", {"a": 1}), ("g", {})])),
    ("Here is your soup.", ("Here is your soup.", [])), ("", ("", [])), ('["f"]', ('["f"]', [])),
    ("Action Input: {}", ("Action Input: {}", []))])
def test_calls(output, calls):
    assert bench.stb_calls(output) == calls


@pytest.mark.parametrize("given", [
    "[" * 9999, '{"a":' * 9999, '{"a":' * 120 + "1" + "}" * 120, '{"a": ' + "9" * 9999 + "}", "{'a': {1, 2}}", "{1: 2, 'b': 3}",
    "{'a': b'x'}", "-" * 9999 + "1", "\0", '{"a": NaN}', '{"a": 1e999}', '{"a": "\ud800"}', '{"a": "\\ud800"}'])
def test_hostile_inputs(items, given, tmp_path):
    call = bench.stb_recorded(write(tmp_path / "seen.json", {LIST: {"{}": {"error": "", "response": 1}}}))
    for action in (LIST, "Finish", given):
        trace = bench.stb_run(items[:1], say(turn(action, given), *[GIVE_UP] * 9), call)["7"]
        for t in (trace, trace[:1]):
            verdict = bench.stb_judge(items[0], t, lambda *_: ("Solved", ""))
            assert verdict["status"] == "Unsolved"
            json.dumps([verdict, t])
    answer = bench.stb_end([{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": "a\ud800" + given}}])[1]
    answer.encode("utf-8")


def test_no_depth_of_nesting_runs_out_of_stack(items, tmp_path):
    call = bench.stb_recorded(write(tmp_path / "seen.json", {LIST: {"{}": {"error": "", "response": 1}}}))
    for depth in range(100, 1200, 20):
        given = '{"a":' * depth + "1" + "}" * depth
        trace = bench.stb_run(items[:1], say(turn(LIST, given), finish("leek")), call)["7"]
        assert bench.stb_judge(items[0], trace, lambda *_: ("Unsure", ""))["valid_json"] == (depth <= 300)
        answer = finish(0).partition("Action Input: ")[2]
        answer = f'[{{"name": "Finish", "arguments": {answer.replace("0", given)}}}]'
        trace = bench.stb_run(items[:1], say(answer, *[GIVE_UP] * 9), call)["7"]
        assert bench.stb_judge(items[0], trace, lambda *_: ("Solved", ""))["status"] == ("Solved" if depth < 300 else "Unsolved")


@pytest.mark.parametrize("given, end", [
    ({"return_type": "give_answer", "final_answer": "soup"}, ("give_answer", "soup")),
    ({"return_type": "give_answer", "final_answer": ["soup"]}, ("give_answer", '["soup"]')),
    ({"return_type": "give_up_and_restart", "final_answer": "soup"}, ("give_up_and_restart", "")),
    ({"return_type": "give_answer"}, (None, 'must have "final_answer"')),
    *((given, (None, 'must have "return_type"')) for given in ("", {"final_answer": "soup"}, {"return_type": ["give_answer"]})),
    ('{"return_type": "give_answer", "final_answer": "so\nup', ("give_answer", "so\nup")),
    ('{"return_type": "give_up_and_restart", ', ("give_up_and_restart", ""))])
def test_end(given, end):
    assert bench.stb_end([{"action": LIST}, {"action": "Finish", "input": given}]) == end
    assert bench.stb_end([{"action": "Finish", "input": given}, {"action": LIST, "input": {}}])[0] is None


# -----------------------------------------------------------------------------------------------------------------
# The loop

def test_loop(items):
    calls, spoken, finished = [], [], []
    script = {"7": [turn(LIST, '{"town": "Bern"}'), turn("soups", "{}"), finish("leek")], "8": [finish("none")],
              "9": ["no call", turn("Finish", "{}"), "still", "none"]}

    def speak(talks):
        spoken.append([(len(talk), talk[-1].role) for talk in talks])
        by_query = {i.messages[1].text: i.id for i in items}
        return [script[by_query[talk[1].text]][sum(m.role == "assistant" for m in talk)] for talk in talks]

    def call(*arguments):
        calls.append(arguments)
        return {"error": "", "response": "x" * 2000, "source": "test"}
    traces = bench.stb_run(items, speak, call, max_steps=4, done=lambda item, trace: finished.append((item.id, len(trace))))
    assert spoken == [[(2, "user")] * 3, [(4, "tool")] * 2, [(6, "tool")] * 2, [(8, "tool")]]           # side by side
    assert finished == [("8", 1), ("7", 3), ("9", 4)] and {k: len(t) for k, t in traces.items()} == {"7": 3, "8": 1, "9": 4}
    assert calls == [("Food, Drink", "soup_finder", "list_soups", {"town": "Bern"})]
    first, second, last = traces["7"]
    assert {k: first[k] for k in first if k != "observation"} == {
        "thought": "hm", "action": LIST, "input": {"town": "Bern"}, "source": "test"}
    assert first["observation"].startswith('{"error": "", "response": "xxx') and len(first["observation"]) == 1024 + len("...")
    assert second["observation"] == '{"error": "No such function name: soups", "response": ""}' and "source" not in second
    assert json.loads(traces["9"][1]["observation"])["error"] == 'must have "return_type"'
    assert len(items[0].messages) == 2                                      # the items stay as they were
    assert bench.stb_run([], None, None) == {}


def test_two_calls_in_a_turn_and_a_conversation_too_long(items):
    both = json.dumps([{"name": LIST, "arguments": {}}, {"name": "price_for_soup_finder", "arguments": {"soup": "leek"}}])
    roles = []

    def speak(talks):
        roles.append([m.role for m in talks[0]])
        return [both if len(roles) == 1 else None]
    trace = bench.stb_run(items[:1], speak, nothing)["7"]
    assert roles[1] == ["system", "user", "assistant", "tool", "tool"]
    assert [step["action"] for step in trace] == [LIST, "price_for_soup_finder", ""]
    verdict = bench.stb_judge(items[0], trace, lambda *_: ("Solved", ""))
    assert verdict["reason"] == "the conversation grew too long" and verdict["status"] == "Unsolved" and verdict["steps"] == 2


# -----------------------------------------------------------------------------------------------------------------
# The environments

def test_server(serve):
    posted = []

    def answer(path, body, headers):
        posted.append((path, headers["toolbench_key"], body))
        return {"error": "", "response": {"soups": ["leek"]}, "more": 1}
    url = serve(answer)
    for address in (url, url + "/", url + "/virtual"):
        reply = bench.stb_server(address, "secret")("Food, Drink", "soup_finder", "list_soups", {"town": "Bern"})
        assert reply == {"error": "", "response": {"soups": ["leek"]}, "source": "server"}
    assert posted == [("/virtual", "secret", {"category": "Food, Drink", "tool_name": "soup_finder", "api_name": "list_soups",
                                              "tool_input": {"town": "Bern"}, "strip": "truncate", "toolbench_key": "secret"})] * 3
    for bad in ("file:///etc/hosts", "localhost:80", "http://"):
        with pytest.raises(DataError, match="http://"):
            bench.stb_server(bad)


@pytest.mark.parametrize("reply, fault, error, attempts", [
    (None, "timeout", "Timeout error...", 3),
    ((500, "no"), "http 500", "request invalid, data error. status_code=500", 3),
    ((404, "no"), "http 404", "request invalid, data error. status_code=404", 1),
    *((reply, "nonsense", "request invalid, data error", 3) for reply in (
        (200, "<html>"), (200, "[" * 9999), (200, "\udcff"), {"response": "no error field"}, [1])),
    ("gone", "unreachable", "request invalid, data error", 0)])
def test_faults_of_the_server_are_counted_and_never_fatal(items, serve, reply, fault, error, attempts):
    seen = []
    url = "http://127.0.0.1:9" if reply == "gone" else serve(lambda *request: seen.append(request) or reply)
    call = bench.stb_server(url, timeout=0.1)
    traces = bench.stb_run(items[:1], say(turn(LIST, "{}"), GIVE_UP), call)
    step = traces["7"][0]
    assert len(seen) == attempts and step["fault"] == fault and json.loads(step["observation"]) == {"error": error, "response": ""}
    summary = bench.stb_summary([bench.stb_judge(items[0], traces["7"])])
    assert summary["server_errors"] == {fault: 1} and summary["sources"] == {} and "pass_rate" not in summary


def test_no_depth_of_a_reply_is_fatal(items, serve):
    for depth in range(900, 1000, 7):
        call = bench.stb_server(serve(lambda *_: (200, '{"error": "", "response": ' + "[" * depth + "]" * depth + "}")))
        step = bench.stb_run(items[:1], say(turn(LIST, "{}"), GIVE_UP), call)["7"][0]
        assert step.get("source") == "server" or step["fault"] == "nonsense"


def test_a_model_that_leaves_out_an_answer_is_an_error(items):
    with pytest.raises(ValueError):
        bench.stb_run(items, lambda talks: [GIVE_UP], nothing)


def test_a_second_attempt_succeeds(serve):
    replies = [(503, "busy"), {"error": "", "response": "soup"}]
    assert bench.stb_server(serve(lambda *_: replies.pop(0)))("a", "b", "c", {})["response"] == "soup"


def test_cache(tmp_path, items):
    folder = tmp_path / "Food_Drink" / "soup_finder_for_Food_Drink"
    folder.mkdir(parents=True)
    say_so = lambda response: {"error": "", "response": response}
    stored = {str({"town": "Bern", "count": 2}): say_so("two"), str({"town": "it's"}): say_so("quoted"), "{}": say_so("all"),
              "{'vegan': True}": say_so("vegan"), "{'x': nan": {}, "{'y': 1}": "no dict"}
    write(folder / "list_soups.json", stored)
    write(folder / "price.json", "{")
    call, where = bench.stb_cache(str(tmp_path)), items[0].reference["functions"]
    ask = lambda given, function=LIST: call(*where[function], given)
    assert ask({"town": "Bern", "count": 2}) == {"error": "", "response": "two", "source": "stored"}
    assert ask({"count": 2, "town": "Bern"}) == {"error": "", "response": "two", "source": "stored, keys in another order"}
    assert ask({"town": "it's"})["response"] == "quoted" and ask({})["response"] == "all"
    assert ask({"vegan": True})["source"] == "stored" and ask({"vegan": 1})["source"] == "not stored"           # 1 is not True
    assert ask({"town": "Rome"}) == {"error": "no response is stored for this input", "response": "", "source": "not stored"}
    assert ask("town")["source"] == "no JSON"
    assert ask({"y": 1})["fault"] == "nonsense" and ask({}, "price_for_soup_finder")["fault"] == "nonsense"
    assert call("Food", "soup_finder", "list_soups", {})["source"] == "not stored"
    with pytest.raises(DataError, match="is no folder"):
        bench.stb_cache(str(tmp_path / "none"))


def test_recorded(tmp_path, items):
    path = write(tmp_path / "seen.json", {LIST: {'{"town":"Bern",\n"count":2}': {"error": "", "response": "two"},
                                                 "broken {": {"error": "e", "response": ""}}})
    call, where = bench.stb_recorded(path), items[0].reference["functions"][LIST]
    assert call(*where, {"town": "Bern", "count": 2})["source"] == "stored"
    assert call(*where, {"count": 2, "town": "Bern"})["source"] == "stored, keys in another order"
    assert call(*where, "broken {") == {"error": "e", "response": "", "source": "stored"}
    assert call("Food", "other", "list_soups", {})["source"] == "not stored"
    for bad in ([1], {LIST: 1}):
        with pytest.raises(DataError, match="seen.json must be a JSON object"):
            bench.stb_recorded(write(tmp_path / "seen.json", bad))


# -----------------------------------------------------------------------------------------------------------------
# The judge and the figures

def chat(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def test_pass_rate(items, serve):
    asked = []

    def answer(path, body, headers):
        prompt = body["messages"][0]["content"]
        asked.append((path, headers["Authorization"], body["model"], "Calls: " in prompt))
        if "Answer: maybe" in prompt:
            return chat('{"verdict": "Solved"}' if "the soup is in this call" in prompt else '{"verdict": "Unsure"}')
        assert "Answer: leek" in prompt
        return chat('At first I thought {"verdict": "Unsolved"} but: {"verdict": "Solved"}')
    judge = bench.stb_endpoint(serve(answer) + "/v1/", "judge-1", "key")
    call = {"action": LIST, "input": {}, "observation": "the soup is in this call"}
    one, two, three = items
    verdicts = [bench.stb_judge(one, answered("leek"), judge), bench.stb_judge(two, [call, *answered("maybe")], judge)]
    assert [(v["status"], v["score"], v["correct"]) for v in verdicts] == [("Solved", 1, True)] * 2
    assert asked == [("/v1/chat/completions", "Bearer key", "judge-1", in_detail) for in_detail in (False, False, True)]
    verdicts.append(bench.stb_judge(three, answered("maybe"), judge))
    assert (verdicts[2]["status"], verdicts[2]["score"], verdicts[2]["correct"]) == ("Unsure", 0.5, False)
    summary = bench.stb_summary(verdicts)
    assert summary["pass_rate"] == 2.5 / 3 and summary["pass_rate_mean_of_categories"] == 0.75
    assert summary["categories"]["G1_tool"]["pass_rate"] == 1 and summary["categories"]["G2_category"]["Unsure"] == 1
    n = len(asked)
    for trace, reason in (([], "no output"), (answered(" "), "empty answer"), ([call], "no Finish"),
                          (bench.stb_turn(one, GIVE_UP, None), "gave up")):
        verdict = bench.stb_judge(one, trace, judge)
        assert (verdict["status"], verdict["correct"], verdict["reason"]) == ("Unsolved", False, reason)
    assert len(asked) == n                                                  # unsolved without asking


@pytest.mark.parametrize("reply, fault", [
    (None, "timeout"), ((500, ""), "http 500"), ((401, ""), "http 401"), *((reply, "nonsense") for reply in (
        (200, "soup"), chat(None), {"choices": []}, chat("Solved, I think."), chat('{"verdict": "Sol"}'), chat('{"verdict": "0"}')))])
def test_faults_of_the_judge_are_never_success(items, serve, reply, fault):
    judge = bench.stb_endpoint(serve(lambda *_: reply), "m", timeout=0.1)
    verdict = bench.stb_judge(items[0], answered("leek"), judge)
    assert (verdict["correct"], verdict["score"], verdict["status"]) == (False, 0, "not judged")
    assert verdict["reason"] == f"the judge failed: {fault}"
    summary = bench.stb_summary([verdict])
    assert summary["judge_errors"] == {fault: 1} and summary["pass_rate"] == 0 and summary["not judged"] == 1


def test_a_redirect_does_not_take_the_key_along(items, serve):
    seen = []
    elsewhere = serve(lambda path, body, headers: seen.append(headers["Authorization"]) or (500, ""))
    bench.stb_judge(items[0], answered("leek"), bench.stb_endpoint(serve(lambda *_: elsewhere), "m", "key"))
    assert seen == [None] * 3


def test_win_rate(items):
    item = items[0]
    better = lambda prompt, choices: ("0" if prompt.index("good") < prompt.index("bad") else "1", "why")
    verdict = lambda answer, status: bench.stb_judge(item, answered(answer), lambda *_: (status, ""))
    compare = lambda ours, theirs, judge=better: bench.stb_compare(item, (ours, []), (theirs, []), judge)["win"]
    missing = bench.stb_judge(item, [], better)
    never = lambda *_: pytest.fail("the judge is asked where the status decides")
    assert compare(verdict("a", "Solved"), verdict("b", "Unsolved"), never) == "win"
    assert compare(verdict("a", "Unsure"), verdict("b", "Solved"), never) == "lose"
    assert compare(verdict("a", "Unsure"), verdict("b", "Unsolved"), never) == "win"
    assert compare(missing, verdict("b", "Unsolved"), never) == "lose"
    assert compare(verdict("b", "Unsolved"), missing, never) == "win"
    assert compare(missing, missing, never) == compare(verdict("a", "Solved"), verdict("a", "Solved"), never) == "tie"
    assert compare(verdict("good", "Solved"), verdict("bad", "Solved")) == "win"
    assert compare(verdict("bad", "Unsolved"), verdict("good", "Unsolved")) == "lose"
    assert compare(verdict("good", "Solved"), verdict("bad", "Solved"), lambda *_: ("0", "the first")) == "tie"     # it wavers
    failed = bench.stb_compare(item, (verdict("a", "Solved"), []), (verdict("b", "Solved"), []), lambda *_: (None, "timeout"))
    assert failed["win"] == "not judged" and failed["judge_errors"] == {"timeout": 1}
    assert compare(bench.stb_judge(item, answered("a")), verdict("b", "Unsolved")) == "not judged"
    ours = verdict("a", "Solved")
    summary = bench.stb_summary([ours | {"win": w} for w in ("win", "win", "tie", "lose")] + [ours | failed])
    assert [summary[k] for k in ("win_rate", "tie_rate", "lose_rate", "not compared")] == [0.4, 0.2, 0.2, 1]
    assert summary["judge_errors"] == {"timeout": 1}


def test_figures_without_a_judge(items):
    scripts = [[turn(LIST, "{}"), turn("soup", "{}"), turn(LIST, "not json"), finish("leek")], [GIVE_UP], ["I do not know"] * 5]
    traces = {item.id: bench.stb_run([item], say(*script), nothing, max_steps=5)[item.id] for item, script in zip(items, scripts)}
    verdicts = [bench.stb_judge(item, traces[item.id]) for item in items]
    assert not any(v["correct"] for v in verdicts) and verdicts[0]["status"] == "not judged" and verdicts[0]["output"] == "leek"
    summary = bench.stb_summary(verdicts)
    assert not [key for figures in (summary, *summary["categories"].values()) for key in figures if "pass" in key]
    assert summary["asked"] == 3 and summary["finish_rate"] == summary["give_up_rate"] == 1 / 3 and summary["steps"] == 8
    assert summary["valid_action_rate"] == summary["valid_json_rate"] == 2 / 8 and summary["relevant_apis_called"] == 1 / 3
    assert summary["sources"] == {"test": 2} and summary["categories"]["G2_category"]["finish_rate"] == 0
    assert bench.stb_summary([])["asked"] == 0


def test_traces(tmp_path, items):
    trace = bench.stb_run(items[:1], say(turn(LIST, "{}"), finish("leek")), nothing)["7"]
    text = '{"return_type": "give_answer", "final_answer": "x"}'
    lines = [{"id": 7, "output": "old"}, {"id": "7", "trace": trace}, {"id": 8, "output": "soup"}, {"id": 9, "output": None},
             {"id": 10, "trace": [{"action": "Finish ", "input": text}]}, {"id": 11, "trace": []}]
    traces = bench.stb_traces(write(tmp_path / "traces.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert traces["7"] == trace and {id: bench.stb_end(t)[1] for id, t in traces.items()} == {
        "7": "leek", "8": "soup", "9": "", "10": "x", "11": "no Finish"}
    for bad in ({"id": 1}, {"output": "x"}, {"id": 1, "trace": [{"action": 1, "input": {}}]}, {"id": 1, "trace": [1]},
                {"id": 1, "trace": 1}, 5):
        with pytest.raises(DataError, match="traces.jsonl, line 2"):
            bench.stb_traces(write(tmp_path / "traces.jsonl", json.dumps(lines[0]) + "\n" + json.dumps(bad)))


# -----------------------------------------------------------------------------------------------------------------
# Real data

@needs_data
def test_the_765_queries_and_the_loop_on_recorded_responses(tmp_path):
    folder = os.path.join(DATA, "stabletoolbench")
    items = bench.stb_items(folder)
    counts = {c: sum(i.category == c for i in items) for c in sorted({i.category for i in items})}
    assert counts == {"G1_category": 153, "G1_instruction": 163, "G1_tool": 158, "G2_category": 124, "G2_instruction": 106,
                      "G3_instruction": 61}
    assert not [i for i in items if "fault" in i.reference] and len({i.id for i in items}) == 765
    assert all(set(i.reference["relevant"]) <= set(i.reference["functions"]) for i in items)
    with open(os.path.join(folder, "observed_tool_responses.json"), encoding="utf-8") as f:
        recorded = json.load(f)

    def script(item):                       # one recorded call of each function that has one, then an answer, or giving up
        calls = [turn(name, next(iter(recorded[name]))) for name in item.reference["functions"] if name in recorded]
        return [*calls[:3], finish(f"after {len(calls[:3])}") if calls else GIVE_UP]
    scripts = {i.messages[1].text + i.messages[0].text: script(i) for i in items}
    speak = lambda talks: [scripts[t[1].text + t[0].text][sum(m.role == "assistant" for m in t)] for t in talks]
    traces = bench.stb_run(items, speak, bench.stb_recorded(os.path.join(folder, "observed_tool_responses.json")))
    summary = bench.stb_summary([bench.stb_judge(i, traces[i.id]) for i in items])
    assert summary["asked"] == 765 and summary["finish_rate"] + summary["give_up_rate"] == 1 and 0.3 < summary["finish_rate"] < 0.5
    assert summary["valid_action_rate"] == 1 and summary["valid_json_rate"] > 0.95 and summary["server_errors"] == {}
    assert set(summary["sources"]) == {"stored"} and summary["sources"]["stored"] == summary["steps"] > 500


@needs_data
def test_the_functions_are_those_of_toolbench_s_own_prompts():
    with open(os.path.join(DATA, "toolbench", "trajectories.json"), encoding="utf-8") as f:
        systems = [record["conversations"][0]["value"] for record in json.load(f)]
    theirs = {}
    for system in systems:
        for function in ast.literal_eval(system.split("access to the following APIs: ")[1]):
            theirs.setdefault(function["name"], []).append(function)
    same = total = 0
    for item in bench.stb_items(os.path.join(DATA, "stabletoolbench")):
        for function in ast.literal_eval(item.messages[0].text.split("access to the following APIs: ")[1])[:-1]:
            if function["name"] in theirs:
                same, total = same + (function in theirs[function["name"]]), total + 1
    assert total > 1000 and same / total > 0.99, (same, total)
