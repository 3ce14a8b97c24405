"""The samples that a network is measured on, and the result of a measurement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["validation", "test"]
"""Which samples are evaluated: those that choose the lr, or those that measure."""


ROLES: tuple[Role, ...] = ("validation", "test")


def singular(samples: str) -> str:
    """Return what one of a task's samples is called.

    >>> singular("images")
    'image'
    """
    return samples.removesuffix("s")


@dataclass(frozen=True)
class Evaluation:
    """A network measured on the samples of one role.

    Attributes:
        score: The task's metric, in its unit.
        loss: Mean loss; None where evaluation has none.
        images: How many samples were evaluated, on all ranks together.
        metrics: Further scores, by name.
    """

    score: float
    loss: float | None
    images: int
    metrics: dict[str, float] = field(default_factory=dict)
