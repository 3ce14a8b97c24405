"""Torch's own batch-normalization kernels, for statistics of each channel or of each channel of each instance."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from wellcond.numerics.moments import positions


def over(factors: Tensor, x: Tensor) -> Tensor:
    """View [C] or [N, C] so that it broadcasts over x's positions.

    >>> over(torch.ones(3), torch.zeros(2, 3, 4, 5)).shape
    torch.Size([3, 1, 1])
    """
    return factors.reshape(factors.shape + (1,) * (x.dim() - 2))


def standardized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x − μ)/√(σ² + ε)·γ + β, without a graph.

    Torch's evaluation kernel is the fastest x·a + b, and mixes dtypes without a copy.

    Args:
        x: Shape [N, C, *positions], any memory format.
        mean: μ, shape [C] or [N, C], float32 or wider.
        var: σ², likewise.
        weight: γ, shape [C], or [N, C] if the mean has it; or None for 1.
        bias: β, likewise, or None for 0.
        eps: ε.

    Returns:
        Of x's shape, dtype and memory format.
    """
    if mean.dim() == 1:
        return _of_channels(x, mean, var, weight, bias, eps)
    if x.is_contiguous():
        gamma, beta = _flat(weight, mean), _flat(bias, mean)
        flat = _of_channels(_one_instance(x), _flat(mean, mean), _flat(var, mean), gamma, beta, eps)
        # Not `view_as`: what comes after may work in place, which autograd forbids on a view from in a Function.
        output: Tensor = torch.ops.aten._unsafe_view(flat, x.shape)
        return output
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    offset = -mean * scale
    offset = offset if bias is None else offset + bias
    return torch.addcmul(over(offset, x), x, over(scale, x)).to(x.dtype)


def gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return Σ g·(x − μ)/√(σ² + ε) and Σ g, over positions, and over instances too if the mean is of the channels.

    Args:
        grad: g, shape [N, C, *positions].
        x: The same shape.
        mean: μ, shape [C] or [N, C], float32 or wider.
        var: σ², likewise.
        eps: ε.

    Returns:
        Shaped as the mean.
    """
    if mean.dim() == 1:
        return _sums_of_channels(grad, x, mean, var, eps)
    if x.is_contiguous():
        flat = _one_instance(grad.contiguous()), _one_instance(x), _flat(mean, mean), _flat(var, mean)
        product, total = _sums_of_channels(*flat, eps)
        return product.view(mean.shape), total.view(mean.shape)
    if x.device.type != "cpu" or not len(x):
        return plain_gradient_sums(grad, x, mean, var, eps)
    # With channels last the kernel of one instance after the other is far quicker than plain sums.
    parts = zip(grad.split(1), x.split(1), mean, var, strict=True)
    each = [_sums_of_channels(*part, eps) for part in parts]
    return torch.stack([product for product, _ in each]), torch.stack([total for _, total in each])


def plain_gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return what `gradient_sums` does for a mean [N, C], by plain operations: differentiable, and for the compiler."""
    wide = grad.to(mean.dtype)
    product = wide * (x.to(mean.dtype) - over(mean, x))
    if x.dim() > 2:
        product, wide = product.flatten(2).sum(2), wide.flatten(2).sum(2)
    return product * torch.rsqrt(var + eps), wide


def _of_channels(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    dtype = mean.dtype
    weight = weight if weight is None else weight.to(dtype)
    bias = bias if bias is None else bias.to(dtype)
    output: Tensor = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]
    return output


def _sums_of_channels(grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, product, total = torch.ops.aten.native_batch_norm_backward(
        grad, x, torch.ones_like(mean), mean, var, None, None, False, eps, [False, True, True]
    )
    return product, total


def _one_instance(x: Tensor) -> Tensor:
    """View [N, C, *positions] as [1, N·C, positions]."""
    return x.view(1, -1, positions(x))


@overload
def _flat(values: Tensor, mean: Tensor) -> Tensor: ...


@overload
def _flat(values: None, mean: Tensor) -> None: ...


def _flat(values: Tensor | None, mean: Tensor) -> Tensor | None:
    """Return [N·C] of [C] or [N, C], in memory of its own where it was expanded: the kernels read it as it lies."""
    return None if values is None else values.expand(mean.shape).reshape(-1).contiguous()
