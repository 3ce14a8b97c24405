"""Transforms at work on an optimizer: what happens in which order in a step, a forward pass, a checkpoint."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from wellcond.layouts import find_layers
from wellcond.moments.collection import SecondMoments
from wellcond.runtime.autocast import without_autocast
from wellcond.runtime.checks import WellcondWarning, check_choice
from wellcond.runtime.ranks import Ranks
from wellcond.transforms.arguments import check_synchronize, check_transforms, unknown_switches
from wellcond.transforms.base import GradientTransform, Slot
from wellcond.transforms.checkpoint import carried, follow, set_state
from wellcond.transforms.freezing import FrozenWeights
from wellcond.transforms.groups import Groups
from wellcond.transforms.metrics import GradientMetrics, MetricValue, read_metrics
from wellcond.transforms.observe import Observer
from wellcond.transforms.publishing import Published, first_state, restore
from wellcond.transforms.replicas import Replicas
from wellcond.transforms.report import ParameterCoverage, coverage_lines, coverage_rows, warn_of_idle
from wellcond.transforms.running import running_moments
from wellcond.transforms.standing import Standing
from wellcond.transforms.stepping import StepHooks, StepRecord, followers_of, forget
from wellcond.transforms.weight_decay import WeightDecayKind, mixed_with
from wellcond.transforms.weights import Places, shared_uses, slots_of
from wellcond.transforms.wrappers import usable_optimizer


class Attachment:
    """Transforms at work on an optimizer; made by `wellcond.attach`."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        transforms: Sequence[GradientTransform],
        weight_decay: WeightDecayKind = "auto",
        synchronize: bool | dist.ProcessGroup = True,
    ) -> None:
        optimizer = usable_optimizer(optimizer)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_choice("weight_decay", weight_decay, ("auto", "coupled", "decoupled"))
        check_synchronize(synchronize)
        self.transforms = tuple(transforms)
        check_transforms(optimizer, self.transforms)
        if wrong := unknown_switches(optimizer, self.transforms):
            raise ValueError(wrong)
        self._optimizer = weakref.ref(optimizer)
        self._optimizer_name = type(optimizer).__name__
        self._model = model
        self._weight_decay: WeightDecayKind = weight_decay
        self._replicas = Replicas(model, synchronize)
        self._groups = Groups()
        self._places = Places(model, [])
        self._slots: dict[str, list[Slot]] = {transform.name: [] for transform in self.transforms}
        self._standing = Standing(self.transforms)
        self._switches = [f"wellcond_{transform.name}" for transform in self.transforms]
        self._finishing = [t for t in reversed(self.transforms) if type(t).finish is not GradientTransform.finish]
        self._shared: dict[str, dict[str, Any]] = {transform.name: {} for transform in self.transforms}
        self._observer = Observer(self, self.transforms, self._find_new_weights)
        self._gate = self._observer.gate
        self._metrics = GradientMetrics()
        self._published = Published()
        self._lazy: set[nn.Module] = set()
        self._hooks = StepHooks(optimizer, self)
        self._frozen = FrozenWeights(self._take_up_thawed)
        found = {key: dict(entry) for key, entry in optimizer.state.items() if isinstance(entry, dict)}
        try:
            self._begin(optimizer)
        except BaseException:
            self._take_off()
            restore(optimizer, found)
            raise

    def _begin(self, optimizer: Optimizer) -> None:
        """Do what changes the optimizer or the model; whoever calls undoes it after an error."""
        self._groups.look(optimizer)
        if not any(id(parameter) in self._groups.held for parameter in self._model.parameters()):
            raise ValueError(
                f"model ({type(self._model).__name__}) shares no parameter with the optimizer "
                f"({type(optimizer).__name__}): attach the model whose parameters it was given"
            )
        self._find_weights(optimizer)
        for transform in self.transforms:
            transform.check(self._covered(transform))
        for transform in self.transforms:
            frozen = any(slot.frozen and slot.coverage.applies for slot in self._slots[transform.name])
            if not (self._covered(transform) or self._lazy or frozen):
                warn_of_idle(transform, self._slots[transform.name])
        self._hooks.install()
        self._replicas.stand_in_when_joined(self._stand_in)

    # what the user asks ---------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the transforms."""
        return tuple(transform.name for transform in self.transforms)

    def remove(self) -> None:
        """Take the transforms off: the optimizer steps as before, and forgets their state. May be called twice."""
        optimizer = self._optimizer()
        attached = optimizer is not None and self in followers_of(optimizer)
        self._take_off()
        if optimizer is not None and attached:
            forget(optimizer, optimizer.state, self.names)

    def _take_off(self) -> None:
        """Take off all hooks."""
        self._hooks.remove()
        self._frozen.remove()
        self._observer.remove()
        self._replicas.leave(self._stand_in)

    def stats(self) -> dict[str, dict[str, int]]:
        """Count what happened so far, per transform; reading the counts may synchronize the device.

        Returns:
            Transform name → counts by name.
        """
        self._look_again()
        return {transform.name: transform.stats(self._covered(transform)) for transform in self.transforms}

    def coverage(self) -> dict[str, list[ParameterCoverage]]:
        """Say for each parameter what is done with its gradient, or why nothing is, and the bytes kept for it.

        Returns:
            Transform name → one row a parameter.
        """
        self._look_again()
        return {
            transform.name: coverage_rows(self._model, self._groups.held, self._slots[transform.name])
            for transform in self.transforms
        }

    def report(self) -> str:
        """Say, one line a parameter, what is done with its gradient, or why nothing is, and what it costs in memory.

        Returns:
            A table as text, a block per transform. Of an optimizer that no longer exists it says what was done.
        """
        self._look_again()
        gone = " (which no longer exists)" if self._optimizer() is None else ""
        blocks = []
        for transform in self.transforms:
            title = f"{transform.name} over {self._optimizer_name}{gone}"
            lines = coverage_lines(self._model, self._groups.held, self._slots[transform.name])
            blocks.append("\n".join([title, *lines]))
        return "\n\n".join(blocks)

    def second_moments(self) -> SecondMoments:
        """Return E[x xᵀ] of layers' inputs as the attached transforms have it now: moving averages over training steps.

        Returns:
            The moments by layer, copied to the CPU, of layers of which something was seen; of other layers the reason
            why not. Of Kronecker factors, tap blocks and sketches means are not known.

        Raises:
            ValueError: If no attached transform keeps second moments.
        """
        self._look_again()
        return running_moments(self.transforms, self._slots)

    def protect(self, moments: SecondMoments) -> None:
        """Have `GradientProjection` protect further features from now on, such as those of a task just learned.

        Args:
            moments: Of the features, as `second_moments` takes them; layers that have none there stay as they are.

        Raises:
            ValueError: If no transform attached does such a thing, or a layer has another number of features.
        """
        self._look_again()
        done = [transform.protect(self._covered(transform), moments) for transform in self.transforms]
        if not any(done):
            raise ValueError(f"protect needs GradientProjection, attached are {', '.join(self.names)}")
        optimizer = self._optimizer()
        if optimizer is not None:
            self._published.show(optimizer, self._standing.pairs)

    def metrics(
        self, *, by_layer: bool = False, spectra: bool = False, synchronize: bool = False
    ) -> dict[str, MetricValue]:
        """Return numbers worth logging, of what the transforms keep and of what they did to gradients.

        - ``"gradient/cosine"``, ``"gradient/norm_ratio"``: of the covered weights' gradients before and after the
          transforms, in the first step after the last call, on this rank; absent in the first call, which asks for it;
        - ``"<transform>/age"``: steps since the factorization in use was made, of the oldest;
        - ``"<transform>/effective_rank"``: (Σλ)²/Σλ² of a second moment M, of groups the mean, of layers the median;
        - ``"<transform>/condition"``, with `spectra`: (λ_max + ε)/(λ_min + ε) of M with its damping ε.

        Args:
            by_layer: Whether to give each layer's numbers, too, with ``/<layer>`` behind the name.
            spectra: Whether to compute eigenvalues, which takes as long as factorizing all layers.
            synchronize: Whether to wait for the device and return floats in any case.

        Returns:
            Floats; of weights elsewhere than on the CPU, tensors of no dimension on their device, which nobody waits
            for until they are read.

        Example:
            >>> import wellcond
            >>> model = nn.Linear(4, 2)
            >>> optimizer = wellcond.optim.WSGDM(model, lr=0.1, stats_every=1)
            >>> _ = optimizer.attachment.metrics()
            >>> _ = model(torch.randn(8, 4)).sum().backward(), optimizer.step()
            >>> sorted(optimizer.attachment.metrics(spectra=True))  # doctest: +NORMALIZE_WHITESPACE
            ['gradient/cosine', 'gradient/norm_ratio', 'whitening/age', 'whitening/condition',
             'whitening/effective_rank']
        """
        self._look_again()
        return read_metrics(self._standing.pairs, self._metrics, by_layer, spectra, synchronize)

    # which weights --------------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """Take in what the optimizer and the model are now, for one who asks what is done."""
        optimizer = self._optimizer()
        if optimizer is not None and self in followers_of(optimizer):
            self._find_weights(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        """Take in what has changed since the last step, for which no model is searched unless something has."""
        regrouped = self._groups.look(optimizer)
        if regrouped and (wrong := unknown_switches(optimizer, self.transforms)):
            warnings.warn(f"the parameter groups have changed: {wrong}", WellcondWarning, stacklevel=2)
        if regrouped or self._places.changed() or any(not _is_lazy(module) for module in self._lazy):
            self._search(optimizer)
        self._published.compare(optimizer, self._standing.pairs)

    def _search(self, optimizer: Optimizer) -> None:
        """Find the weights anew between two steps, and say so if none are left."""
        had_weights = any(self._slots.values())
        before = {slot for slots in self._slots.values() for slot in slots}
        self._find_weights(optimizer)
        # The passes of this step were before them.
        self._observer.excuse(slot for slots in self._slots.values() for slot in slots if slot not in before)
        if had_weights and not any(self._slots.values()):
            warnings.warn(
                f"the optimizer ({self._optimizer_name}) holds none of the model's parameters any more: give it "
                "those that the model has now",
                WellcondWarning,
                stacklevel=2,
            )
        for transform in self.transforms:
            transform.check(self._covered(transform))

    def _find_weights(self, optimizer: Optimizer) -> None:
        """Make a slot for every known weight that the optimizer holds, and let go of those of others."""
        self._groups.look(optimizer)
        self._groups.read(optimizer, self._weight_decay, self._switches)
        held = self._groups.held
        found = find_layers(self._model)
        lazy = set(found.lazy.values())
        before = {name: list(slots) for name, slots in self._slots.items()}
        for number, transform in enumerate(self.transforms):
            name = transform.name
            uses = shared_uses(found, held, self._groups.acted_on(number))
            self._slots[name] = slots_of(transform, uses, before[name], held, self._shared[name])
            kept = set(map(id, self._slots[name]))
            for slot in before[name]:
                if id(slot) not in kept:
                    self._let_go(optimizer, transform, slot)
            for slot in self._slots[name]:
                slot.companions = functools.partial(mixed_with, self._optimizer, slot.layer.weight)
        self._take_settings(optimizer)
        self._frozen.watch(self._standing.pairs)
        if before == self._slots and lazy == self._lazy:
            return
        self._lazy = lazy
        self._places = Places(self._model, [slot for slots in self._slots.values() for slot in slots])
        self._published.show(optimizer, self._standing.kept)
        self._observer.watch(self._slots, self._lazy)

    def _let_go(self, optimizer: Optimizer, transform: GradientTransform, slot: Slot) -> None:
        """Forget a slot's state, or hand it on if the weight is used otherwise now (parametrized, tied)."""
        state, weight = slot.state, slot.layer.weight
        slot.state, slot.pending, slot.enabled = {}, None, False
        if state:
            forget(optimizer, [weight], [transform.name])
        for other in self._slots[transform.name]:
            if state and other.layer.weight is weight and other.coverage.applies and carried(transform, other, state):
                other.state, other.home = state, slot.home

    def _covered(self, transform: GradientTransform) -> Sequence[Slot]:
        return self._standing.acting[transform.name]

    def _read_groups(self, optimizer: Optimizer) -> None:
        """Take from the parameter groups what the coming step depends on, if anything there has changed."""
        if self._groups.read(optimizer, self._weight_decay, self._switches):
            self._search(optimizer)  # which weights have their biases with them depends on the switches
        elif not self._standing.holds():
            self._take_settings(optimizer)

    def _take_settings(self, optimizer: Optimizer) -> None:
        """Give the slots what was read of the parameter groups: weight decay, and which transforms act."""
        refrozen = False
        for number, transform in enumerate(self.transforms):
            for slot in self._slots[transform.name]:
                weight = slot.layer.weight
                index = self._groups.group_of(weight)
                if index is None:
                    continue
                slot.terms = self._groups.terms[index]
                frozen = not weight.requires_grad and weight.grad is None
                refrozen |= frozen is not slot.frozen
                if slot.frozen and not frozen and slot.failure is None:
                    slot.coverage = transform.cover_shared(slot.uses)  # its bias may be trained again, too
                slot.frozen = frozen
                slot.enabled = self._groups.is_on(index, number) and not slot.frozen
                if slot.frozen and slot.state:
                    slot.state, slot.pending, slot.home = {}, None, None
                    forget(optimizer, [weight], [transform.name])
                if slot.enabled and slot.coverage.applies:
                    if slot.home is None:
                        set_state(slot, first_state(optimizer, transform, slot))
                    else:
                        follow(transform, slot)
        self._standing.sort_out(self._slots)
        if refrozen:
            self._frozen.watch(self._standing.pairs)

    def _take_up_thawed(self) -> None:
        """Give weights that are trained again a state, before their layers' forward passes."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._groups.look(optimizer):
            self._find_weights(optimizer)
        self._read_groups(optimizer)
        self._observer.update()

    def _find_new_weights(self) -> None:
        """Find the weights of a module that has just been initialised."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._find_weights(optimizer)

    # forward passes -------------------------------------------------------------------------------------------------

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take in one forward call of one module."""
        self._observer.observe(module, args, kwargs, output)

    def _collect(self, optimizer: Optimizer, ranks: Ranks) -> None:
        """Take in what was observed, and leave weights alone for whose layers that failed."""
        failed = self._observer.collect(ranks)
        if not failed:
            return
        self._standing.sort_out(self._slots)
        for transform, slot in self._standing.pairs:
            if slot in failed and slot.state:
                slot.state = {}
                forget(optimizer, [slot.layer.weight], [transform.name])
        for slot in failed:
            warnings.warn(
                f"the input of '{slot.layer.name}' could not be observed ({slot.failure}): its gradient stays as it is "
                "from now on",
                WellcondWarning,
                stacklevel=2,
            )

    # steps ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gradients_are_there(self, optimizer: Optimizer, step: StepRecord) -> None:
        """Transform the gradients that the optimizer is about to use."""
        before = self._metrics.before(self._standing.pairs)
        with without_autocast(*self._standing.devices):
            if not step.refreshed:
                step.refreshed = True
                self._refresh(optimizer)
                if step.closure:
                    self._observer.pause()
                else:
                    self._observer.update(stepped=True)
            for transform in self.transforms:
                transform.update(self._standing.with_gradient(transform))
        self._metrics.after(before)

    def _refresh(self, optimizer: Optimizer) -> None:
        """Do what is done once a step, and together with other ranks."""
        self._look(optimizer)
        self._read_groups(optimizer)
        ranks = self._replicas.ranks(self.transforms, self._slots)
        self._collect(optimizer, ranks)
        for transform in self.transforms:
            transform.refresh(self._covered(transform), ranks)
            for slot in self._slots[transform.name]:
                slot.pending = None

    @torch.no_grad()
    def _stand_in(self) -> None:
        """Take part in the other ranks' step, on a rank that has no batch for it."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._observer.forget()
            self._refresh(optimizer)
            self._observer.update(stepped=True)

    @torch.no_grad()
    def step_is_done(self, optimizer: Optimizer) -> None:
        """Correct the weights, and show the state beside the optimizer's own."""
        for transform in self._finishing:
            transform.finish(self._covered(transform))
        self._observer.resume()
        self._published.show(optimizer, self._standing.kept, after_step=True)

    # checkpoints ----------------------------------------------------------------------------------------------------

    def before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take our tensors out of a state dict that is being loaded: torch would round them to the weights' dtype."""
        return self._published.take_out(optimizer, state_dict, self.transforms)

    def after_load(self, optimizer: Optimizer) -> None:
        """Give the slots the state that was loaded."""
        if self._groups.look(optimizer):
            self._find_weights(optimizer)
        self._read_groups(optimizer)
        self._published.give(optimizer, self._standing.pairs)
        self._observer.forget()
        self._observer.update()


def _is_lazy(module: nn.Module) -> bool:
    return any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False))
