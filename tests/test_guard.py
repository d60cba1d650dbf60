"""Nothing of the user's is harmed, and no run is lost: folders, locks, full disks."""
import json
import math
import os
import sys

import pytest
import torch

import shad
import train
from processes import call, in_float32, printed, start, wait_until
from runs import content, labelling, training
from runs import work as work  # a fixture
from support import checkpoints, files
from support.cli import DataError
from tiny import apigen, make_model, read_lines, write
from toy import reproduce


def assert_refused(result, *words):
    code, text = result
    assert code == 2, text
    assert "Traceback" not in text, text
    sentence = text.strip().split("\n")[-1]
    assert sentence.startswith(("train.py: ", "shad.py: ", "eval.py: ")), text
    assert all(word in sentence for word in words), text


def temporary(folder):
    return [path for path in content(folder) if ".tmp" in path]


# --------------------------------------------------------------------------------------------------
# Whose a file or a folder is

@pytest.mark.parametrize("script, name", [
    ("shad", "parts/a"), ("shad", "summary.json"), ("shad", "labels.html.tmp"),
    ("train", "model/b"), ("train", "model/config.json"), ("train", "model.tmp/b"),
    ("train", "metrics.jsonl"), ("eval", "summary.json"), ("eval", "outputs.0.jsonl")])
def test_what_a_script_did_not_make_stays_and_is_named(work, tmp_path, script, name):
    os.makedirs((tmp_path / name).parent, exist_ok=True)
    write(tmp_path / name, "the user's")
    before = content(tmp_path)
    arguments = {"shad": labelling(work, tmp_path), "train": training(work, tmp_path),
                 "eval": ["eval", "toy", "--model", work / "model", "--out", tmp_path]}[script]
    assert_refused(call(work, *arguments), str(tmp_path / name.split("/")[0]), "--out")
    assert content(tmp_path) == before


@pytest.mark.parametrize("out", ["", "file", "file/below", "loop", "dangling"])
def test_what_can_be_no_folder_is_refused_before_any_work(monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "file", "theirs")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    with pytest.raises(DataError, match=f"'{out}' is no folder|could not be written"):
        files.claim(out, ["model"], "train.py", create=out == "file/below")
    assert sorted(os.listdir()) == ["dangling", "file", "loop"]


def test_a_marker_that_is_a_link_is_not_followed(tmp_path):
    write(tmp_path / "theirs", "theirs")
    os.symlink("theirs", tmp_path / files.MARKER)
    with pytest.raises(DataError, match="is a link"):
        files.claim(str(tmp_path), ["model"], "train.py")
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_other_files_in_the_same_folder_do_not_matter(work, tmp_path):
    write(tmp_path / "notes.txt", "the user's")
    code, text = call(work, *training(work, tmp_path, "--method", "sft"))
    assert code == 0, text
    assert (tmp_path / "notes.txt").read_text() == "the user's"


def test_a_file_of_another_evaluation_is_not_replaced(work, tmp_path):
    arguments = ["eval", "loss", "--model", work / "model", "--out", tmp_path, "--data"]
    write(work / "other.json", apigen(4))
    for _ in range(2):
        code, text = call(work, *arguments, work / "data.json")
        assert code == 0, text
    before = content(tmp_path)
    assert_refused(call(work, *arguments, work / "other.json"), "summary.json", "data.json")
    assert content(tmp_path) == before


def test_the_small_reproduction_replaces_only_its_own(tmp_path):
    files.claim(str(tmp_path / "labels"), ["labels.safetensors"], "shad.py")
    write(tmp_path / "labels" / "labels.safetensors", "hours of work")
    with pytest.raises(DataError, match="labels is there already"):
        reproduce.reproduce(str(tmp_path))
    assert content(tmp_path / "labels")["labels.safetensors"] == b"hours of work"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_others_is_neither_removed_nor_packed(tmp_path):
    for name in ("step-00000001", "step-00000003.tmp"):
        os.makedirs(tmp_path / "checkpoints" / name)
        write(tmp_path / "checkpoints" / name / "a", "the user's")
    before = content(tmp_path)
    model = make_model(60)
    arguments = (model, torch.optim.AdamW(model.parameters()), {}, 1)
    checkpoints.save_checkpoint(str(tmp_path), 2, *arguments)
    with pytest.raises(DataError, match="step-00000003.tmp is in the way"):
        checkpoints.save_checkpoint(str(tmp_path), 3, *arguments)
    checkpoints.save_checkpoint(str(tmp_path), 4, *arguments)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "step-00000001", "step-00000003.tmp", "step-00000004"]
    assert before.items() <= content(tmp_path).items()


