"""Computes the lr over a run: the schedules by name, and a linear warm-up before them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wellcond.lab.errors import LabError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

_FORMS = "cosine, constant, step:EVERY,FACTOR or steps:EPOCH,...,FACTOR"


@dataclass(frozen=True)
class Schedule:
    """An lr schedule, in epochs.

    Attributes:
        kind: ``"cosine"`` (to 0 at the end), ``"constant"``, ``"step"`` or ``"steps"``.
        milestones: Of ``"steps"``: the epochs at whose beginning the lr is multiplied. Of ``"step"``: the one period.
        factor: By how much.
    """

    kind: str
    milestones: tuple[float, ...] = ()
    factor: float = 1.0

    def text(self, warmup: float = 0.0) -> str:
        """Return it as the end of a sentence about the lr.

        >>> parse_schedule("steps:30,60,0.1").text(warmup=5)
        'rises over 5 epochs, then is multiplied by 0.1 after 30, 60 epochs'
        """
        epochs = ", ".join(f"{milestone:g}" for milestone in self.milestones)
        said = {
            "cosine": "follows a cosine to 0 over the run",
            "constant": "stays the same",
            "step": f"is multiplied by {self.factor:g} every {epochs} epochs",
            "steps": f"is multiplied by {self.factor:g} after {epochs} epochs",
        }[self.kind]
        return f"rises over {warmup:g} epochs, then {said}" if warmup else said

    def changes(self, epochs: int, steps: int) -> list[int]:
        """Return the steps, counted from 0, from which on the lr is multiplied, once for each.

        Args:
            epochs: Epochs that the schedule is made for.
            steps: Steps that they are carried out in, perhaps fewer or more than so many epochs have.

        >>> parse_schedule("step:2,0.1").changes(epochs=6, steps=600)
        [200, 400]
        """
        milestones = list(self.milestones)
        if self.kind == "step":
            milestones = [index * milestones[0] for index in range(1, math.ceil(epochs / milestones[0]))]
        return [round(milestone * steps / epochs) for milestone in milestones]

    def relative(self, step: int, epochs: int, steps: int, warmup: float = 0.0) -> float:
        """Return the lr of a step as a share of the highest.

        Args:
            step: The step, from 0.
            epochs: Epochs that the schedule is made for.
            steps: Steps of the run.
            warmup: Epochs of a linear rise at the beginning; a cosine begins where it ends.

        >>> parse_schedule("cosine").relative(5, epochs=1, steps=10)
        0.5
        """
        rising = round(warmup * steps / epochs)
        if step < rising:
            return (step + 1) / rising
        if self.kind == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / (steps - rising)))
        if self.kind == "constant":
            return 1.0
        return self.factor ** sum(step >= change for change in self.changes(epochs, steps))

    def scheduler(self, optimizer: Optimizer, epochs: int, steps: int, warmup: float) -> LRScheduler:
        """Return torch's scheduler for it, which goes on after every step."""
        from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

        if self.kind == "cosine" and warmup == 0:
            # The same curve, but for roundings, which the results kept in docs/results were computed with.
            return CosineAnnealingLR(optimizer, T_max=steps)
        return LambdaLR(optimizer, lambda step: self.relative(min(step, steps), epochs, steps, warmup))


def parse_schedule(text: str) -> Schedule:
    """Read a schedule.

    Args:
        text: ``cosine``, ``constant``, ``step:EVERY,FACTOR`` (multiply the lr by FACTOR every EVERY epochs) or
            ``steps:EPOCH,...,FACTOR`` (multiply it at each of these epochs).

    Raises:
        LabError: If the text has another form, or a number is out of its range.

    >>> parse_schedule("steps:30,60,0.1")
    Schedule(kind='steps', milestones=(30.0, 60.0), factor=0.1)
    """
    kind, separator, rest = text.partition(":")
    if kind in ("cosine", "constant") and not separator:
        return Schedule(kind)
    try:
        *milestones, factor = (float(value) for value in rest.split(","))
    except ValueError:
        raise LabError(f"--schedule must be {_FORMS}, got {text!r}") from None
    if kind not in ("step", "steps") or not milestones or (kind == "step" and len(milestones) != 1):
        raise LabError(f"--schedule must be {_FORMS}, got {text!r}")
    if milestones != sorted(set(milestones)) or not all(0 < milestone < math.inf for milestone in milestones):
        raise LabError(f"--schedule {text}: epochs must be positive and ascending")
    if not 0 < factor <= 1:
        raise LabError(f"--schedule {text}: the factor must be above 0 and at most 1, got {factor:g}")
    return Schedule(kind, tuple(milestones), factor)
