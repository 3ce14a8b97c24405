"""Which ranks share statistics: uneven inputs, ranks of different models, groups of their own (gloo, CPU)."""

from __future__ import annotations

import pytest
import replica_worker as worker
import torch
import torch.distributed as dist
from launch_ranks import Ranks, results_of, run_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("how", ["join", "Join", "accumulate"])
def test_a_rank_without_further_batches_stands_in_for_the_others_steps(how: str, ranks: Ranks) -> None:
    results = results_of(ranks, f"joined {how}")
    for result in results:
        torch.testing.assert_close(result["moment"], result["expected"], rtol=1e-12, atol=1e-12)
        assert result["step"] == max(worker.BATCHES)
    assert torch.equal(results[0]["moment"], results[1]["moment"])


@pytest.mark.filterwarnings("ignore:FeatureWhitening covers none")
@pytest.mark.parametrize("kind", ["other shapes", "other weights", "a stage without weights"])
def test_ranks_of_different_models_are_told_apart(kind: str, ranks: Ranks) -> None:
    for result in results_of(ranks, f"strangers {kind}"):
        assert "synchronize=False" in result["True"]
        assert "0.weight" in result["True"]
        assert result["False"] is None
        assert result["centralization"] is None


def test_the_group_of_the_wrapper_is_meant(ranks: Ranks) -> None:
    for result in results_of(ranks, "own group"):
        torch.testing.assert_close(result["moment"], result["expected"], rtol=1e-12, atol=1e-12)


def test_what_fails_on_one_rank_is_left_alone_on_all(ranks: Ranks) -> None:
    found = [rank["one rank fails"] for rank in ranks]
    assert [one["error"] for one in found] == [None, None]
    assert "broken here" in found[1]["warnings"][0]
    assert "an error on another rank" in found[0]["warnings"][0]
    results = [one["result"] for one in found]
    for result in results:
        assert result["stats"] == 1
        assert "plain gradient: its input could not be observed" in result["report"]
    for name, weight in results[0]["weights"].items():
        assert torch.equal(weight, results[1]["weights"][name])


def test_no_zeros_are_summed_for_weights_that_no_pass_reaches(ranks: Ranks) -> None:
    for result in results_of(ranks, "unused weights"):
        assert not result["open"]
        assert result["most"] <= 2 * 16 + 4  # the two layers' sums that came, with their counts
        assert result["all"] < 150
