"""The closed forms against batches that are drawn, scipy's distributions, enumeration and quadrature, in float64."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from wellcond import theory
from wellcond.theory import (
    Formula,
    additive_noise_penalty,
    batch_mean_noise,
    batch_variance_noise,
    gamma_decay_coefficient,
    inference_decay,
    large_batch_deviation_noise,
    large_batch_variance_noise,
    log_batch_variance_noise,
    noise_matching_momentum,
    normalized_mean,
    normalized_variance,
    stat_momentum,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int) -> Tensor:
    """Return draws of mean 0, variance 1 and kurtosis 9/5."""
    return math.sqrt(12) * (torch.rand(*shape, generator=seeded(seed), dtype=torch.float64) - 0.5)


def exponential(*shape: int, seed: int) -> Tensor:
    """Return draws of mean 0, variance 1 and kurtosis 9."""
    return torch.empty(*shape, dtype=torch.float64).exponential_(generator=seeded(seed)) - 1


def batch_statistics(batches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each row."""
    mean = batches.mean(-1)
    return mean, (batches - mean.unsqueeze(-1)).square().mean(-1)


def errors_from(samples: Tensor, expected: float) -> float:
    """Return how many standard errors the mean of the samples is away from what was expected."""
    return float((samples.mean() - expected).abs() / (samples.std() / math.sqrt(samples.numel())))


def squares(samples: Tensor) -> Tensor:
    """Return squared deviations, whose mean is the unbiased variance."""
    return (samples - samples.mean()).square() * (samples.numel() / (samples.numel() - 1))


