"""Tables of text, as results print themselves, and what stands in them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table: the first column to the left, all others to the right.

    >>> print(table("Sizes", ["layer", "size"], [["0.weight", "12"]]))
    Sizes
    layer     size
    0.weight    12
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    written = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([title, *written])


def average(values: Sequence[float]) -> float:
    """Return the mean; of values that are not finite, what arithmetic makes of them."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation of all values."""
    mean = average(values)
    return math.sqrt(average([(value - mean) ** 2 for value in values]))
