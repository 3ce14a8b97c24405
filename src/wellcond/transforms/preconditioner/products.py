"""Changed gradients on their way back: written where they belong, scaled to the norm that they are to have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wellcond.transforms.base import Slot
from wellcond.transforms.preconditioner.norm_recovery import Norms, norm_ratios
from wellcond.transforms.sharding import is_sharded, local, whole, write_whole

View = Callable[[Tensor], Tensor]

# From this size on a layer's product is scaled while it is written: memory costs more than calls.
SCALED_AT_ONCE = 1 << 18


@dataclass
class Kept:
    """A changed gradient that is written when its norm is known."""

    target: Tensor
    changed: Tensor
    view: View

    def write(self) -> None:
        """Write it, of a sharded gradient the own part."""
        gathered = whole(self.target)
        self.view(gathered).copy_(self.changed)
        if is_sharded(self.target):
            write_whole(self.target, gathered)


@dataclass
class Product:
    """One layer's gradients, of its weight and of its bias, before and after the product.

    Attributes:
        slot: The layer's slot.
        dtype: In which norms are taken.
        weight: What is multiplied, shape [groups, out, *inputs].
        bias: Its further column, shape [groups, out], or None.
        is_partial: Whether other ranks have further rows.
        fixed_norm: The norm that ``norm="fixed"`` gives the product.
        changed: The changed weight's and bias's gradients, still to be scaled.
        written: Those of them that stand in the gradients.
        kept: Those that do not: of gradients of lower precision, or gathered from several ranks.
    """

    slot: Slot
    dtype: torch.dtype
    weight: Tensor
    bias: Tensor | None
    is_partial: bool
    fixed_norm: float
    changed: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def take(self, target: Tensor | None, view: Tensor, changed: Tensor, make_view: View, ratio: Tensor | None) -> None:
        """Write a changed gradient through a view of its target, or keep a copy for later.

        Args:
            target: The gradient; None: there is none, and the change counts in the norm alone.
            view: A view of the target, of ``changed``'s shape.
            changed: The product.
            make_view: Makes such a view.
            ratio: By what the product is to be multiplied, where that is known.
        """
        if target is not None and view.dtype == self.dtype and (self.is_partial or not is_sharded(target)):
            in_place = changed.data_ptr() == view.data_ptr()  # low-rank forms may have multiplied so
            if ratio is not None:
                torch.mul(view if in_place else changed, ratio, out=view)
                return
            if not in_place:
                view.copy_(changed)
            self.changed.append(view)
            self.written.append(view)
            return
        changed = changed.to(self.dtype, copy=True) if ratio is None else changed.to(self.dtype) * ratio
        self.changed.append(changed)
        if target is not None:
            self.kept.append(Kept(local(target) if self.is_partial else target, changed, make_view))

    @property
    def is_large(self) -> bool:
        """Whether it is scaled while it is written, which it can be where this rank alone knows its norm."""
        return not self.is_partial and self.weight.numel() >= SCALED_AT_ONCE


def alike(products: Sequence[Product]) -> list[Sequence[Product]]:
    """Group products whose norms can be taken together."""
    first = products[0].dtype, products[0].weight.device
    if all(product.dtype == first[0] and product.weight.device == first[1] for product in products):
        return [products]
    groups: dict[tuple[torch.dtype, torch.device], list[Product]] = {}
    for product in products:
        groups.setdefault((product.dtype, product.weight.device), []).append(product)
    return list(groups.values())


def scale(products: Sequence[Product], before: Norms | None) -> None:
    """Give what is written, or kept, of some products the norm that they are to have.

    Args:
        products: On one device.
        before: The norms that are restored; None: fixed ones.
    """
    after = Norms([(p.changed[0], p.changed[1] if len(p.changed) > 1 else None) for p in products], products[0].dtype)
    ratios = norm_ratios([(p.slot, p.is_partial, p.fixed_norm) for p in products], before, after)
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
