"""Shows a model to a transform: forward hooks where it wants inputs, and the sums over rows that count.

A hook is in place only while its layer's input is wanted; an ordinary pass runs no code of ours. What the hook sees
counts once the weight's gradient has come from it (`arrivals`).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

from wellcond.layouts import Layer, UnknownInputError
from wellcond.layouts.unusual import is_sharded
from wellcond.runtime.random_state import RandomState, random_numbers_kept
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.tracing import is_traced
from wellcond.transforms.arrivals import Arrivals, LayerCall, Sums
from wellcond.transforms.base import Coverage, GradientTransform, Slot
from wellcond.transforms.checkpoint import follow
from wellcond.transforms.eager import run_eagerly

NEVER_CALLED = "its module is never called (F.linear on its weight?)"
DROPPED = "no row of its input led to its gradient"

WatchedUse = tuple[GradientTransform, Slot, int]


class Observing(Protocol):
    """An observer of the calls that a hook shows; it must not raise."""

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take in one forward call of one module."""


class Gate:
    """A window that is open while some input is due."""

    def __init__(self) -> None:
        self.open = False


class _Hook:
    """A hook of one module that acts on calls that can lead to a gradient."""

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        self._module = weakref.ref(module)
        self._gate = gate
        # Compiled code steps out here. (As a decorator this would import the compiler together with this library; by
        # now the optimizer has imported it.)
        self._act_uncompiled = torch.compiler.disable(self._act_on_own)

    def __call__(self, module: nn.Module, *call: Any) -> None:
        """Act on the call unless it cannot lead to a gradient."""
        if torch.compiler.is_compiling() and (torch.compiler.is_exporting() or not self._gate.open):
            return
        if torch.is_grad_enabled():
            self._act_uncompiled(module, *call)

    def _act_on_own(self, module: nn.Module, *call: Any) -> None:
        # A deep copy of the model carries this hook, but is another module.
        if self._module() is module and not is_traced():
            self._act(module, *call)

    def _act(self, module: nn.Module, *call: Any) -> None:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert_probe

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert_probe, ()


class CallHook(_Hook):
    """A forward hook that shows a module's calls to an observer: what its forward was given, and what it returned."""

    def __init__(self, module: nn.Module, observer: Observing, gate: Gate) -> None:
        super().__init__(module, gate)
        self._observer = weakref.ref(observer)

    def _act(self, module: nn.Module, *call: Any) -> None:
        observer = self._observer()
        if observer is not None:
            args, kwargs, output = call
            observer.observe(module, args, kwargs, output)


class Start(_Hook):
    """A forward pre-hook that notes where the random generators stand, for rules that run the forward once more."""

    def __init__(self, module: nn.Module, gate: Gate, device: torch.device) -> None:
        super().__init__(module, gate)
        self._device = device
        self._noted: RandomState | None = None

    def _act(self, module: nn.Module, *call: Any) -> None:
        try:
            self._noted = RandomState(self._device)
        except Exception:
            self._noted = None  # the rows are then those of other draws from the same distribution

    def take(self) -> RandomState | None:
        """Return what was noted of the call that has just ended."""
        noted, self._noted = self._noted, None
        return noted


