"""Nothing of the user's is harmed, and no run is lost: folders, locks, full disks, signals."""
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import shad
import train
from data import Dataset
from model import Transformer
from processes import ROOT, call, launch, printed, start, wait_until
from support import checkpoints, distributed, files
from support.cli import DataError, parse_options, printable
from tiny import CAN_SHARD, apigen, make_checkpoint, make_model, read_lines, write


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with model/ and data.json."""
    work = tmp_path_factory.mktemp("work")
    make_checkpoint(work / "model")
    write(work / "data.json", apigen(24))
    return work


def training(work, out, *more, steps=3):
    return ["train", "--model", work / "model", "--data", work / "data.json", "--out", out,
            "--steps", steps, "--lr", "1e-3", "--batch-tokens", 400, "--micro-tokens", 200, *more]


def labelling(work, out, *more):
    return ["shad", "--model", work / "model", "--data", work / "data.json", "--out", out,
            "--shuffle", 12, "--lr", "1e-3", "--batch-tokens", 400, "--micro-tokens", 200, *more]


def content(folder):
    """{path: bytes} of all files in a folder."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


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
        train.reproduce(str(tmp_path))
    assert content(tmp_path / "labels")["labels.safetensors"] == b"hours of work"


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


def fail_to_save(monkeypatch):
    def save_file(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.save_file", save_file)


def test_a_model_that_cannot_be_saved_is_kept_in_a_checkpoint(monkeypatch, work, tmp_path):
    arguments = training(work, tmp_path / "out", "--method", "sft")
    monkeypatch.setattr(sys, "argv", [str(a) for a in arguments])
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
    monkeypatch.setattr(sys, "argv", [str(a) for a in labelling(work, tmp_path)])
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


# --------------------------------------------------------------------------------------------------
# Never a silent wrong result

def test_weights_that_are_not_finite_are_never_saved(work, tmp_path):
    model = make_model(60)
    for value, stored in ((math.inf, "float32"), (math.nan, "float32"), (1e5, "float16")):
        model.config.extra["torch_dtype"] = stored
        with torch.no_grad():
            model.model.norm.weight[3] = value
        with pytest.raises(DataError, match="after step 7 model.norm.weight is not finite.*--lr"):
            checkpoints.save_model(str(tmp_path), 7, model, None, {}, 2, str(work / "model"))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["the base model", "the tuned model"])
def test_losses_that_are_not_finite_are_no_labels(monkeypatch, work, tmp_path, name):
    compute = shad.sample_losses
    monkeypatch.setattr(sys, "argv", [str(a) for a in labelling(work, tmp_path)])

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
        shad.tune(model, dataset, options)


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
    assert "XDG_CACHE_HOME" in capsys.readouterr().out


@pytest.fixture(scope="module")
def labels(work):
    """The labels of an uninterrupted run, and what parts/ held at its end."""
    folders = []
    remove = shad.remove_folder
    shad.remove_folder = folders.append
    arguments = sys.argv
    sys.argv = [str(a) for a in labelling(work, work / "labels")]
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
    monkeypatch.setattr(sys, "argv", [str(a) for a in labelling(work, tmp_path)])
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


# --------------------------------------------------------------------------------------------------
# Flags, terminals, signals, environment

@pytest.mark.parametrize("cls, arguments", [
    (train.Options, "--lr inf"), (train.Options, "--lr nan"), (train.Options, "--lr 1e30"),
    (train.Options, "--steps 1000000000000000000"), (train.Options, "--epochs 1000000000"),
    (train.Options, "--warmup 2"), (train.Options, "--warmup inf"),
    (train.Options, "--threshold nan"), (shad.Options, "--threshold inf"),
    (shad.Options, "--threshold -inf"), (shad.Options, "--micro-tokens 1" + 30 * "0"),
    (shad.Options, "--batch-tokens " + 5000 * "9"), (shad.Options, "--seed -1")])
def test_numbers_that_make_no_sense_are_refused(capsys, cls, arguments):
    with pytest.raises(SystemExit) as error:
        parse_options(cls, "", ["--model", "m", "--data", "d", "--out", "o", *arguments.split()])
    assert error.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("cls", [train.Options, shad.Options])
