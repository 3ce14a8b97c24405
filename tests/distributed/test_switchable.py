"""Synchronized switchable normalization ("SyncSN"): two processes with unequal parts of a batch equal one with it."""

from __future__ import annotations

import pytest
import switchable_worker as worker
import torch
import torch.distributed as dist
from launch_ranks import Ranks, results_of, run_ranks
from torch import Tensor

import wellcond.nn as wnn

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("ranks"))


def close(key: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{key}: {text}")


def check_joined(alone: dict[str, Tensor], first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Outputs and gradients of x side by side, gradients of parameters as sums, the same buffers on both."""
    assert alone.keys() == first.keys() == second.keys()
    for key, expected in alone.items():
        if key.startswith("state."):
            close(key, second[key], first[key], 0)
            close(key, first[key], expected)
        elif key.startswith("parameter "):
            close(key, first[key] + second[key], expected)  # as DDP reduces them, but for the division
        else:
            close(key, torch.cat([first[key], second[key]]), expected)


@pytest.mark.parametrize("name", worker.LAYERS)
def test_two_ranks_equal_one_process_with_the_joined_batch(name: str, ranks: Ranks) -> None:
    alone = worker.train(name, 0, 1)
    assert any("logits" in key and bool(value.abs().sum() > 0) for key, value in alone.items())
    check_joined(alone, *results_of(ranks, name))


@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("name", worker.EMPTY)
def test_a_rank_without_samples_takes_part(name: str, empty: int, ranks: Ranks) -> None:
    found = results_of(ranks, f"empty {empty} {name}")
    assert found[empty]["out"].shape == (0, worker.CHANNELS, 3, 3)
    assert all(torch.isfinite(value).all() for value in found[empty].values())
    check_joined(worker.empty_rank(name, empty, 0, 1), *found)


def test_both_ranks_choose_the_same(ranks: Ranks) -> None:
    for name in ("ssn", "ssn closed"):
        first, second = results_of(ranks, name)
        chosen = [int(each["state.mean_chosen0"]) for each in (first, second)]
        assert chosen[0] == chosen[1]
        assert (chosen[0] >= 0) == (name == "ssn closed")


def test_synchronized_alone_is_the_same_layer() -> None:
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(wnn.SwitchableNorm2d(3, synchronize=True)(x), wnn.SwitchableNorm2d(3)(x))
