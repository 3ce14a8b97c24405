"""What the tasks of `--data` share: a pool that each seed draws from, networks by name, and a share for each rank."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

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
