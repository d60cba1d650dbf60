"""StableToolBench's environments, and its judge: servers, a cache folder, recorded responses."""
import ast
import functools
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request

from support.cli import DataError
from support.readers import read_records


ATTEMPTS = 3            # of a request that times out, fails with 5xx or 429, or is answered with nonsense


def input(text: str):
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


def post(url: str, body: dict, headers: dict, timeout: float, read):
    """(read(the JSON answer), None) of a POST, or (None, fault): "timeout", "unreachable", "http CODE" or "nonsense"."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)                        # keys go to this host only
    for attempt in range(ATTEMPTS):
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


def reply(value: dict) -> dict:
    return {"error": value["error"], "response": value["response"]}


def failure(fault: str) -> dict:
    """What the agent sees, in upstream's words, when the environment itself fails; the fault is counted in the summary."""
    status = f". status_code={fault[5:]}" if fault.startswith("http ") else ""
    error = "Timeout error..." if fault == "timeout" else f"request invalid, data error{status}"
    return {"error": error, "response": "", "fault": fault}


def server(url: str, key: str = "", timeout: float = 60.0):
    """The environment behind StableToolBench's own server: call(category, tool, api, input) posts to URL/virtual."""
    url = checked_url(url).removesuffix("/virtual") + "/virtual"

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        body = {"category": category, "tool_name": tool, "api_name": api, "tool_input": tool_input, "strip": "truncate",
                "toolbench_key": key}
        reply, fault = post(url, body, {"toolbench_key": key}, timeout, reply)
        return failure(fault) if fault else reply | {"source": "server"}
    return call


def checked_url(url: str) -> str:
    if not re.match(r"https?://[^/]", url):
        raise DataError(f"{url!r} is no address; give one that begins with http:// or https://.")
    return url.rstrip("/")


def stored(find):
    """The environment of stored responses: find(category, tool, api) gives {input: {"error", "response"}}, or raises.

    The server looks up str() of the input's dict, so the order of keys counts; here any will do, and "source" says which hit.
    """
    @functools.lru_cache(512)
    def table(category: str, tool: str, api: str) -> tuple[dict, dict]:
        inputs = [(input(key), reply) for key, reply in find(category, tool, api).items()]
        return {str(value): reply for value, reply in inputs}, {json.dumps(v, sort_keys=True): reply for v, reply in inputs}

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        try:
            exact, any_order = table(category, tool, api)
            if str(tool_input) in exact:
                return reply(exact[str(tool_input)]) | {"source": "stored"}
            if (key := json.dumps(tool_input, sort_keys=True)) in any_order:
                return reply(any_order[key]) | {"source": "stored, keys in another order"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return failure("nonsense")
        if isinstance(tool_input, str):
            return {"error": "Tool input parse error...\n", "response": "", "source": "no JSON"}
        return {"error": "no response is stored for this input", "response": "", "source": "not stored"}
    return call


def cache(folder: str):
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
    return stored(find)


def recorded(path: str):
    """The environment of responses seen in earlier runs: a JSON object {function: {input as text: {"error", "response"}}}."""
    recorded = dict(pair for _, record in read_records(path) if isinstance(record, dict) for pair in record.items())
    if not all(isinstance(responses, dict) for responses in recorded.values()) or not recorded:
        raise DataError(f'{path} must be a JSON object {{function: {{input: {{"error", "response"}}}}}}.')
    return stored(lambda category, tool, api: recorded.get(f"{api}_for_{tool}"[-64:], {}))


def endpoint(url: str, model: str, key: str = "", timeout: float = 120.0):
    """The judge behind an OpenAI-compatible endpoint: judge(prompt, choices) -> (choice, its reasons), or (None, fault)."""
    url = checked_url(url) + "/chat/completions"

    def judge(prompt: str, choices: tuple) -> tuple[str | None, str]:
        ask = f'{prompt}\n\nGive your reasons briefly, then end with {{"verdict": "..."}}: one of {", ".join(choices)}.'

        def read(reply: dict) -> tuple[str, str]:
            text = reply["choices"][0]["message"]["content"]
            verdict = re.findall(r'"verdict"\s*:\s*"?(\w+)', text)[-1]
            return choices[choices.index(verdict)], text.encode("utf-8", "replace").decode()[:1000]
        verdict, fault = post(url, {"model": model, "temperature": 0, "messages": [{"role": "user", "content": ask}]},
                                  {"Authorization": f"Bearer {key}"} if key else {}, timeout, read)
        return (None, fault) if fault else verdict
    return judge