class Observer:
    """The observations of one attachment.

    Args:
        owner: Whom hooks show calls to; it hands them on to `observe`.
        transforms: What is attached.
        find: A method that looks for weights again, after a lazily initialised module has got its own; held weakly.
    """

    def __init__(self, owner: Observing, transforms: Sequence[GradientTransform], find: Callable[[], None]) -> None:
        self.gate = Gate()
        self._owner = weakref.ref(owner)
        self._find = weakref.WeakMethod(find)
        self._transforms = [t for t in transforms if type(t).observe is not GradientTransform.observe]
        self._watched: dict[nn.Module, list[WatchedUse]] = {}
        # Each watched slot once, in the order of attaching; and those whose inputs were wanted when last asked.
        self._pairs: list[tuple[GradientTransform, Slot]] = []
        self._wanted: list[tuple[GradientTransform, Slot]] = []
        self._lazy: set[nn.Module] = set()
        self._hooks: dict[nn.Module, list[RemovableHandle]] = {}
        self._starts: dict[nn.Module, Start] = {}
        self._arrivals: dict[Slot, Arrivals] = {}
        self._alone = True
        self._paused = False
        self._called: set[Slot] = set()
        self._empty: set[Slot] = set()

    # where to look --------------------------------------------------------------------------------------------------

    def watch(self, slots: Mapping[str, Sequence[Slot]], lazy: Iterable[nn.Module]) -> None:
        """Take up the weights whose layers' inputs may be wanted.

        Args:
            slots: Each transform's slots by its name.
            lazy: Modules that are still to be initialised.
        """
        self._lazy = set(lazy) if self._transforms else set()
        self._watched = {}
        for transform in self._transforms:
            for slot in slots[transform.name]:
                if slot.coverage.applies:
                    slot.noted = functools.partial(_noted, weakref.ref(self), transform, weakref.ref(slot))
                    for index, use in enumerate(slot.uses):
                        self._watched.setdefault(use.called, []).append((transform, slot, index))
        found = ((transform, slot) for watched in self._watched.values() for transform, slot, _ in watched)
        self._pairs = list(dict.fromkeys(found))
        self.update()

    def update(self, *, stepped: bool = False) -> None:
        """Place hooks on the modules whose inputs are wanted now, and take all others off.

        Args:
            stepped: Whether a step has just ended.
        """
        if self._paused:
            return
        self._wanted = [(transform, slot) for transform, slot in self._pairs if _wants(transform, slot)]
        due = {slot for transform, slot in self._wanted if _is_due(transform, slot)}
        # Ranks share what they saw at steps that they agree on; alone, an input may come at any step.
        shown = {slot for _, slot in self._wanted} if self._alone else due
        wanted = set(self._lazy)
        if shown:
            wanted |= {module for module, found in self._watched.items() if any(slot in shown for _, slot, _ in found)}
        for module in [module for module in self._hooks if module not in wanted]:
            self._take_off(module)
        owner = self._owner()
        if owner is None:
            return
        for module in wanted:
            if module not in self._hooks:
                self._place(module, owner)
        # Whether nothing that was due in the last window is still to come.
        observed = self.gate.open and not any(transform.waited(slot) > 0 for transform, slot in self._wanted)
        self.gate.open = bool(self._lazy or due)
        # Where inputs are wanted at every step, only cut graphs can be compiled.
        every_step = stepped and observed and self.gate.open
        run_eagerly(self, self._hooks if self.gate.open and not every_step else (), stepped=stepped)

    def pause(self) -> None:
        """Take all hooks off until `resume`: further passes of a step's closure belong to no step's statistics."""
        self._paused = True
        for module in list(self._hooks):
            self._take_off(module)

    def resume(self) -> None:
        """End a pause, now that its step has ended."""
        if self._paused:
            self._paused = False
            self.update(stepped=True)

    def _place(self, module: nn.Module, owner: Observing) -> None:
        hooks = self._hooks[module] = []
        # Before all other hooks: FSDP's puts the sharded weight back.
        hooks.append(module.register_forward_hook(CallHook(module, owner, self.gate), with_kwargs=True, prepend=True))
        for use in (slot.uses[index] for _, slot, index in self._watched.get(module, [])):
            if use.layout.reruns and module not in self._starts:
                self._starts[module] = Start(module, self.gate, use.weight.device)
                hooks.append(module.register_forward_pre_hook(self._starts[module]))

    def _take_off(self, module: nn.Module) -> None:
        for hook in self._hooks.pop(module):
            hook.remove()
        self._starts.pop(module, None)

    def remove(self) -> None:
        """Take all hooks off."""
        for module in list(self._hooks):
            self._take_off(module)
        self._watched, self._pairs, self._wanted, self._lazy = {}, [], [], set()
        self.forget()
        self.gate.open = False
        run_eagerly(self, ())

    def forget(self) -> None:
        """Drop what was seen and not yet taken in."""
        for arrivals in self._arrivals.values():
            arrivals.clear()

    # forward passes -------------------------------------------------------------------------------------------------

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one forward call of one module. Never raises: what goes wrong is said at the next step."""
        start = self._starts[module].take() if module in self._starts else None
        outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad and tensor.grad_fn is not None]
        if module in self._lazy:
            try:
                if (find := self._find()) is not None:
                    find()  # its own hook has just initialised it
            except Exception:
                return  # the step looks for weights again, and raises this there
        if not outputs or any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in outputs):
            return
        for transform, slot, index in self._watched.get(module, []):
            if _wants(transform, slot) and slot.failure is None:
                try:
                    with random_numbers_kept(slot.layer.weight.device, start) if start else contextlib.nullcontext():
                        self._note(transform, slot, index, args, kwargs, outputs)
                except Exception as error:
                    slot.failure = _described(error)
                    self._arrivals.pop(slot, Arrivals(slot.layer.weight)).clear()

    def _note(
        self,
        transform: GradientTransform,
        slot: Slot,
        index: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        outputs: Sequence[Tensor],
    ) -> None:
        use = slot.uses[index]
        self._called.add(slot)
        inputs = use.inputs(args, kwargs)
        if inputs is None:
            return
        if inputs[0].numel() == 0:
            self._empty.add(slot)  # it says nothing, and leaves its turn to the next
            return
        with torch.no_grad(), _aside_of_checkpoints():
            if _bytes(inputs) < slot.coverage.state_bytes // 2:
                copies = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in inputs)
                call = LayerCall(index, None, copies)
            else:
                follow(transform, slot)
                call = LayerCall(index, transform.observe(slot, use, inputs), None)
            arrivals = self._arrivals.setdefault(slot, Arrivals(slot.layer.weight))
            arrivals.expect(call, outputs, _weight_in_use(use), self._fold(transform, slot))

    def _fold(self, transform: GradientTransform, slot: Slot) -> Callable[[LayerCall], Sums]:
        def sums_of(call: LayerCall) -> Sums:
            if call.sums is None:
                assert call.inputs is not None
                follow(transform, slot)
                call.sums, call.inputs = transform.observe(slot, slot.uses[call.use], call.inputs), None
            return call.sums

        return sums_of

    def noted(self, transform: GradientTransform, slot: Slot) -> Sums | None:
        """Return the sums over the calls of a slot's layers that were noted since the last step."""
        arrivals = self._arrivals.get(slot)
        with torch.no_grad():
            return None if arrivals is None else arrivals.noted(self._fold(transform, slot))

    # steps ----------------------------------------------------------------------------------------------------------

    def excuse(self, slots: Iterable[Slot]) -> None:
        """Do not miss the inputs of some slots in the coming `collect`."""
        self._empty.update(slots)

    def collect(self, ranks: Ranks) -> list[Slot]:
        """Put what counts of this step's calls into ``pending`` of each slot, summed over ranks.

        Args:
            ranks: Over which ranks.

        Returns:
            The slots whose observation failed on some rank: their gradients stay as they are from now on.
        """
        self._alone = ranks.size == 1
        if self._alone:
            # What came to be wanted without an `update` since had no hook.
            due = [(transform, slot) for transform, slot in self._wanted if _wants(transform, slot)]
        else:
            due = [(transform, slot) for transform, slot in self._pairs if _is_due(transform, slot)]
        failed = self._sum(due, ranks)
        self.forget()
        for _, slot in due:
            if slot.pending is not None:  # all calls that did not count are forgotten
                slot.observed += 1
                slot.unseen = None
            elif slot.layer.weight.grad is not None and slot not in self._empty:
                slot.unseen = DROPPED if slot in self._called else NEVER_CALLED
        self._called.clear()
        self._empty.clear()
        return failed

    def _taken(self, transform: GradientTransform, slot: Slot) -> Sums | None:
        """Return what counts of a slot's calls, and forget these."""
        arrivals = self._arrivals.get(slot)
        if arrivals is None or slot.failure is not None:
            return None
        try:
            if arrivals.failure is not None:
                raise arrivals.failure
            with torch.no_grad():
                return arrivals.take(self._fold(transform, slot))
        except Exception as error:
            slot.failure = _described(error)
            arrivals.clear()
            return None

    def _sum(self, due: Sequence[tuple[GradientTransform, Slot]], ranks: Ranks) -> list[Slot]:
        """Add over ranks what counts. All take part for every slot that is due; sums of nothing are not sent."""
        if not due:
            return []
        sums = [self._taken(transform, slot) for transform, slot in due]
        failed = [slot.failure is not None for _, slot in due]
        if ranks.size > 1:
            saw = [part is not None for part in sums]
            flags = torch.tensor([saw, failed], dtype=torch.int64).to(due[0][1].layer.weight.device)
            ranks.add([flags])
            saw, failed = ([number > 0 for number in row] for row in flags.tolist())
            sums = [
                (part or transform.pending_like(slot)) if seen and not fails else None
                for (transform, slot), part, seen, fails in zip(due, sums, saw, failed, strict=True)
            ]
            ranks.add([tensor for part in sums for tensor in part or []])
        for (_, slot), part in zip(due, sums, strict=True):
            slot.pending = part
        lost = [slot for (_, slot), fails in zip(due, failed, strict=True) if fails]
        for slot in lost:
            slot.pending = None
            slot.failure = slot.failure or "an error on another rank"
            how = f"plain gradient: its input could not be observed ({slot.failure})"
            slot.coverage = Coverage(False, how)
        return lost


