"""`wellcond train`: what it writes, that it goes on in the same files, and that its weights begin other runs."""

from __future__ import annotations

import csv
import json
import re
import sys
import time

import pytest
import torch
from stopped_runs import stop_at, uncounted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wellcond.__main__ import main
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.launch import Launched, launched
from wellcond.lab.hardware.machine import training_device
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.logs import _wait_for_a_later_name
from wellcond.lab.training.run_memory import RunMemory

pytestmark = pytest.mark.usefixtures("quick_collections")

SMALL = ["--epochs", "2", "--train-images", "128", "--val-images", "64", "--test-images", "64", "--log-every", "2"]
SCORES = ("train_score", "validation_score", "test_score")
TRAIN = ["train", "--method", "W-SGDM", "--lr", "0.03", "--seed", "3", *SMALL]


@pytest.fixture(autouse=True, scope="module")
def _memory_is_not_counted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMemory, "of", uncounted)
        yield


def rows(folder):
    (file,) = folder.glob("logs/*/metrics.csv")
    with file.open(newline="") as lines:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def board(folder):
    (log,) = folder.glob("logs/*")
    events = EventAccumulator(str(log))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    assert main([*TRAIN, "--out", str(folder), "--save", str(folder / "model.pt")]) == 0
    return folder


def test_the_loss_is_logged_every_few_steps_and_the_rest_after_every_epoch(finished):
    logged = rows(finished)
    assert [row["step"] for row in logged if "loss" in row] == [2, 4, 6, 8]
    after = [row for row in logged if "train_loss" in row]
    assert [row["step"] for row in after] == [4, 8]
    record = json.loads((finished / "run.json").read_text())
    for row, epoch in zip(after, record["epochs"], strict=True):
        for name in (*SCORES, "train_loss", "validation_loss", "test_loss", "seconds"):
            assert row[name] == pytest.approx(epoch[name], rel=1e-5)
        assert row["test_top-5"] == pytest.approx(epoch["metrics"]["top-5"], rel=1e-5)
        assert row["whitening/weights"] == record["transforms"]["whitening"]["weights"] > 0
    assert [row["next_lr"] for row in logged if "loss" in row][-1] == pytest.approx(0.0)


def test_tensorboard_has_the_same(finished):
    drawn, logged = board(finished), rows(finished)
    for name in ("loss", "next_lr", "train_loss", "train_score", "validation_score", "test_score", "whitening/weights"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-5, abs=1e-7)) for row in logged if name in row]
        assert drawn[name] == expected


def test_run_json_says_what_was_run(finished):
    run = json.loads((finished / "run.json").read_text())
    assert run["command"].startswith("wellcond train --method W-SGDM --lr 0.03 --seed 3")
    assert (run["run"]["lr"], run["run"]["seed"], run["run"]["steps"]) == (0.03, 3, 8)
    assert run["task"]["kind"] == "classification"
    assert run["processes"] == 1
    assert set(run["versions"]) >= {"torch", "lightning", "wellcond"}


def test_the_weights_begin_another_run(finished, tmp_path):
    saved = torch.load(finished / "model.pt")
    assert all(isinstance(value, torch.Tensor) for value in saved.values())
    constant = ["--schedule", "constant", "--lr", "1e-9", "--weights", str(finished / "model.pt")]
    assert main(["train", "--method", "SGDM", *SMALL, *constant, "--out", str(tmp_path), "--quiet"]) == 0
    first, last = (json.loads((folder / "run.json").read_text())["epochs"] for folder in (tmp_path, finished))
    # Another seed has other images, and running statistics move on; it would begin with a loss of ln 10 = 2.3.
    assert first[0]["train_loss"] == pytest.approx(last[-1]["train_loss"], rel=0.2)


