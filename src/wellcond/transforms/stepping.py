"""The steps of an optimizer: each outermost one once, each gradient of its closure, and copies, which have no hooks.

Where a class overrides ``step`` and calls ``super().step()``, torch runs its hooks twice in one step.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from wellcond.runtime.checks import WellcondWarning

# The code of torch's wrapper around each ``step``, which runs the hooks.
_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__
_KEY = "wellcond"
_HANDLES = "wellcond_attachments"


class Follower(Protocol):
    """A follower of an optimizer's steps, and of the states that are loaded into it."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its transforms."""

    def gradients_are_there(self, optimizer: Optimizer, step: StepRecord) -> None:
        """Act on gradients before the optimizer uses them: in each step, or each time its closure was run."""

    def step_is_done(self, optimizer: Optimizer) -> None:
        """Act on what the optimizer has done."""

    def before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take out of a state dict what is not the optimizer's own."""

    def after_load(self, optimizer: Optimizer) -> None:
        """Act on a state that was loaded."""


class StepRecord:
    """A note within one optimizer step: whether its statistics were taken in.

    Args:
        closure: Whether a closure computes its gradients, perhaps several times.
    """

    def __init__(self, closure: bool = False) -> None:
        self.closure = closure
        self.refreshed = False


class StepHooks:
    """The hooks by which an optimizer tells a follower of its steps.

    Args:
        optimizer: The optimizer, with torch's hooks.
        follower: Who is told.
    """

    def __init__(self, optimizer: Optimizer, follower: Follower) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._follower = follower
        self._told_of_copy = False
        # A compiled step leaves compiled code here. (As a decorator this would import the compiler with this library.)
        self._is_nested = torch.compiler.disable(_is_nested)

    def install(self) -> None:
        """Register the hooks."""
        optimizer = self._optimizer()
        assert optimizer is not None
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_load_state_dict_pre_hook(self._before_load)
        optimizer.register_load_state_dict_post_hook(self._after_load)
        optimizer.__dict__.setdefault(_HANDLES, []).append(self._follower)
        optimizer.__dict__["__getstate__"] = functools.partial(_state_for_copies, weakref.ref(optimizer))
        # What it was a copy of is of no concern any more.
        optimizer._optimizer_step_pre_hooks.pop(_KEY, None)  # type: ignore[call-overload]

    def remove(self) -> None:
        """Take the hooks off; may be called twice."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        for hooks in _hooks_in(vars(optimizer)).values():
            for number in [number for number, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[number]
        followers = optimizer.__dict__.get(_HANDLES, [])
        if self._follower in followers:
            followers.remove(self._follower)
        if not followers:
            optimizer.__dict__.pop(_HANDLES, None)
            optimizer.__dict__.pop("__getstate__", None)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Transform the gradients, or, where a closure will compute them, have them transformed after it ran."""
        if not self._is_ours(optimizer) or self._is_nested(optimizer):
            return None
        positional = len(args) > 1 and callable(args[1])
        closure = args[1] if positional else kwargs.get("closure")
        step = StepRecord(closure is not None)
        if closure is None:
            self._follower.gradients_are_there(optimizer, step)
            return None

        @functools.wraps(closure)
        def transformed_closure() -> Any:
            loss = closure()
            self._follower.gradients_are_there(optimizer, step)
            return loss

        if positional:
            return (args[0], transformed_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": transformed_closure}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is self._optimizer() and not self._is_nested(optimizer):
            self._follower.step_is_done(optimizer)

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        return self._follower.before_load(optimizer, state_dict) if optimizer is self._optimizer() else None

    def _after_load(self, optimizer: Optimizer) -> None:
        if optimizer is self._optimizer():
            self._follower.after_load(optimizer)

    def _is_ours(self, optimizer: Optimizer) -> bool:
        """Whether this is the optimizer that was attached to, and not a copy that shares its hooks."""
        if optimizer is self._optimizer():
            return True
        if not self._told_of_copy:
            self._told_of_copy = True
            _warn_of_copy(optimizer, self._follower.names)
        return False


def followers_of(optimizer: Optimizer) -> list[Any]:
    """Return who follows an optimizer, in the order in which they came."""
    return list(optimizer.__dict__.get(_HANDLES, []))


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether the step whose hooks run now was called by another step of the same optimizer.

    The call stack is asked, not a counter: a step that raised would leave a counter wrong.
    """
    steps = 0
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and steps < 2:
        if frame.f_code is _WRAPPER:
            called_with = frame.f_locals.get("args", ())
            steps += bool(called_with) and called_with[0] is optimizer
        frame = frame.f_back
    return steps == 2


# copies --------------------------------------------------------------------------------------------------------------


class CopiedOptimizer:
    """Stands where a copied or unpickled optimizer had its hooks: tells of it at the copy's first step.

    The copy steps as a plain optimizer; what was remembered for the transforms goes. Attaching to the copy before its
    first step takes this off and goes on with what was remembered.

    Args:
        names: Of the transforms.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.told = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Say it once."""
        if self.told:
            return
        self.told = True
        forget(optimizer, optimizer.state, self.names)
        _warn_of_copy(optimizer, self.names)


def forget(optimizer: Optimizer, parameters: Iterable[Any], names: Iterable[str]) -> None:
    """Take transforms' entries out of an optimizer's state.

    Args:
        optimizer: The optimizer.
        parameters: Of which parameters; those that it keeps no state of are passed over.
        names: The transforms' names.
    """
    prefixes = tuple(f"wellcond_{name}_" for name in names)
    for parameter in list(parameters):
        entry = optimizer.state.get(parameter)
        if not isinstance(entry, dict):
            continue
        ours = [key for key in entry if str(key).startswith(prefixes)]
        for key in ours:
            del entry[key]
        if ours and not entry:
            del optimizer.state[parameter]


def _warn_of_copy(optimizer: Optimizer, names: Iterable[str]) -> None:
    kind = type(optimizer).__name__
    warnings.warn(
        f"this {kind} is a copy of one to which {', '.join(names)} is attached, and steps as a plain {kind}: attach to "
        "the copy, with the model that it trains",
        WellcondWarning,
        stacklevel=4,
    )


def _state_for_copies(reference: weakref.ref[Optimizer], *_: Any) -> Any:
    """Return what a copy or a pickle of an optimizer is made of: what its class says, and who tells that it is one."""
    optimizer = reference()
    assert optimizer is not None
    state = type(optimizer).__getstate__(optimizer)
    if not isinstance(state, dict):
        return state
    names = tuple(name for follower in followers_of(optimizer) for name in follower.names)
    # Some classes copy their whole __dict__.
    kept = {key: value for key, value in state.items() if key not in (_HANDLES, "__getstate__")}
    for key, hooks in _hooks_in(kept).items():
        kept[key] = OrderedDict((number, hook) for number, hook in hooks.items() if not _is_ours(hook))
    before = kept.get("_optimizer_step_pre_hooks", {})
    return {**kept, "_optimizer_step_pre_hooks": OrderedDict({**before, _KEY: CopiedOptimizer(names)})}


def _hooks_in(attributes: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """Return an optimizer's hooks of all kinds."""
    return {
        name: hooks
        for name, hooks in attributes.items()
        if name.startswith("_optimizer_") and name.endswith("_hooks") and isinstance(hooks, dict)
    }


def _is_ours(hook: Callable[..., Any]) -> bool:
    return isinstance(hook, types.MethodType) and isinstance(hook.__self__, StepHooks)
