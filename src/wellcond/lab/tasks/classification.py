"""The base of image classification: its networks, its loss, and its scores over the batches of all ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.data.batches import Batch
from wellcond.lab.data.image_files import FileData
from wellcond.lab.data.load import ImageData
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.networks import registry as models
from wellcond.lab.runs.metric import ACCURACY
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.base import Defaults, Evaluation, Role
from wellcond.lab.tasks.given_data import DataTask, SplitSeed, SplitT

_TOP = 5


class ImageClassification(DataTask):
    """Classification of labelled images.

    Args:
        data: The data set, its test images set apart.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        defaults: What suits the data.
        image_size: The shorter side that the network sees.
        channels: Of the images.
    """

    kind = "classification"
    samples = "images"
    metric = ACCURACY

    def __init__(
        self,
        data: ImageData | FileData,
        train_images: int,
        validation_images: int,
        augmentation: str,
        defaults: Defaults,
        image_size: int,
        channels: int = 3,
    ) -> None:
        self.name = data.name
        self.classes, self.test_images = len(data.pool.classes), len(data.test.labels)
        self.train_images, self.validation_images = train_images, validation_images
        self.augmentation, self.defaults = augmentation, defaults
        self.image_size, self.channels = image_size, channels

    @cached_property
    def chance(self) -> float:
        """The accuracy of guessing, in percent."""
        return 100.0 / self.classes

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        models.select_model(model, self.image_size, self.channels)
        return models.initial_model(model, self.channels, self.classes, derived_seed("weights", seed), weights)


ClassificationT = TypeVar("ClassificationT", bound=ImageClassification)


class ClassifiedSeed(SplitSeed[ClassificationT, SplitT]):
    """One seed's images: cross-entropy in training, accuracy and cross-entropy in evaluation."""

    @abstractmethod
    def held_out(self, role: Role) -> tuple[Iterable[Batch], int]:
        """Return this rank's share of each batch of a role, perhaps none of one, and how many images all ranks have."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the batch's mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.spec.label_smoothing)

    def train_score(self, output: Tensor, batch: Batch) -> Tensor:
        """Return how many of a batch's images are right."""
        return batch_accuracy(output, batch[1])

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return accuracy, also among the five highest logits if there are more classes, and mean cross-entropy."""
        batches, count = self.held_out(role)
        return evaluate_classifier(model, batches, count, self.task.classes, self.device, self.ranks, stopwatch)


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int,
    classes: int,
    device: torch.device,
    ranks: int,
    stopwatch: Stopwatch,
) -> Evaluation:
    """Return accuracy, also among the five highest logits if there are more classes, and mean cross-entropy.

    Args:
        model: The network, in evaluation mode.
        batches: This rank's share of each batch of images and labels, perhaps none of one.
        count: Images of all ranks together.
        classes: How many classes there are.
        device: Where the batches are.
        ranks: How many processes the run has.
        stopwatch: Runs in forward passes only.
    """
    loss = torch.zeros((), device=device)
    first, among = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    for images, labels in batches:
        # A network that is sharded over the ranks needs all of them in every forward pass, images or not.
        shown = images if len(labels) else images.new_zeros(1, *images.shape[1:])
        stopwatch.start()
        logits = model(shown)
        stopwatch.stop()
        logits = logits[: len(labels)].float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        first += (logits.argmax(1) == labels).sum()
        if classes > _TOP:
            among += (logits.topk(_TOP, dim=1).indices == labels[:, None]).sum()
    sums = torch.stack([loss.double(), first.double(), among.double()])
    if ranks > 1:
        dist.all_reduce(sums)
    metrics = {f"top-{_TOP}": 100.0 * float(sums[2].float() / count)} if classes > _TOP else {}
    return Evaluation(100.0 * float(sums[1].float() / count), float(sums[0]) / count, count, metrics)


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the images that are right, in percent, and their number, as `SeedData.train_score` wants it.

    Args:
        logits: [n, classes].
        labels: [n].

    >>> batch_accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor([100.,   2.], dtype=torch.float64)
    """
    right = (logits.argmax(1) == labels).sum(dtype=torch.float64)
    return torch.stack([100.0 * right, torch.full_like(right, len(labels))])
