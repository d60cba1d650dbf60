"""A model's and SHAD's files that are broken, hostile or of another kind: refused in one line."""
import contextlib
import json
import math
import os
import random
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

import shad
from data import Dataset
from model import CheckpointError, Config, Transformer
from support.cli import DataError
from test_fuzz import POINTER, mutations
from tiny import apigen, make_checkpoint, make_model, write

INDEX = "model.safetensors.index.json"


@pytest.fixture
def saved(tmp_path):
    """A tiny checkpoint in one file."""
    make_model(60).save_pretrained(str(tmp_path))
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """A tiny checkpoint in several files with an index."""
    make_model(60).save_pretrained(str(tmp_path), max_shard_bytes=20_000)
    return tmp_path


def refuse(folder, said):
    with pytest.raises(CheckpointError, match=said) as error:
        Transformer.from_pretrained(str(folder))
    assert str(folder) in str(error.value)


def change_config(folder, **changes):
    hf = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", hf | changes)


# --------------------------------------------------------------------------------------------------
# config.json

ODD = [None, True, False, -1, 0, 3, 1.5, 10**30, math.nan, math.inf, "", "many", [], [1], {},
       {"a": 1}]


@pytest.mark.parametrize("key, value, said", [
    ("vocab_size", 0, "vocab_size=0 in config.json"), ("vocab_size", "60", "vocab_size='60'"),
    ("vocab_size", 60.0, "vocab_size=60.0"), ("vocab_size", 10**12, "from 1 to 16777216"),
    ("vocab_size", True, "vocab_size=True"), ("hidden_size", None, "hidden_size=None"),
    ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000"),
    ("num_attention_heads", -4, "num_attention_heads=-4"),
    ("num_attention_heads", 64, "shape"), ("num_key_value_heads", 0, "num_key_value_heads=0"),
    ("head_dim", 3, "a head_dim of 3"), ("rms_norm_eps", "small", "rms_norm_eps='small'"),
    ("rms_norm_eps", -1e-6, "must be float, from 0.0 to 1.0"),
    ("rope_theta", math.nan, "rope_theta=nan"), ("rope_theta", math.inf, "rope_theta=inf"),
    ("rope_theta", 0, "rope_theta=0"), ("max_position_embeddings", 2.5, "embeddings=2.5"),
    ("tie_word_embeddings", "true", "must be bool"), ("attention_bias", 1, "attention_bias=1"),
    ("sliding_window", 0, "sliding_window=0"), ("torch_dtype", "int8", "torch_dtype='int8'"),
    ("dtype", "float8_e4m3fn", "'float32' or 'bfloat16'"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor=None"),
    ("rope_scaling", "llama3", "must be a dict"), ("rope_scaling", [1], "must be a dict"),
    ("layer_types", 7, "must be a list"), ("model_type", ["llama"], "not supported")])
def test_a_value_that_no_model_has_is_refused(saved, key, value, said):
    change_config(saved, **{key: value})
    refuse(saved, said)


def test_any_odd_value_is_refused_or_means_what_it_says():
    hf = make_model(60).config.to_hf(torch.float32)
    hf["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for key in [*hf, "layer_types", "rope_parameters", "quantization_config", "use_sliding_window",
                *hf["rope_scaling"]]:
        for value in ODD:
            changed = hf | {key: value}
            if key in hf["rope_scaling"]:
                changed = hf | {"rope_scaling": hf["rope_scaling"] | {key: value}}
            try:
                config = Config.from_hf(changed)
            except (ValueError, TypeError, AttributeError):     # one sentence, in from_pretrained
                continue
            json.loads(json.dumps(config.to_hf(torch.float32)))


def test_a_model_with_no_room_for_it_is_refused(saved):
    change_config(saved, hidden_size=2**18, intermediate_size=2**20, head_dim=64)
    refuse(saved, "no room|shape")


# --------------------------------------------------------------------------------------------------
# The index and the weights

@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "a/b", "..", "", 7,
                                  None, {}])
