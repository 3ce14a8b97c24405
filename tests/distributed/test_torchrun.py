"""The lab's commands in two processes, started by torchrun, against one process; exit codes where a rank fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lab_worker
import pytest
import torch
import torch.distributed as dist

from wellcond.__main__ import main
from wellcond.lab.methods.method import METHODS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

SHARE = 16  # of a batch of 32
TIMEOUT = 900


def torchrun(*arguments: str) -> tuple[int, str]:
    """Return the exit code and what was said, on both ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, lab_worker.__file__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    return process.returncode, said


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of everything that two processes did."""
    folder = tmp_path_factory.mktemp("two")
    code, said = torchrun(str(folder))
    assert code == 0, said[-5000:]
    (folder / "said.txt").write_text(said)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Gives the folder of what one process does, its ghost groups the shares of two."""
    folder = tmp_path_factory.mktemp("one")

    def train(method: str) -> Path:
        out = folder / method
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(METHODS, lab_worker.WITHOUT_BATCH.name, lab_worker.WITHOUT_BATCH)
                assert main([*lab_worker.train(method, "--ghost-batch", str(SHARE)), "--out", str(out)]) == 0
        return out

    return train


def epochs(out: Path) -> list[dict[str, float]]:
    (file,) = out.glob("runs/*.json")
    return json.loads(file.read_text())["result"]["epochs"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = out.glob("runs/*.pt")
    return torch.load(file)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_ends_with_the_code_of_its_command(two, rank):
    codes = json.loads((two / f"codes{rank}.json").read_text())
    refused = {"odd batch": 2, "second order": 2}
    stopped = {name: 1 for name in codes if name.endswith("stopped")}
    kept = {name: 1 for name in codes if name.endswith("kept")}
    assert len(stopped) == len(kept) == len(lab_worker.RESUMED)
    assert codes == dict.fromkeys(codes, 0) | refused | stopped | kept


@pytest.mark.parametrize(("method", "strategy"), lab_worker.RUNS)
def test_two_processes_equal_one_with_their_shares_as_ghost_groups(two, one, method, strategy):
    """Data parallel or sharded; batch normalization, Momentum Batch Normalization, and networks without either."""
    ours, alone = two / f"{method} {strategy}", one(method)
    for mine, expected in zip(epochs(ours), epochs(alone), strict=True):
        assert mine["steps"] == expected["steps"]
        assert mine["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
        assert mine["train_score"] == expected["train_score"]
        if "GN" in method:  # no running statistics, of which the first process has its own
            assert mine["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
            assert mine["test_score"] == expected["test_score"]
    trained, reference = weights(ours), weights(alone)
    assert trained.keys() == reference.keys()
    for name, value in trained.items():
        if "running" not in name and "train_" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, reference[name], rtol=1e-4, atol=1e-5)


def test_the_methods_differ(two):
    """Or equality would say little."""
    losses = [epochs(two / f"{method} ddp")[-1]["train_loss"] for method in ("SGDM", "W-SGDM", "MBN", "GN")]
    assert len({round(loss, 4) for loss in losses}) == 4


@pytest.mark.parametrize(("method", "strategy"), lab_worker.RESUMED)
def test_a_stopped_run_of_two_processes_goes_on(two, method, strategy):
    resumed, whole = two / f"{method} {strategy} resumed", two / f"{method} {strategy}"
    for mine, expected in zip(epochs(resumed), epochs(whole), strict=True):
        assert {**mine, "seconds": 0} == {**expected, "seconds": 0}
    ours, theirs = weights(resumed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_number_of_processes_and_the_strategy_are_part_of_what_a_run_is(two, one):
    stems = {
        next(out.glob("runs/*.json")).stem for out in (two / "SGDM ddp", two / "SGDM fsdp", one("SGDM")) if out.exists()
    }
    assert len(stems) == 3
    run = json.loads((two / "SGDM fsdp" / "run.json").read_text())
    assert (run["processes"], run["strategy"]) == (2, "fsdp")


def test_only_the_first_process_writes_and_speaks(two):
    said = (two / "said.txt").read_text()
    assert said.count(f"Written: {two / 'compare' / 'report.html'}") == 1
    assert said.count("must be divisible by the 2 processes, got 15") == 1
    assert said.count("cannot be done on several ranks") == 1
    settings = json.loads((two / "compare" / "results.json").read_text())["settings"]
    assert settings["processes of a run"] == 2
    assert len((two / "compare" / "epochs.csv").read_text().splitlines()) >= 3


def test_a_rank_that_fails_ends_all(tmp_path):
    code, said = torchrun(str(tmp_path), "fail")
    assert code == 1
    assert "RuntimeError: no such luck" in said
    assert list(tmp_path.glob("failing/runs/*.json")) == []
