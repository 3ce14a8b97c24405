"""A transform's state as others see it, in ``optimizer.state``: shown after each step, saved and loaded with it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from wellcond.runtime.checks import WellcondWarning
from wellcond.transforms.base import GradientTransform, Slot, State, TransformSlots
from wellcond.transforms.checkpoint import read_state, set_state, state_key, take_out


class Published:
    """The tensors that an attachment has shown in an optimizer's state, and those that are being loaded into it."""

    def __init__(self) -> None:
        self._loading: dict[int, dict[str, Any]] = {}
        # One value that was shown, and where: if it is there no more, somebody else wrote to the state.
        self._witness: tuple[Any, str, Any] | None = None
        self._state_id: int | None = None

    def show(self, optimizer: Optimizer, slots: TransformSlots, *, after_step: bool = False) -> None:
        """Show the slots' state in ``optimizer.state``.

        Only beside the optimizer's own, or after its own update: Adam and others set up a parameter's state when they
        find it empty, and would take ours for their own.

        Args:
            optimizer: The optimizer.
            slots: The active slots.
            after_step: Whether the optimizer has just used the gradients.
        """
        shown: tuple[GradientTransform, Slot] | None = None
        state = optimizer.state
        for transform, slot in slots:
            weight = slot.layer.weight
            entry = state.get(weight)
            if not slot.state or not (entry or (after_step and weight.grad is not None)):
                continue
            if entry is None:
                entry = state[weight]
            entry.update(zip(map(state_key(transform, "").__add__, slot.state), slot.state.values(), strict=True))
            shown = transform, slot
        self._witness = None if shown is None else _witness(*shown)
        self._state_id = id(state)

    def compare(self, optimizer: Optimizer, slots: Sequence[tuple[GradientTransform, Slot]]) -> None:
        """Take up a state that was loaded without torch's hooks, as some optimizers' own ``load_state_dict`` does.

        Args:
            optimizer: The optimizer.
            slots: All slots.
        """
        replaced = self._state_id != id(optimizer.state)
        if not replaced and self._is_shown(optimizer, slots):
            return
        without: list[tuple[GradientTransform, Slot]] = []
        for transform, slot in slots:
            entry = optimizer.state.get(slot.layer.weight, {})
            if not slot.enabled or not slot.state or _shows(transform, slot, entry):
                continue
            if any(str(key).startswith(state_key(transform, "")) for key in entry):
                set_state(slot, first_state(optimizer, transform, slot))
            elif replaced and entry:
                set_state(slot, transform.init(slot))
                without.append((transform, slot))
        self.show(optimizer, [(transform, slot) for transform, slot in slots if slot.enabled])
        _warn_of_missing(without)

    def _is_shown(self, optimizer: Optimizer, slots: TransformSlots) -> bool:
        if self._witness is not None:
            weight, name, value = self._witness
            return optimizer.state.get(weight, {}).get(name) is value
        for transform, slot in slots:
            entry = optimizer.state.get(slot.layer.weight) if slot.state else None
            if entry and state_key(transform, next(iter(slot.state))) in entry:
                return False
        return True

    def take_out(
        self, optimizer: Optimizer, state_dict: dict[str, Any], transforms: Sequence[GradientTransform]
    ) -> dict[str, Any]:
        """Take the transforms' entries out of a state dict that is being loaded, until `give`.

        Args:
            optimizer: The optimizer that loads it.
            state_dict: The state dict; left as it is.
            transforms: Whose entries.

        Returns:
            The state dict without them.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state_dict, self._loading = take_out(state_dict, transforms, parameters)
        return state_dict

    def give(self, optimizer: Optimizer, slots: TransformSlots) -> None:
        """Give the slots what was taken out; those of which nothing was saved start anew.

        Args:
            optimizer: The optimizer.
            slots: All slots.

        Raises:
            ValueError: If a tensor has another shape.
        """
        loading, self._loading = self._loading, {}
        without: list[tuple[GradientTransform, Slot]] = []
        for transform, slot in slots:
            if not slot.coverage.applies or not (fresh := transform.init(slot)):
                continue
            slot.pending = None
            weight = slot.layer.weight
            loaded = None if slot.frozen else read_state(transform, slot, loading.get(id(weight), {}))
            if loaded is None and not slot.enabled:
                slot.state, slot.home = {}, None
                continue
            set_state(slot, fresh if loaded is None else loaded)
            if slot.enabled and id(weight) in loading:
                entry = optimizer.state[weight]
                entry |= {state_key(transform, key): value for key, value in slot.state.items()}
            if loaded is None and optimizer.state.get(weight):
                without.append((transform, slot))
        self.show(optimizer, [(transform, slot) for transform, slot in slots if slot.enabled])
        _warn_of_missing(without)


def first_state(optimizer: Optimizer, transform: GradientTransform, slot: Slot) -> State:
    """Return a slot's state: what was loaded into the optimizer before, or a new one; what is of no use is dropped.

    Args:
        optimizer: The optimizer.
        transform: The transform.
        slot: A covered slot.

    Returns:
        The state.
    """
    entry = optimizer.state.get(slot.layer.weight, {})
    found = read_state(transform, slot, entry, warn_if_rounded=True)
    others = [key for key in entry if str(key).startswith(state_key(transform, ""))]
    if found is None and others:
        for key in others:  # or it would be saved again, beside the new
            del entry[key]
        warnings.warn(
            f"the optimizer's state holds statistics of {transform.name} for {slot.layer.name} in another form "
            "(saved with other options?): they start anew",
            WellcondWarning,
            stacklevel=2,
        )
    return transform.init(slot) if found is None else found


def restore(optimizer: Optimizer, entries: Mapping[Any, Mapping[Any, Any]]) -> None:
    """Put back what the entries of an optimizer's state were.

    Args:
        optimizer: The optimizer.
        entries: A copy of each entry; entries that came later go.
    """
    for key, entry in list(optimizer.state.items()):
        if key not in entries:
            del optimizer.state[key]
        elif isinstance(entry, dict):
            entry.clear()
            entry.update(entries[key])


def _witness(transform: GradientTransform, slot: Slot) -> tuple[Any, str, Any] | None:
    """Return a tensor of a slot's state: small integers are one object wherever they stand."""
    for key, value in slot.state.items():
        if isinstance(value, Tensor):
            return slot.layer.weight, state_key(transform, key), value
    return None


def _shows(transform: GradientTransform, slot: Slot, entry: dict[str, Any]) -> bool:
    return all(entry.get(state_key(transform, key)) is value for key, value in slot.state.items())


def _warn_of_missing(without: Sequence[tuple[GradientTransform, Slot]]) -> None:
    if not without:
        return
    names = " or ".join(dict.fromkeys(transform.name for transform, _ in without))
    first = without[0][1].layer.name
    warnings.warn(
        f"the loaded optimizer state has no statistics of {names} for {len(without)} of the weights "
        f"({first}{', …' if len(without) > 1 else ''}): they start anew",
        WellcondWarning,
        stacklevel=4,
    )
