"""timm's layers with an activation: they normalize, drop and activate, as `BatchNormAct2d` does, in any kind."""

from __future__ import annotations

import sys
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NormClass: TypeAlias = type[nn.Module]


class ThenActivation(nn.Module):
    """Adds to a normalization what timm's `BatchNormAct2d` does after it, under the same names.

    Splitting the layer in two would change the keys of its state dict and what code around it reads, so it stays one
    layer, and, where it still is a batch normalization, an instance of timm's class, too.
    """

    normalization: ClassVar[NormClass]
    original: ClassVar[NormClass]
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop, activate."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on demand, so it has no name under which it could be found again.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _empty_fused, (self.normalization, self.original), *reduced[2:]


FUSED: dict[tuple[NormClass, NormClass], NormClass] = {}


def fused_type(normalization: NormClass, original: NormClass) -> NormClass:
    """Return the type that normalizes as the first and then acts as the second, a timm type."""
    if normalization is nn.BatchNorm2d:
        return original
    if (normalization, original) not in FUSED:
        bases = (normalization, original) if issubclass(normalization, _BatchNorm) else (normalization,)
        members: dict[str, Any] = {"normalization": normalization, "original": original}
        members |= {"__module__": __name__, "__doc__": ThenActivation.__doc__}
        name = normalization.__name__.removesuffix("2d") + "Act2d"
        FUSED[normalization, original] = type(name, (ThenActivation, *bases), members)
    return FUSED[normalization, original]


def parts_of(layer: nn.Module) -> tuple[NormClass, NormClass] | None:
    """Return the type that normalizes and timm's type that acts after it; None if a layer is not one of theirs."""
    kind = type(layer)
    if isinstance(layer, ThenActivation) and kind is FUSED.get((layer.normalization, layer.original)):
        return layer.normalization, layer.original
    return (nn.BatchNorm2d, kind) if kind is timm_class("BatchNormAct2d") else None


def timm_class(name: str) -> Any:
    """Return a class of timm's; None if there can be no layer of it, since its module was not imported."""
    return getattr(sys.modules.get("timm.layers.norm_act"), name, None)


def _empty_fused(normalization: NormClass, original: NormClass) -> nn.Module:
    """Make a layer for `pickle` and `copy` to fill."""
    fused = fused_type(normalization, original)
    return fused.__new__(fused)
