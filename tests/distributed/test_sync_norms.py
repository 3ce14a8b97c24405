"""Synchronized normalization: two processes (gloo, CPU) with unequal parts of a batch equal one with all of it."""

from __future__ import annotations

import pytest
import sync_norm_worker as worker
import torch
import torch.distributed as dist
from launch_ranks import Ranks, results_of, run_ranks
from torch import nn

import wellcond.nn as wnn

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(worker, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", worker.LAYERS)
def test_two_ranks_equal_one_process_with_the_joined_batch(name: str, ranks: Ranks) -> None:
    alone = worker.train(name, 0, 1)
    one, other = results_of(ranks, name)
    for key, expected in alone.items():
        first, second = one[key], other[key]
        if key.startswith("state."):
            torch.testing.assert_close(first, second, rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
            joined = first
        elif key.startswith(("weight_grad", "bias_grad")):
            joined = first + second  # as DDP reduces them, but for the division
        else:
            joined = torch.cat([first, second])
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", worker.IMAGES)
def test_a_rank_without_samples_takes_part(name: str, ranks: Ranks) -> None:
    first, second = results_of(ranks, f"empty {name}")
    alone = worker.empty_rank(name, 0, 1)
    assert second["out"].shape == (0, worker.CHANNELS, 3, 3)
    for key, expected in alone.items():
        torch.testing.assert_close(
            first[key], expected, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}"
        )
        if key.startswith("state."):
            torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def test_a_second_derivative_over_ranks_is_refused() -> None:
    from wellcond.nn.functional.normalize import normalize
    from wellcond.numerics.moments import batch_moments

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    own = batch_moments(x)
    y = normalize(x, own.mean, own.var, None, None, 1e-5, own, all_reduce=lambda sums: 1 * sums)
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        first.sum().backward()


def test_synchronized_alone_is_the_same_layer() -> None:
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(wnn.EvalNorm2d(3, synchronize=True)(x), nn.BatchNorm2d(3)(x))
