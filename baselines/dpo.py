"""Direct Preference Optimization, for the rewards of `--method rewardft`.

    python -m toy.task --pairs 500 > pairs.jsonl
    python -m baselines.dpo --model toy --data pairs.jsonl --out dpo --lr 1e-4      # seconds
    torchrun --nproc_per_node 8 -m baselines.dpo --model DIR --data pairs.jsonl --out DIR

Rafailov et al. 2023 (arXiv 2305.18290), equation 7: for a chosen answer w and a rejected one l,

    h = log pi(w) / pi_ref(w) - log pi(l) / pi_ref(l),    L = -log sigmoid(beta h)

A record is {"messages": [...] or "prompt": "...", "chosen": "...", "rejected": "..."}. Writes
OUT/model, a Hugging Face directory.
"""
import itertools
import os
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Dataset, collate, epoch_batches, micro_batches
from model import CheckpointError, Transformer, resolve
from shad import token_losses
from support import distributed
from support.checkpoints import save_model
from support.cli import HELP, DataError, option, parse_options, run_script
from support.files import claim
from support.readers import read_record, read_records, split_slice
from support.records import reading
from support.templates import Renderer


@dataclass
class Options:
    model: str = option("", "reference, to be tuned: a directory or hub id", required=True)
    data: str = option("", "pairs, JSON or JSON Lines; a slice: pairs.jsonl[:300]", required=True)
    out: str = option("", "directory for model/", required=True)
    beta: float = option(0.1, "how far the model may move from the reference; smaller is farther")
    epochs: int = option(1, "epochs over the pairs", low=1)
    lr: float = option(1e-6, "learning rate, falling linearly to 0")
    batch_tokens: int = option(8192, "tokens per global batch, of both samples of a pair", low=1)
    micro_tokens: int = option(4096, "tokens per forward on one rank, padding included", low=1)
    max_length: int = option(2048, "pairs with a longer sample are dropped, in tokens", low=2)
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    shard: str = option("auto", "split the model over the ranks; auto: with several GPUs",
                        choices=["auto", "yes", "no"])
    dtype: str = option("auto", HELP["dtype"], choices=["auto", "float32", "bfloat16"])
    seed: int = option(0, "seed of the batch order")


def read_pairs(path: str):
    """Yield two samples per record of a file: the prompt with its chosen answer, then rejected."""
    name, first, last = split_slice(path)
    for where, record in itertools.islice(read_records(name), first, last):
        with reading(where, 'a pair is {"messages" or "prompt", "chosen", "rejected"}'):
            prompt = record.get("messages") or record["prompt"]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            for key in ("chosen", "rejected"):
                messages = [*prompt, {"role": "assistant", "content": record[key]}]
                sample = read_record({"tools": record.get("tools"), "messages": messages}, 0)
                for message in sample.messages[:-1]:
                    message.scored = False
                yield sample


def backward(model, dataset: Dataset, batch, lengths, reference, options: Options):
    """Forward and backward of this rank's share of a global batch, an array of pairs.

    Returns sums over its pairs, (2,): of the losses, and of those whose h is above 0.
    """
    sums = torch.zeros(2, device=model.device)
    for pairs in micro_batches(batch, lengths, options.micro_tokens, *distributed.rank_and_world()):
        rows = np.concatenate([2 * pairs, 2 * pairs + 1])       # the chosen, then the rejected
        tokens, targets, _ = collate(dataset, rows, device=sums.device)         # (2 * pairs, T)
        with distributed.mixed_precision(sums.device):
            log_probs = -model(tokens, targets).sum(1)                          # (2 * pairs,)
        if not len(pairs):      # one row with nothing to score: all ranks must go backward together
            log_probs.sum().backward()
            continue
        chosen, rejected = log_probs.view(2, -1) - reference[pairs].T           # (pairs,) each
        h = chosen - rejected
        losses = -F.logsigmoid(options.beta * h)
        (losses.sum() / len(batch)).backward()
        sums += torch.stack([losses.detach(), h > 0]).sum(1)
    return sums


def train_dpo(model: Transformer, dataset: Dataset, options: Options) -> list:
    """Tune a model in place on samples 2p (chosen) and 2p + 1 (rejected) of each pair p.

    Returns (loss, share of the pairs whose chosen answer is ahead) of each step's batch.
    """
    lengths = dataset.lengths.reshape(-1, 2)                                        # (pairs, 2)
    kept = np.flatnonzero(lengths.min(1))               # a sample that was dropped has length 0
    if not len(kept):
        raise DataError(f"no pair has both samples within {options.max_length} tokens; "
                        "raise --max-length.")
    lengths = 2 * lengths.max(1)                                        # as they are padded

    # log pi_ref of every answer, before the reference is tuned
    losses = token_losses(model, dataset, options.micro_tokens, "losses of the reference")
    sums = np.concatenate([[0], losses.cumsum(dtype=np.float64)])[dataset.output_starts]
    reference = torch.from_numpy(-np.diff(sums)).to(model.device, torch.float32).view(-1, 2)

    batches = []
    for epoch in range(options.epochs):
        batches += epoch_batches(lengths, kept, options.batch_tokens, options.seed, epoch)
    means = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    bar = tqdm(batches, "dpo", unit="step", disable=distributed.rank_and_world()[0] > 0)
    for step, batch in enumerate(bar):
        optimizer.param_groups[0]["lr"] = options.lr * (1 - step / len(batches))
        sums = backward(model, dataset, batch, lengths, reference, options)
        distributed.all_reduce_gradients(model)
        distributed.clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distributed.sum_over_ranks(sums)
        means.append((sums / len(batch)).tolist())
        bar.set_postfix(loss=f"{means[-1][0]:.3f}", ahead=f"{means[-1][1]:.0%}")
    return means


def main():
    options = parse_options(Options, __doc__)
    device = distributed.init_distributed(options.dtype)
    path = resolve(options.model)
    if os.path.exists(os.path.join(options.out, "model", "config.json")):
        raise DataError(f"{options.out}/model already holds a trained model; "
                        "choose another --out, or remove it.")
    distributed.on_rank_0(claim, options.out, ["model"], "baselines.dpo", False)
    dataset = Dataset(
        read_pairs(options.data), Renderer(path, options.template), options.max_length)
    shard = partial(distributed.shard_model, device=device, choice=options.shard)
    model = Transformer.from_pretrained(path, device=device, shard=shard)
    means = train_dpo(model, dataset, options)
    distributed.on_rank_0(claim, options.out, ["model"], "baselines.dpo")
    save_model(model, path, os.path.join(options.out, "model"))
    if distributed.rank_and_world()[0] == 0:
        print(f"\ndpo: {len(means)} steps; of the last batch loss {means[-1][0]:.3f}, the chosen "
              f"answer ahead in {means[-1][1]:.0%} of the pairs\nwrote {options.out}/model. Next:\n"
              f"  python -m baselines.reference --model {options.model} "
              f"--minus {options.out}/model --data TRAIN.json --out REWARDS")


if __name__ == "__main__":
    run_script(main, CheckpointError)
