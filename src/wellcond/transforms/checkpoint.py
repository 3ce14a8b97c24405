"""Names a transform's state, takes it out of a state dict, checks it, and lets it follow its weight."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from wellcond.runtime.checks import WellcondWarning
from wellcond.transforms.base import GradientTransform, Slot, State


def state_key(transform: GradientTransform, key: str) -> str:
    """Return the key of a transform's state in ``optimizer.state[weight]``."""
    return f"wellcond_{transform.name}_{key}"


def take_out(
    state_dict: dict[str, Any], transforms: Sequence[GradientTransform], parameters: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Split an optimizer's state dict into the optimizer's own and the transforms'.

    Args:
        state_dict: As `Optimizer.state_dict` returned it; left as it is.
        transforms: Whose state to take out.
        parameters: The parameters of the optimizer that loads it, in order.

    Returns:
        The state dict without the transforms' entries, and these by the ``id`` of the parameter.
    """
    prefixes = tuple(state_key(transform, "") for transform in transforms)
    own: dict[Any, Any] = {}
    taken: dict[Any, dict[str, Any]] = {}
    for index, entry in state_dict["state"].items():
        own[index] = {key: value for key, value in entry.items() if not str(key).startswith(prefixes)}
        taken[index] = {key: value for key, value in entry.items() if key not in own[index]}
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    # Where the counts differ, torch refuses the state dict in its own words.
    by_parameter = {id(p): taken[index] for index, p in zip(indices, parameters, strict=False) if taken.get(index)}
    return {**state_dict, "state": own}, by_parameter


def read_state(
    transform: GradientTransform, slot: Slot, entry: Mapping[str, Any], *, warn_if_rounded: bool = False
) -> State | None:
    """Read a slot's state from what was saved for its weight.

    Args:
        transform: The transform.
        slot: The weight's slot.
        entry: Saved values by full key.
        warn_if_rounded: Warn if tensors have fewer bits than they should, as torch leaves them when it loads a state
            that no one takes out for it.

    Returns:
        A copy on the weight's device, in the precision and shapes that the transform keeps; None if ``entry`` has no
        complete state, or the transform keeps none.

    Raises:
        ValueError: If a tensor has another shape.
    """
    fresh = transform.init(slot)
    found = {key: entry[name] for key in fresh if (name := state_key(transform, key)) in entry}
    if len(found) < len(fresh) or not fresh:
        return None
    state: State = {}
    rounded = False
    for key, like in fresh.items():
        value = found[key]
        if not isinstance(like, Tensor):
            state[key] = int(value)
            continue
        if not isinstance(value, Tensor) or value.shape != like.shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the loaded {state_key(transform, key)} of layer '{slot.layer.module_name or slot.layer.name}' must "
                f"have the shape {tuple(like.shape)}, got {given}"
            )
        # torch makes counts floating-point numbers, too; that loses nothing.
        rounded |= like.is_floating_point() and value.dtype.itemsize < like.dtype.itemsize
        state[key] = like.copy_(value)
    if rounded and warn_if_rounded:
        warnings.warn(
            f"the statistics of '{slot.layer.module_name}' were rounded to {slot.layer.weight.dtype} when the "
            "optimizer's state was loaded: attach first, then load",
            WellcondWarning,
            stacklevel=2,
        )
    return state


def set_state(slot: Slot, state: State) -> None:
    """Give a slot a state that was made for its weight as the weight is now."""
    slot.state = state
    slot.home = (slot.layer.weight.device, slot.layer.weight.dtype)


def follow(transform: GradientTransform, slot: Slot) -> None:
    """Have a slot's state go where its weight went since the state was made: another device, another precision.

    What was made on the meta device starts anew: it holds nothing.

    Args:
        transform: The transform.
        slot: One of its slots.
    """
    weight = slot.layer.weight
    if not slot.state or slot.home == (weight.device, weight.dtype):
        return
    now = transform.cover_shared(slot.uses)
    slot.coverage = dataclasses.replace(slot.coverage, state_bytes=now.state_bytes)
    state = transform.init(slot)
    for key, value in slot.state.items():
        fresh = state[key]
        if not isinstance(fresh, Tensor) or not isinstance(value, Tensor):
            state[key] = value
        elif not value.is_meta:
            fresh.copy_(value)
    set_state(slot, state)


def carried(transform: GradientTransform, slot: Slot, state: State) -> bool:
    """Say whether the state of an earlier slot of the same weight is one of this slot, too.

    Args:
        transform: The transform.
        slot: The slot, without a state.
        state: The earlier one's.

    Returns:
        Whether it has the same keys and shapes.
    """
    fresh = transform.init(slot)
    return fresh.keys() == state.keys() and all(
        getattr(value, "shape", None) == getattr(state[key], "shape", None) for key, value in fresh.items()
    )
