"""Attach gradient transforms to an optimizer: steps and closures, parameter groups, checkpoints, ranks.

Only this file and `decay`, which reads parameter groups, know what an optimizer is.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from wellcond.layouts import Layer, find_layers
from wellcond.ranks import Ranks
from wellcond.transforms.base import (
    GradientTransform,
    Slot,
    State,
    WellcondWarning,
    check_choice,
)
from wellcond.transforms.decay import WeightDecayKind, group_decay
from wellcond.transforms.names import named
from wellcond.transforms.probe import Gate, Probe
from wellcond.transforms.report import ParameterCoverage, coverage_lines, coverage_rows
from wellcond.transforms.state import read_state, state_key, take_out


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *transforms: GradientTransform | str,
    weight_decay: WeightDecayKind = "auto",
    synchronize: bool | dist.ProcessGroup = True,
) -> Attachment:
    """Attach gradient transforms to an optimizer: from now on its steps see transformed gradients.

    Transforms are applied left to right. What they remember is saved and loaded with the optimizer's state dict. A
    parameter group with ``wellcond_<name>=False`` (``wellcond_whitening``, ``wellcond_descent``,
    ``wellcond_centralization``) is left out, as long as that stands there.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        model: The model whose parameters it trains, also wrapped (DDP, FSDP2, ``torch.compile``).
        *transforms: At least one; each kind once per optimizer. A name (``"centralization"``, ``"whitening"``,
            ``"descent"``) is the transform of that name with its default options.
        weight_decay: How the optimizer applies weight decay: ``"coupled"`` (adds λw to the gradient), ``"decoupled"``
            (shrinks the weight), or ``"auto"``: known for torch's own optimizers and for those whose parameter groups
            say it (``decoupled_weight_decay``, ``weight_decouple``).
        synchronize: Whether statistics are averaged over ranks when ``torch.distributed`` is initialised: over the
            default group (True), over the given group, or not at all.

    Returns:
        A handle with ``report()``, ``stats()`` and ``remove()``.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If no transform is given, one of its kind is attached already, or the model shares no parameter
            with the optimizer.

    Example:
        >>> import wellcond
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
        >>> print(handle.report())
        centralization over AdamW
        0.weight  (8, 4)  gradient centred over 4 inputs of each of 8 output units  0 B
        0.bias    (8,)    unchanged
        2.weight  (2, 8)  gradient centred over 8 inputs of each of 2 output units  0 B
        2.bias    (2,)    unchanged
        in all: 2 of 4 parameters, 0 B kept
        >>> wellcond.attach(optimizer, model, "whitening").stats()["whitening"]["weights"]
        2
    """
    return Attachment(optimizer, model, named(transforms), weight_decay, synchronize)


def attachments(optimizer: object) -> list[Attachment]:
    """Return the handles of what is attached to an optimizer, for code that was only given the optimizer.

    Args:
        optimizer: A ``torch.optim.Optimizer``, also in a wrapper of Lightning or Accelerate.

    Returns:
        The handles, in the order of attaching; of those that were removed none.

    Raises:
        TypeError: If it is no optimizer.

    Example:
        >>> import wellcond
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
        >>> attachments(optimizer) == [handle]
        True
    """
    return list(_unwrap(optimizer).__dict__.get("wellcond_attachments", []))


class Attachment:
    """Transforms at work on an optimizer; made by `attach`."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        transforms: Sequence[GradientTransform],
        weight_decay: WeightDecayKind = "auto",
        synchronize: bool | dist.ProcessGroup = True,
    ) -> None:
        optimizer = _unwrap(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_choice("weight_decay", weight_decay, ("auto", "coupled", "decoupled"))
        self.transforms = tuple(transforms)
        self._check_transforms(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._optimizer_name = type(optimizer).__name__
        self._held: frozenset[int] = frozenset()
        self._model = model
        self._weight_decay: WeightDecayKind = weight_decay
        self._synchronize = synchronize
        self._slots: dict[str, list[Slot]] = {transform.name: [] for transform in self.transforms}
        self._shared: dict[str, dict[str, Any]] = {transform.name: {} for transform in self.transforms}
        self._group_sizes: list[int] = []
        self._gate = Gate()
        self._probes: dict[nn.Module, tuple[Probe, RemovableHandle]] = {}
        self._observers: dict[nn.Module, list[tuple[GradientTransform, Slot, Layer]]] = {}
        self._loading: dict[int, State] = {}
        self._lazy: set[nn.Module] = set()

        self._find_weights(optimizer)
        self._warn_of_idle_transforms()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        optimizer.__dict__.setdefault("wellcond_attachments", []).append(self)

    # what the user asks ---------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take the transforms off: the optimizer steps as before, and forgets their state. May be called twice."""
        for hook in [*self._hooks, *(hook for _, hook in self._probes.values())]:
            hook.remove()
        self._hooks, self._probes = [], {}
        self._gate.open = False
        optimizer = self._optimizer()
        if optimizer is None:
            return
        attachments = optimizer.__dict__.get("wellcond_attachments", [])
        if self in attachments:
            attachments.remove(self)
            for transform, slot in self._all_slots():
                for key in slot.state:
                    optimizer.state.get(slot.layer.weight, {}).pop(state_key(transform, key), None)

    def stats(self) -> dict[str, dict[str, int]]:
        """Count what happened so far, per transform; reading the counts may synchronize the device.

        Returns:
            Transform name → counts by name.
        """
        return {transform.name: transform.stats(self._covered(transform)) for transform in self.transforms}

    def coverage(self) -> dict[str, list[ParameterCoverage]]:
        """Say for each parameter what is done with its gradient, or why nothing is, and the bytes kept for it.

        Returns:
            Transform name → one row a parameter.
        """
        held = self._held_now()
        return {
            transform.name: coverage_rows(self._model, held, self._slots[transform.name])
            for transform in self.transforms
        }

    def report(self) -> str:
        """Say, one line a parameter, what is done with its gradient, or why nothing is, and what it costs in memory.

        Returns:
            A table as text, a block per transform. Of an optimizer that no longer exists it says what was done.
        """
        held = self._held_now()
        gone = " (which no longer exists)" if self._optimizer() is None else ""
        blocks = []
        for transform in self.transforms:
            title = f"{transform.name} over {self._optimizer_name}{gone}"
            blocks.append("\n".join([title, *coverage_lines(self._model, held, self._slots[transform.name])]))
        return "\n\n".join(blocks)

    def _held_now(self) -> frozenset[int]:
        """Return the ``id`` of each parameter that the optimizer holds; of one that is gone, those it held."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._held = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        return self._held

    # which weights --------------------------------------------------------------------------------------------------

    def _check_transforms(self, optimizer: Optimizer) -> None:
        if not self.transforms:
            raise ValueError("attach needs at least one transform, got none")
        attached = {t.name for other in optimizer.__dict__.get("wellcond_attachments", []) for t in other.transforms}
        for transform in self.transforms:
            if not isinstance(transform, GradientTransform):
                hint = f": did you mean {transform.__name__}()?" if isinstance(transform, type) else ""
                if isinstance(transform, (list, tuple)):
                    hint = ": give them one by one, not as a sequence"
                raise TypeError(f"transforms must be GradientTransforms, got {transform!r}{hint}")
            if transform.name in attached:
                raise ValueError(
                    f"{type(transform).__name__} is attached to this {type(optimizer).__name__} already: "
                    "attach each kind once, or call remove() on the earlier handle first"
                )
            attached.add(transform.name)

    def _find_weights(self, optimizer: Optimizer) -> None:
        """Make a slot for every known weight that the optimizer holds; again whenever its groups have grown."""
        held = self._held_now()
        if not any(id(parameter) in held for parameter in self._model.parameters()):
            raise ValueError(
                f"model ({type(self._model).__name__}) shares no parameter with the optimizer "
                f"({type(optimizer).__name__}): attach the model whose parameters it was given"
            )
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        uses: dict[int, list[Layer]] = {}
        found = find_layers(self._model)
        for layer in found:
            if id(layer.weight) in held:
                uses.setdefault(id(layer.weight), []).append(layer)
        self._lazy = set(found.lazy.values())
        for transform in self.transforms:
            known = {id(slot.layer.weight) for slot in self._slots[transform.name]}
            for layers in uses.values():
                layer = _representative(layers, held)
                if id(layer.weight) in known:
                    continue
                coverage = transform.cover_shared([layer, *layers[1:]])
                self._slots[transform.name].append(Slot(layer, layers, coverage, shared=self._shared[transform.name]))
        self._read_groups(optimizer)
        for transform in self.transforms:
            transform.check(self._covered(transform))
        self._publish(optimizer, lambda slot: bool(optimizer.state.get(slot.layer.weight)))
        self._place_probes()

    def _warn_of_idle_transforms(self) -> None:
        for transform in self.transforms:
            if not (self._covered(transform) or self._lazy):
                slots = self._slots[transform.name]
                off = "switched off by its parameter group"
                reasons = {off if slot.coverage.applies else slot.coverage.how: None for slot in slots}
                why = f" ({'; '.join(list(reasons)[:3])})" if reasons else ""
                warnings.warn(
                    f"{type(transform).__name__} covers none of the weights, so it will do nothing{why}",
                    WellcondWarning,
                    stacklevel=4,
                )

    def _adopt(self, optimizer: Optimizer, transform: GradientTransform, slot: Slot) -> State:
        """Return a slot's first state: what was loaded into the optimizer before attaching, or a new one."""
        entry = optimizer.state.get(slot.layer.weight, {})
        found = read_state(transform, slot, entry, warn_if_rounded=True)
        if found is None and any(str(key).startswith(state_key(transform, "")) for key in entry):
            warnings.warn(
                f"the optimizer's state holds statistics of {transform.name} for {slot.layer.name} in another form "
                "(saved with other options?): they start anew",
                WellcondWarning,
                stacklevel=2,
            )
        return transform.init(slot) if found is None else found

    def _covered(self, transform: GradientTransform) -> list[Slot]:
        return [slot for slot in self._slots[transform.name] if slot.coverage.applies and slot.enabled]

    def _all_slots(self) -> Iterable[tuple[GradientTransform, Slot]]:
        return ((transform, slot) for transform in self.transforms for slot in self._covered(transform))

    def _read_groups(self, optimizer: Optimizer) -> None:
        """Take from the parameter groups what the coming step depends on: weight decay, and which transforms act."""
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        decays = {id(group): group_decay(optimizer, group, self._weight_decay) for group in optimizer.param_groups}
        for transform in self.transforms:
            for slot in self._slots[transform.name]:
                group = groups.get(id(slot.layer.weight))
                if group is None:
                    continue
                slot.decay = decays[id(group)]
                slot.grad_scale = getattr(optimizer, "grad_scale", None)
                slot.found_inf = getattr(optimizer, "found_inf", None)
                slot.enabled = bool(group.get(f"wellcond_{transform.name}", True))
                if slot.enabled and slot.coverage.applies and not slot.state:
                    slot.state = self._adopt(optimizer, transform, slot)

    # forward passes -------------------------------------------------------------------------------------------------

    def _place_probes(self) -> None:
        """Watch the modules whose inputs some transform may want, and those that are still to be initialised."""
        self._observers = {}
        observing = [t for t in self.transforms if type(t).observe is not GradientTransform.observe]
        for module in self._lazy if observing else ():
            self._watch(module)
        for transform, slot in ((t, slot) for t in observing for slot in self._slots[t.name] if slot.coverage.applies):
            for use in slot.uses:
                self._observers.setdefault(use.called, []).append((transform, slot, use))
                self._watch(use.called)
        self._set_gate()

    def _watch(self, module: nn.Module) -> None:
        """Place a probe on a module, unless it has one."""
        if module not in self._probes:
            probe = Probe(module, self, self._gate)
            self._probes[module] = probe, module.register_forward_pre_hook(probe, with_kwargs=True)

    def _set_gate(self) -> None:
        self._gate.open = bool(self._lazy) or any(t.wants_inputs(slot) for t, slot in self._all_slots())

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in one forward pass of one module; an empty batch says nothing, and leaves its turn to the next."""
        optimizer = self._optimizer()
        if module in self._lazy and optimizer is not None:
            self._find_weights(optimizer)  # its own hook has just initialised it
        for transform, slot, use in self._observers.get(module, []):
            if not (slot.enabled and transform.wants_inputs(slot) and use.weight.requires_grad):
                continue
            inputs = use.inputs(args, kwargs)
            if inputs is None or inputs[0].numel() == 0:
                continue
            observation = transform.observe(slot, use, inputs)
            if slot.pending is None:
                slot.pending = observation
            else:
                for total, part in zip(slot.pending, observation, strict=True):
                    total.add_(part)

    def _reduce(self, ranks: Ranks) -> None:
        """Add pending observations over ranks."""
        if ranks.size == 1:
            return
        # Every rank takes part for every layer that is due, whether or not its own batch reached the layer.
        due = [(transform, slot) for transform, slot in self._all_slots() if transform.wants_inputs(slot)]
        if not due:
            return
        saw = [float(slot.pending is not None) for _, slot in due]
        for transform, slot in due:
            slot.pending = slot.pending or transform.pending_like(slot)
        tensors = [tensor for _, slot in due for tensor in slot.pending or []]
        ranks_that_saw = torch.tensor(saw, dtype=tensors[0].dtype).to(tensors[0].device)
        ranks.add([ranks_that_saw, *tensors])
        for (_, slot), number in zip(due, ranks_that_saw.tolist(), strict=True):
            if number == 0:
                slot.pending = None  # its turn goes to the next step

    # steps ----------------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Transform the gradients, or, where a closure will compute them, have them transformed after it ran."""
        step = _Step()
        positional = len(args) > 1 and callable(args[1])
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._transform_gradients(optimizer, step)
            return None

        @functools.wraps(closure)
        def transformed_closure() -> Any:
            loss = closure()
            self._transform_gradients(optimizer, step)
            return loss

        if positional:
            return (args[0], transformed_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": transformed_closure}

    @torch.no_grad()
    def _transform_gradients(self, optimizer: Optimizer, step: _Step) -> None:
        with _autocast_off({slot.layer.weight.device.type for _, slot in self._all_slots()}):
            self._transform_in_full_precision(optimizer, step)

    def _transform_in_full_precision(self, optimizer: Optimizer, step: _Step) -> None:
        if not step.refreshed:
            step.refreshed = True
            grown = self._group_sizes != [len(group["params"]) for group in optimizer.param_groups]
            if grown or any(not _is_lazy(module) for module in self._lazy):
                self._find_weights(optimizer)
            self._read_groups(optimizer)
            ranks = Ranks(self._synchronize)
            self._reduce(ranks)
            for transform in self.transforms:
                slots = self._covered(transform)
                transform.refresh(slots, ranks)
                for slot in self._slots[transform.name]:
                    slot.pending = None
            # Further forward passes of this step's closure (line searches) are not observed again.
            self._set_gate()
            for probe, _ in self._probes.values():
                probe.may_recur = 0
        for transform in self.transforms:
            transform.update(self._with_gradient(transform))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for transform in reversed(self.transforms):
            transform.finish(self._covered(transform))
        self._publish(optimizer, lambda slot: slot.layer.weight.grad is not None)

    def _with_gradient(self, transform: GradientTransform) -> list[Slot]:
        slots = [slot for slot in self._covered(transform) if slot.layer.weight.grad is not None]
        for slot in slots:
            if slot.layer.weight.grad is not None and slot.layer.weight.grad.is_sparse:
                raise ValueError(
                    f"'{slot.layer.name}' has a sparse gradient, which {type(transform).__name__} cannot transform: "
                    "use sparse=False, or leave the layer out"
                )
        return slots

    # checkpoints ----------------------------------------------------------------------------------------------------

    def _publish(self, optimizer: Optimizer, chosen: Callable[[Slot], bool]) -> None:
        """Show the state of the chosen slots in ``optimizer.state``.

        Only beside the optimizer's own, or after its own update: Adam and others set up a parameter's state when they
        find it empty, and would take ours for their own.
        """
        for transform, slot in self._all_slots():
            if slot.state and chosen(slot):
                state = optimizer.state[slot.layer.weight]
                for key, value in slot.state.items():
                    state[state_key(transform, key)] = value

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take our tensors out of a state dict that is being loaded: torch would round them to the weights' dtype."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state_dict, self._loading = take_out(state_dict, self.transforms, parameters)
        return state_dict

    def _after_load(self, optimizer: Optimizer) -> None:
        """Give the slots the state that was loaded."""
        loading, self._loading = self._loading, {}
        without: list[str] = []
        self._read_groups(optimizer)
        for transform, slot in ((t, s) for t in self.transforms for s in self._slots[t.name] if s.coverage.applies):
            fresh = transform.init(slot)
            if not fresh:
                continue
            slot.pending = None
            loaded = read_state(transform, slot, loading.get(id(slot.layer.weight), {}))
            if loaded is None and not slot.enabled:
                slot.state = {}
                continue
            slot.state = fresh if loaded is None else loaded
            if loaded is None and optimizer.state.get(slot.layer.weight):
                without.append(slot.layer.name)
        self._publish(
            optimizer, lambda slot: id(slot.layer.weight) in loading or bool(optimizer.state.get(slot.layer.weight))
        )
        self._set_gate()
        if without:
            names = " or ".join(transform.name for transform in self.transforms)
            warnings.warn(
                f"the loaded optimizer state has no statistics of {names} for {len(without)} of the weights "
                f"({without[0]}{', …' if len(without) > 1 else ''}): they start anew",
                WellcondWarning,
                stacklevel=3,
            )


class _Step:
    """What is remembered within one optimizer step: whether its statistics were taken in."""

    def __init__(self) -> None:
        self.refreshed = False


@contextmanager
def _autocast_off(device_types: Iterable[str]) -> Iterator[None]:
    """Keep autocast, in which some call ``optimizer.step()``, away from the transforms' products."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False))


def _unwrap(optimizer: object) -> Optimizer:
    """Return the torch optimizer inside the wrappers of Lightning and Accelerate."""
    inner: Any = optimizer
    while not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_pre_hooks")):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return inner


def _representative(layers: list[Layer], held: frozenset[int]) -> Layer:
    """Return the layer that stands for all uses of a weight: with a bias only if all share it and it is trained."""
    layer = layers[0]
    if layer.bias is None:
        return layer
    if id(layer.bias) in held and all(other.bias is layer.bias for other in layers):
        return layer
    return dataclasses.replace(layer, bias=None, bias_name=None)
