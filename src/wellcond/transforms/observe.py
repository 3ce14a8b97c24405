"""Forward hooks that show a module's inputs to an attachment, exactly once per sample and step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn


class Observer(Protocol):
    """What takes in the inputs that a probe shows."""

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in one forward pass of one module."""


class Gate:
    """Whether any input is wanted now: the one thing that compiled code looks at, so that it has two variants."""

    def __init__(self) -> None:
        self.open = False


class Probe:
    """A forward pre-hook that shows a module's input to an observer, exactly once per sample and step."""

    def __init__(self, module: nn.Module, observer: Observer, gate: Gate) -> None:
        self._module = weakref.ref(module)
        self._observer = weakref.ref(observer)
        self._gate = gate
        # Forward passes that were observed and that a checkpointed segment may run again.
        self.may_recur = 0
        # Compiled code steps out here, in the variant where the gate is open. (As a decorator this would import the
        # compiler together with this library; by now the optimizer has imported it.)
        self._observe_uncompiled = torch.compiler.disable(self._observe)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the input unless nobody wants it, or this pass cannot lead to a gradient."""
        if self._gate.open and module.training and torch.is_grad_enabled():
            self._observe_uncompiled(module, args, kwargs)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer = self._observer()
        # A deep copy of the model carries this hook, but is another module.
        if observer is None or self._module() is not module:
            return
        # Inside `torch.func` transforms tensors are wrapped and must not outlive them; such gradients are no `.grad`.
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward pass: activation checkpointing recomputes. Without reentrance the first run was
            # observed, and recomputation runs under saved-tensor hooks of its own; with reentrance the first run had
            # gradients off, no such hooks are set, and this run counts.
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
            if hooks is not None and (_is_recomputation(hooks) or self.may_recur > 0):
                self.may_recur = max(0, self.may_recur - 1)
                return
        else:
            self.may_recur += 1
        observer.observe(module, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert_probe

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert_probe, ()


def _is_recomputation(hooks: tuple[Any, ...]) -> bool:
    """Whether saved-tensor hooks are those of a non-reentrant checkpoint that runs its segment again."""
    return "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")


def _inert_probe(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Stand where a copied or unpickled module had a probe: nothing observes that module."""


def _make_inert_probe() -> Callable[..., None]:
    return _inert_probe