def stationary_averages(momentum: float, batch_size: int, *, chains: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the statistics of many independent MBNs (2.9) of a standard normal feature, after many batches."""
    mean, variance = torch.zeros(chains, dtype=torch.float64), torch.ones(chains, dtype=torch.float64)
    for step in range(math.ceil(math.log(1e-6) / math.log(momentum))):
        batch_mean, batch_variance = batch_statistics(normal(chains, batch_size, seed=1000 * seed + step))
        mean = momentum * mean + (1 - momentum) * batch_mean
        variance = momentum * variance + (1 - momentum) * batch_variance
    return mean, variance


# Noise of a batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("draw", "kurtosis"), [(normal, 3.0), (uniform, 1.8), (exponential, 9.0)])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_noise_of_batches_of_any_distribution(draw: Callable[..., Tensor], kurtosis: float, batch_size: int) -> None:
    mean, variance = batch_statistics(draw(200_000, batch_size, seed=batch_size))
    mean_noise, variance_noise = batch_mean_noise(batch_size), batch_variance_noise(batch_size, kurtosis=kurtosis)
    assert errors_from(-mean, mean_noise.mean) < 4
    assert errors_from(squares(-mean), mean_noise.variance) < 4
    assert errors_from(variance, variance_noise.mean) < 4
    assert errors_from(squares(variance), variance_noise.variance) < 4


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6])
def test_variance_noise_is_exact_for_every_batch_size(batch_size: int) -> None:
    values, weights = [-1.0, 0.0, 3.0], [0.5, 0.3, 0.2]
    mu = math.fsum(w * v for v, w in zip(values, weights, strict=True))
    moment = {k: math.fsum(w * (v - mu) ** k for v, w in zip(values, weights, strict=True)) for k in (2, 4)}
    first = second = 0.0
    for batch in itertools.product(range(3), repeat=batch_size):
        probability = math.prod(weights[i] for i in batch)
        noise = float(np.var([values[i] for i in batch])) / moment[2]
        first += probability * noise
        second += probability * noise**2
    computed = batch_variance_noise(batch_size, kurtosis=moment[4] / moment[2] ** 2)
    assert computed == pytest.approx((first, second - first**2), rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("batch_size", [1, 2, 8, 500])
def test_variance_noise_of_a_normal_feature_is_chi_squared(batch_size: int) -> None:
    m = batch_size
    assert batch_variance_noise(m) == pytest.approx(((m - 1) / m, 2 * (m - 1) / m**2), rel=1e-13)
    if m > 1:
        chi2 = stats.chi2(m - 1, scale=1 / m)
        assert batch_variance_noise(m) == pytest.approx((chi2.mean(), chi2.var()), rel=1e-12)


@pytest.mark.parametrize("kurtosis", [1.0, 1.8, 3.0, 9.0])
def test_theorem_1_is_the_limit_of_the_exact_noise(kurtosis: float) -> None:
    for m in (100, 10_000):
        exact, limit = batch_variance_noise(m, kurtosis=kurtosis), large_batch_variance_noise(m, kurtosis=kurtosis)
        assert limit == pytest.approx((1.0, (kurtosis - 1) / m), rel=1e-15)
        assert exact.mean == pytest.approx(limit.mean, abs=1.01 / m)
        # By hand: the next term is −(2κ − 4)/m².
        assert exact.variance - limit.variance == pytest.approx(-(2 * kurtosis - 4) / m**2, abs=20 / m**3)
        assert large_batch_variance_noise(m, kurtosis=kurtosis, formula="thesis").variance == kurtosis / m


def test_drawn_batches_refute_the_variance_printed_in_theorem_1() -> None:
    _, variance = batch_statistics(uniform(20_000, 200, seed=3))
    printed = large_batch_variance_noise(200, kurtosis=1.8, formula="thesis").variance
    assert errors_from(squares(variance), printed) > 50
    assert errors_from(squares(variance), large_batch_variance_noise(200, kurtosis=1.8).variance) < 4


@pytest.mark.parametrize(("draw", "kurtosis"), [(normal, 3.0), (uniform, 1.8)])
def test_deviation_noise_of_large_batches(draw: Callable[..., Tensor], kurtosis: float) -> None:
    _, variance = batch_statistics(draw(20_000, 400, seed=4))
    noise = large_batch_deviation_noise(400, kurtosis=kurtosis)
    assert errors_from(squares(variance.sqrt()), noise.variance) < 4
    assert float(variance.sqrt().mean()) == pytest.approx(noise.mean, abs=1 / 400)


@pytest.mark.parametrize("batch_size", [2, 5, 32])
def test_log_of_the_variance_noise(batch_size: int) -> None:
    _, variance = batch_statistics(normal(100_000, batch_size, seed=5))
    noise = log_batch_variance_noise(batch_size)
    assert errors_from(variance.log(), noise.mean) < 4
    assert errors_from(squares(variance.log()), noise.variance) < 4
    # The second moment of 2.6 by quadrature, with x = e^u so that the singularity at 0 of m = 2 is harmless.
    u = np.linspace(-60, 8, 200_001)
    density = np.exp(stats.chi2.logpdf(np.exp(u), batch_size - 1) + u)
    second = np.trapezoid((u - math.log(batch_size)) ** 2 * density, u)
    assert noise.variance + noise.mean**2 == pytest.approx(second, rel=1e-8)


# The normalized value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-2.0, 0.0, 1.0])
@pytest.mark.parametrize("batch_size", [12, 20])
def test_normalized_value_of_drawn_batches(x: float, batch_size: int) -> None:
    mean, variance = batch_statistics(normal(100_000, batch_size, seed=6))
    normalized = (x - mean) / variance.sqrt()
    assert errors_from(normalized, normalized_mean(x, batch_size)) < 4
    assert errors_from(squares(normalized), normalized_variance(x, batch_size)) < 4


def test_a_sample_of_the_batch_itself_is_normalized_with_less_noise() -> None:
    batches = normal(200_000, 8, seed=19)
    batches[:, 0] = 1.0
    mean, variance = batch_statistics(batches)
    normalized = (1.0 - mean) / variance.sqrt()
    assert errors_from(normalized, 1.007) < 4
    assert errors_from(squares(normalized), 0.172) < 4


def test_drawn_batches_refute_the_printed_2_4() -> None:
    mean, variance = batch_statistics(normal(100_000, 12, seed=7))
    normalized = (1.0 - mean) / variance.sqrt()
    assert errors_from(normalized, normalized_mean(1.0, 12, formula="thesis")) > 20
    assert errors_from(squares(normalized), normalized_variance(1.0, 12, formula="thesis")) > 20


@pytest.mark.parametrize("x", [-3.0, -0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("batch_size", [3, 4, 5, 8, 63, 64, 65, 200])
def test_normalized_value_is_noncentral_t(x: float, batch_size: int) -> None:
    m = batch_size
    noncentral = stats.nct(m - 1, math.sqrt(m) * x)
    assert normalized_mean(x, m) == pytest.approx(noncentral.mean() / math.sqrt(m - 1), rel=1e-9, abs=1e-12)
    if m > 3:
        assert normalized_variance(x, m) == pytest.approx(noncentral.var() / (m - 1), rel=1e-9)


@pytest.mark.parametrize("x", [-3.0, 0.0, 1.0])
@pytest.mark.parametrize("batch_size", [4, 8, 64, 200])
def test_thesis_2_4_is_as_printed(x: float, batch_size: int) -> None:
    m = batch_size
    mean = x * math.sqrt((m - 1) / 2) * math.exp(math.lgamma((m - 2) / 2) - math.lgamma((m - 1) / 2))
    variance = ((m - 1) / (m - 3) * (1 + x**2) - mean**2) / m
    assert normalized_mean(x, m, formula="thesis") == pytest.approx(mean, rel=1e-12)
    assert normalized_variance(x, m, formula="thesis") == pytest.approx(variance, rel=1e-10)
    # Where it comes from: the noncentrality x in place of √m x.
    noncentral = stats.nct(m - 1, x)
    assert normalized_mean(x, m, formula="thesis") == pytest.approx(noncentral.mean(), rel=1e-9, abs=1e-12)
    assert normalized_variance(x, m, formula="thesis") == pytest.approx(noncentral.var() / m, rel=1e-9)


@pytest.mark.parametrize("batch_size", [62, 64, 66, 500, 2000])
def test_normalized_value_without_cancellation(batch_size: int) -> None:
    # For even m, a = (m−2)/2 is an integer and Γ(a + ½) = (2a)! √π / (4^a a!), so that E[x̂]²/x̃² is rational but for π.
    a = (batch_size - 2) // 2
    pi = Fraction("3.14159265358979323846264338327950288419716939937510")
    root_free = Fraction(math.factorial(a - 1) * math.factorial(a) * 4**a, math.factorial(2 * a)) ** 2
    square = Fraction(batch_size, 2) * root_free / pi
    variance = Fraction(1 + 9 * batch_size, batch_size - 3) - 9 * square
    assert normalized_mean(1.0, batch_size) == pytest.approx(math.sqrt(square), rel=1e-14)
    assert normalized_variance(3.0, batch_size) == pytest.approx(float(variance), rel=1e-12)


def test_normalized_value_of_a_huge_batch() -> None:
    m = 4_000_000
    assert m * (normalized_mean(1.0, m) - 1) == pytest.approx(1.25, rel=1e-5)
    assert m * normalized_variance(2.0, m) == pytest.approx(1 + 2.0**2 / 2, rel=1e-5)
    assert m * normalized_variance(2.0, m, formula="thesis") == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("formula", ["derived", "thesis"])
def test_normalized_value_of_a_tensor_is_that_of_its_elements(dtype: torch.dtype, formula: Formula) -> None:
    x = torch.tensor([[-1.5, 0.0], [0.25, 3.0]], dtype=dtype)
    for of_value in (normalized_mean, normalized_variance):
        result = of_value(x, 8, formula=formula)
        expected = [[of_value(float(v), 8, formula=formula) for v in row] for row in x]
        torch.testing.assert_close(result, torch.tensor(expected, dtype=dtype))


# MBN ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "batch_size"), [(0.5, 2), (0.75, 4), (0.9, 3)])
def test_stationary_noise_of_momentum_batch_norm(momentum: float, batch_size: int) -> None:
    mean, variance = stationary_averages(momentum, batch_size, chains=20_000, seed=8)
    mean_noise, variance_noise = batch_mean_noise(batch_size, momentum), batch_variance_noise(batch_size, momentum)
    assert errors_from(-mean, mean_noise.mean) < 4
    assert errors_from(squares(-mean), mean_noise.variance) < 4
    assert errors_from(variance, variance_noise.mean) < 4
    assert errors_from(squares(variance), variance_noise.variance) < 4
    printed = batch_mean_noise(batch_size, momentum, formula="thesis").variance
    assert errors_from(squares(-mean), printed) > 20


def test_both_formulas_of_the_mean_noise() -> None:
    assert batch_mean_noise(4, 0.75).variance == pytest.approx((1 - 0.75) / (1 + 0.75) / 4, rel=1e-15)
    assert batch_mean_noise(4, 0.75, formula="thesis").variance == (1 - 0.75) / 4
    for formula in ("derived", "thesis"):
        assert batch_mean_noise(4, formula=formula) == (0.0, 0.25)
        assert batch_mean_noise(4, 1.0, formula=formula) == (0.0, 0.0)
    assert batch_variance_noise(4, 1.0) == (0.75, 0.0)


@pytest.mark.parametrize("target", ["derived", "thesis"])
@pytest.mark.parametrize(("batch_size", "base_batch_size"), [(1, 2), (2, 32), (8, 32), (31, 32), (4, 100)])
def test_matching_momentum_gives_the_noise_of_the_base(batch_size: int, base_batch_size: int, target: Formula) -> None:
    momentum = noise_matching_momentum(batch_size, base_batch_size, target=target)
    noise = batch_mean_noise(batch_size, momentum, formula=target)
    assert noise.variance == pytest.approx(1 / base_batch_size, rel=1e-12)
    # Written out, and what the thesis's choice gives in truth.
    m, m0 = batch_size, base_batch_size
    assert momentum == pytest.approx({"thesis": 1 - m / m0, "derived": (m0 - m) / (m0 + m)}[target], rel=1e-12)
    if target == "thesis":
        assert batch_mean_noise(m, momentum).variance == pytest.approx(1 / (2 * m0 - m), rel=1e-12)


@pytest.mark.parametrize("target", ["derived", "thesis"])
@pytest.mark.parametrize("batch_size", [32, 33, 1000])
def test_no_momentum_for_a_batch_that_is_large_enough(batch_size: int, target: Formula) -> None:
    assert noise_matching_momentum(batch_size, 32, target=target) == 0
    for epoch in (-1, 1, 2.5, 10, 50):
        assert stat_momentum(epoch, 10, batch_size, 32, target=target) == 0


# Schedules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2, 2.5, 90, 179, 180, 181, 200])
@pytest.mark.parametrize(("batch_size", "total_epochs"), [(2, 180), (8, 180), (16, 60)])
def test_stat_momentum_is_2_12(epoch: float, batch_size: int, total_epochs: int) -> None:
    t, T, m, m0 = epoch, total_epochs, batch_size, 32
    rho = min(m / m0, 1) ** (1 / T)
    expected = rho ** (T / (T - 1) * max(T - t, 0)) - rho**T
    assert stat_momentum(t, T, m) == pytest.approx(expected, rel=1e-10, abs=1e-14)
    rho = (2 * m / (m0 + m)) ** (1 / T)
    expected = rho ** (T / (T - 1) * max(T - t, 0)) - rho**T
    assert stat_momentum(t, T, m, target="derived") == pytest.approx(expected, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("target", ["derived", "thesis"])
def test_stat_momentum_at_its_ends(target: Formula) -> None:
    end = noise_matching_momentum(3, 32, target=target)
    for epoch in (-math.pi, 0, 0.5, 1):
        assert stat_momentum(epoch, 7, 3, target=target) == 0
    for epoch in (7, 7.5, 1000):
        assert stat_momentum(epoch, 7, 3, target=target) == end
    for epoch in (0, 1, 1.5, 2):
        assert stat_momentum(epoch, 1, 3, target=target) == end
    assert 0 < stat_momentum(1.01, 7, 3, target=target) < stat_momentum(6.99, 7, 3, target=target) < end


@given(
    epochs=st.tuples(st.floats(-5, 300), st.floats(-5, 300)),
    total_epochs=st.integers(1, 250),
    batch_size=st.integers(1, 64),
    target=st.sampled_from(["derived", "thesis"]),
)
@settings(deadline=None, max_examples=200)
def test_stat_momentum_never_falls(
    epochs: tuple[float, float], total_epochs: int, batch_size: int, target: Formula
) -> None:
    earlier, later = (stat_momentum(t, total_epochs, batch_size, target=target) for t in sorted(epochs))
    assert 0 <= earlier <= later + 1e-15
    assert later <= noise_matching_momentum(batch_size, target=target) < 1


@pytest.mark.parametrize(("batch_size", "expected"), [(2, 0.99), (32, 0.85), (64, 0.7225)])
def test_inference_decay_is_2_13(batch_size: int, expected: float) -> None:
    assert inference_decay(batch_size) == pytest.approx(expected, abs=2e-4)
    # The weight that is left of the past after N samples is the same: τ^(N/m) = τ₀^(N/m₀).
    assert inference_decay(batch_size) ** (640 / batch_size) == pytest.approx(0.85 ** (640 / 32), rel=1e-12)
    assert inference_decay(batch_size, 64, 0.9) == pytest.approx(0.9 ** (batch_size / 64), rel=1e-15)
    assert inference_decay(batch_size, 64, 0.0) == 0


# Regularizers ---------------------------------------------------------------------------------------------------------


def network(inputs: int, outputs: int) -> torch.nn.Sequential:
    layers = torch.nn.Sequential(torch.nn.Linear(inputs, 5), torch.nn.Tanh(), torch.nn.Linear(5, outputs)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(layers.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=seed))
    return layers


def test_additive_penalty_is_half_the_squared_jacobian() -> None:
    layers = network(6, 4).requires_grad_(False)

    def function(x: Tensor) -> Tensor:
        return layers(x.flatten(1)).reshape(-1, 2, 2)

    inputs = normal(7, 2, 3, seed=9)
    penalty = additive_noise_penalty(function, inputs, 0.25)
    for x, value in zip(inputs, penalty.tolist(), strict=True):
        step, total = 1e-6, 0.0
        for i, j in itertools.product(range(2), range(3)):
            shift = torch.zeros_like(x)
            shift[i, j] = step
            slope = (function((x + shift)[None]) - function((x - shift)[None])) / (2 * step)
            total += float(slope.square().sum())
        assert value == pytest.approx(0.5 * 0.25 * total, rel=1e-8)
    assert penalty.dtype == torch.float64
    assert not inputs.requires_grad


def test_additive_penalty_is_the_loss_that_noise_adds_to_a_linear_function() -> None:
    weight, x, target = normal(2, 3, seed=10), normal(1, 3, seed=11), normal(2, seed=12)
    noise = batch_statistics(normal(200_000, 3, 4, seed=13))[0]

    def loss(at: Tensor) -> Tensor:
        return 0.5 * (at @ weight.T - target).square().sum(-1)

    added = loss(x + noise) - loss(x)
    penalty = additive_noise_penalty(lambda at: at @ weight.T, x, batch_mean_noise(4).variance)
    assert errors_from(added, float(penalty)) < 4
    assert errors_from(added, 2 * float(penalty)) > 20


def test_additive_penalty_is_the_leading_term_of_2_5() -> None:
    layers = network(1, 1)
    x = torch.tensor([[0.3]], dtype=torch.float64)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(40))
    excess = []
    with torch.no_grad():
        for variance in (1e-2, 1e-3):
            noisy = layers(x + math.sqrt(variance) * nodes[:, None])
            added = float((weights * 0.5 * (noisy - layers(x)).square()[:, 0]).sum() / weights.sum())
            excess.append(added / float(additive_noise_penalty(layers, x, variance)) - 1)
    assert abs(excess[1]) < 0.01
    assert excess[0] / excess[1] == pytest.approx(10, rel=0.2)


def test_additive_penalty_can_be_trained_through() -> None:
    layers, inputs = network(3, 2), normal(5, 3, seed=14)
    additive_noise_penalty(layers, inputs, 0.5).sum().backward()
    weight = layers[0].weight
    gradient = weight.grad[0, 0].item()
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
            values.append(float(additive_noise_penalty(layers, inputs, 0.5).sum()))
            weight[0, 0] -= sign * step
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)
    with torch.no_grad():
        assert not additive_noise_penalty(layers, inputs, 0.5).requires_grad


def test_additive_penalty_through_inputs_that_are_trained() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    base = normal(4, seed=15)
    additive_noise_penalty(lambda x: x**2, scale * base, 2.0).sum().backward()  # Σ (2 s b)² = 4 s² Σ b²
    assert scale.grad is not None
    assert float(scale.grad) == pytest.approx(float(16 * base.square().sum()), rel=1e-12)


def test_additive_penalty_of_inputs_that_are_not_used_or_empty() -> None:
    inputs = normal(3, 2, seed=16)
    only_first = additive_noise_penalty(lambda x: torch.stack([3 * x[:, 0], 0 * x[:, 1]], 1), inputs, 2.0)
    torch.testing.assert_close(only_first, torch.full((3,), 9.0, dtype=torch.float64))
    constant = torch.ones(3, 1, requires_grad=True)
    torch.testing.assert_close(
        additive_noise_penalty(lambda x: 2 * constant, inputs, 2.0), torch.zeros_like(inputs[:, 0])
    )
    assert additive_noise_penalty(lambda x: x.square(), inputs[:0], 1.0).shape == (0,)
    assert additive_noise_penalty(lambda x: x.square(), inputs.float(), 1.0).dtype == torch.float32
    torch.testing.assert_close(additive_noise_penalty(lambda x: x, inputs, 0.0), torch.zeros_like(inputs[:, 0]))


def test_gamma_decay_is_what_batch_noise_adds_to_a_logistic_loss() -> None:
    """E[L(BN)] − L(PN) by quadrature over both noises of a normal feature, at a fitted gamma."""
    x = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    x /= x.std()
    bias = 0.3
    target = stats.bernoulli.rvs(1 / (1 + np.exp(-(1.2 * x + bias))), random_state=17)

    def loss(gain: np.ndarray, shift: np.ndarray) -> np.ndarray:
        h = gain[..., None] * (x + shift[..., None]) + bias
        return (np.logaddexp(0, h) - target * h).mean(-1)

    gamma = 1.0
    for _ in range(50):  # Newton's method for the stationary gamma
        sigmoid = 1 / (1 + np.exp(-(gamma * x + bias)))
        fisher = float((sigmoid * (1 - sigmoid) * x**2).mean())
        gamma -= float(((sigmoid - target) * x).mean()) / fisher
    curvature = float((sigmoid * (1 - sigmoid)).mean())
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    relative = []
    for m in (250, 1000):
        grid = np.linspace(-9, 9, 181) * math.sqrt(2 / m) + 1
        density = stats.chi2.pdf(grid, m - 1, scale=1 / m)
        losses = loss(gamma / np.sqrt(grid)[:, None] * np.ones(9), nodes / math.sqrt(m) * np.ones((181, 1)))
        expected_loss = density @ losses @ weights / (density.sum() * weights.sum())
        added = float(expected_loss - loss(np.array(gamma), np.array(0.0)))
        relative.append(added / (gamma_decay_coefficient(m, fisher, curvature) * gamma**2) - 1)
    assert abs(relative[1]) < 0.02
    assert relative[0] / relative[1] == pytest.approx(4, rel=0.1)  # what is left out is of the order 1/M²


def test_gamma_decay_depends_on_the_kurtosis() -> None:
    """The loss ½(h − x̃)² has gamma, its Fisher and curvature 1; averaged over x̃ it is ½((1/s − 1)² + ξ²/s²)."""
    mean, variance = batch_statistics(uniform(20_000, 500, seed=18))
    scale = variance.rsqrt()
    added = 0.5 * ((scale - 1).square() + (mean * scale).square())
    expected = gamma_decay_coefficient(500, 1.0, 1.0, excess_kurtosis=1.8 - 3)
    assert float(added.mean()) == pytest.approx(expected, rel=0.04)
    assert expected == pytest.approx((0.8 / 8 + 0.5) / 500, rel=1e-14)


def test_gamma_decay_of_channels() -> None:
    fisher, curvature = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
    kurtosis = torch.tensor([0.0, 6.0])
    computed = gamma_decay_coefficient(4, fisher, curvature, kurtosis)
    expected = [gamma_decay_coefficient(4, 1.0, 0.5), gamma_decay_coefficient(4, 2.0, -0.5, 6.0)]
    torch.testing.assert_close(computed, torch.tensor(expected))


# Errors ---------------------------------------------------------------------------------------------------------------

POINT = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batch_mean_noise(0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: batch_mean_noise(2.5), "batch_size must be an integer of at least 1, got 2.5"),
        (lambda: batch_mean_noise(True), "batch_size must be an integer of at least 1, got True"),
        (lambda: batch_mean_noise(4, 1.5), "momentum must be a number from 0 to 1, got 1.5"),
        (lambda: batch_mean_noise(4, math.nan), "momentum must be a number from 0 to 1, got nan"),
        (lambda: batch_mean_noise(4, formula="printed"), "formula must be one of 'derived', 'thesis', got 'printed'"),
        (lambda: batch_variance_noise(-1), "batch_size must be an integer of at least 1, got -1"),
        (lambda: batch_variance_noise(4, -0.1), "momentum must be a number from 0 to 1, got -0.1"),
        (
            lambda: batch_variance_noise(4, kurtosis=0.9),
            "kurtosis must be a finite number of at least 1, got 0.9",
        ),
        (
            lambda: large_batch_variance_noise(4, kurtosis=math.inf),
            "kurtosis must be a finite number of at least 1, got inf",
        ),
        (lambda: large_batch_variance_noise(4, formula=""), "formula must be one of 'derived', 'thesis', got ''"),
        (lambda: large_batch_deviation_noise(0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: log_batch_variance_noise(1), "batch_size must be an integer of at least 2, got 1"),
        (lambda: normalized_mean(1.0, 2), "batch_size must be an integer of at least 3, got 2"),
        (lambda: normalized_mean(1.0, 2, formula="thesis"), "batch_size must be an integer of at least 3, got 2"),
        (lambda: normalized_mean(1.0, 8, formula="2.4"), "formula must be one of 'derived', 'thesis', got '2.4'"),
        (lambda: normalized_variance(1.0, 3), "batch_size must be an integer of at least 4, got 3"),
        (lambda: normalized_variance(POINT, 8, formula="2.4"), "formula must be one of 'derived', 'thesis', got '2.4'"),
        (lambda: noise_matching_momentum(0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: noise_matching_momentum(2, 0), "base_batch_size must be an integer of at least 1, got 0"),
        (lambda: noise_matching_momentum(2, target="x"), "target must be one of 'derived', 'thesis', got 'x'"),
        (lambda: stat_momentum(math.nan, 10, 2), "epoch must be a finite number, got nan"),
        (lambda: stat_momentum("1", 10, 2), "epoch must be a finite number, got '1'"),
        (lambda: stat_momentum(1, 0, 2), "total_epochs must be an integer of at least 1, got 0"),
        (lambda: stat_momentum(1, 10, 0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: stat_momentum(1, 10, 2, -32), "base_batch_size must be an integer of at least 1, got -32"),
        (lambda: stat_momentum(1, 10, 64, target="x"), "target must be one of 'derived', 'thesis', got 'x'"),
        (lambda: inference_decay(0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: inference_decay(2, 0), "base_batch_size must be an integer of at least 1, got 0"),
        (
            lambda: inference_decay(2, 32, 1.0),
            "base_inference_decay must be a number of at least 0 and less than 1, got 1.0",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x, POINT, -1.0),
            "noise_variance must be a finite number of at least 0, got -1.0",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x, POINT.long(), 1.0),
            "inputs must have shape (n, ...) and a floating-point dtype, got (2, 3) of torch.int64",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x, torch.tensor(1.0), 1.0),
            "inputs must have shape (n, ...) and a floating-point dtype, got () of torch.float32",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x.sum(0), POINT, 1.0),
            "function must return one output of shape (...) for each sample, got (3,) from inputs of shape (2, 3)",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x.sum(), POINT, 1.0),
            "function must return one output of shape (...) for each sample, got () from inputs of shape (2, 3)",
        ),
        (
            lambda: additive_noise_penalty(lambda x: x.detach(), POINT, 1.0),
            "function must be differentiable by autograd, got outputs that do not require grad",
        ),
        (lambda: gamma_decay_coefficient(0, 1.0, 1.0), "batch_size must be an integer of at least 1, got 0"),
        (lambda: gamma_decay_coefficient(8, math.nan, 1.0), "gamma_fisher must be a finite number, got nan"),
        (lambda: gamma_decay_coefficient(8, 1.0, math.inf), "curvature must be a finite number, got inf"),
        (
            lambda: gamma_decay_coefficient(8, 1.0, 1.0, -2.5),
            "excess_kurtosis must be a finite number of at least -2, got -2.5",
        ),
    ],
)
def test_errors_say_the_rule_and_what_was_given(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_formulas_are_all_that_the_type_allows() -> None:
    assert theory.FORMULAS == ("derived", "thesis")
