"""The weights that a model and an optimizer share now, as slots: made anew where something has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.nn.parameter import Parameter

from wellcond.layouts import Layer, Layers
from wellcond.layouts.unusual import is_sharded
from wellcond.transforms.base import GradientTransform, Slot

Uses = dict[int, list[Layer]]


def shared_uses(found: Layers, held: Collection[int], acted_on: Collection[int]) -> Uses:
    """Group the layers of the weights that an optimizer holds by weight.

    Args:
        found: What `find_layers` found in the model.
        held: The ``id`` of each parameter that the optimizer holds.
        acted_on: Of these, the ones that their parameter groups do not switch off: a bias goes with its weight only
            if it is among them.

    Returns:
        The weight's ``id`` → the layers that use it; the first stands for all.
    """
    uses: Uses = {}
    for layer in found:
        if id(layer.weight) in held:
            uses.setdefault(id(layer.weight), []).append(layer)
    for layers in uses.values():
        layers[0] = _representative(layers, held, acted_on)
    return uses


def slots_of(
    transform: GradientTransform, uses: Uses, old: Sequence[Slot], held: Collection[int], shared: dict[str, Any]
) -> list[Slot]:
    """Make a transform's slots; a weight that is used as before keeps its slot.

    Args:
        transform: The transform.
        uses: From `shared_uses`.
        old: Its slots so far.
        held: The ``id`` of each parameter that the optimizer holds.
        shared: What the slots share.

    Returns:
        One slot per weight, in the model's order.
    """
    known = {id(slot.layer.weight): slot for slot in old}
    slots = []
    for key, layers in uses.items():
        slot = known.pop(key, None)
        if slot is None or not _same(slot.uses, layers):
            slot = Slot(layers[0], list(layers), transform.cover_shared(layers), shared=shared)
        slots.append(slot)
    # FSDP2 takes a sharded parameter out of its module while the whole one stands there.
    slots += [slot for key, slot in known.items() if key in held and is_sharded(slot.layer.weight)]
    return slots


class Places:
    """The places of the covered weights in the model, to see cheaply whether they still stand there.

    Args:
        model: The model.
        slots: Slots of its weights.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        places: dict[str, tuple[dict[str, Parameter | None], str, Parameter]] = {}
        for use in (use for slot in slots for use in slot.uses if not is_sharded(use.weight)):
            owner, _, attribute = use.name.rpartition(".")
            places[use.name] = model.get_submodule(owner)._parameters, attribute, use.weight
        self._places = list(places.values())

    def changed(self) -> bool:
        """Say whether a weight was replaced in its module, or taken from it (pruning, a parametrization)."""
        return any(parameters.get(name) is not weight for parameters, name, weight in self._places)


def _same(before: Sequence[Layer], now: Sequence[Layer]) -> bool:
    return len(before) == len(now) and all(
        one.module is other.module
        and one.name == other.name
        and one.bias is other.bias
        and one.parent is other.parent
        and type(one.layout) is type(other.layout)
        for one, other in zip(before, now, strict=True)
    )


def _representative(layers: list[Layer], held: Collection[int], acted_on: Collection[int]) -> Layer:
    """Return the layer that stands for all uses of a weight: with a bias only if all share it and it is changed."""
    layer = layers[0]
    if layer.bias is None:
        return layer
    # Of a weight that is switched off it makes no difference, and its slot stays what it is when it is on again.
    together = id(layer.bias) in acted_on or id(layer.weight) not in acted_on
    if together and id(layer.bias) in held and all(other.bias is layer.bias for other in layers):
        return layer
    return dataclasses.replace(layer, bias=None, bias_name=None)
