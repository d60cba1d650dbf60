"""labels.safetensors: what a method must know of each output token, and of which data that is.

    loss_difference, loss or reward   (output tokens,) float32, in data order
    offsets                           (samples + 1,) int64, where each sample's output tokens begin
    metadata                          hashes of the data, tokenizer and template; base model,
                                      threshold, seed
"""
import json
import os

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from support.cli import DataError
from support.files import replacing

# kind of labels: the name of the array, and the command that makes it
KINDS = {"shad": ("loss_difference", "shad.py"),
         "reference": ("loss", "python -m baselines.reference"),
         "reward": ("reward", "python -m baselines.reference --minus")}


def save_labels(directory, values, dataset, made_from: dict, kind="shad") -> None:
    """Write directory/labels.safetensors.

    values: (output tokens,) in data order, stored as float32. dataset: the Dataset they are of.
    made_from: what else goes into the metadata. kind: a key of KINDS.
    """
    metadata = {"shad": json.dumps(dataset.fingerprint | made_from)}
    name, _ = KINDS[kind]
    arrays = {name: values.astype(np.float32),
              "offsets": dataset.output_starts.astype(np.int64)}
    with replacing(os.path.join(directory, "labels.safetensors"), "wb") as file:
        file.write(save(arrays, metadata))


def read_labels(path: str, dataset, kind="shad"):
    """(values, threshold) in a file, or in the directory that holds it.

    values: (output tokens,) float32, of which only the slices that are asked for are read.
    threshold: 0.0 for other kinds than "shad". Raises DataError, naming what differs, for labels
    of another kind, or of other data, another tokenizer or template.
    """
    _, command = KINDS[kind]
    if os.path.isdir(path):
        path = os.path.join(path, "labels.safetensors")
    try:
        found, values, starts, made_from = open_labels(path)
        threshold = float(made_from["threshold"]) if found == "loss_difference" else 0.0
        if not np.isfinite(threshold) or not np.isfinite(values[:]).all():
            raise ValueError("not all of it is finite")
    except Exception as e:                      # safetensors raises its own type, and others
        raise DataError(f"{path} cannot be read as labels ({type(e).__name__}: {e}); "
                        f"make it with {command}.") from None
    check_labels(path, found, starts, made_from, dataset, kind)
    return values, threshold


def open_labels(path: str):
    """(name of the array, its values, offsets, metadata); raises whatever is wrong with a file."""
    file = safe_open(path, framework="numpy")
    made_from = json.loads(file.metadata()["shad"])
    [found] = set(file.keys()) - {"offsets"}
    values = file.get_slice(found)
    starts = file.get_tensor("offsets")
    if starts.ndim != 1 or starts.dtype != np.int64:
        raise ValueError("offsets is not one row of int64")
    if values.get_dtype() != "F32" or values.get_shape() != [starts[-1]]:
        raise ValueError(f"{found} is not float32 of as many tokens as offsets say")
    return found, values, starts, made_from


def check_labels(path: str, found: str, starts, made_from: dict, dataset, kind) -> None:
    """Raise DataError where a file's labels are not of this kind, or not of this dataset."""
    name, command = KINDS[kind]
    if found != name:
        raise DataError(f"{path} holds {found} per token where {name} is needed; "
                        f"make it with {command}.")
    differing = [k for k, value in dataset.fingerprint.items() if made_from.get(k) != value]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        raise DataError(f"{path} does not fit: its {' and '.join(differing)} {verb} from this "
                        f"run's; run {command} again with the same --data, --model, --template and "
                        "--native-calls.")
    if len(starts) != len(dataset.output_starts) or starts[0] != 0:
        raise DataError(f"{path} does not fit: it is of {len(starts) - 1} samples, not of "
                        f"{len(dataset.output_counts)}; run {command} again.")
    if not np.array_equal(starts, dataset.output_starts):
        i = int(np.flatnonzero(np.diff(starts) != dataset.output_counts)[0])
        raise DataError(f"{path} does not fit: sample {dataset.samples[i].id!r} is in only one of "
                        f"the two; use the --max-length that {command} was run with.")
