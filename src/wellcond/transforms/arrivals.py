"""Finds the calls of a layer that led to the gradient of its weight: only their rows count.

A call is noted in the forward pass. It counts once the gradient of its output has come and the gradient of the weight
was computed in the same backward pass. A call whose output is dropped frees what it holds together with its graph.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from wellcond.layouts.unusual import is_sharded
from wellcond.runtime.tracing import NO_BACKWARD, backward_number

Sums = list[Tensor]
_serial = itertools.count()


class LayerCall:
    """One forward call of a layer: the sums over its input's rows, or the input itself where that is smaller.

    Args:
        use: Which of the slot's uses of the weight was called.
        sums: What the transform made of the input, or None.
        inputs: A copy of the input, of which the sums are made once the call counts, or None.
    """

    def __init__(self, use: int, sums: Sums | None, inputs: tuple[Any, ...] | None) -> None:
        self.serial = next(_serial)
        self.use, self.sums, self.inputs = use, sums, inputs


class Signal(IntEnum):
    """The progress of a backward pass."""

    REACHED = 0
    """The gradient of a call's output has come."""
    COMPUTED = 1
    """So has the gradient of the weight; ``torch.autograd.grad`` may have returned it."""
    ACCUMULATED = 2
    """It has been added to ``weight.grad``."""


class _Total:
    """The sums of calls in the order in which they counted, each call once."""

    def __init__(self) -> None:
        self.sums: Sums | None = None
        self._waiting: list[LayerCall | Tensor] = []
        self._counted: set[int] = set()
        self._own = False

    def add(self, calls: Sequence[LayerCall]) -> None:
        self._waiting += calls

    def keep_if(self, condition: Tensor) -> None:
        """Drop what was added so far unless a condition holds, which only the device knows."""
        if self._waiting or self.sums is not None:
            self._waiting.append(condition)

    def fold(self, sums_of: Callable[[LayerCall], Sums]) -> Sums | None:
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            if isinstance(item, Tensor):
                self._counted.clear()
                self.sums, self._own = [total * item.to(total) for total in self.sums or []], True
            elif item.serial not in self._counted:
                self._counted.add(item.serial)
                self._add(sums_of(item))
        return self.sums

    def copy(self, sums_of: Callable[[LayerCall], Sums]) -> _Total:
        """Return a total of its own that goes on from here."""
        other = _Total()
        other.sums, other._counted = self.fold(sums_of), set(self._counted)
        return other

    def _add(self, parts: Sums) -> None:
        if not self.sums:
            self.sums, self._own = parts, False
        elif self._own:
            for total, part in zip(self.sums, parts, strict=True):
                total.add_(part)
        else:
            # The first call's sums stay as they are: its graph may be walked again.
            self.sums = [total + part for total, part in zip(self.sums, parts, strict=True)]
            self._own = True


