"""What `--method rho1` and `--method rewardft` need: other models' losses of every output token.

    python -m baselines.reference --model TUNED --data train.json --out reference       # rho1
    python -m baselines.reference --model BASE --minus DPO_MODEL --data train.json --out rewards
    torchrun --nproc_per_node 8 -m baselines.reference --model ... --data ... --out ...

The first keeps the losses of a reference model, such as one fine-tuned on good data by train.py
(Rho-1, arXiv 2404.07965). The second keeps loss of --model - loss of --minus, which for the base
model and one that baselines/dpo.py made of it is a reward per token (arXiv 2404.12358),

    r = log pi_dpo - log pi_ref = loss_ref - loss_dpo.

Both write DIR/labels.safetensors; give DIR to train.py as --labels.
"""
import os
import shlex
from dataclasses import dataclass
from functools import partial

from data import Dataset
from model import CheckpointError, Transformer, resolve
from shad import save_labels, token_losses
from support.cli import HELP, DataError, option, parse_options, run_script
from support.distributed import (
    barrier,
    init_distributed,
    on_rank_0,
    rank_and_world,
    shard_model,
)
from support.files import claim


@dataclass
class Options:
    model: str = option("", "reference model: a Hugging Face directory or hub id", required=True)
    minus: str = option(None, "another model, whose losses are subtracted: rewards")
    data: list = option([], "training data, one or more files; a slice may follow: "
                            "train.json[:300]", required=True)
    out: str = option("", "directory for labels.safetensors", required=True)
    micro_tokens: int = option(4096, "tokens per forward on one rank, padding included", low=1)
    max_length: int = option(2048, "longer samples are dropped, in tokens", low=2)
    template: str = option("auto", "chat template", choices=["auto", "chatml", "plain"])
    native_calls: bool = option(False, "as train.py is to be given it")
    dtype: str = option("auto", HELP["dtype"], choices=["auto", "float32", "bfloat16"])
    shard: str = option("auto", "split the model over the ranks (FSDP2); auto: with several GPUs",
                        choices=["auto", "yes", "no"])


def main():
    options = parse_options(Options, __doc__)
    device = init_distributed(options.dtype)
    rank, _ = rank_and_world()
    paths = [resolve(path) for path in (options.model, options.minus) if path]
    if os.path.exists(os.path.join(options.out, "labels.safetensors")):
        raise DataError(f"{options.out}/labels.safetensors is there already; "
                        "choose another --out, or remove it.")
    barrier()                                       # every rank has looked
    on_rank_0(claim, options.out, ["labels.safetensors"], "baselines.reference", False)
    datasets = []
    for path in paths:
        datasets.append(Dataset.load(options.data, path, options.template, options.max_length,
                                     options.native_calls))
    dataset = datasets[0]
    if datasets[-1].fingerprint != dataset.fingerprint:
        raise DataError(f"{options.model} and {options.minus} have different tokenizers or chat "
                        "templates, so their losses cannot be compared token by token.")
    if rank == 0:
        print(dataset.describe())

    shard = partial(shard_model, device=device, choice=options.shard)
    losses = []
    for path in paths:
        model = Transformer.from_pretrained(path, device=device, shard=shard)
        losses.append(token_losses(model, dataset, options.micro_tokens, f"losses of {path}"))
        del model
    if rank > 0:
        return

    claim(options.out, ["labels.safetensors"], "baselines.reference")
    made_from = {"base_model": options.model}
    if options.minus:
        made_from["minus"] = options.minus
        save_labels(options.out, losses[0] - losses[1], dataset, made_from, "reward")
    else:
        save_labels(options.out, losses[0], dataset, made_from, "reference")
    native = "--native-calls " if options.native_calls else ""
    what = "reward" if options.minus else "loss"
    method = "rewardft" if options.minus else "rho1"
    mean = (losses[0] - losses[-1] if options.minus else losses[0]).mean()
    print(f"\nwrote {options.out}/labels.safetensors (mean {what} {mean:.3f} nats). Next:\n"
          f"  python train.py --model BASE --data {shlex.join(options.data)} "
          f"--max-length {options.max_length} --template {options.template} {native}"
          f"--method {method} --labels {options.out} --out OUT")


if __name__ == "__main__":
    run_script(main, CheckpointError)
