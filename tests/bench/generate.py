"""Greedy decoding compared with transformers' generate, one prompt at a time and batched.

    python -m tests.bench.generate --model DIR --data train.json
    python -m tests.bench.generate --model DIR --data train.json --prompts 24 --batch 12 --new 64

The same prompts, weights, stop token and number of new tokens; the variants take turns, group of
prompts by group. In bfloat16 both hold their weights in it. Needs transformers.
"""
import json
import os
import time
from dataclasses import dataclass

import torch

from model import CheckpointError, Config, Transformer
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed, uses_bf16
from support.generate import generate
from support.readers import read_samples
from support.templates import Renderer
from tests.bench import measure


@dataclass
class Options:
    model: str = option("", "model: a Hugging Face directory", required=True)
    data: list = option([], "files of samples, whose inputs are the prompts", required=True)
    prompts: int = option(16, "number of prompts, the first that fit --max-length", low=1)
    batch: int = option(8, "prompts that are continued together", low=1)
    new: int = option(48, "new tokens per prompt at most", low=2)
    max_length: int = option(2048, "longer prompts are left out, in tokens", low=2)
    dtype: str = option("auto", "precision of matrix products, in all",
                        choices=["auto", "float32", "bfloat16"])


def read_prompts(options: Options, renderer: Renderer) -> list[list[int]]:
    prompts = []
    for path in options.data:
        for sample in read_samples(path):
            prompts.append(renderer.prompt([m for m in sample.messages if not m.is_output]))
    return [prompt for prompt in prompts if len(prompt) <= options.max_length][:options.prompts]


@torch.no_grad()
def transformers_generate(model, prompts, new: int, stop: int) -> list[list[int]]:
    """What our generate returns, by transformers: without the prompt and the stop token."""
    width = max(map(len, prompts))
    padded = [[stop] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = model.generate(torch.tensor(padded), attention_mask=torch.tensor(mask),
                         max_new_tokens=new, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    outputs = []
    for output in ids[:, width:].tolist():
        outputs.append(output[:output.index(stop)] if stop in output else output)
    return outputs


def one_by_one(decode):
    """The same decoder, given one prompt after the other."""
    def decode_each(prompts, new):
        return [decode([prompt], new)[0] for prompt in prompts]
    return decode_each


def run(variants: dict, prompts: list[list[int]], options: Options):
    """Returns three dicts by variant: seconds, seconds for one new token only, and the outputs.

    The seconds are CPU time, which other processes disturb less than the clock.
    """
    seconds = dict.fromkeys(variants, 0.0)
    prefill = dict.fromkeys(variants, 0.0)
    outputs = {name: [] for name in variants}
    for first in range(0, len(prompts), options.batch):
        group = prompts[first:first + options.batch]
        for name, decode in variants.items():
            start = time.process_time()
            decode(group, 1)
            prefill[name] += time.process_time() - start
            start = time.process_time()
            outputs[name] += decode(group, options.new)
            seconds[name] += time.process_time() - start
    return seconds, prefill, outputs


def print_results(seconds: dict, prefill: dict, outputs: dict) -> None:
    base = "transformers, one by one"
    speed = {}
    decoding = {}                               # new tokens per second, each prompt's first aside
    for name, out in outputs.items():
        new_tokens = sum(map(len, out))
        speed[name] = new_tokens / seconds[name]
        decoding[name] = (new_tokens - len(out)) / (seconds[name] - prefill[name])
    rows = []
    for name, out in outputs.items():
        same = [a == b for a, b in zip(out, outputs[base], strict=True)]
        rows.append([
            name,
            f"{speed[name]:.1f} ({speed[name] / speed[base]:.2f} x)",
            f"{prefill[name]:.1f} ({prefill[name] / prefill[base]:.2f} x)",
            f"{decoding[name]:.1f} ({decoding[name] / decoding[base]:.2f} x)",
            f"{sum(same) / len(same):.0%}"])
    header = ["", "new tokens/s", "prefill, s", "decoding only, tokens/s", f"outputs as {base}"]
    print(measure.table(header, rows))


def main():
    options = parse_options(Options, __doc__)
    import transformers
    torch.set_num_threads(1)
    device = init_distributed(options.dtype)
    dtype = torch.bfloat16 if uses_bf16(device) else torch.float32
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    # One copy of the weights serves both.
    hf = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    with open(os.path.join(options.model, "config.json"), encoding="utf-8") as f:
        model = Transformer(Config.from_hf(json.load(f))).to(dtype)
    model.load_state_dict(hf.state_dict(), assign=True, strict=False)
    renderer = Renderer(options.model)
    prompts = read_prompts(options, renderer)

    def theirs(group, new):
        return transformers_generate(hf, group, new, renderer.end)

    def ours(group, new):
        return generate(model, group, new, {renderer.end})

    variants = {"transformers, one by one": one_by_one(theirs), "transformers, batched": theirs,
                "ours, one by one": one_by_one(ours), "ours, batched": ours}
    for decode in (theirs, ours):               # allocates first-use buffers
        decode([prompts[0][:16]], 2)
    lengths = sorted(map(len, prompts))
    measure.print_heading(
        f"generate: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens "
        f"({sum(lengths) / len(lengths):.0f} on average), at most {options.new} new tokens, "
        f"batches of {options.batch}; CPU time of one thread")
    print_results(*run(variants, prompts, options))


if __name__ == "__main__":
    run_script(main, CheckpointError)