def test_only_marked_folders_are_removed(tmp_path):
    ours = str(tmp_path / "ours")
    for _ in range(2):
        files.make_folder(ours, "train.py")
    write(tmp_path / "ours" / "a", "")
    os.makedirs(tmp_path / "ours" / "b" / "c")
    os.symlink(ours, tmp_path / "link")
    write(tmp_path / "theirs", "")
    os.mkdir(tmp_path / "folder")
    write(tmp_path / "folder" / "a", "")
    for name in ("link", "theirs", "folder"):
        with pytest.raises(DataError, match=name):
            files.remove_folder(str(tmp_path / name))
    with pytest.raises(DataError, match="folder"):
        files.make_folder(str(tmp_path / "folder"), "train.py")
    files.remove_folder(ours)
    files.remove_folder(ours)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "theirs"]


def test_two_runs_into_one_folder(work, tmp_path):
    """The second is refused, until the first has ended, however it did."""
    arguments = training(work, tmp_path, "--method", "sft", "--resume", steps=100_000)
    process, = start(work, *arguments)
    running = wait_until((tmp_path / "metrics.jsonl").exists, process)
    assert running, printed(work)
    for other in (training(work, tmp_path), ["eval", "toy", "--model", work / "model",
                                             "--count", 1, "--out", tmp_path]):
        assert_refused(call(tmp_path.parent, *other), str(tmp_path), "another run is writing")
    process.kill()
    process.join()
    code, text = call(work, *training(work, tmp_path, "--method", "sft", "--resume"))
    assert code == 0, text


def test_without_locks_all_goes_on(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fcntl", None)         # as on Windows
    files.claim(str(tmp_path / "o"), ["a"], "train.py")
    assert files.read_marker(str(tmp_path / "o")) == {"a": "train.py"}


# --------------------------------------------------------------------------------------------------
# Full disks, and what cannot be written

def test_a_full_disk_at_the_end_leaves_nothing_half_written(work, tmp_path):
    size = os.path.getsize(work / "model" / "model.safetensors")
    arguments = training(work, tmp_path, "--method", "sft")
    result = call(work, *arguments, largest_file=size // 2)
    assert_refused(result, "model", "File too large", "step 3", "--resume")
    assert not temporary(tmp_path)
    code, text = call(work, *arguments, "--resume")
    assert code == 0, text
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 3


def test_a_full_disk_during_training_is_named_by_rank_0_alone(work, tmp_path):
    ranks = start(work, *training(work, tmp_path, "--method", "sft", steps=99), processes=2,
                  largest_file=1000)
    for process in ranks:
        process.join()
        assert process.exitcode == 2, printed(work)
    assert_refused((2, printed(work)), "metrics.jsonl could not be written (File too large)")
    assert "Traceback" not in (work / "log1").read_text()


def fail_to_save(monkeypatch):
    def save_file(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.save_file", save_file)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_model_that_cannot_be_saved_is_kept_in_a_checkpoint(monkeypatch, work, tmp_path):
    arguments = training(work, tmp_path / "out", "--method", "sft")
    monkeypatch.setattr(sys, "argv", in_float32("train", arguments))
    with monkeypatch.context() as full_disk:
        fail_to_save(full_disk)
        with pytest.raises(DataError, match="No space left.*keeps step 3.*--resume"):
            train.main()
    assert not temporary(tmp_path)
    assert checkpoints.complete_checkpoints(str(tmp_path / "out/checkpoints")) == ["step-00000003"]
    sys.argv.append("--resume")
    train.main()
    code, text = call(work, *training(work, tmp_path / "whole", "--method", "sft"))
    assert code == 0, text
    one, other = (content(tmp_path / name / "model") for name in ("out", "whole"))
    assert one == other


def test_labels_need_no_room_for_the_tuned_model(monkeypatch, capsys, work, tmp_path):
    fail_to_save(monkeypatch)
    monkeypatch.setattr(sys, "argv", in_float32("shad", labelling(work, tmp_path)))
    shad.main()
    assert "tuned model could not be kept" in capsys.readouterr().out
    assert (tmp_path / "labels.safetensors").exists()
    assert not temporary(tmp_path)


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_write_that_fails_names_its_file(tmp_path, mode):
    refused = pytest.raises(DataError, match="a could not be written .No space left")
    with refused, files.replacing(str(tmp_path / "a"), mode):
        raise OSError(28, "No space left on device")
    assert not os.listdir(tmp_path)


def test_json_that_is_written_is_json(tmp_path):
    files.write_json(str(tmp_path / "a"), {"auc": math.nan, "é\ud83d": [math.inf, 1.5]})
    text = (tmp_path / "a").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"auc": None, "é\ud83d": [None, 1.5]}


def test_the_closing_message_needs_no_token_of_a_group(work, tmp_path):
    result = call(work, *training(work, tmp_path, "--method", "rft", "--threshold", 1e6))
    assert result[0] == 0, result[1]
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["loss_reasoning"] is None
