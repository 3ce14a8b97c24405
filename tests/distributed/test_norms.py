"""Normalizations on several processes (gloo, CPU) against one process with all data; ranks against each other."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = Path(__file__).with_name("norm_worker.py")
TIMEOUT = 150
Ranks = list[dict[str, Any]]


def _load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wellcond_test_norm_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = _load_worker()


def run_ranks(world: int, folder: Path) -> Ranks:
    """Start the ranks, insist on exit code 0 from each within the time, and return what each of them saved."""
    logs = [(folder / f"log{rank}.txt").open("w+") for rank in range(world)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(world), str(folder)], stdout=log, stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes: list[int | str] = []
        for process in processes:
            try:
                codes.append(process.wait(TIMEOUT))
            except subprocess.TimeoutExpired:
                codes.append("timed out")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    output = ""
    for log in logs:
        log.seek(0)
        output += log.read()[-3000:]
        log.close()
    assert codes == [0] * world, f"exit codes {codes}\n{output}"
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(2, tmp_path_factory.mktemp("two"))


def results_of(ranks: Ranks, name: str) -> list[dict[str, Any]]:
    for rank, found in enumerate(ranks):
        assert found[name]["error"] is None, f"rank {rank}:\n{found[name]['error']}"
        assert found[name]["warnings"] == []
    return [found[name]["result"] for found in ranks]


def assert_ranks_identical(results: list[dict[str, Any]]) -> None:
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, value in results[0].items():
            same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
            assert same, key


def assert_close_to(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected.keys() == result.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


# calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["bsr", "evalnorm", "bn", "synchronized", "inside"])
def test_calibration_on_uneven_shards_equals_one_process_with_all_data(what: str, two_ranks: Ranks) -> None:
    name = f"calibrate {what}"
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert_close_to(results[0], worker.checks()[name](0, 1))
    assert not torch.equal(results[0]["norm.running_var"], worker.model_of().norm.running_var) or what != "bn"


def test_calibration_of_layers_with_a_history_is_the_same_on_all_ranks(two_ranks: Ranks) -> None:
    """Each rank's history is of its own batches, so one process would have another one."""
    results = results_of(two_ranks, "calibrate mbn")
    assert_ranks_identical(results)
    before = worker.model_of(worker.MomentumBatchNorm2d).state_dict()
    assert torch.equal(results[0]["norm.train_mean"], before["norm.train_mean"])


def test_a_rank_without_data_gets_the_others_statistics(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "one rank's data")
    assert_ranks_identical(results)
    assert_close_to(results[0], worker.calibrated(0, 1, "bsr", loader=lambda rank, world: worker.batches(0, 2)))


@pytest.mark.parametrize("name", ["failure", "failure bsr"])
def test_a_loader_that_fails_on_one_rank_is_an_error_on_all_and_changes_none(name: str, two_ranks: Ranks) -> None:
    results = results_of(two_ranks, name)
    assert [result["said"] for result in results] == [
        "RuntimeError: calibrate failed on another rank; nothing has changed",
        "OSError: the disk is gone",
    ]
    assert all(result["same"] for result in results)


def test_no_data_on_any_rank_is_an_error_on_all(two_ranks: Ranks) -> None:
    for found in two_ranks:
        assert "ValueError: the loader gave no batch" in found["nothing anywhere"]["error"]
        assert "no batch has batch_size=2 samples: the largest has 1" in found["short everywhere"]["error"]


def test_moving_averages_of_ranks_are_averaged(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "moving averages")
    together, alone = results[0]["together"], results[0]["alone"]
    assert_ranks_identical([result["together"] for result in results])
    for name in ("norm.running_mean", "norm.running_var", "other.running_mean", "other.running_var"):
        torch.testing.assert_close(together[name], (alone[0][name] + alone[1][name]) / 2, rtol=1e-10, atol=1e-10)
    assert int(together["norm.num_batches_tracked"]) == sum(int(one["norm.num_batches_tracked"]) for one in alone)
