"""One step's products: each weight's gradient multiplied by its power, given the norm that it is to have, written back.

What does not change from step to step (which precision, whether sharded, which form) is found once for all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.layouts.unusual import is_sharded
from wellcond.transforms.base import Slot
from wellcond.transforms.preconditioner.form import Scratch
from wellcond.transforms.preconditioner.norm_recovery import NormRecovery, Norms, norm_ratios
from wellcond.transforms.preconditioner.outputs import whiten_outputs
from wellcond.transforms.preconditioner.place import Place
from wellcond.transforms.preconditioner.precision import Precision, layer_dtype, product_dtype, tensor_cores
from wellcond.transforms.preconditioner.products import ChangedGradient, alike, scale
from wellcond.transforms.preconditioner.solves import form_of, tensor_of
from wellcond.transforms.sharding import local, rows_are_whole


@dataclass(frozen=True)
class Rule:
    """The options of a preconditioner that its products depend on, as `FeaturePreconditioner` has them."""

    norm: NormRecovery
    precision: Precision
    outputs: bool
    stats_every: int
    stats_decay: float
    gradient_momentum: float


def by_rows(layer: Layer, outputs: bool) -> bool:
    """Whether each rank can treat its own rows of a weight: the output side needs all of them."""
    return rows_are_whole(layer) and not (outputs and is_sharded(layer.weight))


class Multiplier:
    """Multiplies the gradients of some weights, step after step, as long as these stay what they are.

    Args:
        rule: How.
        slots: The weights'.
        scratch: Memory for products.

    Attributes:
        slots: As given: whoever has others needs another multiplier.
    """

    def __init__(self, rule: Rule, slots: Sequence[Slot], scratch: Scratch) -> None:
        self.slots = slots
        self._rule = rule
        self._scratch = scratch
        self._alike = alike([self._place(slot) for slot in slots])

    def _place(self, slot: Slot) -> Place:
        layer = slot.layer
        sharded = is_sharded(layer.weight) or (slot.bias is not None and is_sharded(slot.bias))
        return Place(
            slot,
            form_of(slot),
            layer_dtype(layer),
            product_dtype(layer, self._rule.precision),
            sharded,
            is_sharded(layer.weight) and by_rows(layer, self._rule.outputs),
        )

    def run(self) -> None:
        """Multiply all gradients, in place."""
        with tensor_cores(self._rule.precision):
            for places in self._alike:
                self._multiply_alike([self._opened(place) for place in places])

    def _multiply_alike(self, products: Sequence[ChangedGradient]) -> None:
        """Ĝ = G T for weights of one precision on one device: few calls for all of them together."""
        norm = self._rule.norm
        before: Norms | None = None
        if norm == "restore":
            before = Norms([(p.weight, p.bias) for p in products], products[0].place.dtype, self._scratch)
        later: list[int] = []
        for index, product in enumerate(products):
            if norm != "none" and product.is_large:
                self._multiply(product, None if before is None else before.of([index]), at_once=True)
            else:
                self._multiply(product)
                later.append(index)
        if later and norm != "none":
            if before is not None and len(later) < len(products):
                before = before.of(later)
            scale([products[index] for index in later], before, self._scratch)
        for product in products:
            for kept in product.kept:
                kept.write()

    def _opened(self, place: Place) -> ChangedGradient:
        """View one weight's gradient, and its bias's if they go together, as what is to be multiplied."""
        slot = place.slot
        layer, bias = slot.layer, slot.bias
        assert layer.weight.grad is not None
        weight, column = layer.matrix(place.part(layer.weight.grad)), None
        if bias is not None:
            # A bias that got no gradient in this step counts as one of zero.
            column = layer.bias_matrix(place.part(torch.zeros_like(bias) if bias.grad is None else bias.grad))
        if self._rule.gradient_momentum:
            weight = self._averaged(slot, "gradient_momentum", layer.matrix, weight)
            if column is not None:
                column = self._averaged(slot, "gradient_momentum_of_bias", layer.bias_matrix, column)
        return ChangedGradient(place, weight, column)

    def _multiply(self, product: ChangedGradient, before: Norms | None = None, *, at_once: bool = False) -> None:
        """Multiply one weight, and write or keep the result, scaled to its norm at once or not."""
        rule, scratch, place = self._rule, self._scratch, product.place
        weight, column, dtype = product.weight, product.bias, place.product_dtype
        slot = place.slot
        layer = slot.layer
        changed, changed_bias = place.form.apply(
            slot.state,
            weight if weight.dtype == dtype else weight.to(dtype),
            column if column is None or column.dtype == dtype else column.to(dtype),
            scratch,
            scaled=rule.norm == "none",
        )
        if rule.outputs:
            changed, changed_bias = whiten_outputs(
                slot, changed, changed_bias, scratch, rule.stats_every, rule.stats_decay
            )
        ratio = None
        if at_once:
            after = Norms([(changed, changed_bias)], place.dtype, scratch)
            ratio = norm_ratios([place], before, after, scratch).squeeze(0)
        target = layer.weight.grad
        assert target is not None
        view = layer.matrix(place.part(target)) if rule.gradient_momentum else weight
        product.take(target, view, changed, layer.matrix, ratio)
        if column is not None and changed_bias is not None:
            target = None if slot.bias is None else slot.bias.grad
            if target is not None and rule.gradient_momentum:
                column = layer.bias_matrix(place.part(target))
            product.take(target, column, changed_bias, layer.bias_matrix, ratio)

    def _averaged(self, slot: Slot, key: str, view: Callable[[Tensor], Tensor], gradient: Tensor) -> Tensor:
        """Return the moving average m ← β m + G, as a copy that may be overwritten, in the scale of G.

        A gradient that is not finite because a loss scaler's scale was too high, whose step is skipped, stays out of m.
        """
        average = view(local(tensor_of(slot, key)))
        scale = 1.0 if slot.grad_scale is None else slot.grad_scale
        latest = self._rule.gradient_momentum * average + gradient / scale
        if slot.found_inf is not None:
            latest = torch.where(slot.found_inf > 0, average, latest)
        average.copy_(latest)
        return latest * scale
