"""Normalizes with moments that layers combine by plain operations, and differentiates through them.

For layers that combine the moments of instances, layers, batches or earlier layers: they do so by plain operations on
[N, C], and both passes over the features stay those of batch normalization.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.nn.functional.batch_norm_kernels import gradient_sums, over, plain_gradient_sums, standardized
from wellcond.numerics.moments import Moments, instance_moments, positions, statistics_dtype
from wellcond.runtime.tracing import is_recorded


class Carried(NamedTuple):
    """The features, on their way from `live_moments` to one `normalize_with`.

    Attributes:
        inputs: The features.
        edge: The same, with the graph by which their gradient comes back; None where plain operations are recorded.
        scale: Ones [N, C], as whose gradient comes back what the gradient of `edge` is still to be multiplied with.
    """

    inputs: Tensor
    edge: Tensor | None
    scale: Tensor | None


def live_moments(inputs: Tensor) -> tuple[Moments, Carried]:
    """Return the mean and variance of each channel of each instance, with their graph, and the features to normalize.

    Args:
        inputs: Shape [N, C, *positions], any floating-point dtype and memory format.

    Returns:
        Moments of shape [N, C], float32 or wider; and the inputs, to be handed to `normalize_with` once (or not at
        all, if the moments alone are wanted).

    Raises:
        ValueError: If the inputs have fewer than two dimensions.

    Example:
        >>> x = torch.tensor([[[1.0, 3.0]], [[5.0, 5.0]]], requires_grad=True)
        >>> moments, features = live_moments(x)
        >>> batch_mean, batch_var = moments.mean.mean(0), moments.var.mean(0) + moments.mean.var(0, correction=0)
        >>> normalize_with(features, batch_mean, batch_var, None, None, eps=0.0).flatten()
        tensor([-1.5076, -0.3015,  0.9045,  0.9045], grad_fn=<ViewBackward0>)
    """
    if is_recorded():
        wide = inputs.to(statistics_dtype(inputs.dtype))
        if inputs.dim() == 2 or positions(inputs) == 1:
            mean = wide.flatten(1)
            return Moments(mean, torch.zeros_like(mean), 1), Carried(inputs, None, None)
        var, mean = torch.var_mean(wide, tuple(range(2, inputs.dim())), correction=0)
        return Moments(mean, var, positions(inputs)), Carried(inputs, None, None)
    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return instance_moments(inputs), Carried(inputs, None, None)
    mean, var, edge, scale = _LiveMoments.apply(inputs)
    return Moments(mean, var, positions(inputs)), Carried(inputs, edge, scale)


def normalize_with(
    features: Carried, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x − μ)/√(σ² + ε)·γ + β, differentiated through μ and σ², too.

    Args:
        features: x, from `live_moments`.
        mean: μ, shape [N, C], or what broadcasts to it, float32 or wider.
        var: σ², likewise, not negative.
        weight: γ, shape [C], or None for 1.
        bias: β, likewise, or None for 0.
        eps: ε.

    Returns:
        Of x's shape, dtype and memory format.
    """
    inputs, edge, scale = features
    shape = inputs.shape[:2]
    mean, var = mean.expand(shape), var.expand(shape)
    if is_recorded():
        factor = torch.rsqrt(var + eps)
        factor = factor if weight is None else factor * weight.to(factor.dtype)
        y = (inputs.to(mean.dtype) - over(mean, inputs)) * over(factor, inputs)
        if bias is not None:
            y = y + over(bias.to(y.dtype), inputs)
        return y.to(inputs.dtype)
    output: Tensor = _NormalizeWith.apply(inputs, edge, scale, mean, var, weight, bias, eps)
    return output


