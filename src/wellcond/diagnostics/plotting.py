"""Axes to plot on: the caller's, or of a new figure; matplotlib is needed only for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
