"""Cuts tensors into pieces, so that what is computed of each stays small."""

from __future__ import annotations

from torch import Tensor

CHUNK = 1 << 24
"""How many numbers temporaries hold, about, unless a caller wants fewer."""


def in_pieces(tensor: Tensor, numbers: int, at_most: int | None = None, dim: int = 0) -> tuple[Tensor, ...]:
    """Split a tensor along one axis.

    Args:
        tensor: Any.
        numbers: How many temporary numbers one entry along the axis makes.
        at_most: How many may be made at a time; `CHUNK` by default.
        dim: The axis.

    Returns:
        Views of at least one entry each.

    Example:
        >>> import torch
        >>> [len(piece) for piece in in_pieces(torch.zeros(5), numbers=10, at_most=20)]
        [2, 2, 1]
    """
    most = CHUNK if at_most is None else at_most
    found: tuple[Tensor, ...] = tensor.split(max(1, most // max(1, numbers)), dim)
    return found


def samples_in_pieces(padded: Tensor, per_sample: int) -> tuple[Tensor, ...]:
    """Split an input along its batch axis, given the temporary numbers of one sample; an empty one has no piece."""
    return in_pieces(padded, per_sample) if padded.numel() else ()