class Arrivals:
    """The calls of the layers that use one weight, sorted by what backward passes have shown of them.

    Hooks only take notes; tensors are added on the thread that runs the forward passes.

    Args:
        weight: The weight, as the optimizer holds it.
    """

    def __init__(self, weight: Tensor) -> None:
        self.failure: Exception | None = None
        self._weight = weight
        self._totals = {signal: _Total() for signal in Signal}
        self._passes: dict[int, _Pass] = {}
        self._accumulated = False
        self._grad_was: tuple[int, int] | None = None
        self._hooks: dict[Tensor, list[RemovableHandle]] = {}
        self._noted: weakref.WeakSet[LayerCall] = weakref.WeakSet()
        self._latest: LayerCall | None = None
        self._clear = True

    def expect(
        self, call: LayerCall, outputs: Sequence[Tensor], leaf: Tensor, fold: Callable[[LayerCall], Sums]
    ) -> None:
        """Note a call, whose rows count if the gradient of one of its outputs comes.

        Args:
            call: The call.
            outputs: Tensors that it returned and that have a graph.
            leaf: The tensor that its layer used as the weight: another one than the weight where that is sharded.
            fold: Makes the sums of a call.
        """
        if backward_number() == NO_BACKWARD:
            self._close_all()
        self._latest, self._clear = call, False
        self._noted.add(call)
        for total in self._totals.values():
            total.fold(fold)
        mine = weakref.ref(self)
        for output in outputs:
            # The graph owns the call; it must not own the slot, which leads to the module and maybe to the graph.
            _hooked(output).register_hook(lambda _: _tell(mine, lambda arrivals: arrivals._reached(call)))
        for tensor in (self._weight, leaf):
            if tensor not in self._hooks and tensor.requires_grad and tensor.is_leaf:
                self._hooks[tensor] = [
                    tensor.register_hook(lambda _: _tell(mine, lambda arrivals: arrivals._computed())),
                    tensor.register_post_accumulate_grad_hook(
                        lambda _: _tell(mine, lambda arrivals: arrivals._was_accumulated())
                    ),
                ]

    def noted(self, fold: Callable[[LayerCall], Sums]) -> Sums | None:
        """Return the sums over the calls that count or still may, and the latest; a call lives as long as its graph."""
        total = self._totals[Signal.ACCUMULATED].copy(fold)
        total.add(sorted(self._noted, key=lambda call: call.serial))
        return total.fold(fold)

    def take(self, fold: Callable[[LayerCall], Sums]) -> Sums | None:
        """Return the sums over the rows behind the weight's gradient, or None without such rows; start anew."""
        self._close_all()
        try:
            if self._weight.grad is None:
                return None
            if self._accumulated:
                return self._totals[Signal.ACCUMULATED].fold(fold)
            # The gradient was put there by hand: of rows whose gradient torch.autograd.grad returned, or, where no
            # hook of the weight was ever called, of those whose outputs were reached.
            return self._totals[Signal.COMPUTED].fold(fold) or self._totals[Signal.REACHED].fold(fold)
        finally:
            self.clear()

    def clear(self) -> None:
        """Forget all calls, and take the hooks off the weight."""
        if self._clear:
            return
        for hook in itertools.chain.from_iterable(self._hooks.values()):
            hook.remove()
        self._totals = {signal: _Total() for signal in Signal}
        self._passes, self._hooks = {}, {}
        self._latest = None
        self._noted.clear()
        self._accumulated, self._grad_was = False, None
        self._clear = True

    # during a backward pass -----------------------------------------------------------------------------------------

    def _reached(self, call: LayerCall) -> None:
        self._this_pass().calls[call] = None

    def _computed(self) -> None:
        """Before the gradient is added to ``.grad``: what is no longer in there does not count."""
        here = self._this_pass()
        here.signal = max(here.signal, Signal.COMPUTED)
        before = self._weight.grad
        if before is None:
            if all(tensor.grad is None for tensor in self._hooks):
                self._totals[Signal.ACCUMULATED] = _Total()
        elif (id(before), before._version) != self._grad_was and not (is_sharded(before) or before.is_sparse):
            # Somebody wrote to it: `zero_grad(set_to_none=False)`, or a reduction over ranks.
            self._totals[Signal.ACCUMULATED].keep_if((before != 0).any())

    def _was_accumulated(self) -> None:
        self._this_pass().signal, self._accumulated = Signal.ACCUMULATED, True
        grad = self._weight.grad
        self._grad_was = None if grad is None else (id(grad), grad._version)
        self._close(backward_number())

    def _this_pass(self) -> _Pass:
        self._clear = False
        return self._passes.setdefault(backward_number(), _Pass())

    def _close(self, number: int) -> None:
        """Sort a backward pass's calls under what it has shown, in the order in which they were made."""
        ended = self._passes.pop(number)
        self._totals[ended.signal].add(sorted(ended.calls, key=lambda call: call.serial))

    def _close_all(self) -> None:
        for number in list(self._passes):
            self._close(number)


class _Pass:
    """What one backward pass has shown; a reentrant checkpoint runs others inside it."""

    def __init__(self) -> None:
        self.calls: dict[LayerCall, None] = {}
        self.signal = Signal.REACHED


def _hooked(output: Tensor) -> Tensor:
    """Return the tensor at which an output's gradient comes by, whatever is later done to the output in place.

    A view (what a linear layer returns of inputs of three axes, or a convolution of one image) is given another history
    then, from its base on, in which no hook of its own is left.
    """
    base = output._base
    return output if base is None or base.grad_fn is None else base


def _tell(arrivals: weakref.ref[Arrivals], note: Callable[[Arrivals], None]) -> None:
    """Let a hook take its note, unless nobody wants it any more; it never raises in a backward pass."""
    found = arrivals()
    if found is not None:
        try:
            note(found)
        except Exception as error:
            found.failure = error
