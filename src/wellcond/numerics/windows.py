"""Sliding windows over a padded input, and the patches that they read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
    check_window(padded, window)
    axes = len(window.size)
    patches = padded
    for axis, (size, stride, dilation) in enumerate(
        zip(window.size, window.stride, window.dilation, strict=True), start=2
    ):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, *positions, *kernel) -> (groups, N, *positions, C/groups, *kernel)
    patches = torch.unflatten(patches, 1, (window.groups, -1)).movedim(1, 0).movedim(2, 2 + axes)
    return patches.reshape(window.groups, math.prod(patches.shape[1 : 2 + axes]), math.prod(patches.shape[2 + axes :]))


def check_window(padded: Tensor, window: Window) -> None:
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
