"""What the tests of StableToolBench share: queries, scripted agents, and servers on loopback."""
import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

HANG_UP = object()                      # as a server's reply: it closes the connection
UNREACHABLE = "http://127.0.0.1:9"      # nobody listens at the port of `discard`
LIST = "list_soups_for_soup_finder"
PRICE = "price_for_soup_finder"


def api(tool, name, required=(), optional=(), category="Food, Drink", about="Gives it."):
    return {"category_name": category, "tool_name": tool, "api_name": name,
            "api_description": about, "method": "GET",
            "required_parameters": [parameter(name) for name in required],
            "optional_parameters": [parameter(name) for name in optional]}


def parameter(name):
    return {"name": name, "type": "NUMBER" if name == "count" else "STRING",
            "description": f"the {name}", "default": ""}


def query(number=7, text="Which soup is cheap?", apis=None):
    """A record as in solvable_queries; the first of its APIs is relevant."""
    apis = apis or [api("Soup Finder!", "List Soups", ["town", "count"], ["id"]),
                    api("Soup Finder!", "Price", [], ["soup"])]
    return {"query_id": number, "query": text, "api_list": apis,
            "relevant APIs": [[apis[0]["tool_name"], apis[0]["api_name"]]]}


def turn(action, tool_input, thought="hm"):
    return f"Thought: {thought}\nAction: {action}\nAction Input: {tool_input}"


def finish(answer):
    return turn("Finish", json.dumps({"return_type": "give_answer", "final_answer": answer}))


GIVE_UP = turn("Finish", '{"return_type": "give_up_and_restart"}')


def answered(answer):
    """The trace of an agent that answers at once."""
    return [{"action": "Finish", "input": {"return_type": "give_answer", "final_answer": answer}}]


def turns_taken(conversation):
    return sum(message.role == "assistant" for message in conversation)


def say(*outputs):
    """respond() of an agent that says these one after the other, whatever it is asked."""
    def respond(conversations):
        return [outputs[turns_taken(conversation)] for conversation in conversations]
    return respond


def always_ok(*call):
    """An environment."""
    return {"error": "", "response": "ok", "source": "test"}


def options(**given):
    """Those of eval.py's options that StableToolBench reads."""
    defaults = {"server": None, "cache": None, "recorded": None, "max_steps": 17, "timeout": 5.0,
                "judge_url": None, "judge_model": None, "judge_times": 1, "against": None,
                "out": ""}
    return SimpleNamespace(**defaults | given)


def chat(text):
    """The reply of an OpenAI-compatible endpoint."""
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def chat_call(**arguments):
    """The same, where the model calls a function."""
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"choices": [{"message": message}]}


@contextlib.contextmanager
def local_servers():
    """Gives start(answer), which starts a server on loopback and returns its address.

    answer(path, body, headers) returns the JSON to send, (status, text), an address to redirect to,
    None to fall silent for two seconds, or HANG_UP. All of them are stopped at the end.
    """
    servers = []
    stopped = threading.Event()

    def start(answer):
        server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(answer, stopped))
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    try:
        yield start
    finally:
        stopped.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def make_handler(answer, stopped):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length) or "null")
            reply = answer(self.path, body, self.headers)
            if reply is None:
                stopped.wait(2)
            elif reply is HANG_UP:
                self.close_connection = True
            elif isinstance(reply, str):
                self.send_response(302)
                self.send_header("Location", reply)
                self.end_headers()
            else:
                status, text = reply if isinstance(reply, tuple) else (200, json.dumps(reply))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode("utf-8", "surrogateescape"))

        do_GET = do_POST

        def log_message(self, *_):
            pass

    return Handler


@contextlib.contextmanager
def dripping_server(data, pause=0.05, longest=3.0):
    """The address of a server that sends these bytes one at a time, for some seconds at most."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def drip(connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            for i in range(int(longest / pause)):
                if stopped.wait(pause):
                    return
                connection.sendall(data[i:i + 1] or b" ")

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=drip, args=[connection], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
