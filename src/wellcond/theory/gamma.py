"""The decay of γ that batch normalization amounts to."""

from __future__ import annotations

import math
from typing import NamedTuple, overload

from torch import Tensor

from wellcond.theory.checks import check_integer, check_within


class GammaDecay(NamedTuple):
    """The two parts of ζ: what the noise of the batch mean and what that of the batch deviation amounts to.

    Attributes:
        mean: Of μ_B: 1/(2M) · mean_j ∂²l/∂h̄_j². It depends on the curvature of the loss in the feature.
        deviation: Of σ_B: (ρ+2)/(8M) · F_γ. It depends on the curvature in γ, and on the feature's kurtosis.

    Example:
        >>> GammaDecay(mean=0.25, deviation=0.5).coefficient
        0.75
    """

    mean: float | Tensor
    deviation: float | Tensor

    @property
    def coefficient(self) -> float | Tensor:
        """ζ, the sum of both parts."""
        return self.mean + self.deviation


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
        >>> import torch
        >>> gamma_decay_coefficient(8, torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.25]))
        tensor([0.0469, 0.1406])
    """
    return gamma_decay_parts(batch_size, gamma_fisher, curvature, excess_kurtosis).coefficient


def gamma_decay_parts(
    batch_size: int,
    gamma_fisher: float | Tensor,
    curvature: float | Tensor,
    excess_kurtosis: float | Tensor = 0.0,
) -> GammaDecay:
    """Return the parts of ζ that the noise of μ_B and of σ_B have: their regularization differs (slides, 2018).

    The noise of the mean acts on the loss's curvature in the feature; the noise of the deviation on that in γ, the more
    the heavier the feature's tails are. Their sum is `gamma_decay_coefficient`, which says what each argument is.

    Args:
        batch_size: M, the elements in each batch's statistics.
        gamma_fisher: F_γ. A number, or a tensor of shape (channels,).
        curvature: mean_j ∂²l/∂h̄_j² over the population, as ``gamma_fisher`` a number or a tensor.
        excess_kurtosis: ρ of the feature h, at least −2.

    Returns:
        Both parts, each a number or a tensor of shape (channels,).

    Raises:
        ValueError: If ``batch_size`` or a number is outside its range.

    Example:
        >>> gamma_decay_parts(8, gamma_fisher=1.0, curvature=0.25)
        GammaDecay(mean=0.015625, deviation=0.03125)
    """
    check_integer("batch_size", batch_size)
    if not isinstance(gamma_fisher, Tensor):
        check_within("gamma_fisher", gamma_fisher, -math.inf, math.inf)
    if not isinstance(curvature, Tensor):
        check_within("curvature", curvature, -math.inf, math.inf)
    if not isinstance(excess_kurtosis, Tensor):
        check_within("excess_kurtosis", excess_kurtosis, -2.0, math.inf)
    return GammaDecay(curvature / (2 * batch_size), (excess_kurtosis + 2) / (8 * batch_size) * gamma_fisher)
