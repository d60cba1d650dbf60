"""Labels for other trainers: what shad.py --export writes, one JSON object per sample."""
import json
import os

import numpy as np

from support.files import claim, release, replacing


def claim_export(path: str, create: bool = True) -> None:
    """See support.files.claim; the folder is the one that the file will lie in."""
    folder, name = os.path.split(path)
    claim(folder or ".", [name], "shad.py --export", create)


def export_labels(path: str, dataset, labels) -> None:
    """Write a JSON Lines file, one object per kept sample of a Dataset.

    labels: a shad.Labels. Each object has
      id               of the sample
      input_ids        (T) of the whole conversation, as train.py renders it
      output_mask      (T) 1 for output tokens, which carry loss
      is_reasoning     (T) 1 for the reasoning tokens among them
      loss_difference  per output token, in nats
      outputs          per output turn, without its end: its "text" and its "spans", [start, end,
                       "reasoning" or "boilerplate"], in characters, which tile the text
    """
    claim_export(path)
    with replacing(path) as file:
        for i in dataset.kept:
            here = slice(dataset.output_starts[i], dataset.output_starts[i + 1])
            is_output = dataset.is_output[i]
            is_reasoning = np.zeros(len(is_output), np.int8)
            is_reasoning[is_output] = labels[here]
            record = {
                "id": dataset.samples[i].id,
                "input_ids": dataset.ids[i].tolist(),
                "output_mask": is_output.astype(int).tolist(),
                "is_reasoning": is_reasoning.tolist(),
                "loss_difference": labels.difference[here].astype(float).round(6).tolist(),
                "outputs": output_spans(dataset, i, labels[here])}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    release(os.path.dirname(path) or ".")
    print(f"\nwrote {path}, one line per sample: {len(dataset.kept):,}")


def output_spans(dataset, i: int, is_reasoning) -> list[dict]:
    """The output turns of sample i with the spans of equal label; is_reasoning: (its tokens,)."""
    outputs = []
    labels = iter(is_reasoning)
    for turn in filter(None, dataset.renderer.output_pieces(dataset.samples[i])):
        spans = []
        start = 0
        *said, _ = turn
        for piece in said:
            label = "reasoning" if next(labels) else "boilerplate"
            end = start + len(piece)
            if spans and spans[-1][2] == label:
                spans[-1][1] = end
            elif piece:                 # a token may be a part of the character before
                spans.append([start, end, label])
            start = end
        next(labels)                    # the end of the turn
        outputs.append({"text": "".join(said), "spans": spans})
    return outputs
