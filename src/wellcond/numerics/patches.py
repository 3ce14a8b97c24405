"""Sums over the patches that a convolution reads; patches are laid out only where that is cheaper.

A patch is what one output position reads: a window over the padded input. Neighbouring windows read the same values, so
most sums of products over patches are sums of products over the input, each counted as often as windows read it.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.numerics.autocorrelation import CALL_COST, COPY_COST, autocorrelation_cost, moment_by_autocorrelation
from wellcond.numerics.pieces import samples_in_pieces
from wellcond.numerics.taps import in_line, tap_gram, tap_moment, tap_plan, times_read
from wellcond.numerics.windows import Window, check_window, crop, patch_rows
from wellcond.runtime.autocast import without_autocast

# From this width on, only the strips of a symmetric sum that reach its diagonal are computed, in `_moment_by_rows`.
_WIDE = 512
_STRIPS = 6


class PatchMargins(NamedTuple):
    """Sums over patches that leave out either which tap or which channel a value came from.

    Attributes:
        channels: Sum over positions and taps of the products of two channels, shape [groups, c, c], c = C/groups.
        taps: Sum over positions and channels of the products of two taps, shape [groups, taps, taps].
        sums: Sum over positions and taps of each channel, shape [groups, c].
        positions: The number of patches, N · output positions.
    """

    channels: Tensor
    taps: Tensor
    sums: Tensor
    positions: int


@torch.no_grad()
def patch_moment(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches x.

    Of two ways to the same sum, the one with the lower estimate of work is taken: laying the patches out, which
    multiplies every pair of taps at every position, or the input's autocorrelation, which multiplies once for all pairs
    of taps that lie equally far apart, and pays for the borders where their windows differ.

    Args:
        padded: The padded input, shape (N, C, *space).
        window: The sliding window.

    Returns:
        Shape [groups, D, D], D = C/groups · taps, in the order of `patch_rows` and in the input's dtype. A value that
        is not finite may reach any entry.

    Raises:
        ValueError: If the window does not fit the input.

    Example:
        >>> patch_moment(torch.arange(4.0).reshape(1, 1, 4), Window((2,), (1,), (1,)))
        tensor([[[ 5.,  8.],
                 [ 8., 14.]]])
    """
    check_window(padded, window)
    padded, window = crop(padded, window)
    if window.taps > 1 and padded.shape[1] == window.groups:
        moment = tap_moment
    elif autocorrelation_cost(padded.shape, window) < _rows_cost(padded.shape, window):
        moment = moment_by_autocorrelation
    else:
        moment = _moment_by_rows
    with without_autocast(padded.device):
        return moment(padded, window)


@torch.no_grad()
def patch_margins(padded: Tensor, window: Window) -> PatchMargins:
    """Sum the patches' products over taps, over channels, and the patches themselves, without laying them out.

    Args:
        padded: The padded input, shape (N, C, *space).
        window: The sliding window.

    Returns:
        The sums, in the input's dtype. A value that is not finite may reach any entry.

    Raises:
        ValueError: If the window does not fit the input.

    Example:
        >>> margins = patch_margins(torch.arange(4.0).reshape(1, 1, 4), Window((2,), (1,), (1,)))
        >>> margins.channels, margins.sums, margins.positions
        (tensor([[[19.]]]), tensor([[9.]]), 3)
        >>> margins.taps
        tensor([[[ 5.,  8.],
                 [ 8., 14.]]])
    """
    check_window(padded, window)
    padded, window = crop(padded, window)
    with without_autocast(padded.device):
        return _margins(padded, window)


def _margins(padded: Tensor, window: Window) -> PatchMargins:
    """Sum the margins of a cropped input."""
    groups, c = window.groups, padded.shape[1] // window.groups
    space = tuple(padded.shape[2:])
    channels = padded.new_zeros(groups, c, c)
    taps = padded.new_zeros(groups, window.taps, window.taps)
    sums = padded.new_zeros(groups, c)
    plan = tap_plan(space, window)
    reads = times_read(space, window, padded)
    for chunk in samples_in_pieces(padded, padded[:1].numel()):
        if window.taps == 1:
            rows = patch_rows(chunk, window)
            sums += rows.sum(dim=1)
        else:
            line = in_line(chunk, groups, plan.tail)
            taps += tap_gram(line, plan)
            rows = line[:, : math.prod(space)]  # (groups, positions, N, c)
            sums += (reads @ rows.flatten(2)).unflatten(1, (-1, c)).sum(dim=1)
            # Both factors of a product take one root of the count. The line is this function's own copy.
            rows = rows.mul_(reads.sqrt()[:, None, None]).flatten(1, 2)
        channels.baddbmm_(rows.mT, rows)
    if window.taps == 1:
        taps = channels.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    return PatchMargins(channels, taps, sums, len(padded) * math.prod(window.positions(space)))


def _moment_by_rows(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches, laid out as rows."""
    width = padded.shape[1] // window.groups * window.taps
    total = padded.new_zeros(window.groups, width, width)
    per_sample = padded.shape[1] * window.taps * math.prod(window.positions(tuple(padded.shape[2:])))
    # Half of a symmetric sum is left out where it is large: a strip of it at a time, from the diagonal on.
    strips = 1 if width < _WIDE else _STRIPS
    edges = [width * strip // strips for strip in range(strips + 1)]
    for chunk in samples_in_pieces(padded, per_sample):
        rows = patch_rows(chunk, window)
        for low, high in itertools.pairwise(edges):
            total[:, low:high, low:].baddbmm_(rows[:, :, low:high].mT, rows[:, :, low:])
    for low, high in itertools.pairwise(edges):
        for start, stop in itertools.pairwise(edge for edge in edges if edge >= high):
            total[:, start:stop, low:high] = total[:, low:high, start:stop].mT
    return total


def _rows_cost(shape: torch.Size, window: Window) -> float:
    """Estimate the work of `_moment_by_rows`, in multiplications."""
    width = shape[1] // window.groups * window.taps
    rows = shape[0] * window.groups * math.prod(window.positions(tuple(shape[2:])))
    share = 1.0 if width < _WIDE else (_STRIPS + 1) / (2 * _STRIPS)
    return rows * width * (width * share + COPY_COST) + CALL_COST
