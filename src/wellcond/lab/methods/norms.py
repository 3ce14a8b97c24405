"""Normalization as part of a method: which layers take the place of batch normalization, and the schedule they have."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import wellcond
from wellcond.lab.methods.grammar import write_call

if TYPE_CHECKING:
    from torch import nn

    from wellcond.nn.norm.noise_decay import BatchNoiseDecay

# Of these every image is normalized by its own values alone: there is no batch to take in groups.
_WITHOUT_BATCH_STATISTICS = ("gn", "ln", "in")
# As in the thesis: there the momentum rises over 180 of 200 epochs.
_RISING_SHARE = 0.9
# As in the paper: after 5,000 steps d_max opens until step 25,000 and r_max until 40,000, where batch normalization of
# large batches takes 130,000 steps.
_OPENING_SHARES = (5 / 130, 25 / 130, 40 / 130)

# By option, which share of a run, and how many steps of a long one: the paper's code has 100 and 1,000 for MABN; CBN's
# weights have to have slowed down.
_BEGINNINGS: dict[str, dict[str, tuple[float, int]]] = {
    "mabn": {"warmup_steps": (0.1, 100), "scale_after": (0.25, 1000)},
    "cbn": {"burn_in": (0.25, sys.maxsize)},
}


class Steppable(Protocol):
    """A schedule of `wellcond.nn`."""

    def step(self) -> None:
        """Go on to the next epoch or step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class NormSchedule:
    """A schedule of the layers and when it goes on.

    Attributes:
        scheduler: The schedule.
        every_step: Whether it goes on after every training step; otherwise after every epoch.
    """

    scheduler: Steppable
    every_step: bool


@dataclass(frozen=True)
class NormSpec:
    """The layers that take the place of a network's batch normalization.

    Attributes:
        kind: What `wellcond.nn.convert_norm` calls them (its ``to``).
        options: The layers' keyword arguments, as pairs.
        schedule: Keyword arguments of the layers' schedule, as pairs; only for kinds that have one.
        noise_decay: Whether the loss takes the gamma decay that batch normalization's noise would be; only for
            population normalization.
    """

    kind: str
    options: tuple[tuple[str, object], ...] = ()
    schedule: tuple[tuple[str, object], ...] = ()
    noise_decay: bool = False

    @property
    def has_batch_statistics(self) -> bool:
        """Whether training normalizes an image with statistics of the batch that it is in."""
        return self.kind not in _WITHOUT_BATCH_STATISTICS

    @property
    def text(self) -> str:
        """The layers, as a method is written with them.

        >>> NormSpec("gn", (("num_groups", 8),)).text
        'norm=gn(num_groups=8)'
        >>> NormSpec("mbn", schedule=(("target", "derived"),)).text
        "norm=mbn(schedule.target='derived')"
        """
        options = [*self.options, *((f"schedule.{name}", value) for name, value in self.schedule)]
        if self.noise_decay:
            options.append(("gamma_decay", True))
        return f"norm={write_call(self.kind, options) if options else self.kind}"

    def convert(self, model: nn.Module) -> nn.Module:
        """Return the network with these layers in place of its batch normalization, all weights kept."""
        options: dict[str, Any] = dict(self.options)
        return wellcond.nn.convert_norm(model, to=self.kind, **options)

    def fit_to_run(self, model: nn.Module, steps: int) -> None:
        """Let layers that begin with each batch by itself do so for a part of a run, where no option says how long.

        Args:
            model: The network that has them.
            steps: Steps of the run.
        """
        given = dict(self.options)
        for name, (share, longest) in _BEGINNINGS.get(self.kind, {}).items():
            for layer in model.modules():
                if name not in given and hasattr(layer, name):
                    setattr(layer, name, min(longest, round(share * steps)))

    def make_decay(self, model: nn.Module, members: int, every: int) -> BatchNoiseDecay | None:
        """Return the penalty of these layers' scales.

        Args:
            model: The network that has them.
            members: Images that share statistics.
            every: Steps between two measurements of its strength.

        Returns:
            The penalty; None if the layers have none.
        """
        from wellcond.nn.norm.noise_decay import BatchNoiseDecay

        return BatchNoiseDecay(model, members, every) if self.noise_decay else None

    def make_schedule(self, model: nn.Module, steps: int, steps_per_epoch: int, members: int) -> NormSchedule | None:
        """Return the schedule of these layers over a run.

        Args:
            model: The network that has them.
            steps: Steps of the run.
            steps_per_epoch: Steps of an epoch.
            members: Images that share statistics.

        Returns:
            The schedule, complete within the run; None if the layers have none.
        """
        options: dict[str, Any] = dict(self.schedule)
        if self.kind == "mbn":
            epochs = -(-steps // steps_per_epoch)
            rising = max(1, round(_RISING_SHARE * epochs))
            return NormSchedule(wellcond.nn.MomentumScheduler(model, rising, members, **options), every_step=False)
        if self.kind == "brn":
            warmup, d_steps, r_steps = (round(share * steps) for share in _OPENING_SHARES)
            scheduler = wellcond.nn.BatchRenormScheduler(
                model, warmup_steps=warmup, r_steps=max(r_steps, warmup + 1), d_steps=max(d_steps, warmup + 1)
            )
            return NormSchedule(scheduler, every_step=True)
        if self.kind == "ssn":
            return NormSchedule(wellcond.nn.SparsityScheduler(model, steps), every_step=True)
        return None


def trained_norm(norm: NormSpec | None, ghost_batch: int | None) -> NormSpec | None:
    """Return the layers that a method trains with when statistics are taken over groups of the batch.

    Args:
        norm: The method's layers; None for batch normalization.
        ghost_batch: Images of a group; None for statistics of the whole batch.

    Returns:
        The layers; None where batch normalization stays as it is.

    >>> trained_norm(None, 2).text
    'norm=ghost(group_size=2)'
    >>> trained_norm(NormSpec("gn"), 2) == NormSpec("gn")  # no batch statistics, so nothing to group
    True
    """
    if ghost_batch is None:
        return norm
    norm = NormSpec("ghost") if norm is None else norm
    if not norm.has_batch_statistics:
        return norm
    return replace(norm, options=(*norm.options, ("group_size", ghost_batch)))
