"""Run compiled code eagerly while inputs are observed, so that compiled graphs are never cut at a probe.

A probe's hook breaks the graph that is being compiled around it, and torch goes on using what it compiled up to the
break in later passes, where there is no probe. So graphs are compiled only where no probe is.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

_wanting: set[int] = set()
_new: set[int] = set()
_ours: list[Any] = []


class EagerWithGradients:
    """A stance of ``torch.compiler.set_stance``: passes that a probe could observe run eagerly, all others compiled."""

    skip_guard_eval_unsafe = False
    backend = None

    @property
    def stance(self) -> str:
        """What the compiler asks at each call of compiled code."""
        return "force_eager" if torch.is_grad_enabled() else "default"


def run_eagerly(owner: object, wanted: bool, *, stepped: bool = False) -> None:
    """Say whether an owner wants compiled code to run eagerly from now on; a stance that the user chose goes first.

    Args:
        owner: Who wants it; nobody does once it no longer exists.
        wanted: Whether it does.
        stepped: Whether it has just trained. Others that never have must not keep it waiting.
    """
    if stepped:
        _new.discard(id(owner))
        if stale := _wanting & _new:
            _wanting.difference_update(stale)
            _set()
    elif wanted and id(owner) not in _wanting:
        _new.add(id(owner))
    if wanted and id(owner) not in _wanting:
        _wanting.add(id(owner))
        weakref.finalize(owner, _leave, id(owner)).atexit = False
        _set()
    elif not wanted and id(owner) in _wanting:
        _leave(id(owner))


def _leave(owner: int) -> None:
    _wanting.discard(owner)
    _new.discard(owner)
    _set()


def _set() -> None:
    # An optimizer's step may itself be compiled.
    torch.compiler.disable(_set_uncompiled)()


def _set_uncompiled() -> None:
    from torch._dynamo import eval_frame

    now: Any = eval_frame._stance
    if _wanting and not _ours and now == eval_frame.DynamoStance():
        _ours.append(EagerWithGradients())
        eval_frame._set_stance(_ours[0])
    elif not _wanting and _ours and now is _ours.pop():
        torch.compiler.set_stance("default")
