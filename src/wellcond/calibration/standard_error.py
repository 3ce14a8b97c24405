"""Estimates how precisely a pass knows its statistics by now: standard errors, from how much batches differ."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from wellcond.calibration.replay import Seen

# Of fewer groups a standard error is itself a guess.
LEAST_GROUPS = 4


class StandardError:
    """The standard errors of one layer's mean and variance, from groups of samples that are independent.

    Of groups with weights w and values a the weighted mean ā has the error √(Σ w²(a − ā)² · n/(n − 1)) / Σ w.

    Example:
        >>> error = StandardError()
        >>> for means in ([[0.0]], [[2.0]], [[0.0]], [[2.0]]):
        ...     error.add(torch.tensor(means, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), 1.0)
        >>> round(float(error.value()), 4)  # of the means, 1/√3, in standard deviations of √2
        0.4082
    """

    def __init__(self) -> None:
        self.groups = 0
        self._first: Tensor | None = None
        self._sums: list[Tensor] = []

    def take(self, seen: Seen, weight: float) -> None:
        """Take in what one call of the layer saw."""
        wide = torch.float32 if seen.batches.mean.device.type == "mps" else torch.float64
        self.add(seen.batches.mean.to(wide), seen.batches.var.to(wide), weight)

    def add(self, means: Tensor, variances: Tensor, weight: float) -> None:
        """Take in groups of the same weight, each tensor of shape [groups, C]."""
        values = torch.stack([means, variances], dim=1)
        if self._first is None:
            self._first = values[0]
            self._sums = [torch.zeros_like(values[0]) for _ in range(3)] + [values.new_zeros(()) for _ in range(2)]
        self.groups += len(values)
        apart = values - self._first  # So that nothing cancels.
        linear, squared, squared_squares, total, squares = self._sums
        linear += weight * apart.sum(0)
        squared += weight**2 * apart.sum(0)
        squared_squares += weight**2 * apart.square().sum(0)
        total += weight * len(values)
        squares += weight**2 * len(values)

    def value(self) -> Tensor:
        """Return the larger of the two errors, each the root mean square over channels.

        That of the mean is in standard deviations, that of the variance a share of the variance; so 0.01 is one in a
        hundred. 0 of constant features.
        """
        assert self._first is not None
        linear, squared, squared_squares, total, squares = self._sums
        center = linear / total
        spread = (squared_squares - 2 * center * squared + center.square() * squares).clamp_min(0)
        error = (spread * (self.groups / max(self.groups - 1, 1))).sqrt() / total
        between = spread[0] / squares
        variance = (self._first[1] + center[1]).clamp_min(0) + between
        tiny = torch.finfo(variance.dtype).tiny
        relative = torch.stack([error[0] / variance.clamp_min(tiny).sqrt(), error[1] / variance.clamp_min(tiny)])
        return relative.square().mean(1).sqrt().max()


def largest(errors: Iterable[StandardError]) -> float | None:
    """Return the largest error of the layers that were reached; None while one of them has seen too few groups."""
    reached = [error for error in errors if error.groups]
    if not reached or any(error.groups < LEAST_GROUPS for error in reached):
        return None
    return float(torch.stack([error.value().cpu() for error in reached]).max())
