"""Population normalization and gamma decay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wellcond.nn import (
    BSRBatchNorm2d,
    GhostBatchNorm2d,
    MomentumBatchNorm2d,
    PopulationNorm1d,
    PopulationNorm2d,
    gamma_decay,
)

FLOAT64 = torch.float64


def batch(step: int, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 2 * torch.randn(samples, 3, 4, generator=generator, dtype=FLOAT64) + 1


def close(actual: object, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_the_first_batch_is_normalized_by_batch_norm() -> None:
    layer, plain = PopulationNorm1d(3).double(), nn.BatchNorm1d(3).double()
    x, other = batch(0).requires_grad_(), batch(0).requires_grad_()
    y, expected = layer(x), plain(other)
    close(y, expected)
    close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), other))


def test_equal_weights_until_the_momentum_is_reached() -> None:
    """1, 1/2, 1/3, 1/4, 1/4, …"""
    layer = PopulationNorm1d(3, momentum=0.25).double()
    means, variances, running = [], [], None
    for step in range(8):
        x = batch(step)
        layer(x)
        means.append(x.mean((0, 2)))
        variances.append(x.transpose(0, 1).flatten(1).var(1))
        if step < 4:
            running = torch.stack(means).mean(0), torch.stack(variances).mean(0)
        else:
            running = tuple(0.75 * old + 0.25 * new[-1] for old, new in zip(running, (means, variances), strict=True))
        close((layer.running_mean, layer.running_var), running)


def test_a_long_average_is_that_of_the_data() -> None:
    """A whole epoch of equal batches, without momentum's floor: the data's mean, and no trace of the start."""
    layer = PopulationNorm1d(3, momentum=1e-3).double()
    data = [batch(step) for step in range(100)]
    for x in data:
        layer(x)
    whole = torch.cat(data)
    close(layer.running_mean, whole.mean((0, 2)), 1e-6)


def test_training_approaches_evaluation() -> None:
    """The batch's weight fades: noise and gradient through the statistics with it."""
    layer = PopulationNorm1d(3, momentum=1e-3).double()
    for step in range(400):
        layer(batch(step))
    x, other = batch(1000).requires_grad_(), batch(1000).requires_grad_()
    y = layer(x)
    layer.eval()
    expected = layer(other)
    close(y, expected, 5e-3)
    close(torch.autograd.grad(y.sin().sum(), x), torch.autograd.grad(expected.sin().sum(), other), 5e-3)


@pytest.mark.parametrize("momentum", [-0.1, 1.5])
def test_momentum_is_checked(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        PopulationNorm1d(3, momentum=momentum)


# ---------------------------------------------------------------------------------------------------------- gamma decay


class Model(nn.Module):
    """Norm layers of several kinds; one has no scale, one is no batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(2)
        self.block = nn.Sequential(PopulationNorm2d(3), nn.ReLU(), MomentumBatchNorm2d(1))
        self.more = nn.ModuleList([GhostBatchNorm2d(2, 4), BSRBatchNorm2d(1)])
        self.bare = nn.BatchNorm2d(7, affine=False)
        self.group = nn.GroupNorm(1, 5)
        for step, parameter in enumerate(self.parameters()):
            nn.init.constant_(parameter, step + 1.0)


def test_the_sum() -> None:
    """Σ ζγ² over γ of every batch normalization, not its β, nor other layers' scales; 2ζγ is its gradient."""
    model = Model()
    scales = [model.first, model.block[0], model.block[2], *model.more]
    penalty = gamma_decay(model, 0.01)
    close(penalty, sum(0.01 * layer.weight.square().sum() for layer in scales))
    penalty.backward()
    for layer in scales:
        close(layer.weight.grad, 0.02 * layer.weight)
        assert layer.bias.grad is None
    assert model.group.weight.grad is None


def test_a_coefficient_for_each_layer() -> None:
    """A number or one for each channel, of name and layer."""
    model = Model()
    names = []

    def coefficient(name: str, layer: nn.Module) -> float | Tensor:
        names.append(name)
        return torch.tensor([1.0, 2.0, 3.0]) if layer.num_features == 3 else 0.5

    penalty = gamma_decay(model, coefficient)
    assert names == ["first", "block.0", "block.2", "more.0", "more.1"]
    others = [model.first, model.block[2], *model.more]
    expected = (torch.tensor([1.0, 2.0, 3.0]) * model.block[0].weight.square()).sum()
    close(penalty, expected + sum(0.5 * layer.weight.square().sum() for layer in others))


def test_some_layers() -> None:
    model = Model()
    penalty = gamma_decay(model, 1.0, where=lambda name, layer: name.startswith("block"))
    close(penalty, model.block[0].weight.square().sum() + model.block[2].weight.square().sum())


def test_a_shared_layer_counts_once() -> None:
    layer = nn.BatchNorm2d(3)
    close(gamma_decay(nn.Sequential(layer, nn.ReLU(), layer), 1.0), torch.tensor(3.0))


def test_a_layer_is_a_model() -> None:
    close(gamma_decay(PopulationNorm1d(4), 0.5), torch.tensor(2.0))


def test_zero_is_allowed() -> None:
    close(gamma_decay(nn.BatchNorm1d(3), 0.0), torch.tensor(0.0))


def test_no_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        gamma_decay(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)))
    with pytest.raises(ValueError, match="scale"):
        gamma_decay(Model(), where=lambda name, layer: False)


@pytest.mark.parametrize("coefficient", [-1e-4, float("nan")])
def test_coefficient_is_checked(coefficient: float) -> None:
    with pytest.raises(ValueError, match="coefficient"):
        gamma_decay(Model(), coefficient)


def test_population_norm_and_decay_by_gradient_descent() -> None:
    """The penalty shrinks a scale that the data leave free, by 1 − 2·lr·ζ a step."""
    layer = PopulationNorm1d(2).double()
    optimizer = torch.optim.SGD([layer.weight], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        gamma_decay(layer, 0.5).backward()
        optimizer.step()
    close(layer.weight.detach(), torch.full((2,), 0.9**5, dtype=FLOAT64), 1e-12)
