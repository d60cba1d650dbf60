"""What StableToolBench talks to: the environment that answers its calls, and the judge.

An environment is a function call(category, tool, api, tool_input) -> {"error", "response"}, with
"source" where the response comes from or "fault" why there is none. It is StableToolBench's own
server, a cache folder in that server's layout, or a file of responses recorded in earlier runs.
"""
import ast
import concurrent.futures
import contextlib
import functools
import http.client
import json
import os
import queue
import re
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future

from support.cli import DataError
from support.readers import read_records

ATTEMPTS = 3            # at a request that times out, fails with 5xx or 429, or returns nonsense
DOWN_AFTER = 5          # unanswered requests in a row; then a server counts as down
CONCURRENT_REQUESTS = 8
CHECK_SECONDS = 10.0    # to wait for a first reply
MAX_REPLY_BYTES = 1 << 24
MAX_BRACKETS = 300      # no API's input nests as deeply; deeper texts would exhaust the stack
TIMEOUTS = (TimeoutError, concurrent.futures.TimeoutError)      # one and the same from Python 3.11
BROKEN_REPLY = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
NO_TOOLS = ("http 400", "http 422", "http 500", "http 501")     # from endpoints without tools


def parse_input(text: str) -> dict | str:
    """The dict that a call's input spells; {} if it is empty. Any other text as it is.

    As strict as StableToolBench's server, which refuses what is not JSON.
    """
    return parse_object(text, json.loads)


def parse_object(text: str, *parsers) -> dict | str:
    """The dict that the first parser to succeed finds in a text, or the text as it is."""
    if text.count("{") + text.count("[") > MAX_BRACKETS:
        return text
    for parse in parsers:
        try:
            value = parse(text or "{}")
            # what json can sort can be sent, and compared in any order of its keys
            if isinstance(value, dict) and json.dumps(value, sort_keys=True):
                return value
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def find_function(functions: dict, action: str) -> str | None:
    """The function that an action calls: as upstream, the first whose name ends with it.

    So in a few queries `search_for_x` calls `advanced_search_for_x`, there as here.
    """
    return next((name for name in functions if action and name.endswith(action)), None)


# --------------------------------------------------------------------------------------------------
# Requests

