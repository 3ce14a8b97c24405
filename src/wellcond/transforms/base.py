"""The protocol of gradient transforms: what a technique must say and do to be attached to an optimizer.

A transform is a configuration: it holds no state and may be attached to several optimizers. What it must remember about
a layer lives in that layer's `Slot`, which `attach` fills, saves with the optimizer and hands back at every step.

One optimizer step runs, in this order: `observe` during the forward passes, `refresh` once, `update` on each gradient
that the closure computes (once without a closure), the optimizer's own update, `finish`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from wellcond.layouts import Layer
from wellcond.moments.collection import SecondMoments
from wellcond.moments.layer_moment import LayerMoment
from wellcond.runtime.ranks import Ranks

Scalar: TypeAlias = "float | Tensor"
State: TypeAlias = "dict[str, Tensor | int]"
TransformSlots: TypeAlias = "Iterable[tuple[GradientTransform, Slot]]"


@dataclass(frozen=True)
class Decay:
    """The effect of the optimizer's weight decay on one parameter in the coming step.

    Attributes:
        gradient: λ where the optimizer adds λ·w to the gradient it is handed (coupled, L2), in that gradient's own
            scale and sign: multiplied by the loss scale that a fused optimizer undoes, negative under ``maximize``.
        shrink: The share of w that the step takes away beside the update (decoupled): w ← (1 − shrink)·w − …
        exact: Whether the optimizer is known to do just that. Others scale the decay (Prodigy, D-Adaptation, SPlus) or
            keep it in a second copy of the weights: what they did is seen in the weights alone, after the step.
        told: Whether the user said of which kind it is.
    """

    gradient: Scalar = 0.0
    shrink: Scalar = 0.0
    exact: bool = True
    told: bool = False


@dataclass(frozen=True)
class Coverage:
    """A transform's decision about one weight.

    Attributes:
        applies: Whether the weight is transformed.
        how: What will be done, or why not, in a few words.
        bias: Whether the layer's bias is transformed together with it.
        state_bytes: Memory that the transform will keep for it.
        plan: What else the transform decided, for itself.
    """

    applies: bool
    how: str
    bias: bool = False
    state_bytes: int = 0
    plan: Any = None


@dataclass(eq=False)
class Terms:
    """An optimizer's settings of the coming step, for all weights of one parameter group.

    Attributes:
        decay: The weights' decay; None if the optimizer does not say how it applies it.
        grad_scale: What a fused optimizer will divide gradients by (GradScaler), or None.
        found_inf: Whether it will skip this step because of infinities, as a tensor of 0 or 1, or None.
    """

    decay: Decay | None = field(default_factory=Decay)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(eq=False)
class Slot:
    """One transform's place for one weight.

    Attributes:
        layer: The weight and its layer.
        uses: All layers that use this very weight (several when it is tied); the first is ``layer``.
        coverage: What the transform said of it.
        state: What must survive a checkpoint. Its tensors are changed in place or replaced; `attach` publishes them
            in ``optimizer.state[weight]`` after each step.
        scratch: What a transform carries from `update` to `finish` within one step.
        terms: What the optimizer says of the coming step to the weight's parameter group: one object a group.
        enabled: Whether the transform acts now: the weight's parameter group lets it (``wellcond_<name>`` is not
            False), and the weight is not frozen.
        frozen: Whether the weight is frozen: it requires no gradient, and has none.
        home: Device and dtype that the weight had when the state was made.
        companions: Further tensors of the weight's shape that the optimizer mixes with it (schedule-free: z).
        shared: What a transform keeps between steps for all its weights together; not saved.
        observed: In how many steps rows of the layer's input were taken in, since attaching.
        unseen: Why nothing was seen of the layer's input when it was last due, though its weight had a gradient.
        failure: The error because of which its input is no longer observed.
        noted: Returns the observations of forward passes that no step has taken in yet.
        taken: What `pending` is within `GradientTransform.refresh`.
    """

    layer: Layer
    uses: list[Layer]
    coverage: Coverage
    state: State = field(default_factory=dict)
    scratch: Any = None
    terms: Terms = field(default_factory=Terms)
    enabled: bool = True
    frozen: bool = False
    home: tuple[torch.device, torch.dtype] | None = None
    companions: Callable[[], list[Tensor]] = list
    shared: dict[str, Any] = field(default_factory=dict)
    observed: int = 0
    unseen: str | None = None
    failure: str | None = None
    noted: Callable[[], list[Tensor] | None] = field(default=lambda: None, repr=False)
    taken: list[Tensor] | None = field(default=None, repr=False)

    @property
    def pending(self) -> list[Tensor] | None:
        """Observations since the last refresh: tensors that add up over forward passes and over ranks.

        In `GradientTransform.refresh` those of the rows behind the gradient, over all ranks. Before a step, to look at:
        those noted so far on this rank, of which the step takes the ones whose gradient has come.
        """
        return self.noted() if self.taken is None else self.taken

    @pending.setter
    def pending(self, value: list[Tensor] | None) -> None:
        self.taken = value

    @property
    def decay(self) -> Decay | None:
        """The weight's decay in the coming step; None if the optimizer does not say how it applies it."""
        return self.terms.decay

    @property
    def grad_scale(self) -> Tensor | None:
        """What a fused optimizer will divide gradients by (GradScaler), or None."""
        return self.terms.grad_scale

    @property
    def found_inf(self) -> Tensor | None:
        """Whether it will skip this step because of infinities, as a tensor of 0 or 1, or None."""
        return self.terms.found_inf

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that is transformed together with the weight, or None."""
        return self.layer.bias if self.coverage.bias else None


class GradientTransform(ABC):
    """A technique that changes gradients, or updates, from what it knows of layers.

    Attributes:
        name: Its name in state keys (``wellcond_<name>_<key>``) and reports; one of each name per optimizer.
    """

    name: ClassVar[str]

    @abstractmethod
    def cover(self, layer: Layer) -> Coverage:
        """Decide whether and how a weight is transformed.

        Args:
            layer: A weight that the optimizer holds.

        Returns:
            The decision.
        """

    def cover_shared(self, uses: Sequence[Layer]) -> Coverage:
        """Decide about a weight that several layers use.

        Args:
            uses: The layers; the first stands for all.

        Returns:
            The decision: by default that for the first, unless one use is refused or of another kind.
        """
        layer, *others = uses
        coverage = self.cover(layer)
        for other in others:
            theirs = self.cover(other)
            if not theirs.applies:
                return replace(theirs, how=f"{theirs.how} (shared with {other.name})")
            if other.layout.family is not layer.layout.family:
                return Coverage(False, f"unchanged: shared with {other.name}, a layer of another kind")
        return coverage

    @abstractmethod
    def update(self, slots: Sequence[Slot]) -> None:
        """Change the gradients, in place.

        Args:
            slots: The weights of this step: those that have a gradient.
        """

    def init(self, slot: Slot) -> State:
        """Make the state of a weight that has none yet.

        Args:
            slot: The weight's slot.

        Returns:
            Its first state; its keys and shapes are also what a loaded state must have.
        """
        return {}

    def check(self, slots: Sequence[Slot]) -> None:
        """Refuse what cannot work, before the first step and whenever the parameter groups change.

        Args:
            slots: All covered weights.

        Raises:
            ValueError: Saying what does not go together.
        """
        return

    def wants_inputs(self, slot: Slot) -> bool:
        """Say whether the layer's inputs should be observed in the forward passes before the next step.

        The answer follows from ``slot.state``, so that all ranks give the same.
        """
        return False

    def waited(self, slot: Slot) -> int:
        """Say for how many steps `wants_inputs` has asked in vain: the same on all ranks, and after a resume."""
        return 0

    def observe(self, slot: Slot, layer: Layer, inputs: tuple[Any, ...]) -> list[Tensor]:
        """Summarise one forward pass's input; summaries of several passes and ranks are added.

        Args:
            slot: The weight's slot; read only.
            layer: Which of ``slot.uses`` is called.
            inputs: The arguments of its `Layer.rows`.

        Returns:
            Tensors of fixed shapes.
        """
        raise TypeError(f"{type(self).__name__} observes no inputs")

    def pending_like(self, slot: Slot) -> list[Tensor]:
        """Return the observation of a rank that has seen nothing: zeros of `observe`'s shapes."""
        return []

    def refresh(self, slots: Sequence[Slot], ranks: Ranks) -> None:
        """Take in what was observed; called once per step before the first `update`.

        Args:
            slots: All covered weights.
            ranks: Among whom work can be shared; they all refresh the same weights in the same step.
        """
        return

    def finish(self, slots: Sequence[Slot]) -> None:
        """Correct the weights after the optimizer's own update.

        Args:
            slots: All covered weights; ``scratch`` tells which of them `update` was given.
        """
        return

    def second_moments(self, slot: Slot) -> Mapping[str, LayerMoment]:
        """Return what the transform has found of E[x xᵀ] of a weight's inputs, by the weight's name in each layer."""
        return {}

    def protect(self, slots: Sequence[Slot], moments: SecondMoments) -> bool:
        """Keep further features as they are, if the transform does such a thing.

        Args:
            slots: All covered weights.
            moments: Of the features.

        Returns:
            Whether it does.
        """
        return False

    def stats(self, slots: Sequence[Slot]) -> dict[str, int]:
        """Count what happened so far; may synchronize the device.

        Args:
            slots: All covered weights.

        Returns:
            Counts by name.
        """
        return {"weights": len(slots)}
