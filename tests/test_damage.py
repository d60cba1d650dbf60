"""Never a silent wrong result: numbers that are not finite, files that were damaged."""
import math
import os
import sys

import pytest
import torch

import shad
from data import Dataset
from model import Transformer
from processes import in_float32
from runs import content, labelling
from runs import work as work  # a fixture
from support import checkpoints, files
from support.cli import DataError
from tiny import make_model, write


def test_weights_that_are_not_finite_are_never_saved(work, tmp_path):
    model = make_model(60)
    for value, stored in ((math.inf, "float32"), (math.nan, "float32"), (1e5, "float16")):
        model.config.extra["torch_dtype"] = stored
        with torch.no_grad():
            model.model.norm.weight[3] = value
        with pytest.raises(DataError, match="step model.norm.weight is not finite; lower --lr"):
            checkpoints.save_last(str(tmp_path), 7, model, None, {}, 2, str(work / "model"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["the base model", "the tuned model"])
def test_losses_that_are_not_finite_are_no_labels(monkeypatch, work, tmp_path, name):
    compute = shad.sample_losses
    monkeypatch.setattr(sys, "argv", in_float32("shad", labelling(work, tmp_path)))

    def infinite_in_one(model, dataset, indices):
        losses = compute(model, dataset, indices)
        is_tuned = (tmp_path / "parts" / "tuned model").exists()
        if 5 in losses and is_tuned == (name == "the tuned model"):
            losses[5][0] = math.inf
        return losses

    monkeypatch.setattr(shad, "sample_losses", infinite_in_one)
    with pytest.raises(DataError, match=f"losses of {name}: not finite for sample '5'.*--lr"):
        shad.main()
    assert not (tmp_path / "labels.safetensors").exists()
    monkeypatch.setattr(shad, "sample_losses", compute)
    shad.main()                             # what is not finite was not kept
    assert (tmp_path / "labels.safetensors").exists()


def test_a_tuned_model_that_is_not_finite_is_refused(work, tmp_path):
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    model = Transformer.from_pretrained(str(work / "model"))
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    options = shad.Options(model="", data=[""], out=str(tmp_path))
    with pytest.raises(DataError, match="tuned model's .* not finite; lower --lr"):
        shad.tune(model, [dataset], options)


def damage(path, kind):
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        if kind == "empty":
            file.truncate(0)
        elif kind == "cut short":
            file.truncate(size - 1)
        elif kind == "zeros":
            file.write(bytes(size))
        else:
            file.seek(size // 2)
            byte = file.read(1)
            file.seek(size // 2)
            file.write(bytes([byte[0] ^ 1]))


DAMAGE = ["empty", "cut short", "zeros", "one bit"]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", ["tokens", "roles", "texts", "index", "info.json",
                                  files.CHECKSUMS])
def test_a_damaged_cache_is_made_again(monkeypatch, work, tmp_path, file, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def load():
        return Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)

    def as_lists(dataset):
        ids = [row.tolist() for row in dataset.ids]
        return ids, list(dataset.samples), dataset.roles.tolist(), dataset.fingerprint

    expected = as_lists(load())
    folder, = (path for path in (tmp_path / "shad-rft").iterdir() if path.is_dir())
    damage(folder / file, kind)
    assert as_lists(load()) == expected
    assert files.damaged_file(str(folder)) is None


def test_without_a_place_for_the_cache_samples_are_held_in_memory(monkeypatch, capsys, work):
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "data.json"))
    dataset = Dataset.load([str(work / "data.json")], str(work / "model"), "auto", 2048)
    assert len(dataset.samples) == 24
    assert "XDG_CACHE_HOME" in capsys.readouterr().err


