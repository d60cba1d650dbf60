"""What a reply to T-Eval says: parsed, never executed.

Every function copes with whatever a model writes.
"""
import ast
import json

# what follows one of these is no longer the reply: upstream cuts it off before it scores
TURN_ENDS = ("<eoa>", "<TOKENS_UNUSED_1>", "<|im_end|>", "\nuser", "\nassistant", "\nUSER",
             "[INST]", "<|user|>")


def clean(output: str) -> str:
    """A reply without a turn that follows, and without white space and code fences around it."""
    for mark in TURN_ENDS:
        output = output.partition(mark)[0]
    return output.strip().removeprefix("```json").strip("`").strip()


def parse(text: str, brackets: str = ""):
    """A reply read as a Python literal, else as JSON, else as JSON with ' for ".

    With `brackets`, such as "[]", only what lies from the first to the last of them is read.
    Raises ValueError if it is neither.
    """
    if "```json" in text:
        text = text.partition("```json")[2].strip("`")
    if brackets:
        text = text[text.find(brackets[0]):text.rfind(brackets[1]) + 1]
    for read, source in [(ast.literal_eval, text), (json.loads, text),
                         (json.loads, text.replace("'", '"'))]:
        try:
            return read(source)
        except Exception:       # a model can provoke SyntaxError, RecursionError, MemoryError ...
            pass
    raise ValueError("neither a Python literal nor JSON")


def read_json_action(template: dict, output: str) -> tuple:
    """(action, arguments) of a JSON object with the keys of `template`; ValueError if it is not."""
    reply = parse(output)
    keys = [template[name] for name in ("thought", "action", "args")]
    if not isinstance(reply, dict) or any(key not in reply for key in keys):
        raise ValueError("no object, or a key is missing")
    return reply[keys[1]], reply[keys[2]]


def read_marked_action(template: dict, output: str) -> tuple[str, object]:
    """(action, arguments) of a text that has the marks of `template`; ValueError if it has not.

    The marks follow one another. Of a mark that occurs more than once the last counts, as in
    upstream's pattern of greedy groups. Arguments that cannot be read are None.
    """
    to_action = template["thought_end"] + template["action_start"]
    to_args = template["action_end"] + template["args_start"]
    args_end = max(output.rfind(template["args_end"]), 0)
    action_end = output.rfind(to_args, 0, args_end)
    thought_end = output.rfind(to_action, 0, max(action_end, 0))
    thought_start = output.find(template["thought_start"])
    if not 0 <= thought_start <= thought_end - len(template["thought_start"]):
        raise ValueError("a mark is missing")
    action = output[thought_end + len(to_action):action_end].strip()
    try:
        return action, ast.literal_eval(output[action_end + len(to_args):args_end].strip())
    except Exception:           # as in parse; the form is right all the same
        return action, None


def read_plan(output: str) -> list[tuple]:
    """The steps (id, name, arguments) of a reply's list; none if any of them is malformed."""
    try:
        reply = parse(output, "[]")
        if not isinstance(reply, list):
            return []
        return [(int(step["id"]), str(step["name"]), str(step["args"])) for step in reply]
    except Exception:           # no list, no step, NaN as id, an integer too long to print
        return []


def plan_in_text(output: str, apis: list[str]) -> list[tuple]:
    """The steps of a plan in words: of each line or sentence the API that it names first.

    The whole line stands for the arguments.
    """
    steps = []
    for i, line in enumerate(output.replace(". ", "\n").split("\n")):
        names = [name for name in apis if name in line]
        if names:
            steps.append((i, min(names, key=line.find), line))
    return steps
