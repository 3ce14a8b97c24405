"""Sums up the shares of IN, LN and BN that switchable normalizations have learned, over layers and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from wellcond.lab.comparison.statistics import Spread, spread
from wellcond.lab.comparison.summary import MethodSummary
from wellcond.lab.training.extras import Shares
from wellcond.nn.norm.switchable import NORMALIZERS

PARTS = {"mean": "means", "var": "variances"}
"""Which statistics are mixed, and what they are called."""


@dataclass(frozen=True)
class SharesSummary:
    """One method's shares at the chosen lr. `part` is one of `PARTS`, `kind` one of `kinds`.

    Attributes:
        layers: The layers' names, in the model's order.
        kinds: The normalizers that are switched between.
        seeds: Each seed's shares.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    seeds: tuple[Shares, ...]

    @property
    def shared(self) -> bool:
        """Whether means and variances have the same shares, in every layer and seed."""
        return all(layer["mean"] == layer["var"] for seed in self.seeds for layer in seed.values())

    @property
    def parts(self) -> dict[str, str]:
        """Which of `PARTS` differ, and what they are called."""
        return {"mean": " and ".join(PARTS.values())} if self.shared else PARTS

    def describe(self) -> dict[str, Any]:
        """Return each layer's shares and their average over layers, each a mean over the seeds with its spread."""
        layers = {
            layer: {part: {kind: asdict(self.of_layer(layer, part, kind)) for kind in self.kinds} for part in PARTS}
            for layer in self.layers
        }
        average = {part: {kind: asdict(self.average(part, kind)) for kind in self.kinds} for part in PARTS}
        return {"layers": layers, "average": average}

    def of_layer(self, layer: str, part: str, kind: str) -> Spread:
        """Return a layer's share over the seeds."""
        return spread([_share(seed, layer, part, kind) for seed in self.seeds])

    def average(self, part: str, kind: str) -> Spread:
        """Return the share's average over the layers, over the seeds."""
        return spread([average_share(seed, part, kind) for seed in self.seeds])


def summarize_shares(seeds: Sequence[Shares | None]) -> SharesSummary | None:
    """Return the shares of one network in several seeds.

    Args:
        seeds: Each seed's shares; None for a seed that has none, as after divergence.

    Returns:
        The summary; None if no seed has shares.

    >>> found = summarize_shares([{"1": {"mean": {"in": 0.2, "bn": 0.8}, "var": {"in": 0.4, "bn": 0.6}}}, None])
    >>> found.kinds, found.average("mean", "bn")
    (('in', 'bn'), Spread(mean=0.8, std=None, count=1))
    """
    there = tuple(seed for seed in seeds if seed)
    if not there:
        return None
    layers = tuple(there[0])
    used = {kind for layer in there[0].values() for kind in layer["mean"]}
    return SharesSummary(layers, tuple(kind for kind in NORMALIZERS if kind in used), there)


def method_shares(method: MethodSummary) -> SharesSummary | None:
    """Return a method's shares; None if it has no switchable normalization, or every run diverged."""
    return summarize_shares(method.extras.get("shares", ()))


def average_share(shares: Shares, part: str, kind: str) -> float:
    """Return one network's share of a normalizer, averaged over the layers.

    >>> average_share({"a": {"mean": {"ln": 0.2}}, "b": {"mean": {"ln": 0.4}}}, "mean", "ln").__round__(6)
    0.3
    """
    return fmean(_share(shares, layer, part, kind) for layer in shares)


def _share(shares: Shares, layer: str, part: str, kind: str) -> float:
    # A layer that does not switch to a normalizer gives it no share.
    return shares[layer][part].get(kind, 0.0)
