"""Flags, terminals, signals, and the environment: each oddity is one sentence, said once."""
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import shad
import train
from processes import ROOT, launch, printed, start, wait_until
from runs import training
from runs import work as work  # a fixture
from support import checkpoints, distributed
from support.cli import DataError, parse_options, printable
from tiny import CAN_SHARD, apigen, write


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


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path, closed):
    path = tmp_path / "file"
    code = ("import os\nfrom support.cli import *\ndef main():\n"
            f"    file = open({str(path)!r}, 'w')\n"
            "    print('out')\n    print('error', file=sys.stderr)\n    os.write(2, b'native')\n"
            "    file.write('own')\n    raise DataError('refused')\nrun_script(main)")
    numbers = " ".join(f"{number}>&-" for number in closed)
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {numbers}"
    process = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stdout == ("" if 1 in closed else "out\n")
    assert "Traceback" not in process.stderr
    assert path.read_text() == "own"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} data.py --model toy --data 'toy[:400]' --json"
    script = f"{command} | head -c 60 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 141
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr


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
     "WORLD_SIZE=x"),
    ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     "a rank beyond the last.*RANK=5, WORLD_SIZE=2")])
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
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("these tests run under nohup, so scripts ignore it too")
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
