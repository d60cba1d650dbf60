"""Where the labels of each method of train.py come from; options: train.py's."""
import os
import shlex

import numpy as np
import torch

import shad
from baselines.regex_labels import regex_labels
from model import Transformer
from rft import METHODS, selection_threshold
from support.cli import DataError
from support.distributed import rank_and_world, sum_over_ranks


def check_labels(options) -> None:
    """Raise DataError where --labels is missing and cannot be made here, or where it is no use."""
    _, kind = METHODS[options.method]
    if kind in ("reference", "reward") and not options.labels:
        minus = "" if kind == "reference" else " --minus DPO_MODEL"
        model = "TUNED_MODEL" if kind == "reference" else options.model
        raise DataError(f"--method {options.method} needs --labels DIR, which is made by: "
                        f"python -m baselines.reference --model {model}{minus} "
                        f"--data {shlex.join(options.data)} --out DIR")
    if kind == "regex" and options.labels:
        raise DataError(f"--method {options.method} makes its labels itself; leave out --labels.")


def method_labels(options, dataset, device, shard):
    """What the method must know of each output token: an array, or what reads slices like one.

    bool, True for reasoning tokens: by shad.py, which runs first where there are no labels yet, or
    by regular expressions. float32: a reference model's losses, or rewards. None for sft, unless it
    is given SHAD's labels to report.
    """
    _, kind = METHODS[options.method]
    if kind == "regex":
        return regex_labels(dataset)
    if kind == "shad" and not options.labels:
        options.labels = os.path.join(options.out, "labels")
        if not os.path.exists(os.path.join(options.labels, "labels.safetensors")):
            model = Transformer.from_pretrained(options.model, device=device, shard=shard)
            shad_options = shad.Options(
                model=options.model, data=options.data, out=options.labels,
                micro_tokens=options.micro_tokens, max_length=options.max_length,
                template=options.template, native_calls=options.native_calls, dtype=options.dtype,
                seed=options.seed)
            shad.run(shad_options, dataset, model)
            del model
            if rank_and_world()[0] == 0:
                print(f"wrote {options.labels}/labels.safetensors and labels.html")
    if not options.labels:
        return None
    labels = shad.load_labels(options.labels, dataset, kind or "shad")
    if isinstance(labels, shad.Labels) and options.threshold is not None:
        labels.threshold = options.threshold
    return labels


def select_tokens(first_pass, pieces, totals, dataset, batch, options) -> list:
    """Which tokens rho1 selects: (B, T) bool per micro-batch. Sets totals.weight to their number.

    first_pass: (losses, reference losses, is_output) per micro-batch of this rank, (B, T) each;
    pieces: their samples. The threshold is that of the global batch, of which every rank gathers
    all excess losses.
    """
    counts = dataset.output_counts[batch]
    starts = dict(zip(batch.tolist(), np.cumsum(counts) - counts, strict=True))
    excess = torch.zeros(totals.tokens, device=first_pass[0][0].device)
    by_piece = []
    for (losses, reference, is_output), indices in zip(first_pass, pieces, strict=True):
        by_piece.append(losses.detach() - reference)                                # (B, T)
        for b, i in enumerate(indices):
            own = by_piece[-1][b][is_output[b]]
            excess[starts[i]:starts[i] + len(own)] = own
    sum_over_ranks(excess)              # each token is filled in by one rank and 0 on the others
    threshold = selection_threshold(excess, options.keep_share)
    totals.weight = (excess >= threshold).sum()
    return [piece >= threshold for piece in by_piece]
