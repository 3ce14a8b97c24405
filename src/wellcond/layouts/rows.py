"""Rows of a layer's input, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from wellcond.layouts.layers import Layer
from wellcond.numerics.pieces import in_pieces
from wellcond.numerics.windows import patch_rows

# Rows are laid out for about this many numbers at a time.
_CHUNK = 1 << 22


def input_pieces(layer: Layer, inputs: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
    """Lay out a layer's input as rows, a piece at a time, so that a convolution's patches never lie out all together.

    Args:
        layer: A layer whose layout defines rows.
        inputs: What `Layer.inputs` picked from a call.

    Yields:
        The first group, and rows [g, n, d] of that and the following ones.
    """
    window = layer.layout.window(layer.module)
    if window is not None:
        padded = layer.layout.padded(layer.module, *inputs)
        per_sample = padded[:1].numel() * window.taps
        for part in in_pieces(padded, per_sample, _CHUNK):
            yield 0, patch_rows(part, window)
        return
    rows = layer.rows(*inputs)
    parts = [rows] if isinstance(rows, Tensor) else [part.unsqueeze(0) for part in rows]
    for first, part in enumerate(parts):
        for piece in row_pieces(part):
            yield first, piece


def row_pieces(rows: Tensor) -> Iterator[Tensor]:
    """Cut rows [g, n, d] along n, for sums in another dtype."""
    yield from in_pieces(rows, rows.shape[0] * rows.shape[2], _CHUNK, dim=1)
