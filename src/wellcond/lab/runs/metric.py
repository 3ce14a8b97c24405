"""The number that a comparison goes by: its name, its unit, and whether higher or lower is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

PERCENT = "%"


@dataclass(frozen=True)
class Metric:
    """The score that chooses the lr and that the report compares.

    Attributes:
        name: As `Task.scores` calls it, such as ``"accuracy"``.
        unit: What it is measured in, ``"%"`` for a number from 0 to 100; ``""`` for a number without a unit.
        higher_is_better: Whether a higher one is better; False for a loss or an error.
        worst: What a run that diverged counts as, guessing for example; None: the worst end of the scale of a
            percentage, and for any other unit what the untrained network scores.

    Raises:
        ValueError: If the name is empty, or `worst` is not a number on the scale.

    Example:
        >>> Metric("bits per character", unit="bits", higher_is_better=False).better(1.5, 2.0)
        True
    """

    name: str
    unit: str = PERCENT
    higher_is_better: bool = True
    worst: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"the name of a metric must be a text, got {self.name!r}")
        if self.worst is not None and not self.span[0] <= self.worst <= self.span[1]:
            raise ValueError(f"worst of the metric {self.name} must be {self.span_text}, got {self.worst!r}")

    @property
    def is_percentage(self) -> bool:
        """Whether it lies between 0 and 100."""
        return self.unit == PERCENT

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest number that it can be."""
        return (0.0, 100.0) if self.is_percentage else (-math.inf, math.inf)

    @property
    def span_text(self) -> str:
        """The same in words."""
        return "a number from 0 to 100" if self.is_percentage else "a finite number"

    @property
    def sign(self) -> float:
        """1 where higher is better, −1 where lower is."""
        return 1.0 if self.higher_is_better else -1.0

    @property
    def end(self) -> float | None:
        """What a run that diverged counts as; None where only the untrained network says it."""
        if self.worst is not None or not self.is_percentage:
            return self.worst
        return 0.0 if self.higher_is_better else 100.0

    def better(self, one: float, other: float) -> bool:
        """Return whether one score is better than another."""
        return self.sign * one > self.sign * other


ACCURACY = Metric("accuracy")
"""What classifiers are compared by."""
