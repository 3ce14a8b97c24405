"""Tables as the numbers that a network sees: standardized, gaps filled, few categories apart, many by their number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wellcond.lab.data.splits import Indices
from wellcond.lab.data.tables import Table

# Columns of at most so many categories, the missing one included, become one column for each.
_FEW = 17

AUGMENTATIONS = ("standardize", "none")
"""What numbers go through: standardized by the rows that train, or as they are."""


@dataclass(frozen=True)
class EncodedColumns:
    """The columns of encoded rows, the same for every seed.

    Attributes:
        numbers: Columns of numbers, those of few categories among them.
        sizes: Of each column of categories by number: how many there are.
    """

    numbers: int
    sizes: tuple[int, ...]


def encoded_columns(table: Table) -> EncodedColumns:
    """Return what the columns of a table's encoded rows are."""
    gaps = int(np.isnan(table.numbers).any(axis=0).sum())
    few = sum(size for size in table.sizes if size <= _FEW)
    return EncodedColumns(table.numbers.shape[1] + gaps + few, tuple(size for size in table.sizes if size > _FEW))


def encode(table: Table, train: Indices, standardize: bool) -> Tensor:
    """Return every row as the network sees it.

    Args:
        table: The table.
        train: The rows that train; what is counted or averaged, is so over these.
        standardize: Whether numbers get a mean of 0 and a standard deviation of 1.

    Returns:
        Float32, [n, columns] in the layout of `encoded_columns`.
    """
    numbers = table.numbers
    mean, std = _moments(numbers[train])
    gaps = np.isnan(numbers)
    filled = np.where(gaps, mean, numbers)
    if standardize:
        filled = (filled - mean) / std
    parts: list[NDArray[np.floating]] = [filled.astype(np.float32), gaps[:, gaps.any(axis=0)].astype(np.float32)]
    by_number = []
    for column, size in enumerate(table.sizes):
        codes = table.codes[:, column]
        # Of a category that no training row has nothing can be learned: it counts as missing.
        seen = np.zeros(size, dtype=bool)
        seen[codes[train]] = True
        codes = np.where(seen[codes], codes, 0)
        if size <= _FEW:
            parts.append(np.eye(size, dtype=np.float32)[codes])
        else:
            by_number.append(codes.astype(np.float32)[:, None])
    return torch.from_numpy(np.concatenate([*parts, *by_number], axis=1))


def _moments(numbers: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of each column's values; 0 and 1 without any, 1 where all are equal."""
    there = ~np.isnan(numbers)
    count = np.maximum(there.sum(axis=0), 1)
    mean = np.where(there, numbers, 0).sum(axis=0, dtype=np.float64) / count
    squares = np.square(np.where(there, numbers - mean, 0.0)).sum(axis=0, dtype=np.float64) / count
    std = np.sqrt(squares)
    # Of equal values the mean may be another one by rounding.
    equal = std <= 1e-12 * np.maximum(1e-300, np.abs(mean))
    return mean, np.where(equal, 1.0, std)
