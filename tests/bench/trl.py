"""Training compared with TRL's SFTTrainer, on the same samples and as many tokens per step.

    python -m tests.bench.trl --model DIR --data train.json --max-length 768 --batch 4

The same precision and AdamW in all; in bfloat16 the weights stay float32 (TRL's bf16=True). One
process per variant, which take turns, step by step. Every variant's first step is left out of its
speed. Needs trl (and with it transformers and datasets).
"""
import itertools
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch

import train
from data import Dataset, epoch_batches
from model import CheckpointError, Transformer
from support.cli import option, parse_options, run_script
from support.distributed import init_distributed, uses_bf16
from tests.bench import measure

TRL = ["TRL, recomputing (its default)", "TRL, not recomputing"]
OURS = ["ours", "ours, micro-batches of 1,024"]


@dataclass
class Options:
    model: str = option("", "base model: a Hugging Face directory", required=True)
    data: list = option([], "training data, one or more files", required=True)
    prompts: int = option(16, "number of samples, the first that fit --max-length", low=1)
    batch: int = option(8, "samples per step of TRL; ours takes as many tokens", low=1)
    max_length: int = option(2048, "longer samples are left out, in tokens", low=2)
    dtype: str = option("auto", "precision of matrix products, in all",
                        choices=["auto", "float32", "bfloat16"])


class Turns:
    """Lets a trainer run one step per message, and sends (seconds, tokens, peak MiB) after each."""

    def __init__(self, pipe):
        self.pipe = pipe

    def begin(self) -> None:
        """Call before the first step."""
        measure.reset_peak()
        self.pipe.recv()
        self.start = time.perf_counter()

    def end_of_step(self, tokens: int) -> None:
        seconds = time.perf_counter() - self.start
        self.pipe.send((seconds, tokens, measure.memory("VmHWM")))
        self.pipe.recv()
        self.start = time.perf_counter()


def train_with_ours(kind: str, dataset: Dataset, samples, options: Options, turns: Turns) -> None:
    init_distributed(options.dtype)             # as train.py begins
    path = options.model
    model = Transformer.from_pretrained(path)
    whole = options.batch * options.max_length
    ours = train.Options(model=path, data=options.data, method="sft",
                         micro_tokens=whole if kind == "ours" else 1024)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch_tokens = int(options.batch * dataset.lengths[samples].mean())
    turns.begin()
    for batch in epoch_batches(dataset.lengths, samples, batch_tokens, seed=0):
        train.backward(model, dataset, None, batch, ours)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end_of_step(int(dataset.lengths[batch].sum()))


def train_with_trl(kind: str, dataset: Dataset, samples, options: Options, turns: Turns) -> None:
    import datasets
    import transformers
    import trl
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    class Callback(transformers.TrainerCallback):
        seen = 0

        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, _, state, *__, **___):
            turns.end_of_step(state.num_input_tokens_seen - self.seen)
            self.seen = state.num_input_tokens_seen

    rows = []
    for i in samples:
        labels = np.where(dataset.is_output[i], dataset.ids[i], -100)
        rows.append({"input_ids": dataset.ids[i].tolist(), "labels": labels.tolist()})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=dataset.renderer.tokenizer, pad_token="<|im_end|>",
        eos_token="<|im_end|>")
    bf16 = uses_bf16(init_distributed(options.dtype))
    arguments = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=options.batch,
        max_length=options.max_length, num_train_epochs=1, learning_rate=1e-5,
        lr_scheduler_type="constant", bf16=bf16, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, include_num_input_tokens_seen="non_padding",
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=kind == TRL[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Callback()], processing_class=tokenizer)
    trainer.train()


def trainer(kind: str, options: Options, pipe) -> None:
    dataset = Dataset.load(options.data, options.model, "auto", options.max_length)
    samples = dataset.kept[:options.prompts]
    run = train_with_trl if kind in TRL else train_with_ours
    run(kind, dataset, samples, options, Turns(pipe))
    pipe.send(None)


def main():
    options = parse_options(Options, __doc__)
    import transformers
    import trl
    dataset = Dataset.load(options.data, options.model, "auto", options.max_length)
    total = int(dataset.lengths[dataset.kept[:options.prompts]].sum())
    measure.print_heading(
        f"trl {trl.__version__}, transformers {transformers.__version__}: {options.prompts} "
        f"samples of at most {options.max_length} tokens, {total} real tokens, {options.batch} "
        "samples per step (ours: as many tokens); the first step not counted")
    results = measure.in_turns(trainer, [*TRL, *OURS], (options,), itertools.repeat(True))

    speed = {}
    peak = {}
    for kind, steps in results.items():
        speed[kind] = sum(n for _, n, _ in steps[1:]) / sum(seconds for seconds, *_ in steps[1:])
        peak[kind] = max(megabytes for *_, megabytes in steps)
    rows = []
    for kind, steps in results.items():
        seconds, tokens, _ = steps[0]
        ratios = []
        for theirs in TRL:
            ratios.append(f"{speed[kind] / speed[theirs]:.2f}")
            ratios.append(f"{peak[kind] / peak[theirs]:.2f}")
        rows.append([kind, len(steps), sum(n for _, n, _ in steps), f"{tokens / seconds:.1f}",
                     f"{speed[kind]:.1f}", f"{peak[kind]:.0f}", *ratios])
    header = ["", "steps", "tokens", "first step, tokens/s", "tokens/s", "peak MiB",
              "x recomputing", "x its memory", "x not recomputing", "x its memory"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    run_script(main, CheckpointError)