@pytest.fixture(scope="module")
def labels(work):
    """The labels of an uninterrupted run, and what parts/ held at its end."""
    folders = []
    remove = shad.remove_folder
    shad.remove_folder = folders.append
    arguments = sys.argv
    sys.argv = in_float32("shad", labelling(work, work / "labels"))
    try:
        shad.main()
    finally:
        shad.remove_folder = remove
        sys.argv = arguments
    return content(work / "labels")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", ["base losses/0000.npy", "tuned losses/0001.npy",
                                  "tuned model/model.safetensors", "settings.json"])
def test_damaged_parts_are_made_again(monkeypatch, work, labels, tmp_path, file, kind):
    for name, found in labels.items():
        if name.startswith("parts") or name == files.MARKER:
            os.makedirs((tmp_path / name).parent, exist_ok=True)
            (tmp_path / name).write_bytes(found)
    damage(tmp_path / "parts" / file, kind)
    monkeypatch.setattr(sys, "argv", in_float32("shad", labelling(work, tmp_path)))
    try:
        shad.main()
    except DataError as e:                  # one bit of settings.json is another setting
        assert (file, kind) == ("settings.json", "one bit")
        assert "remove it" in str(e)
        return
    made = content(tmp_path)
    assert made["labels.safetensors"] == labels["labels.safetensors"]
    assert not (tmp_path / "parts").exists()


@pytest.fixture(scope="module")
def unfinished(work):
    """A run with a checkpoint of step 2 of 3."""
    model = Transformer.from_pretrained(str(work / "model"))
    optimizer = torch.optim.AdamW(model.parameters())
    out = str(work / "unfinished")
    checkpoints.save_checkpoint(out, 2, model, optimizer, {"seed": 0}, 2)
    return content(work / "unfinished")


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json", files.CHECKSUMS])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_checkpoint_of_any_kind_is_refused(work, unfinished, tmp_path, file, kind):
    for name, found in unfinished.items():
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        (tmp_path / name).write_bytes(found)
    model = Transformer.from_pretrained(str(work / "model"))
    optimizer = torch.optim.AdamW(model.parameters())
    assert checkpoints.load_checkpoint(str(tmp_path), model, optimizer, {"seed": 0}) == 2
    folder = tmp_path / "checkpoints" / "step-00000002"
    damage(folder / file, kind)
    if (file, kind) == (files.CHECKSUMS, "cut short"):
        return                              # it ends in a newline
    with pytest.raises(DataError, match=f"{folder} cannot be read.*; remove it"):
        checkpoints.load_checkpoint(str(tmp_path), model, optimizer, {"seed": 0})
    # a checkpoint under another's name, and checksums of nothing
    if (file, kind) == ("state.json", "empty"):
        (folder / file).write_text('{"step": 3, "run": {"seed": 0}}')
        files.write_checksums(str(folder))
        with pytest.raises(DataError, match="state.json is of step 3"):
            checkpoints.load_checkpoint(str(tmp_path), model, optimizer, {"seed": 0})
        (folder / files.CHECKSUMS).write_text("{}")
        assert files.damaged_file(str(folder)) == files.CHECKSUMS
    # the same without the checksums: an exception that is no Exception
    if file == "__0_0.distcp" and kind == "zeros":
        files.write_checksums(str(folder))
        with pytest.raises(DataError, match="remove it"):
            checkpoints.load_checkpoint(str(tmp_path), model, optimizer, {"seed": 0})


@pytest.mark.parametrize("text", ["", '{"step": 1}\n', '{"step": 1}\n{"step": 3}\n', "[]\n[]\n",
                                  '{"step": 1}\n{"st', "\ufeff{}\n{}\n", "[" * 9999])
def test_damaged_metrics_are_refused(tmp_path, text):
    path = write(tmp_path / "metrics.jsonl", text)
    with pytest.raises(DataError, match="metrics.jsonl does not hold .* 2 steps"):
        checkpoints.open_metrics(path, 2)
    os.remove(path)
    metrics, log = checkpoints.open_metrics(path, 2)
    log.close()
    assert metrics == []
