"""Computes a comparison's numbers: means over seeds, paired differences with a t-interval, tests of a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        std: The sample standard deviation (n - 1 in the denominator); None for one seed.
        count: How many seeds.
    """

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """A mean paired difference.

    Attributes:
        mean: The mean of the differences.
        low: Lower end of the confidence interval; None for one pair.
        high: Upper end; None for one pair.
        count: How many pairs.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves zero out; False where there is no interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and the sample standard deviation.

    Raises:
        ValueError: If there is no value.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, std=1.4142135623730951, count=2)
    """
    if not values:
        raise ValueError("a mean needs at least one value, got none")
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), std, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> Difference:
    """Return the mean of ``values - baseline``, pair by pair, with its Student t-interval.

    Args:
        values: One number a seed.
        baseline: The baseline's number for the same seed, in the same order.
        level: The confidence level, between 0 and 1.

    Returns:
        The mean difference and the interval's ends.

    Raises:
        ValueError: If there is no pair, or one sequence is longer than the other.

    >>> difference = paired_difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
    >>> round(difference.mean, 3), round(difference.low, 3), round(difference.high, 3)
    (2.0, -0.484, 4.484)
    """
    if len(values) != len(baseline):
        raise ValueError(f"pairs need equally many values on both sides, got {len(values)} and {len(baseline)}")
    differences = [value - reference for value, reference in zip(values, baseline, strict=True)]
    summary = spread(differences)
    if summary.std is None:
        return Difference(summary.mean, None, None, summary.count)
    half = float(stats.t.ppf((1 + level) / 2, summary.count - 1)) * summary.std / math.sqrt(summary.count)
    return Difference(summary.mean, summary.mean - half, summary.mean + half, summary.count)


def probability_within(values: Sequence[float], target: float) -> float | None:
    """Return how likely a mean this far above a target would be if the true mean were the target.

    The one-sided Student t-test by which speed-run boards accept a record: the mean over the seeds reaches the target
    if this is below 0.01.

    Args:
        values: One number a seed, higher ones better.
        target: What to reach.

    Returns:
        The probability; None for one value.

    >>> round(probability_within([95.2, 95.3, 95.1, 95.4], 95.0), 4)
    0.0152
    >>> probability_within([95.0, 95.0], 95.0), probability_within([96.0, 96.0], 95.0)
    (1.0, 0.0)
    """
    summary = spread(values)
    if summary.std is None:
        return None
    above = summary.mean - target
    if summary.std == 0:
        return 0.0 if above > 0 else 1.0
    return float(stats.t.sf(above / summary.std * math.sqrt(summary.count), summary.count - 1))