def test_a_threshold_may_be_negative(cls):
    options = parse_options(
        cls, "", ["--model", "m", "--data", "d", "--out", "o", "--threshold", "-0.5"])
    assert options.threshold == -0.5


@pytest.mark.parametrize("text, shown", [
    ("\x1b[31mred\x07", r"\x1b[31mred\x07"), ("a\nb\r", r"a\nb\r"), ("é ⏎ 漢", "é ⏎ 漢"),
    ("\u202egnp", r"\u202egnp"), ("\ud83d", r"\ud83d")])
def test_nothing_but_text_reaches_a_terminal(text, shown):
    assert printable(text) == shown


def run_python(code, **environment):
    """(exit code, errors) of some code, in an environment with these variables besides."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    process = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=ROOT, capture_output=True,
        text=True, encoding="utf-8")
    return process.returncode, process.stderr


def test_a_terminal_that_lacks_a_character_gets_another():
    code = ("from support.cli import *\ndef main():\n    print('⏎')\n"
            "    raise DataError('sample \\x1b[1m é \\ud83d')\nrun_script(main)")
    assert run_python(code, PYTHONIOENCODING="ascii") == (2, "-c: sample \\x1b[1m \\xe9 \\ud83d\n")


def test_rank_0_speaks_for_all_and_another_only_when_it_is_alone():
    code = "from support.cli import *\ndef main():\n    raise DataError('no')\nrun_script(main)"
    began = time.perf_counter()
    assert run_python(code, RANK="1") == (2, "-c: no\n")
    assert time.perf_counter() - began > 3
    code = ("from dataclasses import make_dataclass\nfrom support.cli import *\n"
            "parse_options(make_dataclass('O', [('n', int, option(1, 'n'))]), '', ['--n', '-1'])")
    assert run_python(code, RANK="1") == (2, "")
    assert "--n must be at least 0" in run_python(code, RANK="0")[1]


@pytest.mark.skipif(not CAN_SHARD, reason="slow to end on older versions of torch")
def test_under_torchrun_the_sentence_is_said_once(work, tmp_path):
    write(tmp_path / "model", "in the way")
    process = launch(*training(work, tmp_path), processes=2)
    text, _ = process.communicate()
    assert text.count("choose another --out") == 1, text


@pytest.mark.parametrize("environment, named", [
    ({"WORLD_SIZE": "2"}, "no RANK or MASTER_ADDR"), ({"RANK": "0"}, "no WORLD_SIZE"),
    ({"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     "WORLD_SIZE=x")])
def test_variables_of_torchrun_that_are_half_set_are_named(monkeypatch, environment, named):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=named):
        distributed.init_distributed()


@pytest.mark.parametrize("script", ["train", "shad", "eval"])
def test_ctrl_c_while_torch_is_imported(script):
    process = launch(script, "--help")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate()
    assert "Traceback" not in text
    assert process.returncode in (0, 130, -signal.SIGINT), text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_told_to_stop_says_what_it_keeps(work, tmp_path, number):
    arguments = training(work, tmp_path, "--method", "rft", steps=100_000)
    write(work / "much.json", apigen(2000))
    arguments[arguments.index(work / "data.json")] = work / "much.json"
    process, = start(work, *arguments)
    parts = tmp_path / "labels" / "parts"
    assert wait_until((parts / "base losses" / "0000.npy").exists, process), printed(work)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0, printed(work)
    assert f"told to stop: {parts} keeps what SHAD has done" in printed(work)
    assert "Traceback" not in printed(work)

    out = tmp_path / "sft"
    process, = start(work, *training(work, out, "--method", "sft", steps=100_000))
    metrics = out / "metrics.jsonl"
    assert wait_until(lambda: metrics.exists() and metrics.stat().st_size, process), printed(work)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0, printed(work)
    assert "checkpoints holds step" in printed(work)


def test_a_run_under_nohup_outlives_its_terminal(monkeypatch):
    handlers = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
    monkeypatch.setattr(signal, "getsignal", handlers.get)
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    checkpoints.on_stop("handler", signal.SIGINT)
    assert handlers == {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: "handler",
                        signal.SIGINT: "handler"}
