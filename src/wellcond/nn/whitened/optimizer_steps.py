"""Tells layers that an optimizer has stepped."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stepping(Protocol):
    """A layer that wants to know."""

    @property
    def weight(self) -> Tensor:
        """What the optimizer holds."""

    def stepped(self) -> None:
        """Learn that an optimizer has updated the weight."""


class OptimizerSteps:
    """Tells layers of the steps of whatever optimizer holds their weight.

    A weight does not always tell itself: fused kernels leave its version counter as it was, and so does what is
    written to its ``data``.
    """

    def __init__(self) -> None:
        self._layers: weakref.WeakSet[Stepping] = weakref.WeakSet()
        self._hooked = False

    def tell(self, layer: Stepping) -> None:
        """Tell this layer from now on."""
        if not self._hooked:
            register_optimizer_step_post_hook(self._after_step)
            self._hooked = True
        self._layers.add(layer)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for layer in self._layers:
            if id(layer.weight) in updated:
                layer.stepped()


# Torch knows this hook for all optimizers, present and future; one is enough for all layers.
OPTIMIZER_STEPS = OptimizerSteps()
