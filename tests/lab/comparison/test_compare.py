"""A comparison as a whole: choosing, equal time, resuming after any end, and several workers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from forked import forking
from wellcond.__main__ import main
from wellcond.lab.comparison.compare import compared, run_comparison
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan, regrouped
from wellcond.lab.report.findings import describe_comparison
from wellcond.lab.runs.records import EpochRecord, RunRecord, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.progress import RunProgress

pytestmark = pytest.mark.usefixtures("quick_collections")

SMALL = ["compare", "--train-images", "128", "--epochs", "2", "--seeds", "1", "--methods", "SGDM,W-SGDM", "--quiet"]
RUNS = 2 * 3  # methods, lrs


def numbers(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Return what the runs of all epochs measured, without the times."""
    kept = {}
    for file in folder.glob("runs/*-8steps-*.json"):
        epochs = json.loads(file.read_text())["result"]["epochs"]
        kept[file.name] = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in epochs]
    return kept


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a comparison that was not interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*SMALL, "--out", str(folder)]) == 0
    return folder


# Seconds that nothing takes, on a busy machine either: what does has hung.
LONG = 600


# From inside, after the fourth run: from outside, a busy machine might let it finish before.
DYING = """
import os, signal
import torch
from wellcond.__main__ import main
from wellcond.lab.runs.records import RunStore

# As the process of this suite: the number of threads is part of what determines a run.
torch.set_num_threads(1)

save, saved = RunStore.save, []

def save_and_die(self, spec, record):
    save(self, spec, record)
    saved.append(spec)
    if len(saved) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

RunStore.save = save_and_die
main(arguments)
"""


# As Ctrl-C, to every process of the group, when a worker has done the fourth run.
INTERRUPTED = """
import os, signal, sys
from wellcond.__main__ import main
from wellcond.lab.runs.records import RunStore

save, saved = RunStore.save, []

def interrupt_and_save(self, *arguments):
    if len(saved) == 3:
        os.killpg(0, signal.SIGINT)
    saved.append(self)
    save(self, *arguments)

if __name__ == "__main__":
    RunStore.save = interrupt_and_save
    sys.exit(main(sys.argv[1:]))
"""


def interrupt_workers(folder: Path) -> subprocess.CompletedProcess[str]:
    """Let a comparison of two workers interrupt itself."""
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *SMALL, "--jobs", "2", "--out", str(folder)],
        capture_output=True,
        text=True,
        # As the process of this suite: the number of threads is part of what determines a run.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        timeout=LONG,
        check=False,
    )


def test_every_run_is_kept_under_a_readable_name(finished):
    names = sorted(file.name for file in finished.glob("runs/*.json"))
    assert len(numbers(finished)) == RUNS
    assert all(re.fullmatch(r"(W-)?SGDM-lr0\.\d+-seed0-\d+steps-[0-9a-f]{8}\.json", name) for name in names)