def test_the_same_command_again_runs_nothing_and_can_save_the_weights(finished, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("the run was started")

    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    again = tmp_path / "again.pt"
    assert main([*TRAIN, "--out", str(finished), "--save", str(again)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"W-SGDM lr 0\.03 seed 3 \(8 steps\): test accuracy \d", out)
    assert str(again) in out
    saved, first = torch.load(again), torch.load(finished / "model.pt")
    assert all(torch.equal(saved[name], first[name]) for name in first)


@pytest.mark.parametrize("steps", [3, 4, 7])
def test_a_stopped_run_goes_on_in_the_same_files(finished, tmp_path, steps, capsys):
    command = [*TRAIN, "--out", str(tmp_path), "--checkpoint-every", "0"]
    with stop_at(steps):
        assert main(command) == 1
    assert "StoppedError" in capsys.readouterr().err
    assert main(command) == 0
    assert f"goes on after step {steps} of 8" in capsys.readouterr().err
    timeless = [[{**row, "seconds": 0} for row in rows(folder)] for folder in (finished, tmp_path)]
    assert timeless[0] == timeless[1]
    drawn, expected = board(tmp_path), board(finished)
    del drawn["seconds"], expected["seconds"]
    assert drawn == expected
    (ours,), (theirs,) = (list(folder.glob("runs/*.pt")) for folder in (tmp_path, finished))
    assert all(torch.equal(a, b) for a, b in zip(torch.load(ours).values(), torch.load(theirs).values(), strict=True))
    assert not list(tmp_path.glob("runs/*.ckpt"))


def test_progress_is_lines_where_there_is_no_terminal_and_none_if_quiet(tmp_path, capsys):
    assert main([*TRAIN, "--out", str(tmp_path)]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in errors] == ["epoch 1 of 2", "epoch 2 of 2"]
    assert "validation accuracy" in errors[0]
    assert main([*TRAIN, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    written, errors = capsys.readouterr()
    assert written.startswith("Written: ")
    assert errors == ""


def test_a_diverged_run_says_so(tmp_path, capsys):
    assert main(["train", *SMALL, "--lr", "1e30", "--out", str(tmp_path)]) == 0
    assert "diverged after" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["diverged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "SDGM"], "unknown method 'SDGM': did you mean 'SGDM'"),
        (["--lr", "-1"], "--lr must be a positive number, got -1"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--log-every", "0"], "--log-every must be a positive integer, got 0"),
        (["--save", "nowhere/model.pt"], "--save nowhere/model.pt: there is no folder nowhere"),
        (["--strategy", "dpp"], "unknown strategy 'dpp': did you mean 'ddp'"),
        (["--strategy", "fsdp"], "--strategy fsdp is for several processes: start them with --devices N or torchrun"),
        (["--devices", "0"], "--devices must be a positive integer, got 0"),
        (["--accelerator", "gpu"], "unknown accelerator 'gpu'"),
        (["--checkpoint-every", "-1"], "--checkpoint-every must be 0 or more seconds, got -1"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message, capsys):
    assert main(["train", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wellcond: error: {message}")


def test_a_missing_gpu_is_told_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", "--accelerator", "cuda"]) == 2
    assert capsys.readouterr().err == "wellcond: error: --accelerator cuda: torch finds no CUDA device here\n"
    assert main(["compare", "--precision", "16-mixed"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--precision 16-mixed needs a CUDA device" in line


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert main(["train", "--devices", "3"]) == 2
    assert "--devices must be at most the CUDA devices here (2), got 3" in capsys.readouterr().err
    monkeypatch.setattr("wellcond.lab.hardware.machine.launched", lambda: Launched(2, 4, local_rank=2, by="torchrun"))
    with pytest.raises(LabError, match="4 processes were started on this machine, which has 2"):
        training_device()


def test_devices_start_as_many_processes_of_the_same_command(monkeypatch):
    started = []

    def elastic_launch(config, program):
        return lambda *arguments: started.append((config.nproc_per_node, program, *arguments))

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", elastic_launch)
    assert main(["train", "--devices", "2", "--out", "some where"]) == 0
    assert started == [(2, sys.executable, "-m", "wellcond", "train", "--devices", "2", "--out", "some where")]


def test_slurm_says_which_process_this_is(monkeypatch):
    for name, value in (("NTASKS", 8), ("PROCID", 5), ("LOCALID", 1), ("NNODES", 2), ("JOB_NAME", "train")):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    here = launched()
    assert (here.rank, here.size, here.local_rank, here.nodes, here.on_this_machine) == (5, 8, 1, 2, 4)
    assert main(["reproduce", "4.1"]) == 2
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # an interactive allocation, where nobody started anything
    assert launched() == Launched()


def test_an_unknown_strategy_or_accelerator_is_no_setting():
    with pytest.raises(LabError, match="unknown strategy"):
        Settings(strategy="deepspeed")


def test_a_run_that_goes_on_within_the_same_second_is_read_after_its_beginning(tmp_path):
    """TensorBoard reads files by name: a process's tenth file of a second would come before its ninth."""
    begun = f"events.out.tfevents.{int(time.time()) + 1}.host.1.9"
    (tmp_path / begun).touch()
    (tmp_path / f"events.out.tfevents.{int(time.time())}.host.1.8").touch()
    _wait_for_a_later_name(tmp_path)
    assert not (tmp_path / f"events.out.tfevents.{int(time.time())}.host.1.8").exists()
    time.sleep(max(0.0, float(begun.split(".")[3]) - time.time()) + 0.01)
    _wait_for_a_later_name(tmp_path)
    assert int(time.time()) > int(begun.split(".")[3])