class Service:
    """A server that takes and returns JSON.

    It is down after DOWN_AFTER requests in a row without any reply, and is then asked no more.
    """

    def __init__(self, url: str, headers: dict, timeout: float):
        self.url = url
        self.headers = headers
        self.timeout = timeout      # seconds for one attempt, from its first byte to its last
        self.unanswered = 0         # requests in a row
        self.fault = None           # of the last request

    def is_down(self) -> bool:
        return self.unanswered >= DOWN_AFTER

    def post(self, body: dict, read):
        """POST a JSON body. Returns (read(the JSON reply), None), or (None, fault).

        The fault is "timeout", "unreachable", "http CODE", or "nonsense" if `read` raises.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)        # a redirect does not get the keys
        fault = self.fault
        for attempt in range(ATTEMPTS):
            if self.is_down():
                return None, self.fault
            time.sleep(attempt)
            try:
                value = read(json.loads(fetch(request, self.timeout)))
                self.unanswered = 0
                return value, None
            except urllib.error.HTTPError as e:
                e.close()
                fault = f"http {e.code}"
                if e.code < 500 and e.code != 429:
                    break
            except TIMEOUTS:
                fault = "timeout"
            except OSError as e:
                timed_out = isinstance(getattr(e, "reason", e), TIMEOUTS)
                fault = "timeout" if timed_out else "unreachable"
            except (http.client.HTTPException, *BROKEN_REPLY):
                fault = "nonsense"
        self.fault = fault
        self.unanswered = self.unanswered + 1 if fault in ("timeout", "unreachable") else 0
        return None, fault


def fetch(request, timeout: float) -> bytes:
    """The body of the reply to a request, or TimeoutError after so many seconds.

    A socket's own timeout starts again at every byte, so a server that drips would never reach it.
    """
    def read() -> bytes:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.read(MAX_REPLY_BYTES)

    return in_thread(read).result(timeout)


def check_reachable(url: str, flag: str) -> None:
    """Raise DataError if there is no server at an address; whatever it replies is enough."""
    try:
        fetch(urllib.request.Request(checked_url(url)), CHECK_SECONDS)
    except urllib.error.HTTPError as e:
        e.close()
    except TIMEOUTS:
        pass            # a server is there, but busy
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        if not isinstance(reason, TIMEOUTS):
            raise DataError(f"{flag} {url} cannot be reached ({reason}); "
                            "start the server, or correct the address.") from None


def checked_url(url: str) -> str:
    if not re.match(r"https?://[^/]", url):
        raise DataError(f"{url!r} is not an address; "
                        "give one that begins with http:// or https://.")
    return url.rstrip("/")


def in_thread(function) -> Future:
    """The future result of function(), which a daemon thread runs.

    Unlike an executor's threads, daemons delay neither Ctrl-C nor the exit while a server hangs.
    """
    future = Future()
    threading.Thread(target=fulfil, args=[future, function], daemon=True).start()
    return future


def fulfil(future: Future, function) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except BaseException as e:
            future.set_exception(e)


def map_in_threads(function, *inputs):
    """Yield the results of map(function, *inputs); CONCURRENT_REQUESTS of them run side by side.

    Once the caller stops iterating, because of an error or Ctrl-C, no further one is started.
    """
    jobs = queue.SimpleQueue()
    futures = []
    for arguments in zip(*inputs, strict=True):
        futures.append(Future())
        jobs.put((futures[-1], functools.partial(function, *arguments)))

    def work():
        with contextlib.suppress(queue.Empty):
            while True:
                fulfil(*jobs.get_nowait())

    for _ in range(min(CONCURRENT_REQUESTS, len(futures))):
        in_thread(work)
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


# --------------------------------------------------------------------------------------------------
# Environments

def tool_server(url: str, key: str = "", timeout: float = 60.0):
    """The environment behind StableToolBench's own server: each call is a POST to URL/virtual.

    Raises DataError once the server is down.
    """
    url = checked_url(url).removesuffix("/virtual") + "/virtual"
    service = Service(url, {"toolbench_key": key}, timeout)

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        body = {"category": category, "tool_name": tool, "api_name": api,
                "tool_input": tool_input, "strip": "truncate", "toolbench_key": key}
        response, fault = service.post(body, error_and_response)
        if service.is_down():
            raise DataError(f"{url} left {DOWN_AFTER} calls in a row unanswered ({fault}); see "
                            "that it runs, or raise --timeout, and run the same command again.")
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
            tool_input = parse_object(text, json.loads, ast.literal_eval)
            exact[json.dumps(tool_input)] = response
            any_order[json.dumps(tool_input, sort_keys=True)] = response
        return exact, any_order

    def call(category: str, tool: str, api: str, tool_input) -> dict:
        try:
            exact, any_order = responses(category, tool, api)
            key = json.dumps(tool_input)
            if key in exact:
                return error_and_response(exact[key]) | {"source": "stored"}
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

def judge_endpoint(url: str, model: str, key: str = "", timeout: float = 60.0):
    """The judge behind an OpenAI-compatible endpoint.

    Returns ask(question, **fields) -> (one of its choices, the reply with the reason), or (None,
    fault). The judge is to call the question's function; one that writes the same JSON as text,
    or whose endpoint refuses functions, is understood too.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    service = Service(checked_url(url) + "/chat/completions", headers, timeout)

    def ask(question, **fields) -> tuple[str | None, str]:
        prompt = question.prompt.format(**fields)
        body = {"model": model, "temperature": 0.2,         # upstream's
                "messages": [{"role": "user", "content": prompt}]}

        def read(reply: dict) -> tuple[str, str]:
            message = reply["choices"][0]["message"]
            if message.get("tool_calls"):
                text = message["tool_calls"][0]["function"]["arguments"]
            else:
                text = message["content"]
            choice = re.findall(rf'"{question.argument}"\s*:\s*"?(\w+)', text)[-1]
            if choice not in question.choices:
                raise ValueError(choice)
            return choice, text.encode("utf-8", "replace").decode()[:1000]

        answer, fault = service.post(body | tool_fields(question), read)
        if fault in NO_TOOLS:
            answer, fault = service.post(body, read)
        return (None, fault) if fault else answer

    return ask


def tool_fields(question) -> dict:
    """The fields of a request that make the judge call the question's function."""
    reason = {"type": "string", "description": "why you choose so"}
    parameters = {"type": "object", "required": [question.argument, "reason"],
                  "properties": {question.argument: question.schema, "reason": reason}}
    function = {"name": question.function, "description": "Takes your verdict, and the reason.",
                "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": question.function}}}
