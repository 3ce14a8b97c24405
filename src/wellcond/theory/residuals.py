"""The residuals of theorem 2: what the noise of batch statistics adds to a loss, whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.theory.checks import check_integer


class Estimate(NamedTuple):
    """A mean over draws, and its standard error; both of shape (n,).

    Example:
        >>> Estimate(torch.zeros(1), torch.ones(1)).error
        tensor([1.])
    """

    value: Tensor
    error: Tensor


class NoiseResiduals(NamedTuple):
    """The parts of E[l(x̂)] = l(x̃) + R^add + R^mul + R, in the unit of the loss (thesis 2.7).

    Attributes:
        additive: R^add(x̃), of the batch mean's noise alone (2.5).
        multiplicative: R^mul(x̃), of the batch variance's noise alone (2.6).
        cross: R(x̃), what both do together beyond the sum.
    """

    additive: Estimate
    multiplicative: Estimate
    cross: Estimate


@torch.no_grad()
def noise_residuals(
    loss: Callable[[Tensor], Tensor],
    inputs: Tensor,
    batch_size: int,
    *,
    draws: int = 1000,
    generator: torch.Generator | None = None,
) -> NoiseResiduals:
    """Estimate R^add, R^mul and the cross residual R of the noise of batches of m, without an expansion (theorem 2).

    Each element of x̃ gets ξ_μ ~ N(0, 1/m) and m ξ_σ ~ χ²(m − 1) of its own, independent of each other (2.2), and
    x̂ = (x̃ + ξ_μ)/√ξ_σ. The residuals are differences of expected losses, and are taken over the same draws: their
    errors are far less than those of the expectations. `additive_noise_penalty` and `multiplicative_noise_penalty` are
    the leading terms of the first two where the loss is least; "when the noise is small, R can be ignored" can be seen.

    Args:
        loss: l, from inputs of shape (n, ...) to the loss of each of the n samples, shape (n,). It treats the samples
            independently of each other, hence contains no BN in training mode.
        inputs: x̃, the normalized inputs in units of σ, shape (n, ...), of a floating-point dtype.
        batch_size: m, the elements in each batch's statistics, at least 2.
        draws: Draws of the noise, at least 2; each is three calls of ``loss``.
        generator: Where random numbers come from, on the inputs' device; None: torch's global generator.

    Returns:
        The three residuals of each sample with standard errors. With m below 4 a loss that grows as x̂² has no finite
        expectation (E[1/ξ_σ] = m/(m − 3)): the estimates then do not settle.

    Raises:
        ValueError: If an argument is outside its range or ``loss`` returns another shape.

    Example:
        >>> x, numbers = torch.tensor([[1.0], [2.0]]), torch.Generator().manual_seed(0)
        >>> found = noise_residuals(lambda x: 0.5 * x.square().sum(1), x, 16, generator=numbers)
        >>> [round(float(part.value[0]), 3) for part in found]  # for all draws .031, .115, .007
        [0.036, 0.111, 0.015]
    """
    check_integer("batch_size", batch_size, 2)
    check_integer("draws", draws, 2)
    if inputs.dim() == 0 or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must have shape (n, ...) and a floating-point dtype, got {tuple(inputs.shape)} of {inputs.dtype}"
        )
    plain = loss(inputs)
    if plain.shape != inputs.shape[:1]:
        raise ValueError(f"loss must return one number for each sample, got shape {tuple(plain.shape)}")
    freedom = torch.full_like(inputs, (batch_size - 1) / 2)
    sums = inputs.new_zeros(2, 3, len(inputs), dtype=torch.float64)
    for _ in range(draws):
        mean = torch.randn(inputs.shape, dtype=inputs.dtype, device=inputs.device, generator=generator)
        shifted = inputs + mean / math.sqrt(batch_size)
        deviation = (torch._standard_gamma(freedom, generator=generator) * (2 / batch_size)).sqrt()
        added = loss(shifted) - plain
        scaled = loss(inputs / deviation) - plain
        both = loss(shifted / deviation) - plain
        found = torch.stack([added, scaled, both - added - scaled]).double()
        sums += torch.stack([found, found.square()])
    means = sums[0] / draws
    errors = ((sums[1] / draws - means.square()).clamp_min(0) / (draws - 1)).sqrt()
    parts = zip(means.to(plain.dtype), errors.to(plain.dtype), strict=True)
    return NoiseResiduals(*(Estimate(value, error) for value, error in parts))
