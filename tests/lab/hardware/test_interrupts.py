"""A signal ends every command with one line and the shell's code, and what was finished is kept."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wellcond.__main__ import main
from wellcond.lab.hardware.interrupts import Interrupted, ending_at_once, interruptible, take_back
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.training.checkpoint import Keeper
from wellcond.lab.training.progress import RunProgress, StepProgress

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAID = {"SIGINT": "interrupted", "SIGTERM": "asked to end (SIGTERM)", "SIGHUP": "its terminal is gone (SIGHUP)"}
# Seconds that nothing takes, on a busy machine either, but for a training that is `LONG`: what does has hung.
HUNG = 600
LONG = ["--train-images", "512", "--epochs", "40000", "--checkpoint-every", "0.1", "--quiet"]
# A comparison of one run, and so with one worker: each takes seconds to start.
ONE_WORKER = ["compare", *LONG, "--methods", "SGDM", "--lrs", "SGD=0.1", "--seeds", "1", "--jobs", "2"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "wellcond", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], ready: Callable[[], bool], number: int, group: bool = False) -> str:
    """Send a signal when the command has come so far; return the one line that it says."""
    until = time.monotonic() + HUNG
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    (os.killpg if group else os.kill)(process.pid, number)
    out, errors = process.communicate(timeout=HUNG)
    assert process.returncode == 128 + number, errors
    assert out == ""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    return lines[0]


def test_a_comparison_and_its_workers_end_with_their_terminal(tmp_path: Path) -> None:
    kept = tmp_path / "runs"
    line = ended(
        start(*ONE_WORKER, "--out", str(tmp_path)), lambda: any(kept.glob("*.ckpt")), signal.SIGHUP, group=True
    )
    assert line == (f"wellcond: {SAID['SIGHUP']}; 0 finished runs are kept in {tmp_path}; the same command continues.")
    assert any(kept.glob("*.ckpt"))


def epochs_logged(folder: Path) -> int:
    files = list(folder.glob("logs/*/metrics.csv"))
    if not files:
        return 0
    with files[0].open(newline="") as lines:
        return sum(bool(row.get("seconds")) for row in csv.DictReader(lines))


def test_several_processes_of_one_run_end_together_and_keep_it(tmp_path: Path) -> None:
    """That such a run goes on exactly is tested with torchrun."""
    command = ["train", *LONG, "--devices", "2", "--accelerator", "cpu", "--out", str(tmp_path)]
    # By the third epoch the run was kept after the first.
    line = ended(start(*command), lambda: epochs_logged(tmp_path) >= 3, signal.SIGTERM)
    assert line == "wellcond: asked to end (SIGTERM); the same command continues with what was last kept."
    assert not (tmp_path / "run.json").exists()
    (kept,) = tmp_path.glob("runs/*.ckpt")
    assert torch.load(kept, weights_only=True)["global_step"] >= 16


def signalled(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int) -> None:
    """Have this process get a signal in the first call of a method, after what that does."""
    method = getattr(owner, name)

    def act(*arguments: Any, **options: Any) -> Any:
        method(*arguments, **options)
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(owner, name, act)


def test_a_training_keeps_its_run_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--train-images", "128", "--epochs", "3", "--checkpoint-every", "0", "--quiet"]
    command += ["--out", str(tmp_path)]
    for number in (signal.SIGTERM, signal.SIGHUP):
        with monkeypatch.context() as patch:
            signalled(patch, Keeper, "_keep", number)
            assert main(command) == 128 + number
        # One line: what was kept of the first is neither damaged nor another run's for the second.
        kept = f"what was last kept of the run is in {tmp_path}"
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"wellcond: {SAID[number.name]}; {kept}; the same command continues.\n")
    assert main(command) == 0
    assert len(json.loads((tmp_path / "run.json").read_text())["epochs"]) == 3


@pytest.mark.parametrize("name", ["bench", "diagnose", "calibrate"])
def test_commands_that_keep_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    net = tmp_path / "net.pt"
    torch.save(initial_model("convnet", 1, 10, seed=0).state_dict(), net)
    out = ("--out", str(tmp_path / "new.pt"))
    commands = {
        "bench": ["bench", "--rounds", "3", "--model", "convnet", "--image-size", "8"],
        "diagnose": ["diagnose", "--steps", "3", "--out", str(tmp_path / "page")],
        "calibrate": ["calibrate", str(net), "--model", "convnet", "--what", "bn", "--batch-size", "8", *out],
    }
    signalled(monkeypatch, StepProgress, "advance", signal.SIGTERM)
    assert main(commands[name]) == 143
    said = capsys.readouterr()
    assert said.out == ""
    begun, line = said.err.splitlines()
    assert begun.split()[0] in ("timing", "diagnosing", "calibrating")
    assert line == "wellcond: asked to end (SIGTERM)."
    assert not (tmp_path / "new.pt").exists()


def test_a_reproduction_says_where_its_runs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signalled(monkeypatch, RunProgress, "advance", signal.SIGTERM)
    assert main(["reproduce", "4.1", "--scale", "smoke", "--quiet", "--out", str(tmp_path)]) == 143
    kept = len(list(tmp_path.glob("runs/*.json")))
    assert kept >= 1
    assert capsys.readouterr().err == (
        f"wellcond: asked to end (SIGTERM); {kept} finished runs are kept in {tmp_path}; the same command continues.\n"
    )


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(10)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_raises_and_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted) as caught, interruptible():
        send(number)
    assert caught.value.code == 128 + number
    assert str(caught.value) == SAID[number.name]
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_a_second_signal_ends_at_once_even_where_the_first_is_lost() -> None:
    code = (
        "import os, signal, sys, time\n"
        "from wellcond.lab.hardware.interrupts import interruptible\n"
        "with interruptible():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n"
        "        pass  # as a destructor would\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "wellcond: asked to end (SIGTERM).\n")


def test_a_handler_that_a_library_set_is_taken_back() -> None:
    def lose_and_take_back() -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        take_back()
        send(signal.SIGTERM)

    with pytest.raises(Interrupted), interruptible():
        lose_and_take_back()


def test_in_another_thread_nothing_is_handled() -> None:
    found = []

    def act() -> None:
        with ending_at_once(), interruptible():
            found.append([signal.getsignal(each) for each in SIGNALS])

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == [[signal.getsignal(each) for each in SIGNALS]]


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process = start(*ONE_WORKER, "--out", str(tmp_path))
    until = time.monotonic() + HUNG
    while not any(tmp_path.glob("runs/*.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    process.kill()
    # Their ends of the pipes are closed when they have ended; communicate waits for that.
    process.communicate(timeout=HUNG)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*.ckpt")}
    time.sleep(1)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*.ckpt")} == files
