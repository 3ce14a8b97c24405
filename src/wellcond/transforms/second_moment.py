"""Second moments of layer inputs: E[x xᵀ] over samples and positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond.layouts import Layer

# Rows are laid out in pieces of about this many numbers: a large batch's patches need not fit in memory at once.
ROWS_CHUNK = 1 << 24


def raw_second_moment(layer: Layer, inputs: Tensor, bias: bool, dtype: torch.dtype) -> list[Tensor]:
    """Sum x xᵀ over the rows of a layer's input, with a constant 1 appended to x if the bias counts.

    Args:
        layer: The layer.
        inputs: What its forward was given.
        bias: Whether to append the constant.
        dtype: Precision of the sum, whatever autocast says.

    Returns:
        The sum, shape [groups, d, d] (d includes the constant), the number of rows, shape [], and whether the input was
        not finite, shape [], as 0 or 1: then the others are zero. The device decides that; nobody waits for it.

    Example:
        >>> from torch import nn
        >>> from wellcond.layouts import find_layers
        >>> (layer,) = find_layers(nn.Linear(2, 3))
        >>> total, count, not_finite = raw_second_moment(layer, torch.tensor([[1.0, 2.0]]), True, torch.float32)
        >>> total[0]
        tensor([[1., 2., 1.],
                [2., 4., 2.],
                [1., 2., 1.]])
    """
    groups, width = second_moment_shape(layer, bias)
    total = torch.zeros(groups, width, width, dtype=dtype, device=inputs.device)
    count = 0
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        for chunk in _chunks(layer, inputs.detach(), width):
            rows = layer.rows(chunk.to(dtype))
            d = rows.shape[-1]
            total[:, :d, :d].baddbmm_(rows.mT, rows)
            if bias:
                total[:, -1, :d] += rows.sum(dim=1)
            count += rows.shape[1]
        if bias:
            total[:, :-1, -1] = total[:, -1, :-1]
            total[:, -1, -1] = count
        finite = torch.isfinite(total).all()
        return [torch.where(finite, total, 0.0), finite.to(dtype) * count, (~finite).to(dtype)]


def _chunks(layer: Layer, inputs: Tensor, width: int) -> Sequence[Tensor]:
    """Split an input along its batch axis so that one piece's rows hold about ROWS_CHUNK numbers."""
    if inputs.numel() == 0:
        return ()
    if layer.layout.kind != "conv" or inputs.dim() == layer.weight.dim() - 1:
        return (inputs,)
    # A convolution has at most about one patch per input position.
    per_sample = max(1, width * inputs[0, 0].numel())
    return torch.split(inputs, max(1, ROWS_CHUNK // per_sample))


def second_moment_shape(layer: Layer, bias: bool) -> tuple[int, int]:
    """Return (groups, d) of a layer's second moment.

    Args:
        layer: The layer.
        bias: Whether d counts the constant input of the bias.

    Returns:
        The number of matrices and their width.
    """
    groups, _, *inputs = layer.matrix_shape
    return groups, math.prod(inputs) + bool(bias)


def statistics_dtype(layer: Layer) -> torch.dtype:
    """Return the precision in which a layer's statistics are kept: float32, or wider where its weight is wider."""
    return torch.promote_types(torch.float32, layer.weight.dtype)
