"""Run compiled code eagerly while inputs are observed, so that compiled graphs are never cut at a hook.

A hook of ours breaks the graph that is being compiled around it, and torch goes on using what it compiled up to the
break in later passes, where there is no hook. So graphs are compiled only where no hook is. Only code that calls
modules with hooks runs eagerly; what other models' code was compiled to goes on running.
"""

from __future__ import annotations

import inspect
import sys
import threading
import types
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

_hooked: dict[int, weakref.WeakSet[nn.Module]] = {}
_new: set[int] = set()
_ours: list[Any] = []


class EagerWithGradients:
    """A stance of ``torch.compiler.set_stance``: passes that a hook could observe run eagerly, all others compiled."""

    skip_guard_eval_unsafe = False
    backend = None

    def __init__(self) -> None:
        self._answered = threading.local()

    @property
    def stance(self) -> str:
        """The stance for the call of compiled code that asks now.

        The compiler reads this several times in one call and compares it with one name after the other. All reads of a
        call get one answer, also if an owner is collected between two of them.
        """
        asks = sys._getframe(1)
        call, instruction, answer = getattr(self._answered, "last", (0, 0, ""))
        # A later call may reuse a frame's address; its first read comes from the first instruction that reads.
        if id(asks) == call and asks.f_lasti > instruction:
            return str(answer)
        answer = self._answer()
        self._answered.last = (id(asks), asks.f_lasti, answer)
        return answer

    def _answer(self) -> str:
        if not _hooked or not torch.is_grad_enabled():
            return "default"
        try:
            return "force_eager" if _may_meet_hooks() else "default"
        except Exception:  # an odd object, an empty cell: nothing of ours may raise in a pass
            return "force_eager"


def run_eagerly(owner: object, hooked: Collection[nn.Module], *, stepped: bool = False) -> None:
    """Say whose calls an owner wants to run eagerly from now on; a stance that the user chose goes first.

    Args:
        owner: Who wants it; nobody does once it no longer exists.
        hooked: Modules; compiled code that may call one of them runs eagerly.
        stepped: Whether it has just trained. Others that never have must not keep it waiting.
    """
    known = id(owner) in _hooked
    if stepped:
        _new.discard(id(owner))
        for other in _hooked.keys() & _new:
            _forget(other)
    elif hooked and not known:
        _new.add(id(owner))
    if hooked:
        _hooked[id(owner)] = weakref.WeakSet(hooked)
        if not known:
            weakref.finalize(owner, _forget, id(owner)).atexit = False
            _set()
    elif known:
        _forget(id(owner))
    if _ours and not _hooked:
        _set()


def _forget(owner: int) -> None:
    # An owner may be collected at any moment, also while the compiler reads the stance, so the stance stays as it is:
    # ours says "default" when nobody wants anything else.
    _hooked.pop(owner, None)
    _new.discard(owner)


def _set() -> None:
    # An optimizer's step may itself be compiled.
    torch.compiler.disable(_set_uncompiled)()


def _set_uncompiled() -> None:
    from torch._dynamo import eval_frame

    now: Any = eval_frame._stance
    if _hooked and not _ours and now == eval_frame.DynamoStance():
        _ours.append(EagerWithGradients())
        eval_frame._set_stance(_ours[0])
    elif not _hooked and _ours and now is _ours.pop():
        torch.compiler.set_stance("default")


def _may_meet_hooks() -> bool:
    """Whether the compiled code that is being called may call a module with a hook: unless it is seen not to."""
    called = _called()
    modules = None if called is None else list(_modules_of(*called))
    if not modules:
        return True
    return any(part in hooked for module in modules for part in module.modules() for hooked in list(_hooked.values()))


def _called() -> tuple[Any, Iterable[Any]] | None:
    """Return the function that torch is about to run compiled, and its arguments; None if they are not found."""
    frame: types.FrameType | None = sys._getframe(3)
    for _ in range(3):
        frame = None if frame is None else frame.f_back
        if frame is not None and frame.f_code.co_name == "compile_wrapper":
            found = frame.f_locals
            return found.get("fn"), (*found.get("args", ()), *found.get("kwargs", {}).values())
    return None


def _modules_of(function: Any, arguments: Iterable[Any]) -> Iterator[nn.Module]:
    """Yield the modules that a function is, belongs to, is given or names."""
    function = inspect.unwrap(function, stop=lambda wrapper: isinstance(wrapper, nn.Module))
    owner = getattr(function, "__self__", None)
    for module in (function, owner):
        if isinstance(module, nn.Module):
            yield module
            return
    function = getattr(function, "__func__", function)
    named = [owner, *arguments]
    if isinstance(function, types.FunctionType):
        named += [function.__globals__.get(name) for name in function.__code__.co_names]
        named += [cell.cell_contents for cell in function.__closure__ or ()]
        named += function.__defaults__ or ()
    for value in named:
        if isinstance(value, nn.Module):
            yield value
        elif not isinstance(value, (torch.Tensor, types.ModuleType, type)):
            yield from (part for part in getattr(value, "__dict__", {}).values() if isinstance(part, nn.Module))
