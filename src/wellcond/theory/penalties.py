"""Penalties that noise on a function's inputs amounts to, to the second order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wellcond.theory.checks import check_within


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
        >>> from wellcond.theory import batch_mean_noise
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> additive_noise_penalty(lambda x: x @ weight.T, torch.zeros(3, 2), batch_mean_noise(4).variance)
        tensor([0.6250, 0.6250, 0.6250])
    """
    check_within("noise_variance", noise_variance, 0.0, math.inf)
    return _weighted_slopes(function, inputs, torch.ones_like) * (noise_variance / 2)


def cross_entropy_noise_penalty(
    function: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, noise_variance: float
) -> Tensor:
    """Return ½ E[ξ²] (f² − 2tf + t)/(f²(1−f)²) |∂f/∂x|²: what noise on f's inputs adds to a cross-entropy (after 2.5).

    The loss is −t log f − (1−t) log(1−f), summed over the outputs, with f a probability. The weight of the slope is the
    loss's second derivative in f; the thesis prints t² for its last t, which is the same for t = 0 and 1 only. As in
    `additive_noise_penalty`, the term with the curvature of f is left out, ½ E[ξ²] (f−t)/(f(1−f)) Δf, which is 0 where
    f fits the target.

    It takes one backward pass for each output of f, hence is meant for small networks.

    Args:
        function: f, from inputs of shape (n, ...) to probabilities in (0, 1) of shape (n, ...); it treats the n samples
            independently of each other, hence contains no BN in training mode.
        inputs: x̃, the normalized inputs in units of σ, shape (n, ...), of a floating-point dtype.
        targets: t in [0, 1], of the shape of the outputs.
        noise_variance: E[ξ²] of each element, for instance ``batch_mean_noise(m).variance``.

    Returns:
        The penalty of each sample in nats, shape (n,). It can be trained through, unless called under `torch.no_grad`.

    Raises:
        ValueError: If an argument is outside its range, or the outputs are not n differentiable samples of the targets'
            shape.

    Example:
        >>> weight = torch.tensor([[2.0]])
        >>> x, t = torch.zeros(1, 1), torch.ones(1, 1)
        >>> cross_entropy_noise_penalty(lambda x: torch.sigmoid(x @ weight), x, t, 0.5).detach()  # ½·½·4·(½)²
        tensor([0.2500])
    """
    check_within("noise_variance", noise_variance, 0.0, math.inf)

    def curvature(f: Tensor) -> Tensor:
        if f.shape != targets.shape:
            raise ValueError(
                f"targets must have the shape of the outputs, {tuple(f.shape)}, got {tuple(targets.shape)}"
            )
        return (f.square() - 2 * targets * f + targets) / (f * (1 - f)).square()

    return _weighted_slopes(function, inputs, curvature) * (noise_variance / 2)


def _weighted_slopes(
    function: Callable[[Tensor], Tensor], inputs: Tensor, weight: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return Σ_k weight(f)_k |∂f_k/∂x|² of each sample, shape (n,)."""
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
        weights = weight(outputs)
        columns = (values.unsqueeze(-1).flatten(1).unbind(1) for values in (outputs, weights))
        for output, factor in zip(*columns, strict=True):
            # The samples do not mix: the gradient of their sum holds each one's own.
            (slope,) = torch.autograd.grad(
                output.sum(), point, retain_graph=True, create_graph=trained_through, materialize_grads=True
            )
            penalty = penalty + factor * slope.unsqueeze(-1).flatten(1).square().sum(1)
        return penalty if trained_through else penalty.detach()


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
        >>> from wellcond.theory import log_batch_variance_noise
        >>> weight = torch.tensor([[1.0, 2.0]])
        >>> mean, variance = log_batch_variance_noise(8)
        >>> x = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
        >>> penalty = multiplicative_noise_penalty(lambda x: x @ weight.T, x, variance + mean**2)
        >>> penalty.detach() / (variance + mean**2)  # ⅛ (w₁²x₁² + w₂²x₂²)
        tensor([0.6250, 0.5000])
    """
    check_within("log_second_moment", log_second_moment, 0.0, math.inf)
    # l(x/√ξ) = l(sign(x) e^(log|x| − ½ log ξ)): an element that is 0 stays so, as by the indicator in 2.6.
    return additive_noise_penalty(
        lambda shift: function(inputs * torch.exp(shift)), torch.zeros_like(inputs), log_second_moment / 4
    )
