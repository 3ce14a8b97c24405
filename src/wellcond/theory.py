"""Closed forms for the noise in batch statistics: how large it is, how momentum tames it, what penalty it amounts to.

A channel of mean μ and variance σ² is normalized with the statistics of m of its elements, the biased variance
among them: m is the batch size, and N·H·W elements for images, as far as these are independent. Against the population
statistics the batch's own are off by

    ξ_μ = (μ − μ_B) / σ    and    ξ_σ = σ²_B / σ²        (thesis 2.2, which prints σ_B / σ: the square is meant),

so that x = μ + σ x̃ becomes x̂ = (x̃ + ξ_μ) / √ξ_σ (2.3). Where the thesis prints another formula than the one that
follows from these definitions, ``formula="derived"`` is ours and ``formula="thesis"`` is the printed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar, get_args, overload

import torch
from torch import Tensor

Formula = Literal["derived", "thesis"]

FORMULAS: tuple[str, ...] = get_args(Formula)

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
    _check_count("batch_size", batch_size)
    _check_within("momentum", momentum, 0.0, 1.0)
    _check_choice("formula", formula)
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
    _check_count("batch_size", batch_size)
    _check_within("momentum", momentum, 0.0, 1.0)
    _check_within("kurtosis", kurtosis, 1.0, math.inf)
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
    _check_count("batch_size", batch_size)
    _check_within("kurtosis", kurtosis, 1.0, math.inf)
    _check_choice("formula", formula)
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
    _check_count("batch_size", batch_size, at_least=2)
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
    _check_count("batch_size", batch_size, at_least=3)
    _check_choice("formula", formula)
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
    _check_count("batch_size", batch_size, at_least=4)
    _check_choice("formula", formula)
    m = batch_size
    if formula == "thesis":
        gain = normalized_mean(1.0, m, formula="thesis")
        inflation = (m - 1) / (m - 3)
        return (x * x * (inflation - gain**2) + inflation) / m  # (2.4)
    # m/(m−3) − gain² without the ones that cancel: it is only 1/(2m), and m may be millions.
    return x * x * (3 / (m - 3) - math.expm1(2 * _log_gain(m))) + 1 / (m - 3)


def noise_matching_momentum(batch_size: int, base_batch_size: int = 32, *, target: Formula = "thesis") -> float:
    """Return the momentum λ at which the mean of MBN is as noisy as that of BN with the base batch size.

    With the thesis's variance (1−λ)/m it is 1 − m/m₀ (2.11), with the derived one (1−λ)/((1+λ) m) it is
    (m₀−m)/(m₀+m), which is smaller: at 1 − m/m₀ the noise is that of the batch size 2m₀ − m. The thesis's is the
    default because its experiments used it.

    Args:
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size whose noise is wanted.
        target: ``"thesis"`` or ``"derived"``: which of the two variances is to become 1/m₀.

    Returns:
        λ, at least 0 and less than 1; 0 where m is at least m₀, as momentum cannot add noise.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> noise_matching_momentum(4, 16), noise_matching_momentum(4, 16, target="derived")
        (0.75, 0.6)
    """
    return 1 - _end_ratio(batch_size, base_batch_size, target)


def stat_momentum(
    epoch: float, total_epochs: int, batch_size: int, base_batch_size: int = 32, *, target: Formula = "thesis"
) -> float:
    """Return the momentum λ(t) of MBN's training statistics in an epoch (thesis 2.12).

    It rises from 0 in the first epoch, where the statistics still move and MBN is BN, to `noise_matching_momentum` in
    epoch T, and stays there:

        λ(t) = ρ^(T/(T−1) · max(T−t, 0)) − ρ^T,    ρ^T = min(m/m₀, 1),

    where the derived target has 2m/(m₀+m) in place of m/m₀. With T = 1 the end value holds from the first epoch on.

    Args:
        epoch: t, from 1; it may be fractional, and is taken as 1 where it is less.
        total_epochs: T, the number of epochs over which λ rises.
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size whose noise is wanted in the end; 32 in the thesis's experiments.
        target: ``"thesis"`` or ``"derived"``: see `noise_matching_momentum`.

    Returns:
        λ(t), at least 0 and less than 1; 0 for all t where m is at least m₀.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> [round(stat_momentum(epoch, 3, batch_size=8), 4) for epoch in (1, 2, 3, 4)]
        [0.0, 0.25, 0.75, 0.75]
        >>> stat_momentum(3, 3, batch_size=8, target="derived")
        0.6
    """
    _check_within("epoch", epoch, -math.inf, math.inf)
    _check_count("total_epochs", total_epochs)
    ratio = _end_ratio(batch_size, base_batch_size, target)
    # (2.12), with ρ^T written as the ratio: then the two ends are exact.
    remaining = max(total_epochs - max(epoch, 1), 0) / (total_epochs - 1) if total_epochs > 1 else 0.0
    return math.pow(ratio, remaining) - ratio


def inference_decay(batch_size: int, base_batch_size: int = 32, base_inference_decay: float = 0.85) -> float:
    """Return the decay τ = τ₀^(m/m₀) of the running statistics that inference uses (thesis 2.13).

    The running average then forgets a sample at the same rate per sample, whatever the batch size. The decay is the
    weight of the old value: torch's ``momentum`` is 1 − τ. The defaults are those of the thesis's experiments; its text
    at 2.13 also names m₀ = 64 with τ₀ = 0.9.

    Args:
        batch_size: m, the actual batch size.
        base_batch_size: m₀, the batch size that the base decay belongs to.
        base_inference_decay: τ₀, at least 0 and less than 1.

    Returns:
        τ, at least 0 and less than 1; not more than τ₀ where m is more than m₀.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> inference_decay(32), round(inference_decay(2), 3)
        (0.85, 0.99)
    """
    _check_count("batch_size", batch_size)
    _check_count("base_batch_size", base_batch_size)
    if not (_is_number(base_inference_decay) and 0 <= base_inference_decay < 1):
        raise ValueError(
            f"base_inference_decay must be a number of at least 0 and less than 1, got {base_inference_decay!r}"
        )
    return float(base_inference_decay ** (batch_size / base_batch_size))


def additive_noise_penalty(function: Callable[[Tensor], Tensor], inputs: Tensor, noise_variance: float) -> Tensor:
    """Return ½ E[ξ²] |∂f/∂x|²: the penalty that noise ξ on the inputs of f adds to a mean-square loss (2.5).

    For the loss ½|f(x) − t|² the noise adds ½ E[ξ²] (|∂f/∂x|² + (f − t)·Δf) up to terms in E[ξ⁴]; the penalty is the
    first part, all that remains where f fits the target or is linear around x. For |f(x) − t|² without the ½, twice as
    much. With the noise of `batch_mean_noise` it is the additive part of what BN on a batch, or on a ghost group, of m
    does to the network f behind it (theorem 2), with a noise that is independent between the elements of x.

    It takes one backward pass for each output of f, hence is meant for small networks.

    Args:
        function: f, from inputs of shape (n, ...) to outputs of shape (n, ...); it treats the n samples independently
            of each other, hence contains no BN in training mode.
        inputs: x̃, the normalized inputs in units of σ, shape (n, ...), of a floating-point dtype.
        noise_variance: E[ξ²] of each element, for instance ``batch_mean_noise(m).variance``.

    Returns:
        The penalty of each sample, shape (n,), in the unit of f squared. It can be trained through, unless called under
        `torch.no_grad`.

    Raises:
        ValueError: If an argument is outside its range, or the outputs are not n differentiable samples.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> additive_noise_penalty(lambda x: x @ weight.T, torch.zeros(3, 2), batch_mean_noise(4).variance)
        tensor([0.6250, 0.6250, 0.6250])
    """
    _check_within("noise_variance", noise_variance, 0.0, math.inf)
    if inputs.dim() == 0 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must have shape (n, ...) and a floating-point dtype, got {tuple(inputs.shape)} of {inputs.dtype}"
        )
    samples = inputs.shape[0]
    trained_through = torch.is_grad_enabled()
    with torch.enable_grad():
        point = inputs if inputs.requires_grad else inputs.detach().requires_grad_()
        outputs = function(point)
        if outputs.dim() == 0 or outputs.shape[0] != samples:
            raise ValueError(
                "function must return one output of shape (...) for each sample, "
                f"got {tuple(outputs.shape)} from inputs of shape {tuple(inputs.shape)}"
            )
        if not outputs.requires_grad:
            raise ValueError("function must be differentiable by autograd, got outputs that do not require grad")
        penalty = inputs.new_zeros(samples)
        for output in outputs.unsqueeze(-1).flatten(1).unbind(1):
            # The samples do not mix: the gradient of their sum holds each one's own.
            (slope,) = torch.autograd.grad(
                output.sum(), point, retain_graph=True, create_graph=trained_through, materialize_grads=True
            )
            penalty = penalty + slope.unsqueeze(-1).flatten(1).square().sum(1)
        return penalty * (noise_variance / 2)


def multiplicative_noise_penalty(
    function: Callable[[Tensor], Tensor], inputs: Tensor, log_second_moment: float
) -> Tensor:
    """Return ⅛ E[log² ξ] |∂f/∂log|x||²: the penalty that noise x/√ξ on f's inputs adds to a mean-square loss (2.6).

    In u = log|x| the noise is additive, −½ log ξ, and its second moment is ¼ E[log² ξ]: 2.6 is 2.5 for f(x·eᵘ) around
    u = 0, where ∂f/∂u is x·∂f/∂x. As in `additive_noise_penalty` the loss is ½|f(x) − t|², twice as much without the
    ½, and the penalty is what remains of the second order where f fits the target. What is left out there is of the
    order 1/m²; this includes that log ξ has a mean, −1/m for large m, through which the elements of x act together.
    Where f misses the target, that mean also acts in the first order.

    With the noise of `log_batch_variance_noise` it is the multiplicative part of what BN on a batch, or on a ghost
    group, of m does to the network f behind it (theorem 2), with a noise that is independent between the elements of x.

    It takes one backward pass for each output of f, hence is meant for small networks.

    Args:
        function: f, as for `additive_noise_penalty`.
        inputs: x̃, the normalized inputs in units of σ, shape (n, ...), of a floating-point dtype.
        log_second_moment: E[log² ξ_σ] of each element: the variance of `log_batch_variance_noise`, plus the square of
            its mean.

    Returns:
        The penalty of each sample, shape (n,), in the unit of f squared. It can be trained through, unless called under
        `torch.no_grad`.

    Raises:
        ValueError: If an argument is outside its range, or the outputs are not n differentiable samples.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> mean, variance = log_batch_variance_noise(8)
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
        >>> penalty = multiplicative_noise_penalty(lambda x: x @ weight.T, x, variance + mean**2)
        >>> penalty.detach() / (variance + mean**2)  # ⅛ (w₁²x₁² + w₂²x₂²)
        tensor([0.6250, 0.5000])
    """
    _check_within("log_second_moment", log_second_moment, 0.0, math.inf)
    # l(x/√ξ) = l(sign(x) e^(log|x| − ½ log ξ)): an element that is 0 stays so, as by the indicator in 2.6.
    return additive_noise_penalty(
        lambda shift: function(inputs * torch.exp(shift)), torch.zeros_like(inputs), log_second_moment / 4
    )


@overload
def gamma_decay_coefficient(
    batch_size: int, gamma_fisher: float, curvature: float, excess_kurtosis: float = 0.0
) -> float: ...


@overload
def gamma_decay_coefficient(
    batch_size: int, gamma_fisher: Tensor, curvature: Tensor, excess_kurtosis: float | Tensor = 0.0
) -> Tensor: ...


def gamma_decay_coefficient(
    batch_size: int,
    gamma_fisher: float | Tensor,
    curvature: float | Tensor,
    excess_kurtosis: float | Tensor = 0.0,
) -> float | Tensor:
    """Return ζ, the coefficient of the gamma decay ζγ² that BN amounts to: E[L(BN)] ≈ L(PN) + ζγ² (slides, 2018).

    PN is the same network normalized with the population statistics, h̄ = γ (h−μ)/σ + β. To the second order in the
    noise of the batch mean (variance σ²/M) and of the batch deviation (variance σ² (ρ+2)/(4M); see
    `large_batch_deviation_noise`), and to the first in 1/M,

        ζ = (ρ+2)/(8M) · F_γ + 1/(2M) · mean_j ∂²l/∂h̄_j².

    It holds where γ is stationary, ∂L/∂γ = 0, and takes the noise as independent of the sample. The slides print the
    second mean as that of σ(h̄_j); the expansion gives the curvature of the loss, which for the logistic loss
    softplus(h̄) − t h̄ is the derivative of the sigmoid, σ(h̄) (1 − σ(h̄)).

    Args:
        batch_size: M, the elements in each batch's statistics.
        gamma_fisher: F_γ, the second derivative of the mean loss L(PN) with respect to γ; for a loss that is a negative
            log-likelihood it may be estimated by the Fisher information mean_j (∂l_j/∂γ)². A number, or a tensor of
            shape (channels,).
        curvature: mean_j ∂²l/∂h̄_j² over the population, as ``gamma_fisher`` a number or a tensor. Negative where the
            loss is concave.
        excess_kurtosis: ρ = E[(h−μ)⁴]/σ⁴ − 3 of the feature h, at least −2; 0 for a normal one.

    Returns:
        ζ, in the unit of the loss, as γ has none: a number, or a tensor of shape (channels,).

    Raises:
        ValueError: If ``batch_size`` or a number is outside its range. The values of tensors are not looked at: on a
            GPU that would wait for the device.

    Example:
        >>> gamma_decay_coefficient(8, gamma_fisher=1.0, curvature=0.25)
        0.046875
        >>> gamma_decay_coefficient(8, torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.25]))
        tensor([0.0469, 0.1406])
    """
    _check_count("batch_size", batch_size)
    if not isinstance(gamma_fisher, Tensor):
        _check_within("gamma_fisher", gamma_fisher, -math.inf, math.inf)
    if not isinstance(curvature, Tensor):
        _check_within("curvature", curvature, -math.inf, math.inf)
    if not isinstance(excess_kurtosis, Tensor):
        _check_within("excess_kurtosis", excess_kurtosis, -2.0, math.inf)
    from_deviation = (excess_kurtosis + 2) / (8 * batch_size) * gamma_fisher
    from_mean = curvature / (2 * batch_size)
    return from_deviation + from_mean


def _averaging(momentum: float) -> float:
    """Return the share of the noise that is left in a stationary exponential average of independent terms."""
    return (1 - momentum) / (1 + momentum)


def _end_ratio(batch_size: int, base_batch_size: int, target: str) -> float:
    """Return 1 − λ(T), which is the ρ^T of 2.12 for the thesis's target."""
    _check_count("batch_size", batch_size)
    _check_count("base_batch_size", base_batch_size)
    _check_choice("target", target)
    if batch_size >= base_batch_size:
        return 1.0
    if target == "thesis":
        return batch_size / base_batch_size
    return 2 * batch_size / (base_batch_size + batch_size)


def _log_gain(batch_size: int) -> float:
    """Return the logarithm of √(m/2) Γ(a) / Γ(a + ½), a = (m−2)/2."""
    m, a = batch_size, (batch_size - 2) / 2
    if m < 64:
        return 0.5 * math.log(m / 2) + math.lgamma(a) - math.lgamma(a + 0.5)
    # The large logarithms would cancel: by Stirling's series Γ(a + ½) / Γ(a) = √a exp(−1/(8a) + 1/(192a³) − …).
    series = 1 / (8 * a) - 1 / (192 * a**3) + 1 / (640 * a**5) - 17 / (14336 * a**7)
    return 0.5 * math.log1p(2 / (m - 2)) + series


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_count(name: str, value: int, at_least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _check_within(name: str, value: float, low: float, high: float) -> None:
    if _is_number(value) and low <= value <= high:
        return
    rule = "a finite number"
    if high < math.inf:
        rule = f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        rule = f"a finite number of at least {low:g}"
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def _check_choice(name: str, value: str) -> None:
    if value not in FORMULAS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, FORMULAS))}, got {value!r}")
