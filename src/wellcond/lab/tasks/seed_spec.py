"""The part of a run's description that its data, network and loss are made from, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class SeedSpec(Protocol):
    """One seed of a task; a `RunSpec` is one."""

    @property
    def seed(self) -> int:
        """Weights, split, order and augmentation follow from it."""

    @property
    def model(self) -> str:
        """The network's name."""

    @property
    def batch_size(self) -> int:
        """Samples of a batch, those of all ranks together."""

    @property
    def augmentation(self) -> str:
        """What training samples go through."""

    @property
    def train_images(self) -> int:
        """Samples that train."""

    @property
    def validation_images(self) -> int:
        """Samples that validate."""

    @property
    def label_smoothing(self) -> float:
        """Share of the target that is spread over all classes, in training."""


@dataclass(frozen=True)
class OneSeed:
    """One seed of a task that no method trains on."""

    seed: int
    model: str
    batch_size: int
    augmentation: str
    train_images: int
    validation_images: int
    label_smoothing: float = 0.0
