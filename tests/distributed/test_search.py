"""Detection and re-identification on two processes (gloo, CPU) against one."""

from __future__ import annotations

import pytest
import search_worker
import torch
import torch.distributed as dist
from launch_ranks import Ranks, assert_ranks_identical, results_of, run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(search_worker, 2, tmp_path_factory.mktemp("two"))


def test_average_precision_is_of_what_all_ranks_found(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "detection")
    assert_ranks_identical(results)
    alone = search_worker.detection(0, 1)
    assert results[0] == alone
    assert alone["test"][1] == 5
    assert 0 < alone["test"][0] < 100  # neither nothing nor everything is found


def test_triplets_centers_and_rankings_are_of_all_ranks_images(two_ranks: Ranks) -> None:
    results = results_of(two_ranks, "re-identification")
    assert_ranks_identical(results)
    alone = search_worker.re_identification(0, 1)
    torch.testing.assert_close(results[0]["gradient"], alone["gradient"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0]["centers"], alone["centers"])
    torch.testing.assert_close(results[0]["scores"], alone["scores"])
    assert results[0]["images"] == alone["images"] == 35
