"""The noise in batch statistics: its mean and variance, and what it makes of a normalized sample."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from wellcond.theory.checks import Formula, check_formula, check_integer, check_within

NORMAL_KURTOSIS = 3.0

_Number = TypeVar("_Number", float, Tensor)


class Noise(NamedTuple):
    """Mean and variance of a noise, without unit as the noise is relative to the population's own mean and variance.

    Example:
        >>> Noise(mean=0.0, variance=0.25).variance
        0.25
    """

    mean: float
    variance: float


def batch_mean_noise(batch_size: int, momentum: float = 0.0, *, formula: Formula = "derived") -> Noise:
    """Return the moments of ξ_μ = (μ − mean) / σ: the noise in the mean that BN, or MBN with a momentum, subtracts.

    BN's variance is 1/m (2.2), for a feature of any distribution. MBN's mean is an exponential average of the means of
    independent batches, (1−λ) Σ λ^i μ_B, whose variance is (1−λ)² Σ λ^(2i) / m = (1−λ) / ((1+λ) m) once it is
    stationary. Thesis 2.11 prints (1−λ)/m: too much by the factor 1+λ, which lies between 1 and 2.

    Args:
        batch_size: m, the elements in each batch mean.
        momentum: λ, the weight of the old mean in MBN's, from 0 (BN) to 1 (frozen, hence no noise).
        formula: ``"derived"``, or ``"thesis"`` for the variance of 2.11.

    Returns:
        The mean, 0, and the variance of ξ_μ.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> batch_mean_noise(4)
        Noise(mean=0.0, variance=0.25)
        >>> batch_mean_noise(4, 0.75).variance * 28, batch_mean_noise(4, 0.75, formula="thesis").variance * 16
        (1.0, 1.0)
    """
    check_integer("batch_size", batch_size)
    check_within("momentum", momentum, 0.0, 1.0)
    check_formula("formula", formula)
    if formula == "thesis":
        return Noise(0.0, (1 - momentum) / batch_size)  # (2.11)
    return Noise(0.0, _averaging(momentum) / batch_size)


def batch_variance_noise(batch_size: int, momentum: float = 0.0, *, kurtosis: float = NORMAL_KURTOSIS) -> Noise:
    """Return the moments of ξ_σ = variance / σ²: the noise in the variance that BN, or MBN with a momentum, divides by.

    Exact for any m: for m independent elements of kurtosis κ, E[ξ_σ] = (m−1)/m and

        Var[ξ_σ] = (m−1) ((m−1) κ − (m−3)) / m³,

    times (1−λ)/(1+λ) for the stationary exponential average of MBN. For a normal feature, κ = 3, it is 2(m−1)/m² as
    in 2.2, where m ξ_σ ~ χ²(m−1), and below 2.11. For large m it is (κ−1)/m: see `large_batch_variance_noise`.

    Args:
        batch_size: m, the elements in each batch variance.
        momentum: λ, the weight of the old variance in MBN's, from 0 (BN) to 1 (frozen, hence no noise).
        kurtosis: κ = E[(x−μ)⁴]/σ⁴ of the feature, at least 1; 3 for a normal one.

    Returns:
        The mean and the variance of ξ_σ.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> batch_variance_noise(4)
        Noise(mean=0.75, variance=0.375)
        >>> batch_variance_noise(4, 0.5).variance, batch_variance_noise(4, kurtosis=1.0).variance
        (0.125, 0.09375)
    """
    check_integer("batch_size", batch_size)
    check_within("momentum", momentum, 0.0, 1.0)
    check_within("kurtosis", kurtosis, 1.0, math.inf)
    m = batch_size
    variance = (m - 1) * ((m - 1) * kurtosis - (m - 3)) / m**3
    return Noise((m - 1) / m, _averaging(momentum) * variance)


def large_batch_variance_noise(
    batch_size: int, *, kurtosis: float = NORMAL_KURTOSIS, formula: Formula = "derived"
) -> Noise:
    """Return the moments of the normal distribution that ξ_σ = σ²_B / σ² tends to for large batches (theorem 1).

    ξ_σ becomes the mean of m values of x̃², whose variance is E[x̃⁴] − 1: the variance is (κ−1)/m, for a normal feature
    2/m. The proof of theorem 1 prints κ/m, 3/m for a normal feature, which contradicts its own 2/m for χ²(m−1)/m.
    `batch_variance_noise` is exact; it differs from this by the order 1/m².

    Args:
        batch_size: m, the elements in each batch variance.
        kurtosis: κ = E[(x−μ)⁴]/σ⁴ of the feature, at least 1; 3 for a normal one.
        formula: ``"derived"``, or ``"thesis"`` for the variance printed in the proof.

    Returns:
        The mean, 1, and the variance.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> large_batch_variance_noise(100), large_batch_variance_noise(100, formula="thesis")
        (Noise(mean=1.0, variance=0.02), Noise(mean=1.0, variance=0.03))
    """
    check_integer("batch_size", batch_size)
    check_within("kurtosis", kurtosis, 1.0, math.inf)
    check_formula("formula", formula)
    return Noise(1.0, (kurtosis if formula == "thesis" else kurtosis - 1) / batch_size)


def large_batch_deviation_noise(batch_size: int, *, kurtosis: float = NORMAL_KURTOSIS) -> Noise:
    """Return the moments of the normal distribution that σ_B / σ = √ξ_σ tends to for large batches.

    By the delta method a quarter of the variance of ξ_σ: (κ−1)/(4m). With the excess kurtosis κ − 3 it is the slides'
    (ρ+2)/(4M), which they print without the factor σ² that σ_B, not divided by σ, has.

    Args:
        batch_size: m, the elements in each batch variance.
        kurtosis: κ = E[(x−μ)⁴]/σ⁴ of the feature, at least 1; 3 for a normal one.

    Returns:
        The mean, 1, and the variance.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> large_batch_deviation_noise(100)
        Noise(mean=1.0, variance=0.005)
    """
    return Noise(1.0, large_batch_variance_noise(batch_size, kurtosis=kurtosis).variance / 4)


def log_batch_variance_noise(batch_size: int) -> Noise:
    """Return the moments of log ξ_σ = log(σ²_B / σ²) for a normal feature: the strength of BN's multiplicative noise.

    The residual of 2.6 is a series in E[log^n ξ_σ]. The logarithm of χ²(m−1) has the mean ψ((m−1)/2) + log 2 and the
    variance ψ'((m−1)/2); E[log² ξ_σ] is the variance plus the square of the mean.

    Args:
        batch_size: m, the elements in each batch variance; at least 2, as one element has the variance 0.

    Returns:
        The mean and the variance of log ξ_σ.

    Raises:
        ValueError: If ``batch_size`` is outside its range.

    Example:
        >>> mean, variance = log_batch_variance_noise(3)  # ξ_σ is 2/3 times an exponential variable
        >>> math.isclose(mean, math.log(2 / 3) - 0.5772156649015329), math.isclose(variance, math.pi**2 / 6)
        (True, True)
    """
    check_integer("batch_size", batch_size, at_least=2)
    half_freedom = torch.tensor((batch_size - 1) / 2, dtype=torch.float64)
    mean = float(torch.special.digamma(half_freedom)) + math.log(2 / batch_size)
    return Noise(mean, float(torch.special.polygamma(1, half_freedom)))


def normalized_mean(x: _Number, batch_size: int, *, formula: Formula = "derived") -> _Number:
    """Return E[x̂] given x̃: what BN makes, on average over the batches, of a sample of a normal feature.

    √(m−1)·x̂ has the noncentral t-distribution with m−1 degrees of freedom and the noncentrality √m·x̃, hence

        E[x̂] = x̃ √(m/2) Γ((m−2)/2) / Γ((m−1)/2).

    Thesis 2.4 has √((m−1)/2) in place of √(m/2). The batch is taken as independent of x̃, as in the thesis. A sample
    that is itself in the batch, as in training, pulls the statistics towards itself: |x̂| is then at most √(m−1), and
    its mean and variance are smaller (drawn for m = 8 and x̃ = 1: 1.007 and 0.172 instead of 1.204 and 0.351).

    Args:
        x: x̃, the sample in population units (x−μ)/σ: a number, or a tensor of any shape and floating-point dtype.
        batch_size: m, at least 3: with 2 the mean does not exist.
        formula: ``"derived"``, or ``"thesis"`` for the mean of 2.4.

    Returns:
        The means, a number or a tensor as ``x``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> f"{normalized_mean(1.0, 8):.4f} {normalized_mean(1.0, 8, formula='thesis'):.4f}"
        '1.2036 1.1259'
        >>> normalized_mean(torch.tensor([-1.0, 0.0, 2.0]), 8)
        tensor([-1.2036,  0.0000,  2.4072])
    """
    check_integer("batch_size", batch_size, at_least=3)
    check_formula("formula", formula)
    gain = math.exp(_log_gain(batch_size))
    if formula == "thesis":
        gain *= math.sqrt((batch_size - 1) / batch_size)  # (2.4)
    return x * gain


def normalized_variance(x: _Number, batch_size: int, *, formula: Formula = "derived") -> _Number:
    """Return Var[x̂] given x̃: the noise that BN adds to a sample of a normal feature.

    From the noncentral t-distribution of `normalized_mean`,

        Var[x̂] = (1 + m x̃²)/(m−3) − E[x̂]²,

    for large m (1 + x̃²/2)/m. Thesis 2.4 prints ((m−1)/(m−3) (1 + x̃²) − E[x̂]²)/m with its own E[x̂]: the variance for a
    noncentrality x̃ in place of √m·x̃, divided by m. It tends to 1/m and so loses the noise of the variance.

    Args:
        x: x̃, the sample in population units (x−μ)/σ: a number, or a tensor of any shape and floating-point dtype.
        batch_size: m, at least 4: with 3 the variance is infinite.
        formula: ``"derived"``, or ``"thesis"`` for the variance of 2.4.

    Returns:
        The variances, a number or a tensor as ``x``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> f"{normalized_variance(1.0, 8):.3f} {normalized_variance(1.0, 8, formula='thesis'):.3f}"
        '0.351 0.192'
        >>> normalized_variance(torch.tensor([0.0, 1.0]), 8)
        tensor([0.2000, 0.3513])
    """
    check_integer("batch_size", batch_size, at_least=4)
    check_formula("formula", formula)
    m = batch_size
    if formula == "thesis":
        gain = normalized_mean(1.0, m, formula="thesis")
        inflation = (m - 1) / (m - 3)
        return (x * x * (inflation - gain**2) + inflation) / m  # (2.4)
    # m/(m−3) − gain² without the ones that cancel: it is only 1/(2m), and m may be millions.
    return x * x * (3 / (m - 3) - math.expm1(2 * _log_gain(m))) + 1 / (m - 3)


def _averaging(momentum: float) -> float:
    """Return the share of the noise that is left in a stationary exponential average of independent terms."""
    return (1 - momentum) / (1 + momentum)


def _log_gain(batch_size: int) -> float:
    """Return the logarithm of √(m/2) Γ(a) / Γ(a + ½), a = (m−2)/2."""
    m, a = batch_size, (batch_size - 2) / 2
    if m < 64:
        return 0.5 * math.log(m / 2) + math.lgamma(a) - math.lgamma(a + 0.5)
    # The large logarithms would cancel: by Stirling's series Γ(a + ½) / Γ(a) = √a exp(−1/(8a) + 1/(192a³) − …).
    series = 1 / (8 * a) - 1 / (192 * a**3) + 1 / (640 * a**5) - 17 / (14336 * a**7)
    return 0.5 * math.log1p(2 / (m - 2)) + series
