"""What StableToolBench talks to: the environment that answers its calls, and the judge.

An environment is a function call(category, tool, api, tool_input) -> {"error", "response"}, with
"source" where the response comes from or "fault" why there is none. It is StableToolBench's own
server, a cache folder in that server's layout, or a file of responses recorded in earlier runs.
"""
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

ATTEMPTS = 3            # at a request that times out, fails with 5xx or 429, or returns nonsense
MAX_BRACKETS = 300      # no API's input nests as deeply; deeper texts would exhaust the stack
MAX_REPLY_BYTES = 1 << 24
BROKEN_REPLY = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def parse_input(text: str) -> dict | str:
    """The dict that a call's input spells, as JSON or as a Python literal; {} if it is empty.

    Any other text is returned as it is.
    """
    if text.count("{") + text.count("[") > MAX_BRACKETS:
        return text
    for parse in (functools.partial(json.loads, strict=False), ast.literal_eval):
        try:
            value = parse(text.strip() or "{}")
            # what json can sort can be sent, and compared in any order of its keys
            if isinstance(value, dict) and json.dumps(value, sort_keys=True):
                return value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


# --------------------------------------------------------------------------------------------------
# Requests

def post(url: str, body: dict, headers: dict, timeout: float, read):
    """POST a JSON body. Returns (read(the JSON reply), None), or (None, fault).

    The fault is "timeout", "unreachable", "http CODE", or "nonsense" if `read` raises.
    """
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for name, value in headers.items():
        request.add_unredirected_header(name, value)        # a redirect does not get the keys
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return read(json.loads(reply.read(MAX_REPLY_BYTES))), None
        except urllib.error.HTTPError as e:
            e.close()
            fault = f"http {e.code}"
            if e.code < 500 and e.code != 429:
                break
        except OSError as e:
            timed_out = isinstance(getattr(e, "reason", e), TimeoutError)
            fault = "timeout" if timed_out else "unreachable"
        except (http.client.HTTPException, *BROKEN_REPLY):
            fault = "nonsense"
    return None, fault


def checked_url(url: str) -> str:
    if not re.match(r"https?://[^/]", url):
        raise DataError(f"{url!r} is not an address; give one that begins with http:// or https://.")
    return url.rstrip("/")


# --------------------------------------------------------------------------------------------------
# Environments

def tool_server(url: str, key: str = "", timeout: float = 60.0):
    """The environment behind StableToolBench's own server: each call is a POST to URL/virtual."""
    url = checked_url(url).removesuffix("/virtual") + "/virtual"

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        body = {"category": category, "tool_name": tool, "api_name": api,
                "tool_input": tool_input, "strip": "truncate", "toolbench_key": key}
        response, fault = post(url, body, {"toolbench_key": key}, timeout, error_and_response)
        if fault:
            return failure(fault)
        return response | {"source": "server"}

    return call


def error_and_response(reply: dict) -> dict:
    return {"error": reply["error"], "response": reply["response"]}


def failure(fault: str) -> dict:
    """What the agent sees, in upstream's words, when the environment fails to respond."""
    if fault == "timeout":
        error = "Timeout error..."
    elif fault.startswith("http "):
        error = f"request invalid, data error. status_code={fault.removeprefix('http ')}"
    else:
        error = "request invalid, data error"
    return {"error": error, "response": "", "fault": fault}


def recorded_environment(lookup):
    """The environment of recorded responses.

    lookup(category, tool, api) returns {input as text: {"error", "response"}}. The real server
    looks up str() of the input's dict, so there the order of keys matters; here any order finds
    the response, and "source" says which of the two it was.
    """
    @functools.lru_cache(512)
    def responses(category: str, tool: str, api: str) -> tuple[dict, dict]:
        exact = {}
        any_order = {}
        for text, response in lookup(category, tool, api).items():
            tool_input = parse_input(text)
            exact[str(tool_input)] = response
            any_order[json.dumps(tool_input, sort_keys=True)] = response
        return exact, any_order

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        try:
            exact, any_order = responses(category, tool, api)
            if str(tool_input) in exact:
                return error_and_response(exact[str(tool_input)]) | {"source": "stored"}
            key = json.dumps(tool_input, sort_keys=True)
            if key in any_order:
                source = "stored, keys in another order"
                return error_and_response(any_order[key]) | {"source": source}
        except (OSError, *BROKEN_REPLY):
            return failure("nonsense")
        if isinstance(tool_input, str):
            return {"error": "Tool input parse error...\n", "response": "", "source": "no JSON"}
        error = "no response is stored for this input"
        return {"error": error, "response": "", "source": "not stored"}

    return call


def cache_folder(folder: str):
    """The environment of a cache folder: <Category>/<tool>_for_<Category>/<api>.json."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is no folder; give the cache's, which holds "
                        "<Category>/<tool>_for_<Category>/<api>.json.")

    def lookup(category: str, tool: str, api: str) -> dict:
        category = re.sub("[ ,/]", "_", category).replace("__", "_")
        path = os.path.join(folder, category, f"{tool}_for_{category}", f"{api}.json")
        if not os.path.isfile(path):
            return {}
        with open(path, encoding="utf-8") as f:
            return json.load(f)

    return recorded_environment(lookup)


def recorded_file(path: str):
    """The environment of a JSON object {function: {input as text: {"error", "response"}}}."""
    functions = {}
    for _, record in read_records(path):
        if isinstance(record, dict):
            functions |= record
    if not functions or not all(isinstance(inputs, dict) for inputs in functions.values()):
        raise DataError(f"{path} must be a JSON object "
                        '{function: {input: {"error", "response"}}}.')

    def lookup(category: str, tool: str, api: str) -> dict:
        return functions.get(f"{api}_for_{tool}"[-64:], {})

    return recorded_environment(lookup)


# --------------------------------------------------------------------------------------------------
# The judge

def judge_endpoint(url: str, model: str, key: str = "", timeout: float = 120.0):
    """The judge behind an OpenAI-compatible endpoint.

    Returns ask(prompt, choices) -> (one of the choices, the judge's reasons), or (None, fault).
    """
    url = checked_url(url) + "/chat/completions"
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(prompt: str, choices: tuple) -> tuple[str | None, str]:
        request = (f'{prompt}\n\nGive your reasons briefly, then end with {{"verdict": "..."}}: '
                   f'one of {", ".join(choices)}.')
        body = {"model": model, "temperature": 0,
                "messages": [{"role": "user", "content": request}]}

        def read(reply: dict) -> tuple[str, str]:
            text = reply["choices"][0]["message"]["content"]
            verdict = re.findall(r'"verdict"\s*:\s*"?(\w+)', text)[-1]
            if verdict not in choices:
                raise ValueError(verdict)
            return verdict, text.encode("utf-8", "replace").decode()[:1000]

        verdict, fault = post(url, body, headers, timeout, read)
        return (None, fault) if fault else verdict

    return ask
