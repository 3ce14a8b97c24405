"""A task that is open, with the network and the batch size that were asked for; nothing says yet how it is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from wellcond.lab.errors import LabError, naming_errors
from wellcond.lab.networks.weights import check_weights
from wellcond.lab.runs.metric import Metric
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import SeedSpec, TrainingOptions
from wellcond.lab.tasks.base import Defaults, SeedData, Task
from wellcond.lab.tasks.open import open_task


@dataclass(frozen=True)
class OpenedTask:
    """A task, and what the settings leave open filled in by it.

    Attributes:
        settings: What was asked for.
        task: The data and what one does with it.
        digest: The task's, as it was when it was opened.
        defaults: What the task suggests.
        metric: What its scores are.
        model: The network's name.
        batch_size: Samples of a batch.
    """

    settings: Settings
    task: Task
    digest: str
    defaults: Defaults
    metric: Metric
    model: str
    batch_size: int

    def network(self, seed: int, weights: str | None) -> nn.Module:
        """Return the network of a seed.

        Args:
            seed: The seed.
            weights: Where other weights come from; None draws all.
        """
        return self.task.initial_model(self.model, seed, weights)

    def spec(self, seed: int, batch_size: int | None = None) -> SeedSpec:
        """Return what a seed's data, network and loss are made from.

        Args:
            seed: The seed.
            batch_size: Samples of a batch; None for those of `batch_size`.
        """
        options = {field.name: getattr(self.settings, field.name) for field in fields(TrainingOptions)}
        decided = {"model": self.model, "batch_size": batch_size or self.batch_size}
        return SeedSpec(
            **options | decided,
            seed=seed,
            augmentation=self.task.augmentation,
            train_images=self.task.train_images,
            validation_images=self.task.validation_images,
        )

    def data(self, seed: int, device: torch.device, batch_size: int | None = None) -> SeedData:
        """Return a seed's data in one process, every file of it checked.

        Args:
            seed: The seed.
            device: Where the batches go.
            batch_size: Samples of a batch; None for those of `batch_size`.

        Raises:
            LabError: If a file is missing or broken, or the task is not what it must be.
        """
        self.task.check(device)
        return self.task.for_seed(self.spec(seed, batch_size), device, rank=0, ranks=1)


def opened_task(settings: Settings, task: Task | None = None) -> OpenedTask:
    """Open the task that the settings name, and check network and batch size against it.

    Args:
        settings: What was asked for.
        task: Their task if it is open already; None opens it.

    Raises:
        LabError: If a name is unknown, the data cannot be read, or the numbers do not fit together.
    """
    if settings.weights is not None:
        check_weights("--weights", settings.weights)
    task = task or open_task(settings)
    # Before anything of a user's task is used: what it keeps of its work must not change what it is known by.
    digest = task.digest
    with naming_errors(f"{task.name}"):
        defaults, metric = task.defaults, task.metric
    batch_size = settings.batch_size or defaults.batch_size
    if batch_size > task.train_images:
        raise LabError(
            f"--batch-size must be at most the number of training {task.samples} ({task.train_images}), "
            f"got {batch_size}"
        )
    if batch_size < defaults.smallest_batch:
        raise LabError(
            f"--batch-size must be at least {defaults.smallest_batch}, because the networks use batch normalization, "
            f"got {batch_size}"
        )
    return OpenedTask(settings, task, digest, defaults, metric, settings.model or defaults.model, batch_size)
