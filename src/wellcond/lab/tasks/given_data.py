"""The base of the tasks of `--data`: a pool that each seed draws from, networks by name, and a share for each rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.data.randomness import seeded
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import SeedData, Task


class DataTask(Task, ABC):
    """A task whose data are given, and whose network, batch size and numbers of samples are asked for."""

    # What is in doubt of somebody's own work is tested of ours.
    is_rehearsed = False

    def steps_with(self, batch_size: int) -> int:
        """Return the whole batches of an epoch."""
        return self.train_images // batch_size

    @abstractmethod
    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with, what is drawn drawn from torch's global generator.

        Args:
            model: Its name.
            seed: The run's seed, which the generator was seeded by.
            weights: Where other weights come from; None draws all.

        Raises:
            LabError: If there is no such network, or it does not fit the data or the weights.
        """

    def initial_model(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with, leaving the global generators as they were."""
        with seeded("weights", seed):
            return self.network(model, seed, weights)


class DrawnSeed(SeedData):
    """One seed's samples on one rank's device.

    Args:
        spec: What of the run they are made from.
        device: Where the batches go.
        rank: Which process of the run this is.
        ranks: How many processes the run has.
    """

    def __init__(self, spec: SeedSpec, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.spec, self.device, self.rank, self.ranks = spec, device, rank, ranks


TaskT = TypeVar("TaskT", bound=DataTask)
SplitT = TypeVar("SplitT")


class SplitSeed(DrawnSeed, Generic[TaskT, SplitT]):
    """One seed's samples of a task, split into those that train and those that validate.

    Args:
        task: The data.
        split: Which samples train and which validate, or these samples.
        spec: What of the run they are made from.
        device: Where the batches go.
        rank: Which process of the run this is.
        ranks: How many processes the run has.
    """

    def __init__(
        self, task: TaskT, split: SplitT, spec: SeedSpec, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(spec, device, rank, ranks)
        self.task, self.split = task, split

    def one_by_one(self, images: Sequence[int]) -> tuple[list[int], list[list[Key]]]:
        """Return this rank's images of an evaluation, and the keys of its forward passes, each of one image.

        A network that is sharded over the ranks needs all of them in every forward pass: a rank that has no image left
        reads the first one again.
        """
        own = list(images[self.rank :: self.ranks])
        idle = -(-len(images) // self.ranks) - len(own)
        return own, [[Key(image, 0)] for image in own + list(images[:1]) * idle]
