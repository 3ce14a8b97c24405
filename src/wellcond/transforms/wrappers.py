"""Finds the torch optimizer that takes the steps: the given one, or one inside a wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from wellcond.runtime.checks import WellcondWarning

# What torch's constructor gives an optimizer, and what `attach` needs.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# By what one calls the optimizers that update weights outside step().
_UPDATES_ELSEWHERE = {
    "first_step": "first_step() and second_step()",
    "fused_backward": "fused_backward(), during the backward pass",
}


def inner_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer that takes the steps: the innermost one of wrappers such as Lightning's or Lookahead.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or what wraps one.

    Returns:
        The optimizer, which may be ``optimizer`` itself.

    Raises:
        TypeError: If there is none, or several that share the work.

    Example:
        >>> import torch
        >>> class Wrapper:
        ...     def __init__(self, optimizer):
        ...         self.optimizer = optimizer
        >>> sgd = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
        >>> inner_optimizer(Wrapper(sgd)) is sgd
        True
    """
    inner: Optimizer = _chain(optimizer)[-1]
    return inner


def usable_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer that takes the steps, if its steps can be followed.

    Args:
        optimizer: A ``torch.optim.Optimizer``, or what wraps one.

    Returns:
        As `inner_optimizer`.

    Raises:
        TypeError: If its steps, or the loading of its state, cannot be followed; the message says why.
    """
    chain = _chain(optimizer)
    inner: Optimizer = chain[-1]
    name = type(inner).__name__
    for attribute, calls in _UPDATES_ELSEWHERE.items():
        if callable(getattr(inner, attribute, None)):
            raise TypeError(
                f"{name} changes weights in {calls}, which no hook of torch's reports, so nothing can be attached to "
                "it: attach to an optimizer that updates in step()"
            )
    if any(not isinstance(vars(inner).get(hooks), dict) for hooks in _HOOKS):
        raise TypeError(
            f"{name} was made without torch.optim.Optimizer.__init__() and so has none of the hooks by which its steps "
            "are followed: attach to the optimizer that it wraps, or have it call super().__init__(params, defaults)"
        )
    if not getattr(type(inner).step, "hooked", False):
        raise TypeError(
            f"{name}.step was replaced after an optimizer of that class was made, and runs none of torch's hooks: "
            "replace it before, or override it in a subclass"
        )
    if getattr(inner, "_overlap_with_ddp", False):
        raise TypeError(f"{name}(overlap_with_ddp=True) updates during the backward pass: attach needs overlap off")
    for wrapper in chain[:-1]:
        if _saves_without(wrapper, inner):
            warnings.warn(
                f"{type(wrapper).__name__}.state_dict() leaves out the state of the {name} that it steps, and with it "
                f"what is attached: save and load the state of the {name} too",
                WellcondWarning,
                stacklevel=4,
            )
    return inner


def _chain(optimizer: object) -> list[Any]:
    """Follow wrappers from the outermost to the optimizer that takes the steps."""
    chain: list[Any] = [optimizer]
    while (inner := _wrapped(chain[-1])) is not None and all(inner is not outer for outer in chain):
        chain.append(inner)
    if not isinstance(chain[-1], Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return chain


def _wrapped(outer: Any) -> Any:
    """Return what an object hands its steps to, or None if it takes them itself."""
    attributes: dict[str, Any] = getattr(outer, "__dict__", {})
    inner: list[Optimizer] = []
    for value in attributes.values():
        for found in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(found, Optimizer) and found is not outer and all(found is not other for other in inner):
                inner.append(found)
    if isinstance(outer, Optimizer):
        # An optimizer may keep others for purposes of their own: those that hold none of its parameters.
        own = _parameters(outer)
        inner = [other for other in inner if own & _parameters(other)]
        if not inner:
            return None
        if len(inner) > 1 or own - _parameters(inner[0]):
            raise TypeError(_names_several(outer, inner))
    elif len(inner) > 1:
        raise TypeError(_names_several(outer, inner))
    return inner[0] if inner else getattr(outer, "optimizer", None)


def _names_several(outer: object, inner: Sequence[Optimizer]) -> str:
    names = ", ".join(type(other).__name__ for other in inner)
    if len(inner) == 1:
        return (
            f"{type(outer).__name__} gives the {names} in it only some of its parameters, so it cannot be attached to: "
            "attach to optimizers that hold all of what they train, one by one"
        )
    return f"{type(outer).__name__} holds several optimizers ({names}): attach to each of them"


def _parameters(optimizer: Any) -> set[int]:
    groups = getattr(optimizer, "param_groups", None) or []
    return {id(parameter) for group in groups for parameter in group["params"]}


def _saves_without(wrapper: Any, inner: Optimizer) -> bool:
    """Whether a wrapper's checkpoint is its own state alone, as SAM's."""
    if not isinstance(wrapper, Optimizer) or type(wrapper).state_dict is not Optimizer.state_dict:
        return False
    return getattr(wrapper, "state", None) is not inner.state
