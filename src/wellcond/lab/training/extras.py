"""Reads what trained layers have learned, by kind; it is kept with each run beside its scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from wellcond.nn.norm.switchable import SwitchableNorm

Shares: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""From a layer's name to ``"mean"`` and ``"var"``, to a normalizer, to its share; layers in the model's order."""


def read_shares(model: nn.Module) -> Shares:
    """Return the shares of the statistics that each switchable normalization mixes.

    Args:
        model: Any model.

    Returns:
        The shares; empty if it has no such layer.

    >>> from wellcond.nn import SwitchableNorm2d
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), SwitchableNorm2d(8, normalizers=("in", "ln")))
    >>> read_shares(model)
    {'1': {'mean': {'in': 0.5, 'ln': 0.5}, 'var': {'in': 0.5, 'ln': 0.5}}}
    """
    return {
        name: {"mean": layer.mean_ratios, "var": layer.var_ratios}
        for name, layer in model.named_modules()
        if isinstance(layer, SwitchableNorm)
    }


EXTRAS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {"shares": read_shares}
"""From a kind to what reads it from a trained network, as JSON can hold it; empty where the network has none."""


def collect_extras(model: nn.Module) -> dict[str, Any]:
    """Return everything of `EXTRAS` that a trained network has, by kind."""
    found = {kind: read(model) for kind, read in EXTRAS.items()}
    return {kind: value for kind, value in found.items() if value}