def _noted(
    observer: weakref.ref[Observer], transform: GradientTransform, slot: weakref.ref[Slot]
) -> list[Tensor] | None:
    found, of = observer(), slot()
    return None if found is None or of is None else found.noted(transform, of)


def _wants(transform: GradientTransform, slot: Slot) -> bool:
    """Whether a slot's layer should be watched now."""
    # One that requires a gradient no more may still have one that the coming step uses.
    return slot.coverage.applies and slot.enabled and transform.wants_inputs(slot)


def _is_due(transform: GradientTransform, slot: Slot) -> bool:
    """Whether all ranks share what they saw of a slot in this step: when it is first wanted, then ever more rarely."""
    if not _wants(transform, slot):
        return False
    waited = transform.waited(slot)
    return waited & (waited - 1) == 0


def _weight_in_use(use: Layer) -> Tensor:
    """Return the tensor that a layer works with now: FSDP puts a whole one in the place of its shard."""
    if not is_sharded(use.weight):
        return use.weight
    found: Any = use.module
    for attribute in use.name[len(use.module_name) :].strip(".").split("."):
        found = getattr(found, attribute)
    return found if isinstance(found, Tensor) else use.weight


def _aside_of_checkpoints() -> contextlib.AbstractContextManager[None]:
    """Keep what is computed out of the lists of operators that selective checkpoints make and replay."""
    modes = _get_current_dispatch_mode_stack()
    selective = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
    return _disable_current_modes() if selective else contextlib.nullcontext()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def _bytes(inputs: Iterable[Any]) -> int:
    return sum(value.numel() * value.itemsize for value in inputs if isinstance(value, Tensor))


def _described(error: Exception) -> str:
    if isinstance(error, UnknownInputError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# Models that were pickled with hooks know these two by their names.
def _inert_probe(*call: Any) -> None:
    """Stand where a copied or unpickled module had a hook: nothing observes that module."""


def _make_inert_probe() -> Callable[..., None]:
    return _inert_probe
