"""Changed gradients on their way back: written where they belong, with the norm that they are to have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from wellcond.numerics.linalg import frobenius_norm
from wellcond.transforms.base import Slot
from wellcond.transforms.sharding import is_sharded, local, sum_over_shards, whole, write_whole

Norm = Literal["restore", "fixed", "none"]


@dataclass
class Kept:
    """A changed gradient that is written when its norm is known."""

    target: Tensor
    changed: Tensor
    view: Callable[[Tensor], Tensor]

    def write(self) -> None:
        """Write it, of a sharded gradient the own part."""
        gathered = whole(self.target)
        self.view(gathered).copy_(self.changed)
        if is_sharded(self.target):
            write_whole(self.target, gathered)


@dataclass
class Product:
    """One layer's changed gradients: written already and still to be scaled, or kept until their norm is known.

    Attributes:
        norm_before: ‖G‖ of weight and bias together; of this rank's rows if ``is_partial``.
        norm_after: ‖Ĝ‖ likewise.
        is_partial: Whether other ranks have further rows.
        fixed_norm: The norm that ``norm="fixed"`` gives Ĝ.
        written: Views of gradients that hold Ĝ.
        kept: Gradients that do not: those of lower precision than Ĝ, or gathered from several ranks.
    """

    norm_before: Tensor
    norm_after: Tensor
    is_partial: bool
    fixed_norm: float
    written: list[Tensor] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def take(
        self, target: Tensor, view: Tensor, changed: Tensor, make_view: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> None:
        """Write a changed gradient through a view of its target, or keep a copy for later."""
        if view.dtype == dtype and (self.is_partial or not is_sharded(target)):
            if changed.data_ptr() != view.data_ptr():  # low-rank forms may have multiplied in place
                view.copy_(changed)
            self.written.append(view)
        else:
            changed = changed.to(dtype, copy=True)
            self.kept.append(Kept(local(target) if self.is_partial else target, changed, make_view))


def norm_ratios(slots: Sequence[Slot], products: Sequence[Product], norm: Norm) -> list[Tensor]:
    """Return by which number each layer's changed gradient is to be multiplied.

    Args:
        slots: The layers.
        products: Their changed gradients.
        norm: ``"restore"``: ‖G‖ / ‖Ĝ‖ (thesis 5.16, 6.7); ``"fixed"``: ``fixed_norm`` / ‖Ĝ‖, multiplied by the loss
            scale where the optimizer is to divide by that.

    Returns:
        A scalar a layer; finite where Ĝ = 0.
    """
    norms = [torch.stack([product.norm_before, product.norm_after]) for product in products]
    partial = [index for index, product in enumerate(products) if product.is_partial]
    if partial:
        # The squares of the ranks' norms are added in one collective per mesh.
        squares = [norms[index].square() for index in partial]
        for index, total in zip(
            partial, sum_over_shards(squares, [slots[index].layer.weight for index in partial]), strict=True
        ):
            norms[index] = total.sqrt()
    if norm == "restore":
        return [each[0] / each[1].clamp_min(torch.finfo(each.dtype).tiny) for each in norms]
    ratios = []
    for slot, product, (_, after) in zip(slots, products, norms, strict=True):
        scale = product.fixed_norm if slot.grad_scale is None else product.fixed_norm * slot.grad_scale
        # A norm that underflows says nothing of the direction: no step then, rather than a huge one.
        ratios.append(torch.where(after == 0, 0.0, (scale / after).clamp_max(torch.finfo(after.dtype).max)))
    return ratios


def joint_norm(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the Frobenius norm of a weight and its bias together.

    Args:
        weight: Of any shape and precision.
        bias: Likewise, or None.
        dtype: In which the squares are added.

    Returns:
        A scalar.
    """
    norm = frobenius_norm(weight, dtype)
    return norm if bias is None else torch.hypot(norm, frobenius_norm(bias, dtype))
