"""Sums over the patches that a convolution's kernel sees, without laying the patches out where that can be avoided.

A patch is what one output position reads: a window over the padded input. Neighbouring windows read the same values, so
most sums of products over patches are sums of products over the input, each counted as often as windows read it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Temporaries hold about this many numbers: a large batch is summed in pieces.
CHUNK = 1 << 24

# From this width on, only the strips of a symmetric sum that reach its diagonal are computed, in `_moment_by_rows`.
_WIDE = 512
_STRIPS = 6

# Positions per block of products, in `_tap_gram`.
_BLOCK = 16

# What `autocorrelation_cost` counts besides multiplications, in multiplications: one cell's fixed cost, and one
# number read or written.
CALL_COST = 2_000_000.0
COPY_COST = 32.0


@dataclass(frozen=True)
class Window:
    """A convolution's sliding window over an input that is padded already.

    Attributes:
        size: Taps per axis.
        stride: Steps between neighbouring windows, per axis.
        dilation: Steps between neighbouring taps, per axis.
        groups: How many equal parts the channels are cut into; a patch holds the channels of one part.

    Example:
        >>> window = Window((3, 3), (2, 2), (1, 1))
        >>> window.taps
        9
        >>> window.positions((9, 8))
        (4, 3)
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        if not len(self.size) == len(self.stride) == len(self.dilation) > 0:
            raise ValueError(
                f"size, stride and dilation need one number per axis, got {self.size}, {self.stride}, {self.dilation}"
            )
        if min(*self.size, *self.stride, *self.dilation, self.groups) < 1:
            raise ValueError(f"a window's numbers must be at least 1, got {self}")

    @property
    def taps(self) -> int:
        """How many positions a window reads."""
        return math.prod(self.size)

    def positions(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Count the windows along each axis of an input.

        Args:
            space: The padded input's length per axis.

        Returns:
            Output positions per axis.

        Raises:
            ValueError: If the window has another number of axes, or does not fit.
        """
        if len(space) != len(self.size):
            raise ValueError(f"the window has {len(self.size)} axes, the input {len(space)}")
        spans = [d * (k - 1) + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        if any(length < span for length, span in zip(space, spans, strict=True)):
            raise ValueError(f"a window that spans {tuple(spans)} does not fit an input of {tuple(space)}")
        return tuple((n - span) // s + 1 for n, span, s in zip(space, spans, self.stride, strict=True))


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


def patch_rows(padded: Tensor, window: Window) -> Tensor:
    """Lay the patches out as rows (im2col).

    Args:
        padded: The padded input, shape (N, C, *space).
        window: The sliding window.

    Returns:
        Shape [groups, N · positions, C/groups · taps]; a row's order is (channel, *tap), as in a convolution's weight.

    Raises:
        ValueError: If the window does not fit the input.

    Example:
        >>> patch_rows(torch.arange(4.0).reshape(1, 1, 4), Window((2,), (1,), (1,)))
        tensor([[[0., 1.],
                 [1., 2.],
                 [2., 3.]]])
    """
    check_fit(padded, window)
    axes = len(window.size)
    patches = padded
    for axis, (size, stride, dilation) in enumerate(
        zip(window.size, window.stride, window.dilation, strict=True), start=2
    ):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *positions, *kernel) -> (groups, N, *positions, C/groups, *kernel)
    patches = torch.unflatten(patches, 1, (window.groups, -1)).movedim(1, 0).movedim(2, 2 + axes)
    return patches.reshape(window.groups, math.prod(patches.shape[1 : 2 + axes]), math.prod(patches.shape[2 + axes :]))


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
    check_fit(padded, window)
    padded, window = crop(padded, window)
    if window.taps > 1 and padded.shape[1] == window.groups:
        moment = _tap_moment
    elif autocorrelation_cost(padded.shape, window) < _rows_cost(padded.shape, window):
        moment = _moment_by_autocorrelation
    else:
        moment = _moment_by_rows
    with torch.autocast(padded.device.type, enabled=False):
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
    check_fit(padded, window)
    padded, window = crop(padded, window)
    with torch.autocast(padded.device.type, enabled=False):
        return _margins(padded, window)


def _margins(padded: Tensor, window: Window) -> PatchMargins:
    """Sum the margins of a cropped input."""
    groups, c = window.groups, padded.shape[1] // window.groups
    space = tuple(padded.shape[2:])
    channels = padded.new_zeros(groups, c, c)
    taps = padded.new_zeros(groups, window.taps, window.taps)
    sums = padded.new_zeros(groups, c)
    plan = _tap_plan(space, window)
    reads = _reads(space, window, padded)
    for chunk in chunks(padded, padded[:1].numel()):
        if window.taps == 1:
            rows = patch_rows(chunk, window)
            sums += rows.sum(dim=1)
        else:
            line = _line(chunk, groups, plan.tail)
            taps += _tap_gram(line, plan)
            rows = line[:, : math.prod(space)]  # (groups, positions, N, c)
            sums += (reads @ rows.flatten(2)).unflatten(1, (-1, c)).sum(dim=1)
            # Both factors of a product take one root of the count. The line is this function's own copy.
            rows = rows.mul_(reads.sqrt()[:, None, None]).flatten(1, 2)
        channels.baddbmm_(rows.mT, rows)
    if window.taps == 1:
        taps = channels.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None]
    return PatchMargins(channels, taps, sums, len(padded) * math.prod(window.positions(space)))


def check_fit(padded: Tensor, window: Window) -> None:
    """Raise if the window does not fit the input."""
    window.positions(tuple(padded.shape[2:]))
    if padded.shape[1] % window.groups:
        raise ValueError(f"{padded.shape[1]} channels do not divide into {window.groups} groups")


def crop(padded: Tensor, window: Window) -> tuple[Tensor, Window]:
    """Drop positions that no window reads, as far as that leaves a regular grid."""
    stride, dilation = list(window.stride), list(window.dilation)
    for axis, (size, positions) in enumerate(zip(window.size, window.positions(tuple(padded.shape[2:])), strict=True)):
        # Where a window or an output is of one position, there is no dilation or stride to speak of.
        if size == 1:
            dilation[axis] = stride[axis]
        if positions == 1:
            stride[axis] = dilation[axis]
        step = math.gcd(stride[axis], dilation[axis])
        used = stride[axis] * (positions - 1) + dilation[axis] * (size - 1) + 1
        every: list[slice] = [slice(None)] * (axis + 2) + [slice(None, used, step)]
        padded = padded[tuple(every)]
        stride[axis], dilation[axis] = stride[axis] // step, dilation[axis] // step
    return padded, Window(window.size, tuple(stride), tuple(dilation), window.groups)


def chunks(padded: Tensor, per_sample: int) -> tuple[Tensor, ...]:
    """Split an input along its batch axis into pieces of about CHUNK temporary numbers, given those of one sample."""
    if padded.numel() == 0:
        return ()
    return torch.split(padded, max(1, CHUNK // max(1, per_sample)))


def _line(padded: Tensor, groups: int, tail: int) -> Tensor:
    """Copy an input as (groups, positions, N, c): positions in one line, followed by ``tail`` zero positions."""
    samples, channels, *space = padded.shape
    length = math.prod(space)
    line = padded.new_empty(groups, length + tail, samples, channels // groups)
    line[:, length:].zero_()
    # In two steps, which is faster: channels last, then samples behind positions.
    image = padded.movedim(1, -1).contiguous().view(samples, length, groups, -1)
    line[:, :length].copy_(image.permute(2, 1, 0, 3))
    return line


# Sums over taps: every position is read a known number of times.


def _axis_reads(length: int, size: int, stride: int, dilation: int) -> list[list[int]]:
    """Tell for each tap of one axis which positions it reads, as 0 and 1."""
    positions = (length - dilation * (size - 1) - 1) // stride + 1
    reads = [[0] * length for _ in range(size)]
    for tap in range(size):
        start = dilation * tap
        reads[tap][start : start + stride * (positions - 1) + 1 : stride] = [1] * positions
    return reads


def _reads(space: tuple[int, ...], window: Window, like: Tensor) -> Tensor:
    """Count how often each position is read, shape [positions]."""
    total = like.new_ones(1)
    for reads in map(_axis_reads, space, window.size, window.stride, window.dilation):
        count = constant(tuple(map(sum, zip(*reads, strict=True))), like.dtype, like.device)
        total = (total[:, None] * count).flatten()
    return total


@lru_cache(maxsize=1024)
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put numbers on a device once: copying them there waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)


# Sums over channels: products of positions at every distance between two taps.


class _TapPlan(NamedTuple):
    """How `_tap_gram` gets from products of positions in a line to pairs of taps.

    Attributes:
        space: The input's axes.
        segments: Runs of distances along the line, as (first, last, the wanted ones counted from the first).
        reads: Per axis, for each tap the positions it reads.
        first: The pairs' earlier taps.
        second: The pairs' later taps.
        distance: The pairs' distances, as places in the segments' wanted ones.
        tail: How many positions to add to the line, for whole blocks that reach no further than it.
    """

    space: tuple[int, ...]
    segments: tuple[tuple[int, int, tuple[int, ...]], ...]
    reads: tuple[tuple[tuple[float, ...], ...], ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    distance: tuple[int, ...]
    tail: int


@lru_cache(maxsize=256)
def _tap_plan(space: tuple[int, ...], window: Window) -> _TapPlan:
    """Plan the sums over channels for inputs of one size."""
    steps = [math.prod(space[axis + 1 :]) * dilation for axis, dilation in enumerate(window.dilation)]
    taps = [
        sum(step * place for step, place in zip(steps, tap, strict=True))
        for tap in itertools.product(*map(range, window.size))
    ]
    # Taps are in the order of the line, so the second tap of a pair is never behind the first.
    pairs = list(itertools.combinations_with_replacement(range(len(taps)), 2))
    wanted = sorted({taps[j] - taps[i] for i, j in pairs})
    runs: list[list[int]] = []
    for distance in wanted:
        # One more product of blocks costs about as much as widening the last one by a block.
        if runs and distance - runs[-1][-1] <= _BLOCK:
            runs[-1].append(distance)
        else:
            runs.append([distance])
    place = {distance: index for index, distance in enumerate(wanted)}
    return _TapPlan(
        space,
        tuple((run[0], run[-1], tuple(distance - run[0] for distance in run)) for run in runs),
        tuple(
            tuple(tuple(map(float, row)) for row in reads)
            for reads in map(_axis_reads, space, window.size, window.stride, window.dilation)
        ),
        tuple(i for i, _ in pairs),
        tuple(j for _, j in pairs),
        tuple(place[taps[j] - taps[i]] for i, j in pairs),
        -(-math.prod(space) // _BLOCK) * _BLOCK + -(-wanted[-1] // _BLOCK) * _BLOCK - math.prod(space),
    )


def _tap_gram(line: Tensor, plan: _TapPlan) -> Tensor:
    """Sum the products of two taps over windows and channels, shape [groups, taps, taps], from an input as `_line`.

    A block of positions times itself and the positions after it gives the products at all distances of a run at once.
    Positions are in one line whatever their axes: products across an edge are of no pair of taps, and are not read.
    """
    groups, width = line.shape[0], line.shape[2] * line.shape[3]
    length, blocks = math.prod(plan.space), line.shape[1] // _BLOCK
    reads = [constant(axis, line.dtype, line.device) for axis in plan.reads]
    found = []
    for start, stop, wanted in plan.segments:
        span = _BLOCK + stop - start
        index = constant(wanted, torch.int64, line.device)
        parts = []
        for part in line.split(max(1, CHUNK // (blocks * _BLOCK * span))):
            # Blocks are views; those of the second factor overlap. The groups' blocks are one after the other, and the
            # last ones, of the tail alone, are left out.
            size = part.shape[0]
            count = (size - 1) * blocks + -(-length // _BLOCK)
            step, offset = _BLOCK * width, part.storage_offset()
            left = part.as_strided((count, _BLOCK, width), (step, width, 1), offset)
            right = part.as_strided((count, span, width), (step, width, 1), offset + start * width)
            products = part.new_empty(size * blocks, _BLOCK, span)
            torch.bmm(left, right.mT, out=products[:count])
            # Row i of a block holds the distances from column i on: a view along the diagonals.
            near = products.as_strided(
                (size, blocks, _BLOCK, span - _BLOCK + 1), (blocks * _BLOCK * span, _BLOCK * span, span + 1, 1)
            )
            near = near.reshape(size, blocks * _BLOCK, -1)[:, :length].index_select(2, index)
            # (size, *space, distances) -> (size, taps, distances), the last axis first.
            for axis in reversed(range(len(reads))):
                near = near.reshape(size * math.prod(plan.space[:axis]), plan.space[axis], -1)
                near = torch.matmul(reads[axis], near)
            parts.append(near.reshape(size, -1, len(wanted)))
        found.append(torch.cat(parts))
    sums = torch.cat(found, dim=2)
    first, second, distance = (
        constant(values, torch.int64, line.device) for values in (plan.first, plan.second, plan.distance)
    )
    gram = line.new_empty(groups, sums.shape[1], sums.shape[1])
    values = sums[:, first, distance]
    gram[:, first, second] = values
    gram[:, second, first] = values
    return gram


def _tap_moment(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches of single channels."""
    plan = _tap_plan(tuple(padded.shape[2:]), window)
    total = padded.new_zeros(window.groups, window.taps, window.taps)
    for chunk in chunks(padded, padded[:1].numel()):
        total += _tap_gram(_line(chunk, window.groups, plan.tail), plan)
    return total


# Sums over patches, in full.


def _moment_by_rows(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches, laid out as rows."""
    width = padded.shape[1] // window.groups * window.taps
    total = padded.new_zeros(window.groups, width, width)
    per_sample = padded.shape[1] * window.taps * math.prod(window.positions(tuple(padded.shape[2:])))
    # Half of a symmetric sum is left out where it is large: a strip of it at a time, from the diagonal on.
    strips = 1 if width < _WIDE else _STRIPS
    edges = [width * strip // strips for strip in range(strips + 1)]
    for chunk in chunks(padded, per_sample):
        rows = patch_rows(chunk, window)
        for low, high in itertools.pairwise(edges):
            total[:, low:high, low:].baddbmm_(rows[:, :, low:high].mT, rows[:, :, low:])
    for low, high in itertools.pairwise(edges):
        for start, stop in itertools.pairwise(edge for edge in edges if edge >= high):
            total[:, start:stop, low:high] = total[:, low:high, start:stop].mT
    return total


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


def _moment_by_autocorrelation(padded: Tensor, window: Window) -> Tensor:
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
    for chunk in chunks(padded, padded[:1].numel()):
        image = _line(chunk, window.groups, 0).unflatten(1, tuple(padded.shape[2:]))  # (groups, *space, N, c)
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


def _rows_cost(shape: torch.Size, window: Window) -> float:
    """Estimate the work of `_moment_by_rows`, in multiplications."""
    width = shape[1] // window.groups * window.taps
    rows = shape[0] * window.groups * math.prod(window.positions(tuple(shape[2:])))
    share = 1.0 if width < _WIDE else (_STRIPS + 1) / (2 * _STRIPS)
    return rows * width * (width * share + COPY_COST) + CALL_COST


def autocorrelation_cost(shape: torch.Size, window: Window) -> float:
    """Estimate the work of `_moment_by_autocorrelation`, in multiplications."""
    c = shape[1] // window.groups
    positions = products = 0
    for strips in _half(window, tuple(shape[2:])):
        positions += math.prod(sum(len(range(s.start, s.stop, s.step)) for s in strip.cells) for strip in strips)
        products += math.prod(len(strip.cells) for strip in strips)
    read = shape[0] * positions * c * (c + COPY_COST)
    written = (products + 2 * window.taps**2) * c * c * COPY_COST
    return window.groups * (read + written) + products * CALL_COST
