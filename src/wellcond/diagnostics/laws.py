"""Samples beside the law that they should follow: histograms, densities, and how far the two are apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from wellcond.theory import Noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Distribution: TypeAlias = Callable[[Tensor], Tensor]
"""A distribution function or a density."""


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width.

    Attributes:
        edges: Of the bins, one more than there are bins.
        counts: Of each bin.
        outside: Values in no bin.

    Example:
        >>> Histogram(edges=(0.0, 0.5, 1.0), counts=(1, 3), outside=4).density
        (0.25, 0.75)
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    outside: int

    @property
    def density(self) -> tuple[float, ...]:
        """The share of all values per unit in each bin, as a probability density has it."""
        total = sum(self.counts) + self.outside
        width = (self.edges[-1] - self.edges[0]) / len(self.counts)
        return tuple(count / (total * width) for count in self.counts)


@dataclass(frozen=True)
class NoiseDistribution:
    """One of the two noises of a layer, over all its batches and channels, beside its law.

    Attributes:
        found: Its mean and variance.
        law: The mean and variance of its law.
        distance: Of Kolmogorov and Smirnov, between 0 and 1: the largest difference between the two distribution
            functions. n independent values of the law itself come to about 0.87/√n.
        histogram: Of its values.
    """

    found: Noise
    law: Noise
    distance: float
    histogram: Histogram = field(repr=False)


def ks_distance(values: Tensor, cdf: Distribution) -> float:
    """Return the Kolmogorov–Smirnov distance: the largest |F_n − F|, which lies beside a step of F_n."""
    expected = cdf(values.flatten().sort().values)
    steps = torch.arange(len(expected) + 1, dtype=torch.float64) / len(expected)
    return float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).max())


def chi_square_freedom(noise: Noise) -> float:
    """Return the degrees of freedom of a scaled chi-square distribution, whose relative variance is 2 over those."""
    return 2 * noise.mean**2 / noise.variance if noise.variance > 0 else math.inf


def normal_cdf(law: Noise) -> Distribution:
    """Return the distribution function of a normal law."""
    return lambda x: 0.5 * torch.special.erfc((law.mean - x) / math.sqrt(2 * law.variance))


def chi_square_cdf(law: Noise) -> Distribution:
    """Return the distribution function of a scaled chi-square law with this mean and variance."""
    # With n degrees of freedom its scale is mean/n = variance/(2 mean), and that of χ²(n) itself P(n/2, ·/2).
    if law.variance <= 0 or law.mean <= 0:
        return lambda x: (x >= law.mean).double()
    half = torch.tensor(chi_square_freedom(law) / 2, dtype=torch.float64)
    return lambda x: torch.special.gammainc(half, x * law.mean / law.variance)


def normal_density(law: Noise) -> Distribution:
    """Return the density of a normal law."""
    return lambda x: torch.exp(-(x - law.mean).square() / (2 * law.variance)) / math.sqrt(2 * math.pi * law.variance)


def chi_square_density(law: Noise) -> Distribution:
    """Return the density of a scaled chi-square law with this mean and variance."""
    half, rate = chi_square_freedom(law) / 2, law.mean / law.variance
    constant = half * math.log(rate) - math.lgamma(half)
    return lambda x: torch.exp(constant + (half - 1) * torch.log(x) - rate * x)


def plot_distribution(
    ax: Axes, noise: NoiseDistribution, density: Distribution, label: str, law_label: str, color: str
) -> None:
    """Draw a histogram and its law."""
    edges = noise.histogram.edges
    found = f"{label}: {noise.found.mean:.3f} ± {math.sqrt(noise.found.variance):.3g}, distance {noise.distance:.3f}"
    ax.stairs(noise.histogram.density, edges, fill=True, alpha=0.4, color=color, label=found)
    plot_density(ax, edges, density, law_label, color, "-")


def plot_density(ax: Axes, edges: tuple[float, ...], density: Distribution, label: str, color: str, style: str) -> None:
    """Draw a density."""
    # The middles of fine bins: the chi-square's density may be infinite at 0.
    x = torch.linspace(edges[0], edges[-1], 401, dtype=torch.float64)
    x = (x[1:] + x[:-1]) / 2
    ax.plot(x.tolist(), density(x).tolist(), style, color=color, label=label)


def distribution_entry(noise: NoiseDistribution) -> dict[str, Any]:
    """Return everything as dictionaries, lists and numbers."""
    histogram = noise.histogram
    return {
        "found": noise.found._asdict(),
        "law": noise.law._asdict(),
        "distance": noise.distance,
        "histogram": {
            "edges": list(histogram.edges),
            "counts": list(histogram.counts),
            "outside": histogram.outside,
        },
    }
