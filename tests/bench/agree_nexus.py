"""Do the verdicts and NexusRaven's prompts of benchmarks/nexus.py agree with upstream's own?

    git clone https://github.com/nexusflowai/NexusRaven
    python -m tests.bench.agree_nexus --upstream NexusRaven --data DIR  # DIR holds *_queries.json

Each call is the reference, given with its arguments in other types, orders and positions, and
partly damaged. Upstream executes it, as a Python call without assignment or prefix; ours reads more
(JSON, lists, code blocks, "r = nvdlib."), so what only ours accepts is told apart.
"""
import argparse
import inspect
import json
import os
import random
import sys
import types
import warnings
from collections import Counter

from benchmarks import nexus
from tests.bench.agree_teval import damaged


def read_queries(data: str, name: str) -> list[dict]:
    with open(os.path.join(data, f"{name}_queries.json"), encoding="utf-8") as f:
        return json.load(f)


def install_stand_ins(data: str) -> None:
    """Modules in the place of what upstream reads data sets and keeps prompts with."""
    class Dataset(list):
        from_list = classmethod(lambda cls, rows: cls(rows))
        from_dict = staticmethod(dict)

        def filter(self, *arguments, **options):
            return self

    def load_dataset(path, name=None, split=None):
        if name:
            queries = read_queries(data, "toolllm")
            return Dataset({"query_dict": json.dumps(record)} for record in queries)
        return {"turns_1": [record["turns_1"] for record in read_queries(data, "toolalpaca")]}

    class StringPromptTemplate:
        def __init__(self, **fields):
            vars(self).update(fields)

    class Anything(types.ModuleType):
        def __getattr__(self, name):
            return StringPromptTemplate

    for name in ("datasets", "langchain", "langchain.agents", "langchain.schema",
                 "langchain.prompts"):
        sys.modules[name] = Anything(name)
    vars(sys.modules["datasets"]).update(
        Dataset=Dataset, load_dataset=load_dataset, concatenate_datasets=sum)


def load_upstream(directory: str, data: str):
    """Upstream's verdict, a function (item, text) -> bool, and its prompt, a function of an item.

    Functions and references are made as its scripts and its evaluator make them.
    """
    install_stand_ins(data)
    sys.path.insert(0, directory)
    from raven.data.toolllm_evaluation_data_utils import ToolLLMEvaluationDataHelper
    from raven.data.upload_standardized_api_list import UploadStandardizedAPIListHelper
    from raven.data.upload_standardized_queries import StandardizedQueriesHelper
    from raven.eval.raven_utils import RAVEN_PROMPT, RavenPromptTemplate
    from raven.utils import build_functions, parse_function_call_to_name_and_args

    functions = {}
    references = {}                             # {item's id: (name, arguments, query, functions)}
    apis = UploadStandardizedAPIListHelper("", "")
    queries = StandardizedQueriesHelper("", "", "", "")
    for name in ("cve_cpe", "emailrep", "virustotal", "toolalpaca"):
        rows = getattr(apis, name)()
        for row in rows:
            row.update(apis.standardize_arguments(row["args_dicts"]))
        functions[name] = build_functions(rows)
        offered = {name: list(functions[name])}
        for i, record in enumerate(read_queries(data, name)):
            query = queries._map_single(name, json.dumps(record), offered)
            function = functions[name][query["python_function_name"]]
            _, arguments = function(**json.loads(query["python_args_dict"]))
            references[f"{name}_{i}"] = (query["python_function_name"], arguments, query["prompt"],
                                         query["context_functions"])
    toolllm = ToolLLMEvaluationDataHelper("", "standardized")
    functions["toolllm"] = toolllm.build_functions()
    columns = toolllm.processed_dataset
    for i, call in enumerate(columns["reference_function_call"]):
        name, arguments = eval(call, dict(functions["toolllm"]))
        references[f"toolllm_{i}"] = (name, arguments, columns["prompt"][i],
                                      columns["context_functions"][i])

    def verdict(item, text):
        try:
            name, positional, keywords = parse_function_call_to_name_and_args(text)
            called = functions[item.category][name](*positional, **keywords)
        except Exception:
            return False
        return called == references[item.id][:2]

    def prompt(item):
        tools = []
        for name in references[item.id][3]:
            function = functions[item.category][name]
            description = f"{name}{inspect.signature(function)} - {function.__doc__.strip()}"
            tools.append(types.SimpleNamespace(description=description))
        template = RavenPromptTemplate(template=RAVEN_PROMPT, tools=tools)
        return template.format(input=references[item.id][2])
    return verdict, prompt


def rewritten(item, rng) -> str:
    """The reference call with some values in other types, and its arguments in other places."""
    name, _, given = nexus.parse_call(item.reference["call"])
    given = dict(given)
    names = [a["name"] for a in item.reference["function"]["args"]]
    for argument in rng.sample(sorted(given), min(len(given), rng.choice([0, 1, 1, 2]))):
        value = given[argument]
        if isinstance(value, (int, float)):
            given[argument] = rng.choice([float(value), value + 0.5, int(value), str(value),
                                          value + 1, -value, not value])
        elif isinstance(value, str):
            given[argument] = rng.choice([value, value + " ", value.lower(), [value], None])
        elif rng.random() < 0.3:
            del given[argument]
    if names and rng.random() < 0.1:
        argument = rng.choice(names)
        given[argument] = item.reference["arguments"][argument]
    positional = []
    for argument in names[:rng.choice([0, 0, 1, 2, len(names)])]:
        if argument not in given:
            break
        positional.append(repr(given.pop(argument)))
    keywords = [f"{argument}={value!r}" for argument, value in given.items()]
    rng.shuffle(keywords)
    return f"{name}({', '.join(positional + keywords)})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="a clone of nexusflowai/NexusRaven")
    parser.add_argument("--data", required=True,
                        help="folder of *_queries.json and function_specs.json")
    parser.add_argument("--count", type=int, default=5000, help="calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="print at most so many disagreements")
    options = parser.parse_args()
    warnings.simplefilter("ignore")             # upstream's docstrings have invalid escapes
    verdict, prompt = load_upstream(options.upstream, options.data)
    items = nexus.items(options.data)
    rng = random.Random(options.seed)
    counts = Counter()

    # Each call is judged twice; what ours alone reads as a call is no disagreement.
    for _ in range(options.count):
        item = rng.choice(items)
        text = rewritten(item, rng)
        for _ in range(rng.choice([0, 0, 1, 2])):
            text = damaged(text, rng)
        theirs = verdict(item, text)
        ours = nexus.judge(item, text)
        stripped = text.strip()
        reads_more = text != stripped or stripped[:1] in "[{`" or stripped[-1:] == "`"
        kind = {(True, True): "both", (False, False): "neither", (True, False): "upstream only",
                (False, True): "ours only"}[theirs, ours["correct"]]
        if kind == "ours only" and reads_more:
            kind = "ours only, in a list, a code block or white space"
        counts[kind] += 1
        if kind in ("upstream only", "ours only") and counts[kind] <= options.show:
            print(f"DISAGREE {item.id}, {kind}: {text[:300]!r} ({ours['reason'][:200]})")
    for kind, count in counts.most_common():
        print(f"right by {kind:52} {count:8,}")

    differ = [item.id for item in nexus.items(options.data, prompt="raven")
              if item.messages[0].text != prompt(item)]
    print(f"{len(items) - len(differ)} of {len(items)} prompts are upstream's; "
          f"others: {', '.join(differ)}")


if __name__ == "__main__":
    main()
