"""Sorts out the slots that take part now: once, and again only where cheap signs say that something has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wellcond.transforms.base import GradientTransform, Slot


class Standing:
    """The slots of an attachment's transforms as they were when last sorted out.

    Args:
        transforms: The transforms.

    Attributes:
        pairs: All slots, each with its transform.
        acting: Those that are covered and enabled, by their transform's name: one tuple as long as nothing changes, so
            that a transform may keep what it has made of it.
        kept: Those of them that may have a state.
        devices: Where the weights of those that act are.
    """

    def __init__(self, transforms: Sequence[GradientTransform]) -> None:
        self._transforms = transforms
        self.pairs: tuple[tuple[GradientTransform, Slot], ...] = ()
        self.acting: dict[str, tuple[Slot, ...]] = {}
        self.kept: tuple[tuple[GradientTransform, Slot], ...] = ()
        self.devices: frozenset[torch.device] = frozenset()
        self._weights: dict[str, list[Tensor]] = {}
        self._signs: list[tuple[Tensor, bool, torch.dtype, torch.device]] = []

    def sort_out(self, slots: Mapping[str, Sequence[Slot]]) -> None:
        """Take in which slots there are, and what the weights are now.

        Args:
            slots: Each transform's slots by its name.
        """
        self.pairs = tuple((transform, slot) for transform in self._transforms for slot in slots[transform.name])
        acting = [(t, slot) for t, slot in self.pairs if slot.coverage.applies and slot.enabled]
        self.acting = {t.name: tuple(slot for other, slot in acting if other is t) for t in self._transforms}
        self.kept = tuple((t, slot) for t, slot in acting if type(t).init is not GradientTransform.init)
        self.devices = frozenset(slot.layer.weight.device for _, slot in acting)
        self._weights = {name: [slot.layer.weight for slot in found] for name, found in self.acting.items()}
        weights = {id(slot.layer.weight): slot.layer.weight for _, slot in self.pairs}
        self._signs = [(weight, _has_gradients(weight), weight.dtype, weight.device) for weight in weights.values()]

    def holds(self) -> bool:
        """Say whether no weight was frozen, unfrozen, cast or moved since."""
        for weight, trained, dtype, device in self._signs:
            if _has_gradients(weight) is not trained or weight.dtype is not dtype or weight.device != device:
                return False
        return True

    def with_gradient(self, transform: GradientTransform) -> tuple[Slot, ...]:
        """Return a transform's slots that act and whose weights have a gradient.

        Args:
            transform: The transform.

        Raises:
            ValueError: If a gradient is sparse.
        """
        slots = self.acting[transform.name]
        gradients = [weight.grad for weight in self._weights[transform.name]]
        missing = sparse = False
        for gradient in gradients:
            if gradient is None:
                missing = True
            elif gradient.is_sparse:
                sparse = True
        if sparse:
            name = next(s.layer.name for s, g in zip(slots, gradients, strict=True) if g is not None and g.is_sparse)
            raise ValueError(
                f"'{name}' has a sparse gradient, which {type(transform).__name__} cannot transform: use sparse=False, "
                "or leave the layer out"
            )
        if missing:
            return tuple(slot for slot, gradient in zip(slots, gradients, strict=True) if gradient is not None)
        return slots


def _has_gradients(weight: Tensor) -> bool:
    return weight.requires_grad or weight.grad is not None
