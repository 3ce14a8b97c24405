"""Tables and axes on which results show themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def mean_of(values: Sequence[float]) -> float:
    """Return the mean; of values that are not finite, what arithmetic makes of them."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def deviation_of(values: Sequence[float]) -> float:
    """Return the standard deviation of all values."""
    mean = mean_of(values)
    return math.sqrt(mean_of([(value - mean) ** 2 for value in values]))


def axes_for(ax: Axes | None, what: str, size: tuple[float, float] = (6.0, 4.0)) -> Axes:
    """Return the axes that were given, or those of a new figure.

    Args:
        ax: Of the caller; None for new ones.
        what: Who plots, for the error's text.
        size: Of a new figure, in inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(f"{what} needs matplotlib: pip install matplotlib, or wellcond[lab]") from error
    return plt.subplots(figsize=size, layout="constrained")[1]
