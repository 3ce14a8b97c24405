"""The kinds of normalization that `convert_norm` knows, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.nn.convert.centralized import centralize, decentralize, not_after_a_weight
from wellcond.nn.convert.then_activation import NormClass
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.nn.norm.bsr import BSRBatchNorm1d, BSRBatchNorm2d, BSRBatchNorm3d
from wellcond.nn.norm.cross_iteration import (
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
    connect_compensating,
    disconnect_cross_iteration,
    not_after_a_layer,
)
from wellcond.nn.norm.decorrelated import DecorrelatedBatchNorm2d
from wellcond.nn.norm.evalnorm import EvalNorm1d, EvalNorm2d, EvalNorm3d
from wellcond.nn.norm.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from wellcond.nn.norm.instance_batch import InstanceBatchNorm2d
from wellcond.nn.norm.iternorm import IterNorm2d
from wellcond.nn.norm.kalman.layer import KalmanBatchNorm2d
from wellcond.nn.norm.kalman.trace import connect_kalman
from wellcond.nn.norm.momentum import MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d
from wellcond.nn.norm.moving_average import (
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from wellcond.nn.norm.population import PopulationNorm1d, PopulationNorm2d, PopulationNorm3d
from wellcond.nn.norm.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from wellcond.nn.norm.sparse_switchable import SparseSwitchableNorm1d, SparseSwitchableNorm2d, SparseSwitchableNorm3d
from wellcond.nn.norm.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d


@dataclass(frozen=True)
class NormKind:
    """A kind of normalization.

    Attributes:
        layers: Of 1, 2 and 3 dimensions; None where there is none.
        defaults: Arguments that torch's constructor requires or has another default for.
        fixed: Arguments that the kind itself decides; they are no options.
        connect: Called with a whole model that has such layers, after any conversion of it.
        disconnect: Called with any model before that: layers that others were connected to may be other ones by now.
        unsuited: From a model, its layers by name and the options to the reasons why some cannot be of the kind.
    """

    layers: tuple[NormClass | None, NormClass, NormClass | None]
    defaults: Mapping[str, object] = field(default_factory=dict)
    fixed: Mapping[str, object] = field(default_factory=dict)
    connect: Callable[[nn.Module], object] | None = None
    disconnect: Callable[[nn.Module], None] | None = None
    unsuited: Callable[[nn.Module, Mapping[str, nn.Module], Mapping[str, Any]], Mapping[str, str]] | None = None


KINDS: dict[str, NormKind] = {
    "bn": NormKind((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)),
    "ghost": NormKind((GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d)),
    "mbn": NormKind((MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d)),
    "mabn": NormKind(
        (MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d),
        connect=centralize,
        disconnect=decentralize,
        unsuited=not_after_a_weight,
    ),
    "cbn": NormKind(
        (CrossIterationBatchNorm1d, CrossIterationBatchNorm2d, CrossIterationBatchNorm3d),
        connect=connect_compensating,
        disconnect=disconnect_cross_iteration,
        unsuited=not_after_a_layer,
    ),
    "bsr": NormKind((BSRBatchNorm1d, BSRBatchNorm2d, BSRBatchNorm3d)),
    "brn": NormKind((BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)),
    "evalnorm": NormKind((EvalNorm1d, EvalNorm2d, EvalNorm3d)),
    "pn": NormKind((PopulationNorm1d, PopulationNorm2d, PopulationNorm3d)),
    "sn": NormKind((SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d)),
    "ssn": NormKind((SparseSwitchableNorm1d, SparseSwitchableNorm2d, SparseSwitchableNorm3d)),
    "ibn": NormKind((None, InstanceBatchNorm2d, None)),
    "kn": NormKind((None, KalmanBatchNorm2d, None), connect=connect_kalman),
    "dbn": NormKind((None, DecorrelatedBatchNorm2d, None)),
    "iternorm": NormKind((None, IterNorm2d, None)),
    "gn": NormKind((nn.GroupNorm, nn.GroupNorm, nn.GroupNorm), defaults={"num_groups": 32}),
    "ln": NormKind((nn.GroupNorm, nn.GroupNorm, nn.GroupNorm), fixed={"num_groups": 1}),
    "in": NormKind(
        (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        fixed={"momentum": None, "track_running_stats": False},
    ),
}
DIMENSIONS: dict[NormClass, int] = {
    layer: index
    for kind in KINDS.values()
    for index, layer in enumerate(kind.layers)
    if layer is not None and issubclass(layer, _BatchNorm)
}
"""Which of its kind's layers each of the batch normalizations is."""

# Arguments that the converted layer decides, whatever it becomes.
_OF_THE_LAYER = frozenset({"self", "num_features", "num_channels", "bias", "device", "dtype"})


def constructor_options(layer: NormClass) -> dict[str, inspect.Parameter]:
    """Return a constructor's arguments but for those that the converted layer decides."""
    decided = _OF_THE_LAYER | (layer.decided_by_model if issubclass(layer, StatisticsNorm) else frozenset())
    return {name: value for name, value in inspect.signature(layer).parameters.items() if name not in decided}


def inherited(target: NormClass) -> tuple[str, ...]:
    """Return the arguments that a layer takes over from a batch normalization of any other kind."""
    return target.inherited_arguments if issubclass(target, StatisticsNorm) else ("eps", "momentum")


def disconnect(model: nn.Module) -> None:
    """End the connections of layers that are of another kind by now."""
    for kind in KINDS.values():
        if kind.disconnect is not None:
            kind.disconnect(model)


def connect(model: nn.Module) -> None:
    """Connect the layers of a model whose kind needs to know which come before which."""
    disconnect(model)
    for kind in KINDS.values():
        layers = tuple(layer for layer in kind.layers if layer is not None)
        if kind.connect is not None and any(isinstance(module, layers) for module in model.modules()):
            kind.connect(model)


def arguments_for(
    layer: _BatchNorm, remade: bool, to: str, target: NormClass, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a constructor, from a layer and the options.

    Args:
        layer: That is converted.
        remade: Whether the target is its own class.
        to: The kind.
        target: The class.
        options: Of the call.

    Returns:
        The arguments but for the number of features, the device and the dtype.

    Raises:
        TypeError: If one is required and missing.
    """
    accepted = constructor_options(target)
    ours = isinstance(layer, StatisticsNorm)
    names = [*inherited(target), *(("group_size", "synchronize") if ours and not remade else ())]
    arguments = dict(KINDS[to].defaults) | {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    decided: dict[str, Any] = {}
    if remade and isinstance(layer, StatisticsNorm):
        arguments |= layer.own_arguments(tuple(accepted), options)
        decided = {name: arguments[name] for name in type(layer).decided_by_model if name in arguments}
    arguments["affine"] = layer.weight is not None or layer.bias is not None
    arguments["track_running_stats"] = layer.running_mean is not None
    arguments |= options
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    arguments |= decided | dict(KINDS[to].fixed)
    for name, argument in accepted.items():
        if argument.default is argument.empty and arguments.get(name) is None:
            raise TypeError(f"{target.__name__} needs the option {name!r}")
    return arguments
