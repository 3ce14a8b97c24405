"""R_add and R_mul (thesis 2.5, 2.6, theorem 2) against noise drawn, integrated, or batch normalization's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import roots_genlaguerre
from torch import Tensor, nn

from wellcond.diagnostics.noise import batch_noise
from wellcond.theory import (
    additive_noise_penalty,
    batch_mean_noise,
    log_batch_variance_noise,
    multiplicative_noise_penalty,
)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_second_moment(batch_size: int) -> float:
    mean, variance = log_batch_variance_noise(batch_size)
    return variance + mean**2


def errors_from(samples: Tensor, expected: float) -> float:
    return float((samples.mean() - expected).abs() / (samples.std() / math.sqrt(samples.numel())))


def drawn_noise(draws: int, features: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return ξ_μ and ξ_σ of batches of a standard normal feature."""
    batches = normal(draws, features, batch_size, seed=seed)
    mean = batches.mean(-1)
    return -mean, (batches - mean[..., None]).square().mean(-1)


def network(inputs: int, outputs: int) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs)).double().requires_grad_(False)
    for seed, parameter in enumerate(layers.parameters()):
        parameter.copy_(0.5 * normal(*parameter.shape, seed=seed))
    return layers


def half_square(change: Tensor) -> Tensor:
    return 0.5 * change.square().flatten(1).sum(1)


def test_the_multiplicative_penalty_is_the_jacobian_in_the_logarithm() -> None:
    layers = network(6, 4)

    def function(x: Tensor) -> Tensor:
        return layers(x.flatten(1)).reshape(-1, 2, 2)

    inputs = normal(5, 2, 3, seed=9)
    inputs[0, 0, 0] = 0.0
    penalty = multiplicative_noise_penalty(function, inputs, 0.3)
    for x, value in zip(inputs, penalty.tolist(), strict=True):
        step, total = 1e-6, 0.0
        for i, j in itertools.product(range(2), range(3)):
            ends = []
            for sign in (1, -1):
                moved = x.clone()
                moved[i, j] = x[i, j].sign() * (x[i, j].abs() * math.exp(sign * step))
                ends.append(function(moved[None]))
            total += float(((ends[0] - ends[1]) / (2 * step)).square().sum())
        assert value == pytest.approx(0.3 / 8 * total, rel=1e-7)
    assert penalty.shape == (5,)
    assert penalty.dtype == torch.float64
    assert not inputs.requires_grad


@pytest.mark.parametrize("batch_size", [2, 5, 16])
def test_the_multiplicative_penalty_is_exact_for_a_function_of_the_logarithm(batch_size: int) -> None:
    weight, x = torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64), torch.tensor([[0.4, -2.0, 1.0]]).double()

    def function(at: Tensor) -> Tensor:
        return weight * at.abs().log()

    _, noise = drawn_noise(200_000, 3, batch_size, seed=batch_size)
    added = half_square(function(x / noise.sqrt()) - function(x))
    penalty = multiplicative_noise_penalty(function, x, log_second_moment(batch_size)).item()
    assert errors_from(added, penalty) < 4
    assert errors_from(added, 2 * penalty) > 20


def test_the_multiplicative_penalty_can_be_trained_through() -> None:
    layers, inputs = network(3, 2), normal(4, 3, seed=14)
    weight = layers[0].weight.requires_grad_(True)
    multiplicative_noise_penalty(layers, inputs, 0.5).sum().backward()
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
            found = multiplicative_noise_penalty(layers, inputs, 0.5)
            weight[0, 0] -= sign * step
        assert not found.requires_grad
        values.append(float(found.sum()))
    assert weight.grad is not None
    assert float(weight.grad[0, 0]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="log_second_moment must be a finite number of at least 0, got -1.0"):
        multiplicative_noise_penalty(network(1, 1), torch.zeros(2, 1), -1.0)
    with pytest.raises(ValueError, match="inputs must have shape"):
        multiplicative_noise_penalty(network(1, 1), torch.zeros(2, 1, dtype=torch.int64), 0.1)


# Small networks -------------------------------------------------------------------------------------------------------

X = 1.5


