"""Covariances of groups of channels, and one matrix a group applied to the features.

All of it is differentiable and keeps the features' memory format; for the backward only x itself is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.numerics.moments import positions


def group_width(channels: int, at_most: int) -> int:
    """Return the largest divisor of a number of channels that is not above a bound: the width of equal groups.

    Args:
        channels: C.
        at_most: The bound, positive.

    Example:
        >>> group_width(64, 16), group_width(24, 16), group_width(10, 16), group_width(17, 16)
        (16, 12, 10, 1)
    """
    return next(width for width in range(min(channels, at_most), 0, -1) if channels % width == 0)


def group_covariance(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each channel and the biased covariance of each group of channels, with their graph.

    The sums are of centred features, so that nothing cancels, and in the dtype of x: hand in float32 or wider.

    Args:
        x: Shape [N, C, *positions], any memory format.
        width: d, how many consecutive channels make a group; divides C.

    Returns:
        μ, shape [C], and Σ = E[(x − μ)(x − μ)ᵀ], shape [C/d, d, d]; zeros of an empty batch.

    Example:
        >>> mean, covariance = group_covariance(torch.tensor([[1.0, 3.0], [3.0, 7.0]]), width=2)
        >>> mean.tolist(), covariance.tolist()
        ([2.0, 5.0], [[[1.0, 2.0], [2.0, 4.0]]])
    """
    mean, covariance = _GroupCovariance.apply(x, width)
    return mean, covariance


def map_groups(x: Tensor, matrices: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return A x + b at each position, with one matrix A for each group of channels: a grouped 1×1 convolution.

    Unlike torch's it does not depend on `torch.backends.cudnn.allow_tf32`, which is on by default: an inverse square
    root must not be rounded to ten bits, or what it whitens is not white.

    Args:
        x: Shape [N, C, *positions], any memory format, which is kept.
        matrices: A, shape [C/d, d, d], of x's dtype.
        offset: b, shape [C], or None for zero.

    Returns:
        Shape [N, C, *positions].

    Example:
        >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> map_groups(torch.tensor([[1.0, 3.0], [3.0, 7.0]]), swap, torch.tensor([0.0, 10.0]))
        tensor([[ 3., 11.],
                [ 7., 13.]])
    """
    output: Tensor = _MapGroups.apply(x, matrices, offset)
    return output


class _GroupCovariance(torch.autograd.Function):
    """`group_covariance`; keeps x alone, whose centred copy lives no longer than the product."""

    @staticmethod
    def forward(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return μ and Σ."""
        count = max(x.shape[0] * positions(x), 1)
        mean = _sum_of_channels(x) / count
        centred = _as_rows(x, width) - mean.view(-1, width, 1)
        return mean, (centred @ centred.mT).sum(0) / count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep x and μ."""
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_covariance: Tensor) -> tuple[Tensor, None]:
        """Return ∂L/∂x = ((∂L/∂Σ + ∂L/∂Σᵀ)(x − μ) + ∂L/∂μ)/m: one more map of the groups."""
        x, mean = ctx.saved_tensors
        count = max(x.shape[0] * positions(x), 1)
        matrices = (grad_covariance + grad_covariance.mT) / count
        return map_groups(x, matrices, grad_mean / count - _times(matrices, mean)), None


class _MapGroups(torch.autograd.Function):
    """`map_groups`, whose backward is made of it and of `_OuterGroups`, and so are that one's."""

    @staticmethod
    def forward(x: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
        """Return A x + b."""
        mapped = _MapGroups._mapped(x, matrices, offset)
        if torch.compiler.is_compiling() or not mapped._is_view():
            return mapped
        # What comes after may work in place, which autograd forbids on a view from in a Function.
        output: Tensor = torch.ops.aten._unsafe_view(mapped, mapped.shape)
        return output

    @staticmethod
    def _mapped(x: Tensor, matrices: Tensor, offset: Tensor | None) -> Tensor:
        width = matrices.shape[-1]
        rows = _as_rows(x, width)
        if _keeps_positions_last(x, width):
            mapped = matrices @ rows
            if offset is not None:
                mapped.add_(offset.view(-1, width, 1))
            return mapped.reshape(x.shape)
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 and _is_channels_last(x):
            # Torch's own is faster here: it writes the format at once. For others it is slower, or less precise.
            return F.conv2d(x, matrices.reshape(-1, width, 1, 1), offset, groups=matrices.shape[0])
        mapped = rows.mT @ matrices.mT
        if offset is not None:
            mapped.add_(offset.view(-1, 1, width))
        mapped = mapped[0].transpose(0, 1).reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
        return in_format_of(mapped, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x and the matrices."""
        x, matrices, _ = inputs
        ctx.save_for_backward(x, matrices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return Aᵀg for x, Σ g xᵀ for A and Σ g for b."""
        x, matrices = ctx.saved_tensors
        grad = in_format_of(grad, x)
        wants_x, wants_matrices, wants_offset = ctx.needs_input_grad
        return (
            map_groups(grad, matrices.mT) if wants_x else None,
            _OuterGroups.apply(grad, x, matrices.shape[-1]) if wants_matrices else None,
            _sum_of_channels(grad) if wants_offset else None,
        )


class _OuterGroups(torch.autograd.Function):
    """Σ a bᵀ over samples and positions, of each group of channels: [C/d, d, d]."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, width: int) -> Tensor:
        """Return Σ a bᵀ."""
        return (_as_rows(a, width) @ _as_rows(b, width).mT).sum(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep both."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return G b for a and Gᵀ a for b."""
        a, b = ctx.saved_tensors
        return (
            map_groups(b, grad) if ctx.needs_input_grad[0] else None,
            map_groups(a, grad.mT) if ctx.needs_input_grad[1] else None,
            None,
        )


def _times(matrices: Tensor, vector: Tensor) -> Tensor:
    """Return A v, shape [C], with a matrix [d, d] for each group of the channels of v [C]."""
    return (matrices @ vector.view(*matrices.shape[:2], 1)).flatten()


def _sum_of_channels(x: Tensor) -> Tensor:
    return x.sum((0, *range(2, x.dim())))


def _is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a position lie together, and positions do not."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()


def in_format_of(tensor: Tensor, x: Tensor) -> Tensor:
    """Return a tensor of x's shape, contiguous in x's memory format."""
    if _is_channels_last(x):
        return tensor.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return tensor.contiguous()


def _keeps_positions_last(x: Tensor, width: int) -> bool:
    """Whether to multiply sample by sample; with fewer positions than channels that would be many small products."""
    return positions(x) >= width and not _is_channels_last(x)


def _as_rows(x: Tensor, width: int) -> Tensor:
    """Return [N, C/d, d, positions], or [1, C/d, d, N·positions]: a view, if the memory format is a usual one."""
    samples, channels, count = x.shape[0], x.shape[1], positions(x)
    if _keeps_positions_last(x, width):
        return x.reshape(samples, channels // width, width, count)
    return x.movedim(1, -1).reshape(1, samples * count, channels // width, width).permute(0, 2, 3, 1)
