"""Products of positions at every distance between two taps, summed over channels."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.numerics.pieces import in_pieces, samples_in_pieces
from wellcond.numerics.windows import Window

# Positions per block of products, in `tap_gram`.
_BLOCK = 16


def in_line(padded: Tensor, groups: int, tail: int) -> Tensor:
    """Copy an input as (groups, positions, N, c): positions in one line, followed by ``tail`` zero positions."""
    samples, channels, *space = padded.shape
    length = math.prod(space)
    line = padded.new_empty(groups, length + tail, samples, channels // groups)
    line[:, length:].zero_()
    # In two steps, which is faster: channels last, then samples behind positions.
    image = padded.movedim(1, -1).contiguous().view(samples, length, groups, -1)
    line[:, :length].copy_(image.permute(2, 1, 0, 3))
    return line


@lru_cache(maxsize=1024)
def constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put numbers on a device once: copying them there waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)


class _TapPlan(NamedTuple):
    """How `tap_gram` gets from products of positions in a line to pairs of taps.

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
def tap_plan(space: tuple[int, ...], window: Window) -> _TapPlan:
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


def tap_gram(line: Tensor, plan: _TapPlan) -> Tensor:
    """Sum the products of two taps over windows and channels, shape [groups, taps, taps], from an input as `in_line`.

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
        for part in in_pieces(line, blocks * _BLOCK * span):
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


def tap_moment(padded: Tensor, window: Window) -> Tensor:
    """Sum x xᵀ over the patches of single channels."""
    plan = tap_plan(tuple(padded.shape[2:]), window)
    total = padded.new_zeros(window.groups, window.taps, window.taps)
    for chunk in samples_in_pieces(padded, padded[:1].numel()):
        total += tap_gram(in_line(chunk, window.groups, plan.tail), plan)
    return total


def _axis_reads(length: int, size: int, stride: int, dilation: int) -> list[list[int]]:
    """Tell for each tap of one axis which positions it reads, as 0 and 1."""
    positions = (length - dilation * (size - 1) - 1) // stride + 1
    reads = [[0] * length for _ in range(size)]
    for tap in range(size):
        start = dilation * tap
        reads[tap][start : start + stride * (positions - 1) + 1 : stride] = [1] * positions
    return reads


def times_read(space: tuple[int, ...], window: Window, like: Tensor) -> Tensor:
    """Count how often each position is read, shape [positions]."""
    total = like.new_ones(1)
    for reads in map(_axis_reads, space, window.size, window.stride, window.dilation):
        count = constant(tuple(map(sum, zip(*reads, strict=True))), like.dtype, like.device)
        total = (total[:, None] * count).flatten()
    return total
