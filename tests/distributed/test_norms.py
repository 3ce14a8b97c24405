"""Normalizations on several processes (gloo, CPU) against one process with all data; ranks against each other."""

from __future__ import annotations

from typing import Any

import norm_worker as worker
import pytest
import torch
import torch.distributed as dist
from launch_ranks import Ranks, assert_ranks_identical, results_of, run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("two"))


def assert_close_to(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected.keys() == result.keys()
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


# calibration --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["bsr", "evalnorm", "bn", "synchronized", "inside", "sn", "iternorm"])
def test_calibration_on_uneven_shards_equals_one_process_with_all_data(what: str, two_ranks: Ranks) -> None:
    name = f"calibrate {what}"
    results = results_of(two_ranks, name)
    assert_ranks_identical(results)
    assert_close_to(results[0], worker.checks()[name](0, 1))
    assert not torch.equal(results[0]["norm.running_var"], worker.model_of().norm.running_var) or what != "bn"


@pytest.mark.parametrize("sharded", ["replicated", "sharded"])
@pytest.mark.parametrize("case", worker.UNEQUAL)
def test_statistics_of_all_samples_whatever_ranks_have_of_them(case: str, sharded: str, two_ranks: Ranks) -> None:
    results = results_of(two_ranks, f"whole, {case}, {sharded}")
    assert_ranks_identical(results)
    assert_close_to(results[0], worker.whole(0, 1, case, False))


def test_a_sharded_model_stops_where_it_is_told(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "whole, limited, sharded")
    assert_ranks_identical(results)
    assert int(results[0]["norm.num_batches_tracked"]) == 3


def test_a_loader_that_fails_is_told_to_all_ranks_of_a_sharded_model(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "failure sharded")
    assert [each["said"] for each in results] == [
        "RuntimeError: calibrate failed on another rank; nothing has changed",
        "OSError: the disk is gone",
    ]
    assert all(each["same"] for each in results)


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


# training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", worker.DATA_PARALLEL)
def test_ddp_equals_one_process_with_as_many_groups(kind: str, two_ranks: Ranks) -> None:
    results = results_of(two_ranks, f"data parallel {kind}")
    assert_ranks_identical(results)
    assert_close_to(results[0], worker.checks()[f"data parallel {kind}"](0, 1))