def test_an_index_cannot_leave_its_folder(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    write(sharded / INDEX, index)
    refuse(sharded, "index.json: weight_map|cannot be read")


@pytest.mark.parametrize("content", ["", "[]", "7", "{}", '{"weight_map": 7}', "{" * 9999,
                                     '{"weight_map": {}}', "\ud83d"])
def test_a_broken_index_is_refused(sharded, content):
    (sharded / INDEX).write_bytes(content.encode(errors="surrogatepass"))
    refuse(sharded, "index.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX])
def test_a_git_lfs_pointer_is_named_as_such(tmp_path, name):
    make_model(60).save_pretrained(
        str(tmp_path), max_shard_bytes=20_000 if name == INDEX else 2**30)
    (tmp_path / name).write_bytes(POINTER)
    refuse(tmp_path, f"{name} cannot be read .*git-lfs pointer: run git lfs pull")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(saved, value):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_tensors(tensors, saved / "model.safetensors")
    refuse(saved, "model.norm.weight holds numbers that are not finite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_of_another_kind_of_number_are_refused(saved, dtype):
    tensors = load_file(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_tensors(tensors, saved / "model.safetensors")
    refuse(saved, f"{name} is quantized")


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00004.safetensors"])
def test_mutated_files_of_a_model(sharded, name):
    """Nothing but a CheckpointError of one line, and soon."""
    rng = random.Random(name)
    path = sharded / name
    original = path.read_bytes()
    if name.endswith(".json"):
        cases = mutations(json.loads(original), rng, 120)
    else:
        cases = []
        for _ in range(60):
            places = sorted(rng.randrange(2000) for _ in range(2))
            cases.append(original[:places[0]] + bytes([rng.randrange(256)]) + original[places[1]:])
    for case in cases:
        path.write_bytes(case)
        start = time.process_time()
        with contextlib.suppress(CheckpointError):
            Transformer.from_pretrained(str(sharded))
        assert time.process_time() - start < 0.5, case[:500]


# --------------------------------------------------------------------------------------------------
# Labels

@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """(dataset, the arrays and the metadata of its labels)"""
    folder = tmp_path_factory.mktemp("labelled")
    make_checkpoint(folder / "model")
    file = write(folder / "data.json", apigen(6))
    dataset = Dataset.load([file], str(folder / "model"), "auto", 2048)
    starts = dataset.output_starts.astype(np.int64)
    difference = np.linspace(-1, 1, starts[-1], dtype=np.float32)
    metadata = dataset.fingerprint | {"base_model": "m", "threshold": 0.5, "seed": 0}
    return dataset, {"loss_difference": difference, "offsets": starts}, metadata


def save(folder, arrays, metadata):
    path = str(folder / "labels.safetensors")
    save_file(arrays, path, {"shad": json.dumps(metadata)})
    return path


def odd_arrays(arrays):
    """Labels with one thing wrong."""
    difference = arrays["loss_difference"]
    starts = arrays["offsets"]
    for value in (np.nan, np.inf, -np.inf):
        odd = difference.copy()
        odd[7] = value
        yield {"loss_difference": odd, "offsets": starts}
    for odd in (starts[:0], starts[1:], starts[None], starts.astype(np.float32), starts + 1,
                starts[::-1].copy(), np.array(starts[-1]), np.append(starts, starts[-1])):
        yield {"loss_difference": difference, "offsets": odd}
    for odd in (difference[1:], difference[None], difference.astype(np.float64),
                difference.astype(np.int32), difference[:0]):
        yield {"loss_difference": odd, "offsets": starts}
    yield {"loss_difference": difference}


def test_labels_that_are_odd_in_any_way_are_refused(labelled, tmp_path):
    dataset, arrays, metadata = labelled
    loaded = shad.load_labels(save(tmp_path, arrays, metadata), dataset)
    assert np.array_equal(loaded.difference[:], arrays["loss_difference"])
    for odd in odd_arrays(arrays):
        with pytest.raises(DataError, match=r"labels.safetensors .*shad\.py"):
            shad.load_labels(save(tmp_path, odd, metadata), dataset)
    for threshold in (math.nan, math.inf, "low", None):
        with pytest.raises(DataError, match="labels.safetensors"):
            shad.load_labels(
                save(tmp_path, arrays, metadata | {"threshold": threshold}), dataset)


def test_labels_are_written_readable_for_all(labelled, tmp_path):
    dataset, arrays, metadata = labelled
    shad.save_labels(str(tmp_path), arrays["loss_difference"], dataset, metadata)
    assert os.listdir(tmp_path) == ["labels.safetensors"]
    assert os.stat(tmp_path / "labels.safetensors").st_mode & 0o444 == 0o444
    assert shad.load_labels(str(tmp_path), dataset).threshold == 0.5
