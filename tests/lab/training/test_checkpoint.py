"""Unfinished runs: what is kept of them, that they go on bit for bit, and what becomes of files that do not fit."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from stopped_runs import COMPARED, compare, stop_after, uncounted

from forked import forking
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.budget import Budget
from wellcond.lab.training.checkpoint import CheckpointFile, Checkpointing
from wellcond.lab.training.run_memory import RunMemory
from wellcond.lab.training.runner import Runner

CPU = torch.device("cpu")
KILLS = 5


@pytest.fixture(autouse=True, scope="module")
def _memory_is_not_counted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunMemory, "of", uncounted)
        yield


@pytest.fixture(scope="module")
def plan():
    return make_plan(Settings(epochs=3, train_images=96, validation_images=64, test_images=64, seeds=1))


@pytest.fixture
def spec(plan):
    return plan.spec(METHODS["W-SGDM"], 0.1, seed=0)


def measured(record):
    """Return what does not hang on time."""
    epochs = tuple(replace(epoch, seconds=0.0) for epoch in record.epochs)
    return replace(record, epochs=epochs, evaluation_seconds=None, memory=None)


@pytest.fixture(scope="module")
def uninterrupted(plan):
    return measured(Runner(plan.task, CPU).run(plan.spec(METHODS["W-SGDM"], 0.1, seed=0)))


def continued(plan, checkpoints, spec):
    return measured(Runner(plan.task, CPU, checkpoints=checkpoints).run(spec))


# The whole lab's methods are stopped within an epoch in test_run.py; here are the other places.
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 8], ids="after {} steps of 3 epochs of 3".format)
def test_a_run_goes_on_wherever_it_was_stopped(plan, spec, uninterrupted, tmp_path, steps, capsys):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, steps)
    assert checkpoints.file(spec).step() == steps
    assert continued(plan, checkpoints, spec) == uninterrupted
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["SGDM", "MBN", "SSN", "BRN", "CBN", "MABN", "Lookahead", "KN-fixed"])
def test_methods_with_schedules_and_state_go_on_between_epochs(plan, tmp_path, name):
    spec = plan.spec(METHODS[name], METHODS[name].lrs[0], seed=1)
    whole = measured(Runner(plan.task, CPU).run(spec))
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, 6)
    assert continued(plan, checkpoints, spec) == whole


def test_a_run_that_is_stopped_again_and_again_goes_on(plan, spec, uninterrupted, tmp_path):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    for steps in (2, 3, 7):
        stop_after(plan.task, checkpoints, spec, steps)
    assert continued(plan, checkpoints, spec) == uninterrupted


def test_a_run_of_one_step_an_epoch_and_one_that_ends_within_an_epoch_go_on(plan, tmp_path):
    short = make_plan(replace(plan.settings, train_images=32, epochs=4))
    for some, steps, stopped in ((short, 4, 2), (plan, 8, 7), (plan, 7, 6)):
        spec = some.spec(METHODS["SGDM"], 0.1, 0, steps)
        whole = measured(Runner(some.task, CPU).run(spec))
        checkpoints = Checkpointing(tmp_path, every=0.0)
        stop_after(some.task, checkpoints, spec, stopped)
        assert continued(some, checkpoints, spec) == whole
        assert whole.epochs[-1].steps == steps


def test_the_seconds_go_on_too(plan, spec, tmp_path):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, 5)
    kept = torch.load(checkpoints.file(spec).path)["callbacks"]["Measure"]["seconds"]
    record = Runner(plan.task, CPU, checkpoints=checkpoints).run(spec)
    assert record.epochs[0].seconds < kept < record.epochs[1].seconds


def test_nothing_is_kept_before_its_time(plan, spec, tmp_path):
    Runner(plan.task, CPU, checkpoints=Checkpointing(tmp_path, every=3600.0)).run(spec)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_leaves_its_record_alone(plan, spec, tmp_path):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, 5)
    record = Runner(plan.task, CPU, checkpoints=checkpoints).run(spec)
    store = RunStore(tmp_path)
    assert store.checkpoint(spec).exists()
    store.save(spec, record)
    assert list(tmp_path.iterdir()) == [store.path(spec)]


def damaged(path):
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path):
    path.write_bytes(b"")


def of_something_else(path):
    torch.save([1, 2, 3], path)


def of_another_run(path):
    kept = torch.load(path)
    kept["wellcond"]["key"] = "0" * 64
    torch.save(kept, path)


def of_another_network(path):
    kept = torch.load(path)
    kept["state_dict"] = {"model.other": torch.zeros(1)}
    torch.save(kept, path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged, "is damaged and is ignored"),
        (emptied, "is damaged and is ignored"),
        (of_something_else, "is damaged and is ignored"),
        (of_another_run, "is of another run and is ignored"),
        (of_another_network, "cannot be continued and is ignored"),
    ],
)
def test_a_checkpoint_that_is_none_of_this_run_is_ignored_with_a_line(
    plan, spec, uninterrupted, tmp_path, change, said, capsys
):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, 4)
    change(checkpoints.file(spec).path)
    assert continued(plan, checkpoints, spec) == uninterrupted
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wellcond: note: ")
    assert said in line
    assert "begins anew" in line


def test_a_run_that_was_begun_elsewhere_is_named(plan, spec, tmp_path, capsys):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, replace(spec, environment="another machine"), 4)
    assert checkpoints.file(spec).step() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "was begun with other settings, versions or machines and is not continued" in line


def test_an_error_of_a_run_that_goes_on_is_not_taken_for_the_checkpoints(plan, spec, tmp_path, monkeypatch, capsys):
    checkpoints = Checkpointing(tmp_path, every=0.0)
    stop_after(plan.task, checkpoints, spec, 4)

    def fail(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("wellcond.lab.training.module.Training.training_step", fail)
    with pytest.raises(RuntimeError, match="no such luck"):
        continued(plan, checkpoints, spec)
    assert capsys.readouterr().err == ""
    assert checkpoints.file(spec).step() == 4


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_seconds_between_checkpoints_are_checked(value):
    with pytest.raises(LabError, match="--checkpoint-every must be 0 or more seconds"):
        Settings(checkpoint_every=value)


def test_a_budget_ends_where_the_run_does():
    def epochs():
        return Epochs(lambda epoch, first: (4 * epoch + batch for batch in range(first, 4)), 4)

    def steps(budget):
        return [list(budget) for _ in range(budget.epochs)]

    assert steps(Budget(epochs(), 10)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    budget = Budget(epochs(), 10)
    budget.resume_at(5)
    assert [list(budget), list(budget)] == [[5, 6, 7], [8, 9]]
    budget = Budget(epochs(), 7)
    budget.resume_at(6)
    assert list(budget) == [6]


def test_a_comparison_that_is_killed_again_and_again_gives_the_same_table(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = compare(str(tmp_path / "whole"), keep_every=3600.0)
    chance, killed, folder = random.Random(0), 0, tmp_path / "killed"
    while killed < KILLS or not list(folder.glob("*.ckpt")):
        process = forking().Process(target=compare, args=(str(folder),))
        process.start()
        # After so many changes, however long they take on a busy machine.
        before = newest(folder)
        for _ in range(chance.randint(1, 12)):
            while newest(folder) == before and process.is_alive():
                time.sleep(0.001)
            before = newest(folder)
        assert process.is_alive(), f"it ended after {killed} kills"
        process.kill()
        process.join()
        killed += 1
    went_on = []
    original = CheckpointFile.step

    def step(self):
        went_on.append(original(self))
        return went_on[-1]

    monkeypatch.setattr(CheckpointFile, "step", step)
    finished = compare(str(folder))
    assert max(went_on) > 0, "no run was continued from inside"
    assert {spec: measured(run) for spec, run in finished.records.items()} == {
        spec: measured(run) for spec, run in whole.records.items()
    }
    assert table(finished) == table(whole)
    assert sorted(file.suffix for file in folder.iterdir()) == [".json"] * 6


def newest(folder: Path) -> int:
    """Return when something was last kept."""
    return max((file.stat().st_mtime_ns for file in folder.glob("*.*") if not file.name.startswith(".")), default=0)


def table(comparison):
    """Return what the table shows, but for what hangs on time."""
    shown = [asdict(method) for method in summarize(comparison).methods]
    assert [method["name"] for method in shown] == list(COMPARED.methods)
    names = ("lr", "lr_grid", "scores", "epochs_to_target", "early_difference", "final_difference", "diverged_runs")
    return [{name: method[name] for name in names} for method in shown]
