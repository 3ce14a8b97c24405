"""Frozen weights: nothing is kept for them, and the first forward pass after they are unfrozen counts again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import Parameter
from torch.utils.hooks import RemovableHandle

from wellcond.transforms.base import GradientTransform, TransformSlots


class FrozenWeights:
    """Watches the modules of frozen weights: looks at ``requires_grad`` alone, and tells once it has come back.

    Args:
        thawed: A method that takes up the weights that are trained again; held weakly.
    """

    def __init__(self, thawed: Callable[[], None]) -> None:
        self._thawed = weakref.WeakMethod(thawed)
        self._hooks: dict[nn.Module, tuple[list[Parameter], RemovableHandle]] = {}

    def watch(self, slots: TransformSlots) -> None:
        """Place hooks on the modules of frozen weights whose inputs will be wanted, and take all others off.

        Args:
            slots: All slots.
        """
        frozen: dict[nn.Module, list[Parameter]] = {}
        for transform, slot in slots:
            if slot.frozen and slot.coverage.applies and type(transform).observe is not GradientTransform.observe:
                for use in slot.uses:
                    frozen.setdefault(use.called, []).append(use.weight)
        for module in list(self._hooks):
            weights, hook = self._hooks[module]
            if list(map(id, weights)) != list(map(id, frozen.get(module, []))):
                hook.remove()
                del self._hooks[module]
        for module, weights in frozen.items():
            if module not in self._hooks:
                # Before the hook that shows the input.
                hook = module.register_forward_pre_hook(Thaw(module, weights, self), prepend=True)
                self._hooks[module] = weights, hook

    def remove(self) -> None:
        """Take all hooks off."""
        self.watch([])

    def tell(self) -> None:
        """Say that some weight is trained again. Never raises: the next step looks again, and raises there."""
        thawed = self._thawed()
        try:
            if thawed is not None:
                thawed()
        except Exception:
            return


class Thaw:
    """A forward pre-hook that tells when a weight of its module requires a gradient again."""

    def __init__(self, module: nn.Module, weights: list[Parameter], owner: FrozenWeights) -> None:
        self._module = weakref.ref(module)
        self._weights = weights
        self._owner = weakref.ref(owner)
        self._tell_uncompiled = torch.compiler.disable(self._tell)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Look, which costs next to nothing."""
        if any(weight.requires_grad for weight in self._weights):
            self._tell_uncompiled(module)

    def _tell(self, module: nn.Module) -> None:
        owner = self._owner()
        # A deep copy of the model is another module.
        if owner is not None and self._module() is module:
            owner.tell()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert, ()


def _inert(module: nn.Module, args: Any) -> None:
    """Stand where a copied or unpickled module had a hook."""


def _make_inert() -> Callable[..., None]:
    return _inert
