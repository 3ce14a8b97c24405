"""The second moment of patches from the input's autocorrelation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.numerics.pieces import samples_in_pieces
from wellcond.numerics.taps import constant, in_line
from wellcond.numerics.windows import Window

# What `autocorrelation_cost` counts besides multiplications, in multiplications: one cell's fixed cost, and one
# number read or written.
CALL_COST = 2_000_000.0
COPY_COST = 32.0


class _Strip(NamedTuple):
    """Along one axis, the pairs of taps that lie ``offset`` positions apart and start on the same grid.

    Attributes:
        offset: From the first tap's position to the second's.
        cells: The positions that some pair's first tap reads, cut where a window starts or ends.
        first: The pairs' first taps.
        second: The pairs' second taps.
        covers: For each pair, the cells that its window covers, as 0 and 1.
    """

    offset: int
    cells: tuple[slice, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    covers: tuple[tuple[float, ...], ...]


@lru_cache(maxsize=1024)
def _strips(length: int, size: int, stride: int, dilation: int) -> tuple[_Strip, ...]:
    """Sort the pairs of taps of one axis by what their products have in common."""
    positions = (length - dilation * (size - 1) - 1) // stride + 1
    kinds: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i, j in itertools.product(range(size), repeat=2):
        kinds.setdefault((dilation * (j - i), dilation * i % stride), []).append((i, j))
    strips = []
    for (offset, phase), pairs in kinds.items():
        starts = [dilation * i // stride for i, _ in pairs]
        cuts = sorted({cut for start in starts for cut in (start, start + positions)})
        cells = [
            (low, high)
            for low, high in itertools.pairwise(cuts)
            if any(start <= low < start + positions for start in starts)
        ]
        strips.append(
            _Strip(
                offset,
                tuple(slice(phase + stride * low, phase + stride * (high - 1) + 1, stride) for low, high in cells),
                tuple(i for i, _ in pairs),
                tuple(j for _, j in pairs),
                tuple(tuple(float(start <= low < start + positions) for low, _ in cells) for start in starts),
            )
        )
    return tuple(strips)


def _half(window: Window, space: tuple[int, ...]) -> list[tuple[_Strip, ...]]:
    """Combine the axes' strips, leaving out those whose pairs of taps are others' in reverse order."""
    axes = map(_strips, space, window.size, window.stride, window.dilation)
    zero = (0,) * len(space)
    return [strips for strips in itertools.product(*axes) if tuple(strip.offset for strip in strips) >= zero]


def moment_by_autocorrelation(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches from the input's autocorrelation.

    The products of two taps depend on the distance between them and on the positions that the first one reads. Those
    positions are cut into cells, each inside or outside of any tap's window: one product per distance and cell, and a
    pair of taps adds up its cells.
    """
    groups, c = window.groups, padded.shape[1] // window.groups
    width = c * window.taps
    total = padded.new_zeros(groups, c, window.taps, window.taps, c)
    for first, second, sums in pair_products(padded, window):
        for i, j, block in zip(first, second, sums, strict=True):
            total[:, :, i, j] += block
            if i != j:
                total[:, :, j, i] += block.mT
    # Bring each row from (tap, channel) to (channel, tap), in place: a second sum of this size would cost more.
    for part in total.view(-1, window.taps, c).split(max(1, (1 << 18) // width)):
        part.view(-1, c, window.taps).copy_(part.mT.clone(memory_format=torch.contiguous_format))
    return total.view(groups, width, width)


def pair_products(padded: Tensor, window: Window) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Sum the products of any two taps' channels, from the input's autocorrelation.

    Every pair of taps comes once for each piece of the input, in one of its two orders.

    Args:
        padded: A cropped input (`crop`), shape (N, C, *space).
        window: Its window.

    Yields:
        Pairs of taps that lie equally far apart, as the first taps, the second taps, and the sums over positions of
        their products, shape [pairs, groups, c, c].
    """
    half = _half(window, tuple(padded.shape[2:]))
    for chunk in samples_in_pieces(padded, padded[:1].numel()):
        image = in_line(chunk, window.groups, 0).unflatten(1, tuple(padded.shape[2:]))  # (groups, *space, N, c)
        for strips in half:
            yield _correlate(image, strips, window)


def _correlate(
    image: Tensor, strips: tuple[_Strip, ...], window: Window
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    """Sum the products of all pairs of taps of one distance."""
    groups, c = image.shape[0], image.shape[-1]
    cells = list(itertools.product(*(strip.cells for strip in strips)))
    products = image.new_empty(len(cells), groups, c, c)
    offsets = [strip.offset for strip in strips]
    everything = (slice(None),)
    for cell, out in zip(cells, products, strict=True):
        shifted = tuple(slice(s.start + o, s.stop + o, s.step) for s, o in zip(cell, offsets, strict=True))
        _cell_product(image[everything + cell], image[everything + shifted], out)
    covers = image.new_ones(1, 1)
    first, second = [0], [0]
    for strip, size in zip(strips, window.size, strict=True):
        covers = torch.kron(covers, constant(strip.covers, image.dtype, image.device))
        first = [tap * size + i for tap in first for i in strip.first]
        second = [tap * size + j for tap in second for j in strip.second]
    return tuple(first), tuple(second), (covers @ products.flatten(1)).view(-1, groups, c, c)


def _cell_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Sum the products of two images (groups, *space, N, c) over all but groups and channels."""
    c = left.shape[-1]
    if left.shape[0] == 1 and left.shape[-3] * left.shape[-2] >= 256 and math.prod(left.shape[1:-3]) > 1:
        # Rows of positions are matrices already, without a copy.
        left, right = left[0].flatten(0, -4).flatten(1, 2), right[0].flatten(0, -4).flatten(1, 2)
        torch.addbmm(out[0], left.mT, right, beta=0, out=out[0])
    else:
        left, right = left.reshape(left.shape[0], -1, c), right.reshape(right.shape[0], -1, c)
        torch.bmm(left.mT, right, out=out)


def autocorrelation_cost(shape: torch.Size, window: Window) -> float:
    """Estimate the work of `moment_by_autocorrelation`, in multiplications."""
    c = shape[1] // window.groups
    positions = products = 0
    for strips in _half(window, tuple(shape[2:])):
        positions += math.prod(sum(len(range(s.start, s.stop, s.step)) for s in strip.cells) for strip in strips)
        products += math.prod(len(strip.cells) for strip in strips)
    read = shape[0] * positions * c * (c + COPY_COST)
    written = (products + 2 * window.taps**2) * c * c * COPY_COST
    return window.groups * (read + written) + products * CALL_COST
