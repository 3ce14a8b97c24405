"""Changed gradients on their way back: written where they belong, scaled to the norm that they are to have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wellcond.layouts.unusual import is_sharded
from wellcond.transforms.preconditioner.form import Scratch
from wellcond.transforms.preconditioner.norm_recovery import Norms, norm_ratios
from wellcond.transforms.preconditioner.place import Place
from wellcond.transforms.sharding import local, whole, write_whole

MakeView = Callable[[Tensor], Tensor]

# From this size on a layer's product is scaled while it is written: memory costs more than calls.
SCALED_AT_ONCE = 1 << 18


@dataclass
class Kept:
    """A changed gradient that is written when its norm is known."""

    target: Tensor
    changed: Tensor
    view: MakeView

    def write(self) -> None:
        """Write it, of a sharded gradient the own part."""
        gathered = whole(self.target)
        self.view(gathered).copy_(self.changed)
        if is_sharded(self.target):
            write_whole(self.target, gathered)


@dataclass(eq=False)
class ChangedGradient:
    """One layer's gradients, of its weight and of its bias, before and after the product.

    Attributes:
        place: The layer, and how its gradient is treated.
        weight: What is multiplied, shape [groups, out, *inputs].
        bias: Its further column, shape [groups, out], or None.
        changed: The changed weight's and bias's gradients, still to be scaled.
        written: Those of them that stand in the gradients.
        kept: Those that do not: of gradients of lower precision, or gathered from several ranks.
    """

    place: Place
    weight: Tensor
    bias: Tensor | None
    changed: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def take(
        self, target: Tensor | None, view: Tensor, changed: Tensor, make_view: MakeView, ratio: Tensor | None
    ) -> None:
        """Write a changed gradient through a view of its target, or keep a copy for later.

        Args:
            target: The gradient; None: there is none, and the change counts in the norm alone.
            view: A view of the target, of ``changed``'s shape.
            changed: The product.
            make_view: Makes such a view.
            ratio: By what the product is to be multiplied, where that is known.
        """
        place = self.place
        if target is not None and view.dtype == place.dtype and (place.is_partial or not place.is_sharded):
            in_place = changed.data_ptr() == view.data_ptr()  # low-rank forms may have multiplied so
            if ratio is not None:
                torch.mul(view if in_place else changed, ratio, out=view)
                return
            if not in_place:
                view.copy_(changed)
            self.changed.append(view)
            self.written.append(view)
            return
        changed = changed.to(place.dtype, copy=True) if ratio is None else changed.to(place.dtype) * ratio
        self.changed.append(changed)
        if target is not None:
            self.kept.append(Kept(local(target) if place.is_partial else target, changed, make_view))

    @property
    def is_large(self) -> bool:
        """Whether it is scaled while it is written, which it can be where this rank alone knows its norm."""
        return not self.place.is_partial and self.weight.numel() >= SCALED_AT_ONCE


def alike(places: Sequence[Place]) -> list[Sequence[Place]]:
    """Group layers whose norms can be taken together."""
    groups: dict[tuple[torch.dtype, torch.device], list[Place]] = {}
    for place in places:
        groups.setdefault((place.dtype, place.slot.layer.weight.device), []).append(place)
    return list(groups.values())


def scale(products: Sequence[ChangedGradient], before: Norms | None, scratch: Scratch) -> None:
    """Give what is written, or kept, of some products the norm that they are to have.

    Args:
        products: On one device.
        before: The norms that are restored; None: fixed ones.
        scratch: Memory.
    """
    parts = [(p.changed[0], p.changed[1] if len(p.changed) > 1 else None) for p in products]
    after = Norms(parts, products[0].place.dtype, scratch)
    ratios = norm_ratios([product.place for product in products], before, after, scratch)
    written: list[Tensor] = []
    factors: list[Tensor] = []
    for product, ratio in zip(products, ratios.unbind(), strict=True):
        for tensor in product.written:
            written.append(tensor)
            factors.append(ratio)
        for kept in product.kept:
            written.append(kept.changed)
            factors.append(ratio)
    if written:
        torch._foreach_mul_(written, factors)
