"""Symmetric matrices, and scales that never divide by zero."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric part."""
    return (matrix + matrix.mT) / 2


def symmetric_from_lower(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix of a lower triangle."""
    return matrix.tril() + matrix.tril(-1).mT


def positive_or_one(values: Tensor) -> Tensor:
    """Replace zeros by ones, where they would divide."""
    return torch.where(values == 0, 1.0, values)
