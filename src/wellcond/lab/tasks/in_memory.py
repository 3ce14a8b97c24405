"""Classification of images that are in memory as a whole: the digits, CIFAR, and parquet files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wellcond.lab.data.batches import Batch, TrainingBatches, channel_moments, check_augmentation, evaluation_batches
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.load import ImageData, load_data
from wellcond.lab.data.named_data import DIGITS
from wellcond.lab.data.splits import draw_split
from wellcond.lab.networks import registry as models
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, Role
from wellcond.lab.tasks.classification import ClassifiedSeed, ImageClassification
from wellcond.lab.tasks.counts import checked_counts, count_images

_DIGITS_DEFAULTS = Defaults(model="convnet", epochs=6, batch_size=32, target=95.0)
_DEFAULTS = Defaults(model="resnet8", epochs=8, batch_size=64)


@dataclass(frozen=True)
class RoleImages:
    """The images of one role in one seed's split, on the device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SeedImages:
    """One seed's images on the device, with the training images' channel moments."""

    train: RoleImages
    validation: RoleImages
    test: RoleImages
    moments: tuple[Tensor, Tensor]


class InMemoryTask(ImageClassification):
    """Classification of labelled images that are all of one size.

    Args:
        data: The data set, its test images set apart.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        defaults: What suits the data.
    """

    def __init__(
        self, data: ImageData, train_images: int, validation_images: int, augmentation: str, defaults: Defaults
    ) -> None:
        super().__init__(data, train_images, validation_images, augmentation, defaults, min(data.size), data.channels)
        self.data = data
        # Runs come seed by seed, so the last seed's images are nearly always those that are needed.
        self._split = lru_cache(maxsize=1)(self._draw)
        self._test = lru_cache(maxsize=1)(self._test_on)

    def fingerprint(self) -> str:
        """Return a digest of every pixel and label, and of which images test."""
        return self.data.fingerprint()

    def describe(self) -> dict[str, Any]:
        """Return classes, channels and image size."""
        height, width = self.data.size
        return {"classes": self.classes, "channels": self.channels, "image_size": f"{height}x{width}"}

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> InMemorySeed:
        """Return one seed's images on a device."""
        split = self._split(spec.seed, spec.train_images, spec.validation_images, device)
        return InMemorySeed(self, split, spec, device, rank, ranks)

    def _draw(self, seed: int, train: int, validation: int, device: torch.device) -> SeedImages:
        pool = self.data.pool
        labels = torch.from_numpy(pool.labels)
        drawn = draw_split(pool.labels, train, validation, seed)
        training, held_out = (
            RoleImages(pool.images[positions].to(device), labels[positions].to(device))
            for positions in (torch.from_numpy(drawn.train), torch.from_numpy(drawn.validation))
        )
        return SeedImages(training, held_out, self._test(device), channel_moments(training.images))

    def _test_on(self, device: torch.device) -> RoleImages:
        test = self.data.test
        return RoleImages(test.images.to(device), torch.from_numpy(test.labels).to(device))


class InMemorySeed(ClassifiedSeed[InMemoryTask, SeedImages]):
    """One seed's images, which lie on the device."""

    def batches(self) -> Epochs[Batch]:
        """Return the training batches."""
        train, spec = self.split.train, self.spec
        return TrainingBatches(
            train.images,
            train.labels,
            self.split.moments,
            spec.batch_size,
            spec.augmentation,
            spec.seed,
            self.rank,
            self.ranks,
        )

    def held_out(self, role: Role) -> tuple[Iterable[Batch], int]:
        """Return the images of a role."""
        part = self.split.validation if role == "validation" else self.split.test
        batches = evaluation_batches(part.images, part.labels, self.split.moments, self.rank, self.ranks)
        return batches, len(part.labels)


def open_in_memory(settings: Settings) -> InMemoryTask:
    """Return the task of the digits, of CIFAR or of parquet files.

    Raises:
        LabError: If the network or the augmentation is unknown, the data cannot be read, or the numbers do not fit it.
    """
    defaults = _DIGITS_DEFAULTS if settings.data == DIGITS else _DEFAULTS
    augmentation = check_augmentation(settings.augmentation or ("none" if settings.data == DIGITS else "crop-flip"))
    model = settings.model or defaults.model
    # The name first: reading a large file only to find the model misspelt would waste a minute.
    models.find_model(model)
    data = load_data(settings.data, settings.image_size, settings.test_images, settings.train_images)
    models.select_model(model, min(data.size), data.channels)
    train, validation = _counts(settings, len(data.pool.labels))
    return InMemoryTask(data, train, validation, augmentation, defaults)


def _counts(settings: Settings, pool: int) -> tuple[int, int]:
    """Return how many images of the pool train and how many validate."""
    if settings.data != DIGITS:
        return count_images(settings, pool)
    train = settings.train_images or min(1000, pool - 1)
    return checked_counts(train, settings.validation_images or min(398, pool - train), pool)