def test_the_same_command_again_runs_nothing(finished, monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    before = (finished / "results.json").read_text()
    assert main([*SMALL, "--out", str(finished)]) == 0
    assert (finished / "results.json").read_text() == before


def test_a_killed_comparison_continues_to_the_same_numbers(finished, tmp_path):
    command = [*SMALL, "--out", str(tmp_path)]
    process = forking().Process(target=exec, args=(DYING, {"__name__": "__main__", "arguments": command}))
    process.start()
    process.join(LONG)
    assert process.exitcode == -signal.SIGKILL
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*.json")}
    assert len(kept) == 4 < RUNS
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(finished)
    assert all((tmp_path / "runs" / name).stat().st_mtime_ns == changed for name, changed in kept.items())


def test_damaged_runs_are_run_again(finished, tmp_path):
    (tmp_path / "runs").mkdir()
    for file in finished.glob("runs/*.json"):
        (tmp_path / "runs" / file.name).write_text(file.read_text())
    cut, empty, other, deep, *whole = sorted(tmp_path.glob("runs/*-8steps-*.json"))
    cut.write_text(cut.read_text()[: cut.stat().st_size // 2])
    empty.write_text("")
    other.write_text("[1]")
    deep.write_text("[" * 100_000)
    assert whole
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(finished)


def assert_interrupted_after_three_runs(folder: Path, code: int, errors: str) -> None:
    assert code == 130, errors
    assert errors == f"wellcond: interrupted; 3 finished runs are kept in {folder}; the same command continues.\n"
    assert len(list(folder.glob("runs/*.json"))) == 3
    assert not list(folder.glob("runs/.*"))


def test_interrupting_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    from wellcond.lab.training.module import Training

    train = Training.training_step

    def training_step(self, *arguments):
        if len(list(tmp_path.glob("runs/*.json"))) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train(self, *arguments)

    monkeypatch.setattr(Training, "training_step", training_step)
    code = main([*SMALL, "--out", str(tmp_path)])
    assert_interrupted_after_three_runs(tmp_path, code, capsys.readouterr().err)


def test_interrupting_workers_keeps_what_is_finished(tmp_path):
    ended = interrupt_workers(tmp_path)
    assert_interrupted_after_three_runs(tmp_path, ended.returncode, ended.stderr)


@pytest.fixture
def _quick_workers(monkeypatch):
    """Fork the workers from a process that has imported what takes seconds; others begin them as users do."""
    context = forking()
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)


@pytest.mark.usefixtures("_quick_workers")
def test_workers_find_the_numbers_of_one_process(finished, tmp_path):
    # Two workers of one thread each, as this suite's process has one.
    assert main([*SMALL, "--out", str(tmp_path), "--jobs", "2"]) == 0
    by_name = [{name.rsplit("-", 1)[0]: epochs for name, epochs in numbers(f).items()} for f in (finished, tmp_path)]
    assert by_name[0] == by_name[1]
    assert "2 runs at once" in " ".join(json.loads((tmp_path / "results.json").read_text())["notes"])


def test_a_failing_run_is_named_with_its_traceback(finished, tmp_path, monkeypatch, capsys):
    from wellcond.lab.training.runner import Runner

    original = Runner.run

    def run(self, spec):
        if spec.method.name == "W-SGDM" and spec.lr == 0.1:
            raise RuntimeError("no such luck")
        return original(self, spec)

    monkeypatch.setattr(Runner, "run", run)
    assert main([*SMALL, "--out", str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("wellcond: error: the run W-SGDM lr 0.1 seed 0 (8 steps) failed:\nTraceback")
    assert f"RuntimeError: no such luck\n3 finished runs are kept in {tmp_path}.\n" in errors
    assert len(list(tmp_path.glob("runs/*.json"))) == 3
    monkeypatch.undo()
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(finished)


@pytest.mark.usefixtures("_quick_workers")
def test_a_worker_that_fails_ends_the_comparison(tmp_path, monkeypatch, capsys):
    # The workers read the data again: it is gone by then.
    from wellcond.lab.engines import local as workers

    def start_without_data(process):
        connection, settings, *rest = process._args
        process._args = (connection, replace(settings, data="gone.parquet"), *rest)
        process.start()

    monkeypatch.setattr(workers, "_start_deaf_to_interrupts", start_without_data)
    one = ["--methods", "SGDM", "--lrs", "SGD=0.03"]
    assert main([*SMALL, *one, "--out", str(tmp_path), "--jobs", "2"]) == 1
    errors = capsys.readouterr().err
    assert "the run SGDM lr 0.03 seed 0" in errors
    assert "there is no gone.parquet" in errors


@pytest.fixture
def plan():
    return make_plan(Settings(methods=("SGDM", "W-SGDM"), seeds=2, epochs=1, train_images=320))


def record(plan, seconds):
    epoch = EpochRecord(plan.steps, seconds, 0.1, 90.0, 0.5, 90.0, 0.5)
    return RunRecord(epochs=(epoch,), diverged=False, threads=1, transforms={}, warnings=())


def test_time_ratio_is_the_median_over_seed_and_lr(plan):
    seconds = {"SGDM": [1.0, 1.0, 1.0], "W-SGDM": [1.5, 1.7, 30.0]}
    runs = {
        plan.spec(METHODS[name], lr, seed): record(plan, seconds=each)
        for name in seconds
        for lr, each in zip(METHODS[name].lrs, seconds[name], strict=True)
        for seed in range(2)
    }
    assert compared(plan, runs).methods["W-SGDM"].time_ratio == pytest.approx(1.7)


def test_time_ratio_also_counts_the_seeds_that_do_not_choose_where_chosen_places_differ():
    plan = make_plan(Settings(methods=("SGDM", "W-SGDM"), seeds=6, trial_seeds=1, epochs=1, train_images=320))
    best = {"SGDM": 0, "W-SGDM": 2}
    runs = {}
    for name, place in best.items():
        for at, lr in enumerate(METHODS[name].lrs):
            for seed in range(6) if at == place else (0,):
                score = 90.0 if at == place else 80.0
                # The first seed's runs took any time; the others' are as they are.
                seconds = 1.0 if name == "SGDM" else 1.5 if seed else 9.0
                epoch = EpochRecord(plan.steps, seconds, 0.1, score, 0.5, score, 0.5)
                runs[plan.spec(METHODS[name], lr, seed)] = RunRecord((epoch,), False, 1, {}, ())
    assert compared(plan, runs).methods["W-SGDM"].time_ratio == pytest.approx(1.5)


def test_equal_time_trains_as_many_steps_as_fit(plan, tmp_path, monkeypatch):
    asked = []

    def execute(plan, specs, store):
        for spec in specs:
            asked.append(spec)
            cost = {"SGDM": 1.0, "W-SGDM": 2.0}[spec.method.name]
            epoch = EpochRecord(spec.steps, cost * spec.steps, 0.1, 90.0, 0.5, 90.0, 0.5)
            yield spec, RunRecord((epoch,), diverged=False, threads=1, transforms={}, warnings=())

    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", execute)
    comparison = run_comparison(plan, RunStore(tmp_path), RunProgress(Console(), quiet=True))
    assert {name: [timed.steps for timed in found.timed.values()] for name, found in comparison.methods.items()} == {
        "SGDM": [],
        "W-SGDM": [5],
    }
    main_runs, equal = asked[:12], asked[12:]
    assert {spec.steps for spec in main_runs} == {10}
    assert [(spec.method.name, spec.seed, spec.steps) for spec in equal] == [("W-SGDM", 0, 5), ("W-SGDM", 1, 5)]
    assert [spec.method.name for spec in main_runs[:2]] == ["SGDM", "W-SGDM"]  # methods take turns
    assert [spec.seed for spec in main_runs] == [0] * 6 + [1] * 6


def test_equal_time_can_be_left_out(plan, tmp_path, monkeypatch):
    asked = []

    def execute(plan, specs, store):
        for spec in specs:
            asked.append(spec)
            yield spec, record(plan, seconds=2.0 if spec.method.name == "W-SGDM" else 1.0)

    monkeypatch.setattr("wellcond.lab.comparison.compare.execute", execute)
    progress = RunProgress(Console(), quiet=True)
    comparison = run_comparison(plan, RunStore(tmp_path), progress, equal_time=False)
    assert {spec.steps for spec in asked} == {plan.steps}
    assert progress.finished == progress.total == len(asked) == 12
    assert all(not found.timed for found in comparison.methods.values())
    assert comparison.methods["W-SGDM"].time_ratio == 2.0
    summary = summarize(comparison)
    assert [method.equal_time for method in summary.methods] == [None, None]
    assert not any("equal time" in line for line in describe_comparison(summary))


def test_other_groups_share_the_images(plan):
    grouped = regrouped(plan, 4)
    assert grouped.task is plan.task
    assert grouped.settings.ghost_batch == 4
    spec = plan.spec(METHODS["SGDM"], 0.1, seed=1)
    assert grouped.spec(METHODS["SGDM"], 0.1, seed=1) == replace(spec, ghost_batch=4)
    with pytest.raises(LabError, match=r"--ghost-batch must be at most the batch size \(32\), got 33"):
        regrouped(plan, 33)


def test_every_field_of_a_run_is_in_its_file_name(plan):
    spec = plan.spec(METHODS["SGDM"], 0.1, 0)
    changed = {
        "stats_every": 9,
        "model": "resnet8",
        "data": "other",
        "environment": "other",
        "batch_size": 9,
        "ghost_batch": 2,
    }
    names = {RunStore(Path()).path(replace(spec, **{field: value})).name for field, value in changed.items()}
    names.add(RunStore(Path()).path(spec).name)
    assert len(names) == len(changed) + 1


def test_fewer_seeds_can_choose_the_trials(tmp_path, capsys):
    """Every trial is trained with the first seeds, the chosen one of each method with all, also in equal time."""
    settings = Settings(
        methods=("SGDM", "W-SGDM"), train_images=128, epochs=2, seeds=3, trial_seeds=1, stats_every=2, solve_every=4
    )
    plan, store = make_plan(settings), RunStore(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    progress = RunProgress(Console(stderr=True), quiet=True)
    comparison = run_comparison(plan, store, progress)
    for found in comparison.methods.values():
        alone = replace(plan, settings=replace(settings, seeds=1, trial_seeds=None))
        assert found.chosen == compared(alone, comparison.records).methods[found.method.name].chosen
        assert {len(runs) for trial, runs in found.trials.items() if trial != found.chosen} == {1}
        assert [run.epochs[-1].steps for run in found.runs] == [8] * 3
    assert len(comparison.methods["W-SGDM"].timed[1.0].runs) == 3
    summary = summarize(comparison)
    assert summary.methods[1].final_difference.count == 3
    # The grid's figures are all of the seeds that chose.
    for method, found in zip(summary.methods, comparison.methods.values(), strict=True):
        point = next(point for point in method.lr_grid if point.lr == method.lr)
        assert point.validation_score == round(found.runs[0].epochs[-1].validation_score, 4)
    assert main(["compare", "--seeds", "2", "--trial-seeds", "3", "--out", str(tmp_path)]) == 2
    assert "--trial-seeds must be at most the number of seeds (2), got 3" in capsys.readouterr().err
