"""What a transform sees of a model: forward hooks where it wants inputs, and the sums over rows that count.

A hook is in place only while its layer's input is wanted; an ordinary pass runs no code of ours. What the hook sees
counts once the weight's gradient has come from it (`arrivals`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.hooks import RemovableHandle

from wellcond.layouts import Layer, UnknownInputError
from wellcond.runtime.ranks import Ranks
from wellcond.runtime.tracing import is_traced
from wellcond.transforms.arrivals import Arrivals, Call, Sums
from wellcond.transforms.base import Coverage, GradientTransform, Slot
from wellcond.transforms.checkpoint import follow
from wellcond.transforms.eager import run_eagerly
from wellcond.transforms.sharding import is_sharded

NEVER_CALLED = "its module is never called (F.linear on its weight?)"
DROPPED = "no row of its input led to its gradient"

Watched = tuple[GradientTransform, Slot, int]


class Observing(Protocol):
    """What takes in the calls that a probe shows; it must not raise."""

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take in one forward call of one module."""


class Gate:
    """Whether a window is open: some input is due now."""

    def __init__(self) -> None:
        self.open = False


class Probe:
    """A forward hook that shows a module's calls to an observer: what its forward was given, and what it returned."""

    def __init__(self, module: nn.Module, observer: Observing, gate: Gate) -> None:
        self._module = weakref.ref(module)
        self._observer = weakref.ref(observer)
        self._gate = gate
        # Compiled code steps out here. (As a decorator this would import the compiler together with this library; by
        # now the optimizer has imported it.)
        self._observe_uncompiled = torch.compiler.disable(self._observe)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Show the call unless it cannot lead to a gradient."""
        if torch.compiler.is_compiling() and (torch.compiler.is_exporting() or not self._gate.open):
            return
        if torch.is_grad_enabled():
            self._observe_uncompiled(module, args, kwargs, output)

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observer = self._observer()
        # A deep copy of the model carries this hook, but is another module.
        if observer is not None and self._module() is module and not is_traced():
            observer.observe(module, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _inert_probe

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_inert_probe, ()


class Observer:
    """The observations of one attachment.

    Args:
        owner: Whom probes show calls to; it hands them on to `observe`.
        transforms: What is attached.
        find: A method that looks for weights again, after a lazily initialised module has got its own; held weakly.
    """

    def __init__(self, owner: Observing, transforms: Sequence[GradientTransform], find: Callable[[], None]) -> None:
        self.gate = Gate()
        self._owner = weakref.ref(owner)
        self._find = weakref.WeakMethod(find)
        self._transforms = [t for t in transforms if type(t).observe is not GradientTransform.observe]
        self._watched: dict[nn.Module, list[Watched]] = {}
        self._lazy: set[nn.Module] = set()
        self._probes: dict[nn.Module, RemovableHandle] = {}
        self._arrivals: dict[Slot, Arrivals] = {}
        self._alone = True
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
                    for index, use in enumerate(slot.uses):
                        self._watched.setdefault(use.called, []).append((transform, slot, index))
        self.update()

    def update(self, *, stepped: bool = False) -> None:
        """Place probes on the modules whose inputs are wanted now, and take all others off.

        Args:
            stepped: Whether a step has just ended.
        """
        # Ranks share what they saw at steps that they agree on; alone, an input may come at any step.
        watch = _wants if self._alone else _is_due
        wanted = {module for module, found in self._watched.items() if any(watch(t, slot) for t, slot, _ in found)}
        wanted |= self._lazy
        for module in [module for module in self._probes if module not in wanted]:
            self._probes.pop(module).remove()
        owner = self._owner()
        if owner is None:
            return
        for module in wanted:
            if module not in self._probes:
                probe = Probe(module, owner, self.gate)
                # Before all other hooks: FSDP's puts the sharded weight back.
                self._probes[module] = module.register_forward_hook(probe, with_kwargs=True, prepend=True)
        observed = self.gate.open and not self._missed()
        self.gate.open = bool(self._lazy) or any(_is_due(t, slot) for t, slot in self._pairs())
        # Where inputs are wanted at every step, only cut graphs can be compiled.
        every_step = stepped and observed and self.gate.open
        run_eagerly(self, self.gate.open and not every_step, stepped=stepped)

    def remove(self) -> None:
        """Take all probes off."""
        for hook in self._probes.values():
            hook.remove()
        self._probes, self._watched, self._lazy = {}, {}, set()
        self.forget()
        self.gate.open = False
        run_eagerly(self, False)

    def forget(self) -> None:
        """Drop what was seen and not yet taken in."""
        for arrivals in self._arrivals.values():
            arrivals.clear()

    def _pairs(self) -> Iterator[tuple[GradientTransform, Slot]]:
        """Yield each watched slot once, in the order of attaching."""
        seen = {(transform, slot): None for found in self._watched.values() for transform, slot, _ in found}
        yield from seen

    # forward passes -------------------------------------------------------------------------------------------------

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one forward call of one module. Never raises: what goes wrong is said at the next step."""
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
                call = Call(index, None, copies)
            else:
                follow(transform, slot)
                call = Call(index, transform.observe(slot, use, inputs), None)
            arrivals = self._arrivals.setdefault(slot, Arrivals(slot.layer.weight))
            arrivals.expect(call, outputs, _weight_in_use(use), self._fold(transform, slot))

    def _fold(self, transform: GradientTransform, slot: Slot) -> Callable[[Call], Sums]:
        def sums_of(call: Call) -> Sums:
            if call.sums is None:
                assert call.inputs is not None
                follow(transform, slot)
                call.sums, call.inputs = transform.observe(slot, slot.uses[call.use], call.inputs), None
            return call.sums

        return sums_of

    # steps ----------------------------------------------------------------------------------------------------------

    def collect(self, ranks: Ranks) -> list[Slot]:
        """Put what counts of this step's calls into ``pending`` of each slot, summed over ranks.

        Args:
            ranks: Over which ranks.

        Returns:
            The slots whose observation failed on some rank: their gradients stay as they are from now on.
        """
        self._alone = ranks.size == 1
        watch = _wants if self._alone else _is_due
        due = [(transform, slot) for transform, slot in self._pairs() if watch(transform, slot)]
        failed = self._sum(due, ranks)
        for _, slot in due:
            if slot.pending is not None:
                slot.observed += 1
                slot.unseen = None
            elif slot.layer.weight.grad is not None and slot not in self._empty:
                slot.unseen = DROPPED if slot in self._called else NEVER_CALLED
        self._called, self._empty = set(), set()
        self.forget()
        return failed

    def _missed(self) -> bool:
        """Whether something that was due in the last window has not come."""
        return any(_wants(transform, slot) and transform.waited(slot) > 0 for transform, slot in self._pairs())

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
        sums = [self._taken(transform, slot) for transform, slot in due]
        failed = [slot.failure is not None for _, slot in due]
        if ranks.size > 1 and due:
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


def _wants(transform: GradientTransform, slot: Slot) -> bool:
    """Whether a slot's layer should be watched now."""
    trained = slot.coverage.applies and slot.enabled and slot.layer.weight.requires_grad
    return trained and transform.wants_inputs(slot)


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


def _inert_probe(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Stand where a copied or unpickled module had a probe: nothing observes that module."""


def _make_inert_probe() -> Callable[..., None]:
    return _inert_probe
