"""Gradient Centralization: take each output unit's mean out of its gradient (thesis chapter 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from wellcond.layouts import Layer
from wellcond.runtime.checks import Predicate, check_choice, check_fields
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.base import Coverage, Decay, GradientTransform, Slot
from wellcond.transforms.sharding import units, units_can_be_averaged
from wellcond.transforms.unit_means import UnitMeans, add

Where = Literal["gradient", "update"]
DecayPlace = Literal["inside", "outside"]


@dataclass(frozen=True)
class GradientCentralization(GradientTransform):
    """Centre the gradient of each output unit: Φ(g_i) = g_i − mean(g_i), that is, Φ(G) = G P (thesis 4.1, 4.2).

    Biases, norm scales and other one-dimensional parameters are never touched, nor are embedding tables unless
    ``layers`` is a predicate that asks for them. Gradients are changed in place, as gradient clipping does.

    Args:
        layers: ``"all"``: every linear map and convolution (fine-tuning, detection); ``"conv"``: convolutions alone
            (the source's choice on CIFAR and ImageNet); or a predicate of (module name, module).
        where: ``"gradient"``: before the optimizer sees the gradient (thesis algorithms 3 and 4); ``"update"``: on
            the optimizer's update itself, which keeps row means constant under adaptive optimizers too.
        decay: Whether weight decay is centred as well, ``"inside"`` the projection, P(g + λw), so that it leaves row
            means where they are; or stays ``"outside"``, P(g) + λw, and shrinks them. Both for coupled (L2) and for
            decoupled decay, except that coupled decay cannot be told from the rest of an update. Of optimizers other
            than torch's it is not known how strong decay is: ``"inside"`` then puts row means back to where they were
            before each step, whatever moved them.

    Raises:
        ValueError: If an argument has another value.

    Example:
        >>> import torch, wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> bool(model.weight.grad.sum(dim=1).abs().max() < 1e-6)
        True
    """

    name: ClassVar[str] = "centralization"

    layers: Literal["all", "conv"] | Predicate = "all"
    where: Where = "gradient"
    decay: DecayPlace = "inside"

    def __post_init__(self) -> None:
        if not callable(self.layers):
            check_choice("layers", self.layers, ("all", "conv"))
        check_choice("where", self.where, ("gradient", "update"))
        check_choice("decay", self.decay, ("inside", "outside"))
        check_fields(self)

    def cover(self, layer: Layer) -> Coverage:
        """Decide whether a weight's gradient is centred."""
        kind = layer.layout.kind
        if kind == "norm":
            return Coverage(False, "not centred: a norm layer's scale")
        if callable(self.layers):
            wanted = bool(self.layers(layer.module_name, layer.module))
            reason = "not chosen by `layers`"
        elif kind == "embedding":
            wanted, reason = False, "an embedding table"
        else:
            wanted, reason = self.layers == "all" or kind == "conv", "not a convolution"
        if not wanted:
            return Coverage(False, f"not centred: {reason}")
        if layer.unfit:
            return Coverage(False, f"not centred: {layer.unfit}")
        if not units_can_be_averaged(layer):
            return Coverage(False, "not centred: sharded across ranks inside its output units or groups")
        groups, out, *inputs = layer.matrix_shape
        width = math.prod(inputs)
        if width == 1:
            # The mean of one number is that number: centring would only ever give zero.
            return Coverage(False, "not centred: one weight per output unit")
        return Coverage(True, f"{self.where} centred over {width} inputs of each of {groups * out} output units")

    def check(self, slots: Sequence[Slot]) -> None:
        """Refuse weight decay that cannot be kept where ``decay`` wants it."""
        for decay in {id(slot.terms): slot.decay for slot in slots}.values():
            self._check_decay(decay)

    def _check_decay(self, decay: Decay | None) -> None:
        if (self.where == "gradient") != (self.decay == "inside"):
            return
        if self.where == "gradient":
            if decay is None:
                raise ValueError(
                    "GradientCentralization(decay='inside') must know how the optimizer applies weight decay: "
                    "pass weight_decay='coupled' or 'decoupled' to attach()"
                )
            return
        if decay is None or not (decay.exact or decay.told):
            raise ValueError(
                "GradientCentralization(where='update', decay='outside') must know how the optimizer applies "
                "weight decay: pass weight_decay='decoupled' to attach() if it multiplies weights by "
                "1 - lr * weight_decay"
            )
        if not _is_zero(decay.gradient):
            raise ValueError(
                "GradientCentralization(where='update', decay='outside') needs decoupled weight decay: this "
                "optimizer adds it to the gradient, where it cannot be told from the rest of the update"
            )

    def refresh(self, slots: Sequence[Slot], ranks: Ranks) -> None:
        """Forget what an interrupted step may have left."""
        for slot in slots:
            slot.scratch = None

    def update(self, slots: Sequence[Slot]) -> None:
        """Centre the gradients; note where the weights' row means are if they are needed after the step."""
        planned = self._planned(slots)
        for alike, _ in planned:
            self._check_decay(alike[0].decay)
        for alike, means in planned:
            decay = alike[0].decay
            known = self.decay == "inside" and decay is not None and decay.exact
            # A closure that runs several times in a step (line searches) moves the weights in between.
            if any(slot.scratch is None for slot in alike):
                if self._keeps_row_means(decay):
                    for slot in alike:
                        slot.scratch = _row_means(slot)
                elif known and decay is not None and not _is_zero(decay.shrink):
                    for slot, mean in zip(alike, means.of_weights(), strict=True):
                        slot.scratch = [mean]
            if self.where == "update":
                continue
            gradients = means.gradients()
            # The optimizer will add λw: P(g + λw) = (g − mean(g + λw)) + λw.
            add(gradients, means.of(gradients, decay.gradient if known and decay is not None else 0.0), -1)

    def _planned(self, slots: Sequence[Slot]) -> list[tuple[list[Slot], UnitMeans]]:
        """Return the slots by parameter group; those of the last step are remembered."""
        if not slots:
            return []
        shared = slots[0].shared
        if shared.get("planned for") is not slots:
            by_terms: dict[int, list[Slot]] = {}
            for slot in slots:
                by_terms.setdefault(id(slot.terms), []).append(slot)
            shared["plan"] = [(alike, UnitMeans([slot.layer for slot in alike])) for alike in by_terms.values()]
            shared["planned for"] = slots
        plan: list[tuple[list[Slot], UnitMeans]] = shared["plan"]
        return plan

    def _keeps_row_means(self, decay: Decay | None) -> bool:
        """Whether the whole step is to leave the row means alone, or to move them by decay alone.

        That is what centred updates are. Where decay must not move them and all that is known of it is what the step
        has done to the weights, row means go back to where they were.
        """
        return self.where == "update" or (self.decay == "inside" and decay is not None and not decay.exact)

    def finish(self, slots: Sequence[Slot]) -> None:
        """Put the row means where they belong after the optimizer's update."""
        shrunk: list[Tensor] = []
        amounts: list[Tensor] = []
        for slot in slots:
            before, slot.scratch = slot.scratch, None
            if before is None:
                continue
            weight = units(slot.layer, slot.layer.weight)
            shrink = slot.decay.shrink if slot.decay is not None else 0.0
            if not self._keeps_row_means(slot.decay):
                shrunk.append(weight)
                amounts.append(before[0] * shrink)
                continue
            # Two means a step are enough: whatever moved the row means is taken back.
            target, *others = before
            if self.decay == "outside":
                target = target * (1 - shrink)
            weight.add_(target - slot.layer.unit_mean(weight))
            for companion, place in zip(slot.companions(), others or [target], strict=False):
                mixed = units(slot.layer, companion)
                mixed.add_(place - slot.layer.unit_mean(mixed))
        add(shrunk, amounts, 1)


def _row_means(slot: Slot) -> list[Tensor]:
    """Return the row means of the weight, and of what the optimizer mixes with it: by the same sums before and after.

    A step that changes nothing then has nothing taken back.
    """
    return [slot.layer.unit_mean(units(slot.layer, tensor)) for tensor in (slot.layer.weight, *slot.companions())]


def _is_zero(value: float | Tensor) -> bool:
    """Whether a scalar is known to be zero; a tensor's value is not looked at, which would wait for the device."""
    return not isinstance(value, Tensor) and value == 0
