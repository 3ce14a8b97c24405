"""Layers with amortized constants on two processes (gloo, CPU) against one process with all data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import whitened_worker as worker
from launch_ranks import Ranks, assert_ranks_identical, results_of, run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", ["", " accumulated", " without samples"])
@pytest.mark.parametrize("kind", list(worker.KINDS))
def test_ranks_stay_alike_and_equal_one_process(kind: str, case: str, two_ranks: Ranks) -> None:
    """Parameters change inside the forward pass: equally on all ranks, and as with all samples in one batch."""
    results = results_of(two_ranks, kind + case)
    assert_ranks_identical(results)
    expected = worker.checks()[kind](0, 1)
    start = worker.model_of(kind).state_dict()
    assert not torch.allclose(expected["0.transform"], start["0.transform"])
    assert expected.keys() == results[0].keys()
    for key, value in expected.items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


def test_statistics_of_ones_own(two_ranks: Ranks) -> None:
    first, second = results_of(two_ranks, "alone")
    assert first["number"] == 4 * 16
    assert second["number"] == 2 * 16
    assert not torch.allclose(first["transform"], second["transform"])
