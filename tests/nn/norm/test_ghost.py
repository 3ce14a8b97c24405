"""Ghost Batch Normalization: as if each group of samples were on a device of its own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn import GhostBatchNorm1d, GhostBatchNorm2d

FLOAT64 = torch.float64


def batch(step: int, samples: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(samples, 3, 4, generator=generator, dtype=FLOAT64) + 1


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


GROUPS = {
    (8, 2): (2, 2, 2, 2),
    (8, 8): (8,),
    (8, 100): (8,),
    (7, 2): (2, 2, 3),  # a remainder of half a group joins the last one
    (7, 4): (4, 3),  # one of more than half is a group of its own
    (10, 4): (4, 6),
    (9, 4): (4, 5),
    (5, 4): (5,),
    (3, 2): (3,),
}


@pytest.mark.parametrize(("key", "sizes"), GROUPS.items(), ids=str)
def test_as_on_so_many_devices(key: tuple[int, int], sizes: tuple[int, ...]) -> None:
    """Every group by an nn.BatchNorm1d of its own with shared γ, β; running statistics: the replicas' average."""
    samples, group_size = key
    layer = GhostBatchNorm1d(3, group_size).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    replicas = []
    for _ in sizes:
        replica = nn.BatchNorm1d(3).double()
        replica.weight, replica.bias = layer.weight, layer.bias
        replicas.append(replica)
    for step in range(3):
        x, other = batch(step, samples).requires_grad_(), batch(step, samples).requires_grad_()
        chunks = other.split(sizes)
        y, expected = layer(x), torch.cat([r(chunk) for r, chunk in zip(replicas, chunks, strict=True)])
        close(y, expected)
        upstream = torch.sin(torch.arange(x.numel(), dtype=FLOAT64)).view(x.shape)
        ours = torch.autograd.grad(y, [x, layer.weight, layer.bias], upstream)
        theirs = torch.autograd.grad(expected, [other, layer.weight, layer.bias], upstream)
        close(ours, theirs, 1e-11)
        close(layer.running_mean, torch.stack([replica.running_mean for replica in replicas]).mean(0))
        close(layer.running_var, torch.stack([replica.running_var for replica in replicas]).mean(0))
    assert int(layer.num_batches_tracked) == 3
    x = batch(9, 5)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
    close(layer.eval()(x), expected)


def test_groups_of_one_are_instance_normalization() -> None:
    layer = GhostBatchNorm2d(3, 1).double()
    x = torch.randn(4, 3, 3, 3, dtype=FLOAT64)
    close(layer(x), F.instance_norm(x, eps=layer.eps), 1e-11)


def test_groups_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?i)more than 1 value per channel .*got input size \[4, 3\]"):
        GhostBatchNorm1d(3, 1)(torch.randn(4, 3))


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_without_running_statistics(samples: int) -> None:
    """Evaluation uses the batch's own, in groups; there is nothing to keep."""
    layer = GhostBatchNorm1d(3, 2, track_running_stats=False).double()
    assert layer.running_mean is None
    x = batch(0, samples)
    training = layer(x)
    expected = torch.cat([F.batch_norm(chunk, None, None, training=True) for chunk in x.split(2)])
    close(training, expected, 1e-11)
    close(layer.eval()(x), expected, 1e-11)
    assert set(layer.state_dict()) == {"weight", "bias"}
    other = copy.deepcopy(layer)
    close(other.bfloat16()(x.bfloat16()).double(), expected, 5e-2)


def test_without_running_statistics_one_value_evaluates_as_torch_does() -> None:
    layer, plain = GhostBatchNorm1d(3, 2, track_running_stats=False), nn.BatchNorm1d(3, track_running_stats=False)
    x = torch.randn(1, 3)
    with pytest.raises(ValueError, match="(?i)expected more than 1 value per channel"):
        plain.eval()(x)
    with pytest.raises(ValueError, match="(?i)expected more than 1 value per channel"):
        layer.eval()(x)


def test_order_of_the_samples_matters() -> None:
    layer = GhostBatchNorm1d(3, 2, affine=False).double()
    x = batch(0)
    y = layer(x)
    mixed = layer(x[[0, 2, 1, 3, 4, 5, 6, 7]])
    assert not torch.allclose(mixed[0], y[0])
    close(mixed[4:], y[4:])


@pytest.mark.parametrize("group_size", [0, -2, 2.0, None])
def test_group_size_is_checked(group_size: object) -> None:
    with pytest.raises(ValueError, match="group_size must be a positive integer"):
        GhostBatchNorm1d(3, group_size)