def integrated(loss: Callable[[Tensor, Tensor], Tensor], batch_size: int) -> float:
    """Return E[loss(ξ_μ, ξ_σ)] by quadrature: ξ_μ is normal, m ξ_σ/2 has the gamma distribution of shape (m−1)/2."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    half, half_weights = roots_genlaguerre(60, (batch_size - 1) / 2 - 1)
    mean = torch.from_numpy(nodes / math.sqrt(batch_size))
    variance = torch.from_numpy(2 * half / batch_size)
    joint = torch.from_numpy(weights / weights.sum())[:, None] * torch.from_numpy(half_weights / half_weights.sum())
    return float((joint * loss(mean[:, None], variance[None])).sum())


@pytest.mark.parametrize("kind", ["additive", "multiplicative", "both"])
def test_the_penalties_are_the_leading_terms_of_2_7_in_a_small_network(kind: str) -> None:
    layers, x = network(1, 1), torch.full((1, 1), X, dtype=torch.float64)
    target = layers(x)

    def loss(mean: Tensor, variance: Tensor) -> Tensor:
        if kind == "additive":
            variance = torch.ones_like(variance)
        elif kind == "multiplicative":
            mean = torch.zeros_like(mean)
        noisy = ((X + mean) / variance.sqrt()).flatten()[:, None]
        return 0.5 * (layers(noisy) - target).square().view(mean.shape[0], variance.shape[1])

    def penalty(batch_size: int) -> float:
        additive = additive_noise_penalty(layers, x, batch_mean_noise(batch_size).variance)
        multiplicative = multiplicative_noise_penalty(layers, x, log_second_moment(batch_size))
        parts = {"additive": additive, "multiplicative": multiplicative, "both": additive + multiplicative}
        return parts[kind].item()

    excess = [integrated(loss, m) / penalty(m) - 1 for m in (40, 160)]
    # What is left out is of the next order in 1/m.
    assert abs(excess[1]) < 0.06
    assert excess[0] / excess[1] == pytest.approx(4, rel=0.25)
    # Neither part can be left out.
    if kind == "both":
        alone = additive_noise_penalty(layers, x, batch_mean_noise(160).variance).item()
        assert integrated(loss, 160) / alone > 1.2


def test_both_penalties_together_are_what_drawn_batches_add() -> None:
    layers, x, m = network(3, 2), normal(1, 3, seed=11), 256
    with torch.no_grad():
        mean, variance = drawn_noise(40_000, 3, m, seed=12)
        added = half_square(layers((x + mean) / variance.sqrt()) - layers(x))
    additive = additive_noise_penalty(layers, x, batch_mean_noise(m).variance).item()
    multiplicative = multiplicative_noise_penalty(layers, x, log_second_moment(m)).item()
    # The order that is left out is a share of about 1/m, less than a standard error of these draws.
    assert errors_from(added, additive + multiplicative) < 4
    assert errors_from(added, additive) > 10
    assert errors_from(added, multiplicative) > 10


def test_the_noise_that_is_measured_says_what_batch_normalization_adds_to_the_loss() -> None:
    m, samples = 64, 64 * 400
    head = network(4, 2)
    model = nn.Sequential(nn.Linear(5, 4).double(), nn.BatchNorm1d(4, eps=1e-12, affine=False).double(), head)
    nn.init.orthogonal_(model[0].weight)
    data = normal(samples, 5, seed=21)
    layer = batch_noise(model, data.split(640), batch_size=m).layers["1"]
    with torch.no_grad():
        features = model[0](data)
        population = (features - layer.population_mean) / layer.population_var.sqrt()
        target = head(population)
        model.train()
        losses = torch.stack(
            [half_square(model(x) - t).mean() for x, t in zip(data.split(m), target.split(m), strict=True)]
        )
        additive = additive_noise_penalty(head, population, layer.mean.found.variance)
        # Of log ξ_σ with the freedom that was found: E[log²] is 2/freedom in the leading order.
        multiplicative = multiplicative_noise_penalty(head, population, 2 / layer.freedom)
    predicted = float((additive + multiplicative).mean())
    # A sample in its own batch pulls the statistics: a further term of the order 1/m.
    assert float(losses.mean()) == pytest.approx(predicted, rel=0.1)
    assert float(additive.mean()) < 0.8 * predicted