class _LiveMoments(torch.autograd.Function):
    """Instance moments, whose backward also finishes that of `_NormalizeWith`: one pass, one buffer of x's size."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return μ_s, σ²_s, x itself, and ones [N, C]."""
        moments = instance_moments(x)
        return moments.mean, moments.var, x.view_as(x), torch.ones_like(moments.mean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and their mean."""
        ctx.save_for_backward(inputs[0], output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, grad: Tensor | None, scale: Tensor | None
    ) -> Tensor | None:
        """Return g·scale + ∂L/∂μ_s/n + ∂L/∂σ²_s·2(x − μ_s)/n, with n positions."""
        x, mean = ctx.saved_tensors
        if x.numel() == 0:
            return torch.zeros_like(x)
        count = positions(x)
        differentiable = torch.is_grad_enabled()
        offset = None if grad_mean is None else grad_mean / count
        along = None if grad_var is None or count == 1 else grad_var * (2.0 / count)
        if differentiable:
            parts = []
            if grad is not None and scale is not None:
                parts.append(grad.to(mean.dtype) * over(scale, x))
            if offset is not None:
                parts.append(over(offset, x).expand(x.shape))
            if along is not None:
                parts.append((x.to(mean.dtype) - over(mean, x)) * over(along, x))
            return torch.stack(parts).sum(0).to(x.dtype) if parts else None
        if along is None:
            if grad is None or scale is None:
                return None if offset is None else over(offset, x).expand(x.shape).to(x.dtype)
            if offset is None:
                return (grad * over(scale, x)).to(x.dtype)
            return torch.addcmul(over(offset, x), grad, over(scale, x)).to(x.dtype)
        bias = offset
        if x.dtype == mean.dtype and x.is_contiguous():
            # (x − μ)·along + offset by the fastest kernel, the rest in place.
            result = standardized(x, mean, torch.ones_like(mean), along, bias, 0.0)
            return result if grad is None or scale is None else result.addcmul_(grad, over(scale, x))
        start = -along * mean if bias is None else bias - along * mean
        result = torch.addcmul(over(start, x), x, over(along, x))
        if grad is not None and scale is not None:
            result = result.addcmul_(grad.to(result.dtype), over(scale, x))
        return result.to(x.dtype)


class _NormalizeWith(torch.autograd.Function):
    """`normalize_with`. Its gradient of x is left to `_LiveMoments`: it passes g on, and what to multiply it with."""

    @staticmethod
    def forward(
        x: Tensor,
        edge: Tensor | None,
        scale: Tensor | None,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Normalize."""
        return standardized(x, mean, var, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs and what is of the size of [N, C]."""
        x, _, _, mean, var, weight, bias, ctx.eps = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, mean, var, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return g and the scale for x, and the gradients of mean, variance, weight and bias."""
        x, mean, var, weight = ctx.saved_tensors
        _, wants_edge, _, wants_mean, wants_var, wants_weight, wants_bias, _ = ctx.needs_input_grad
        factor = torch.rsqrt(var + ctx.eps)
        scale = factor if weight is None else factor * weight
        grad_mean = grad_var = grad_weight = grad_bias = None
        if wants_mean or wants_var or wants_weight or wants_bias:
            sums = plain_gradient_sums if torch.is_grad_enabled() else gradient_sums
            product, total = sums(grad, x, mean, var, ctx.eps)
            grad_weight = product.sum(0).to(weight.dtype) if wants_weight else None
            grad_bias = total.sum(0).to(ctx.bias_dtype) if wants_bias else None
            grad_mean = -scale * total if wants_mean else None
            grad_var = -0.5 * scale * factor * product if wants_var else None
        carried = (grad, scale) if wants_edge else (None, None)
        return None, *carried, grad_mean, grad_var, grad_weight, grad_bias, None


# `apply` asks for the signatures on every call; asked once, a small layer's pass is quicker.
_LiveMoments.forward.__signature__ = inspect.signature(_LiveMoments.forward)  # type: ignore[attr-defined]
_NormalizeWith.forward.__signature__ = inspect.signature(_NormalizeWith.forward)  # type: ignore[attr-defined]
