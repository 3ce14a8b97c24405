"""What a run needs to know of a data set and of what one does with it, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wellcond.lab.runs.records import RunSpec
from wellcond.lab.runs.stopwatch import Stopwatch

Role = Literal["validation", "test"]
"""Which images are evaluated: those that choose the lr, or those that measure."""


ROLES: tuple[Role, ...] = ("validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """A network measured on the images of one role.

    Attributes:
        score: The task's main metric in percent; higher is better.
        loss: Mean loss; None where evaluation has none.
        images: How many images were evaluated, on all ranks together.
        metrics: Further metrics in percent, by name.
    """

    score: float
    loss: float | None
    images: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Defaults:
    """What a comparison on this data uses where nothing else is asked for.

    Attributes:
        model: Name of the network.
        epochs: Epochs of a run.
        batch_size: Images of a batch.
        target: Score, in percent, to count the epochs to; None: the first baseline's final score decides.
        smallest_batch: The least batch size that can train; 2 where batch statistics are taken over images.
    """

    model: str
    epochs: int
    batch_size: int
    target: float | None = None
    smallest_batch: int = 2


class EpochBatches(Protocol):
    """One epoch of batches on the device each time it is iterated over.

    Attributes:
        epoch: Number of the next epoch, from 0. Order and augmentation are a function of the seed, the epoch and the
            position alone. An iteration that is begun raises it by one.
    """

    epoch: int

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""

    def __iter__(self) -> Iterator[Any]:
        """Begin the next epoch."""

    def resume_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be of this epoch, and begin at this batch, exactly as if it had not been interrupted.

        The iteration yields ``len(self) - batch`` batches; those after it are whole epochs again.
        """


class SeedData(Protocol):
    """One seed's data on one rank's device."""

    def batches(self) -> EpochBatches:
        """Return the training batches from the first epoch on: this rank's share of each global batch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss of a batch, a scalar with its graph."""

    def train_score(self, output: Any, batch: Any) -> Tensor | None:
        """Return what the task's score of a training batch is made of, from what the loss has computed anyway.

        Args:
            output: What the network's last forward pass in `loss` returned.
            batch: The batch.

        Returns:
            Float64, [2], on the device: a sum over this rank's samples, and their number. The epoch's score is the
            quotient of both, each summed over steps and ranks. None where training batches have no such score.
        """

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return what the network scores; the same on every rank.

        Args:
            model: The network, in evaluation mode; called under ``torch.no_grad``.
            role: The images.
            stopwatch: Runs in forward passes only.
        """


class Task(Protocol):
    """A data set and what one does with it; the test images are the same for every seed."""

    @property
    def name(self) -> str:
        """A short name, fit for a file name."""

    @property
    def kind(self) -> str:
        """``"classification"``, ``"detection"`` or ``"re-identification"``."""

    @property
    def score(self) -> str:
        """What the main metric is called: ``"accuracy"``, ``"AP"`` or ``"mAP"``."""

    @property
    def chance(self) -> float:
        """The score of guessing, in percent: what a diverged run counts as."""

    @property
    def train_images(self) -> int:
        """Images that train in each seed."""

    @property
    def validation_images(self) -> int:
        """Images that choose the lr in each seed."""

    @property
    def test_images(self) -> int:
        """Images that measure."""

    @property
    def augmentation(self) -> str:
        """What training images go through."""

    @property
    def defaults(self) -> Defaults:
        """What is used where nothing else is asked for."""

    def fingerprint(self) -> str:
        """Return a digest of the data and of which images test, so that no other data's results are taken for its."""

    def describe(self) -> dict[str, Any]:
        """Return what the report says of the data: classes, image size and the like, as JSON takes it."""

    def check_files(self) -> None:
        """Look at every file that runs will read, before the first of them begins.

        Raises:
            DataError: If one is missing or broken.
        """

    def initial_model(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with; torch's global generator is left as it was.

        Args:
            model: The network's name.
            seed: The run's seed: weights are drawn from ``derived_seed("weights", seed)``.
            weights: Where other weights come from; None draws all.

        Raises:
            LabError: If the task has no such network, or it does not fit the images or the weights.
        """

    def for_seed(self, spec: RunSpec, device: torch.device, rank: int, ranks: int) -> SeedData:
        """Return one seed's data.

        Args:
            spec: The run; seed, batch size, images, augmentation and ghost batch count.
            device: Where the batches go.
            rank: Which process of the run this is.
            ranks: How many processes the run has.
        """
