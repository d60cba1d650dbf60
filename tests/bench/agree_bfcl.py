"""Do the verdicts of benchmarks/bfcl.py agree with upstream's own checker on the same texts?

    pip install --no-deps bfcl-eval==2026.3.23 filelock tenacity
    pip install --no-deps tree-sitter==0.21.3 tree-sitter-java==0.21.0 \\
        tree-sitter-javascript==0.21.4
    python -m tests.bench.agree_bfcl --data DIR     # DIR holds BFCL_v4_*.json and possible_answer/

Each item is answered with its accepted calls and with damaged ones, in its own language and partly
as JSON. Upstream decodes and checks each text as it does for prompted models (JSON: as its handlers
of xLAM models do). Where its checker raises, its verdict counts as "wrong"; how often is printed.
"""
import argparse
import json
import random
import sys
import types
from collections import Counter, defaultdict

from benchmarks import bfcl
from tests.bench.bfcl_outputs import outputs


def load_upstream():
    """Upstream's verdict, a function (item, text, is_json) -> (correct, reason, raised).

    Upstream's table of models imports every vendor's client, so an empty one stands in for it.
    """
    try:
        table = types.ModuleType("bfcl_eval.constants.model_config")
        prompted = types.SimpleNamespace(underscore_to_dot=False)
        table.MODEL_CONFIG_MAPPING = {"prompted": prompted}
        sys.modules[table.__name__] = table
        from bfcl_eval.constants.enums import Language, ReturnFormat
        from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker
        from bfcl_eval.model_handler.utils import default_decode_ast_prompting
        from bfcl_eval.utils import is_empty_output, is_function_calling_format_output
    except ImportError as e:
        sys.exit("agree_bfcl.py needs bfcl-eval 2026.3.23 and what its checker imports "
                 f"({e}); --help has the pip command.")

    def verdict(item, text: str, is_json: bool):
        language = bfcl.language_of(item.category)
        wants_none = item.category.endswith("irrelevance")
        try:
            if is_json:
                decoded = [{call["name"]: call["arguments"]} for call in json.loads(text)]
            else:
                decoded = default_decode_ast_prompting(text, ReturnFormat(language))
        except Exception as e:
            return wants_none, f"decoding: {type(e).__name__}: {e}", False
        if "relevance" in item.category:
            return is_empty_output(decoded) == wants_none, f"decoded {decoded}", False
        if not is_function_calling_format_output(decoded):
            return False, "wrong output format", False
        documents = item.reference["documents"]
        truth = item.reference["truth"]
        try:
            result = ast_checker(documents, decoded, truth, Language(language), item.category,
                                 "prompted")
        except Exception as e:
            return False, f"crash: {type(e).__name__}: {e}", True
        return result["valid"], f"{result.get('error_type')}: {result.get('error')}", False
    return verdict


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True,
                        help="folder of BFCL_v4_*.json and possible_answer/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=100,
                        help="print at most this many disagreements")
    options = parser.parse_args()
    upstream = load_upstream()
    rng = random.Random(options.seed)
    by_category = defaultdict(Counter)
    by_damage = defaultdict(Counter)
    refused = defaultdict(list)
    differ = 0
    raised = 0

    # Each text is judged twice, counted, and shown if the two verdicts differ.
    for item in bfcl.items(options.data):
        for kind, text, is_json in outputs(item, rng):
            name = kind + (", JSON" if is_json else "")
            theirs, reason, has_raised = upstream(item, text, is_json)
            ours = bfcl.judge(item, text)
            agree = theirs == ours["correct"]
            raised += has_raised
            for counter in (by_category[item.category], by_damage[name]):
                counter["n"] += 1
                counter["agree"] += agree
                counter["accepted"] += theirs
            if kind.startswith("accepted") and not theirs:
                refused[name].append(item.id)
            differ += not agree
            if not agree and differ <= options.show:
                print(f"DISAGREE {item.id} ({kind}): {text[:300]!r}\n"
                      f"   upstream {theirs}: {reason[:300]}\n"
                      f"   ours     {ours['correct']}: {ours['reason'][:300]}")

    for title, table in (("category", by_category), ("damage", by_damage)):
        print(f"\n{title:34} {'outputs':>8} {'accepted':>9} {'agree':>8}")
        for name, count in table.items():
            share = count["agree"] / count["n"]
            print(f"{name:34} {count['n']:8,} {count['accepted']:9,} {share:8.2%}")
    for name, ids in refused.items():
        print(f"\nrefused by upstream among '{name}': {len(ids)}: {' '.join(ids[:40])}")
    total = sum(count["n"] for count in by_category.values())
    print(f"\nagreement {1 - differ / total:.3%} ({differ} of {total:,} outputs differ); "
          f"upstream raised on {raised}, counted as wrong")


if __name__ == "__main__":
    main()
