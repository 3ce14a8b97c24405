"""Kept runs: what is read back is what a run can have written; two commands do not work in one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.__main__ import main
from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.locks import NAME, locked
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.records import EpochRecord, RunRecord, RunSpec, RunStore
from wellcond.lab.runs.settings import Settings

SPEC = RunSpec(
    method=METHODS["SGDM"],
    lr=0.1,
    seed=0,
    steps=20,
    epochs=2,
    stats_every=5,
    solve_every=25,
    model="convnet",
    batch_size=32,
    augmentation="none",
    train_images=320,
    validation_images=32,
    data="data",
    environment="here",
)
EPOCHS = (
    EpochRecord(10, 1.0, 0.5, 80.0, 0.4, 81.0, 0.4, {"top-5": 99.0}, train_score=85.0),
    EpochRecord(20, 2.0, 0.4, 100.0, None, 0.0, None),
)
RECORD = RunRecord(EPOCHS, False, 1, {"whitening": {"weights": 2}}, ("said",), 0.01, memory=Memory(1, 2, 3, 4))


def test_a_record_comes_back_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(tmp_path)
    for record in (
        RECORD,
        replace(RECORD, epochs=EPOCHS[:1], diverged=True),
        replace(RECORD, epochs=(), diverged=True),
    ):
        store.save(SPEC, record)
        assert store.load(SPEC) == record
    assert capsys.readouterr().err == ""


def test_a_record_from_before_there_were_scores_of_training_is_read(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save(SPEC, RECORD)
    content = json.loads(store.path(SPEC).read_text())
    for epoch in content["result"]["epochs"]:
        del epoch["train_score"]
    store.path(SPEC).write_text(json.dumps(content))
    assert store.load(SPEC) == replace(RECORD, epochs=tuple(replace(epoch, train_score=None) for epoch in EPOCHS))


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
NO_NUMBERS = (None, "90", True, [90.0], {})
BAD: dict[str, tuple[Any, ...]] = {
    "steps": (0, -1, 10.5, 21, *NO_NUMBERS),
    "seconds": (-1.0, *NOT_FINITE, *NO_NUMBERS),
    "train_loss": (*NOT_FINITE, *NO_NUMBERS),
    "validation_score": (500.0, -0.1, 100.1, *NOT_FINITE, *NO_NUMBERS),
    "test_score": (500, -3.0, *NOT_FINITE, *NO_NUMBERS),
    "train_score": (100.5, *NOT_FINITE, "1", True),
    "validation_loss": (*NOT_FINITE, "1", True),
    "test_loss": (*NOT_FINITE, [1.0]),
    "metrics": ({"top-5": None}, {"top-5": float("nan")}, [1], None),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_epoch_that_no_run_measures_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    store = RunStore(tmp_path)
    store.save(SPEC, RECORD)
    content = json.loads(store.path(SPEC).read_text())
    content["result"]["epochs"][1][name] = value
    store.path(SPEC).write_text(json.dumps(content))
    assert store.load(SPEC) is None
    said = capsys.readouterr().err
    assert said.startswith(f"wellcond: note: {store.path(SPEC)} is not what a run keeps ({name}")
    assert said.endswith(f"the run {SPEC.name} begins anew\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("diverged", "no"),
        ("diverged", None),
        ("threads", 0),
        ("threads", 1.5),
        ("evaluation_seconds", float("nan")),
        ("memory", {"parameters": 1, "buffers": 2, "optimizer_state": 3, "peak": -4}),
        ("memory", [1]),
        ("warnings", [1]),
        ("warnings", None),
        ("transforms", []),
        ("extras", None),
        ("epochs", EPOCHS[:1]),
        ("epochs", []),
        ("epochs", None),
        ("epochs", [[1]]),
        ("a_new_one", 1),
    ],
)
def test_so_is_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any) -> None:
    store = RunStore(tmp_path)
    store.save(SPEC, RECORD)
    content = json.loads(store.path(SPEC).read_text())
    content["result"][name] = [asdict(e) for e in value] if isinstance(value, tuple) else value
    store.path(SPEC).write_text(json.dumps(content))
    assert store.load(SPEC) is None
    assert "is not what a run keeps (" in capsys.readouterr().err


scores = st.floats(0, 100)
losses = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(scores, scores, losses, st.none() | losses), min_size=20, max_size=20))
def test_what_a_run_can_measure_is_accepted(figures: list[tuple[float, float, float, float | None]]) -> None:
    epochs = tuple(
        EpochRecord(step + 1, 0.1 * step, loss, validation, other, test, other, {"AP50": test})
        for step, (validation, test, loss, other) in enumerate(figures)
    )
    replace(RECORD, epochs=epochs).check(steps=20)


# two commands -------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from wellcond.lab.runs.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_at_work_is_refused_until_its_holder_ends_in_any_way(tmp_path: Path) -> None:
    for end in ("close", "kill"):
        process = hold(tmp_path)
        refusal = rf"--out .*: another wellcond command \(process {process.pid} on "
        with pytest.raises(LabError, match=refusal), locked(tmp_path):
            pass
        with locked(tmp_path, here=False):  # another rank of the same command
            pass
        if end == "kill":
            process.kill()
        process.communicate()
        assert (tmp_path / NAME).exists()  # stale, and no obstacle
        with locked(tmp_path):
            assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--seeds", "1", "--epochs", "1", "--methods", "SGDM"],
        ["train", "--epochs", "1"],
        ["reproduce", "4.1", "--scale", "smoke"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_keeps_runs_takes_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    process = hold(tmp_path)
    try:
        assert main([*command, "--out", str(tmp_path), "--quiet"]) == 2
    finally:
        process.communicate()
    said = capsys.readouterr()
    assert said.err.startswith(
        f"wellcond: error: --out {tmp_path}: another wellcond command (process {process.pid} on "
    )
    assert said.err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


def test_a_lock_file_of_anything_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("[1, 2")
    with locked(tmp_path):
        pass


SWEPT = st.lists(
    st.tuples(
        st.sampled_from(["damping", "weight_decay", "nesterov", "norm.group_size"]),
        st.one_of(st.floats(1e-6, 1e3), st.booleans(), st.none(), st.text("ab/ .", min_size=1, max_size=300)),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@given(swept=SWEPT)
def test_what_was_swept_is_in_the_name_and_nowhere_else(
    tmp_path_factory: pytest.TempPathFactory, swept: tuple[tuple[str, object], ...]
) -> None:
    store, other = RunStore(tmp_path_factory.mktemp("runs")), replace(SPEC, swept=swept)
    assert other.key() == SPEC.key()
    assert other == SPEC
    assert all(name in other.name for name, _ in swept)
    assert swept[0][0].replace("_", "-") in store.path(other).name
    # The one is the other's run, whichever was kept first.
    store.save(other, RECORD)
    assert store.load(SPEC) == RECORD
    store.save(SPEC, RECORD)
    assert len(list(store.folder.iterdir())) == 1


def test_trials_of_a_sweep_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    plan = make_plan(Settings(methods=("W-SGDM",), sweeps=(("damping", (0.01, 0.1)), ("batch_size", (16, 32)))))
    names = {RunStore(tmp_path).path(spec).name.rpartition("-")[0] for spec in plan.specs()}
    assert len(names) == len(plan.specs())
    assert any("damping0.01-batch-size16-seed0" in name for name in names)


def test_a_wider_grid_and_another_baseline_keep_their_runs():
    """What else is tried, what a run is set beside and how it is described are no part of it; what trains it is."""
    method = SPEC.method
    beside = replace(method, lrs=(*method.lrs, 1.0), baseline="AdamW", description="plain")
    assert replace(SPEC, method=beside).key() == SPEC.key()
    assert RunStore(Path()).path(replace(SPEC, method=beside)) == RunStore(Path()).path(SPEC)
    other = replace(method, options=(("momentum", 0.8),))
    assert replace(SPEC, method=other).key() != SPEC.key()
