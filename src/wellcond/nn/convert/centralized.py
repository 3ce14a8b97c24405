"""Centralizes the weights right before `MovingAverageBatchNorm*`, and ends that where these are other layers by now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.layouts import Layout, layout_of
from wellcond.nn.norm.moving_average import MovingAverageBatchNorm
from wellcond.nn.norm.outline import PrecedingLayer, find_before
from wellcond.nn.standardize import OfUnits, WeightCentralization, why_not_centralized

_ADVICE = "Make the layers yourself, and call weight_centralize on those before them"


class _CentralizedFor(WeightCentralization):
    """Centralizes a weight for the normalization behind it."""

    def __init__(self, module: nn.Module, layout: Layout, norm: nn.Module) -> None:
        super().__init__(module, layout)
        self.behind = (norm,)  # In a tuple, since it is no part of this one.


def not_after_a_weight(model: nn.Module, norms: Mapping[str, nn.Module], options: Mapping[str, Any]) -> dict[str, str]:
    """Return why the weights before normalizations cannot be centralized, by name of the normalization.

    Args:
        model: That they are in.
        norms: By name.
        options: Of the conversion.
    """
    found: dict[str, str] = {}
    for name, before in find_before(model, norms, _ADVICE).items():
        if isinstance(before, str):
            found[name] = before
        elif not _is_centralized(before.layer) and (why := why_not_centralized(before.layer)) is not None:
            found[name] = f"comes after {before.name!r}, which cannot be centralized: {why}"
    return found


def centralize(model: nn.Module) -> None:
    """Centralize the weights right before `MovingAverageBatchNorm*`, where that can be done and is not done."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MovingAverageBatchNorm)}
    for name, before in find_before(model, layers, _ADVICE).items():
        if (
            isinstance(before, PrecedingLayer)
            and not _is_centralized(before.layer)
            and not why_not_centralized(before.layer)
        ):
            layout = layout_of(before.layer)
            assert layout is not None
            step = _CentralizedFor(before.layer, layout.of_weight("weight"), layers[name])
            parametrize.register_parametrization(before.layer, "weight", step)
            # Of features that have no mean any more.
            mean = layers[name].running_mean
            assert isinstance(mean, Tensor)
            mean.zero_()


def decentralize(model: nn.Module) -> None:
    """Make the centralized weights permanent whose normalization is another one by now, or none of the model."""
    modules = set(model.modules())
    for module in list(modules):
        own = [step for step in _steps(module) if isinstance(step, _CentralizedFor)]
        if own and not all(step.behind[0] in modules and _averages(step.behind[0]) for step in own):
            # Copies share the class that torch made, from which removing would take their weight.
            made = type(module)
            members = {name: value for name, value in vars(made).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(made.__name__, made.__bases__, members)
            parametrize.remove_parametrizations(module, "weight")


def _averages(norm: nn.Module) -> bool:
    return isinstance(norm, MovingAverageBatchNorm)


def _is_centralized(module: nn.Module) -> bool:
    return any(isinstance(step, OfUnits) and not step.leaves_a_mean for step in _steps(module))


def _steps(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return list(module.get_submodule("parametrizations.weight").children())
