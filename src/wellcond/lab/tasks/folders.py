"""Classification of images that stay in their files: class folders as ImageNet's, and the fine-grained data sets."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wellcond.lab.data.batches import Batch, check_augmentation
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.fine_grained import FINE_GRAINED
from wellcond.lab.data.image_files import FileData, find_class_folders, read_class_folders
from wellcond.lab.data.load import draw_test
from wellcond.lab.data.splits import Split, derived_seed, draw_split
from wellcond.lab.data.streams import StreamedBatches, evaluation_stream, loading_processes
from wellcond.lab.data.views import (
    EvaluationViews,
    Pictures,
    TrainingViews,
    evaluation_view,
    shorter_side,
    training_view,
)
from wellcond.lab.errors import LabError
from wellcond.lab.networks import registry as models
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, Role
from wellcond.lab.tasks.classification import ClassifiedSeed, ImageClassification
from wellcond.lab.tasks.counts import count_images

_IMAGE_SIZE = 224
# From so many images on, the sources' own network, epochs and batch size.
_LARGE = 100_000
_LARGE_DEFAULTS = Defaults(model="torchvision:resnet50", epochs=100, batch_size=256)
_DEFAULTS = Defaults(model="torchvision:resnet18", epochs=30, batch_size=32)


class FolderTask(ImageClassification):
    """Classification of labelled image files, cut to one size on the way.

    Args:
        data: The data set, its test images set apart.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        image_size: Height and width that the network sees.
        workers: Processes that decode; 0 decodes in the one that trains.
    """

    def __init__(
        self,
        data: FileData,
        train_images: int,
        validation_images: int,
        augmentation: str,
        image_size: int = _IMAGE_SIZE,
        workers: int = 0,
    ) -> None:
        super().__init__(data, train_images, validation_images, augmentation, default_of(data))
        self.data, self.image_size, self.workers = data, image_size, workers

    @cached_property
    def pool(self) -> Pictures:
        """The images that train and validate, decoded once if they fit into memory."""
        return Pictures(self.data.pool)

    @cached_property
    def test(self) -> Pictures:
        """The images that measure, decoded once if they fit into memory."""
        return Pictures(self.data.test)

    def fingerprint(self) -> str:
        """Return a digest of the images' names, sizes in bytes and classes, and of how they are cut."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return f"{self.data.fingerprint()}-{self.data.crop}-{self.image_size}"

    def describe(self) -> dict[str, Any]:
        """Return classes, image size, and what images go through."""
        size, side = self.image_size, shorter_side(self.image_size)
        centre = f"shorter side {side}, its centre"
        cuts = {
            "none": centre,
            "flip": f"{centre}, mirrored at random",
            "crop-flip": "a random area and shape, mirrored at random"
            if self.data.crop == "area"
            else f"shorter side {side}, a random place, mirrored at random",
        }
        return {
            "classes": self.classes,
            "channels": 3,
            "image_size": f"{size}x{size}",
            "training cut": cuts[self.augmentation],
            "evaluation cut": centre,
        }

    def check_files(self) -> None:
        """Open every image, as its format allows, without decoding it.

        Raises:
            DataError: If one is missing or broken.
        """
        for part in (self.data.pool, self.data.test):
            check_images([part.path(position) for position in range(len(part.labels))])

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        models.select_model(model, self.image_size)
        return models.initial_model(model, 3, self.classes, derived_seed("weights", seed), weights)

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> FolderSeed:
        """Return one seed's images."""
        drawn = draw_split(self.data.pool.labels, spec.train_images, spec.validation_images, spec.seed)
        return FolderSeed(self, drawn, spec, device, rank, ranks)


class FolderSeed(ClassifiedSeed):
    """One seed's images.

    Args:
        task: The data.
        drawn: Which images train and which validate.
        spec: What of the run they are made from.
        device: Where the batches go.
        rank: Which process of the run this is.
        ranks: How many processes the run has.
    """

    def __init__(
        self, task: FolderTask, drawn: Split, spec: SeedSpec, device: torch.device, rank: int, ranks: int
    ) -> None:
        super().__init__(spec, device, rank, ranks)
        self.task, self.drawn, self.classes = task, drawn, task.classes

    def batches(self) -> Epochs[Batch]:
        """Return the training batches."""
        task, spec = self.task, self.spec
        view = training_view(task.data.crop, spec.augmentation, task.image_size)
        return StreamedBatches(
            TrainingViews(task.pool, view, spec.seed),
            self.drawn.train,
            spec.batch_size,
            task.image_size,
            self.device,
            task.workers,
            self.rank,
            self.ranks,
        )

    def held_out(self, role: Role) -> tuple[Iterable[Batch], int]:
        """Return the images of a role."""
        task = self.task
        pictures = task.pool if role == "validation" else task.test
        positions = self.drawn.validation if role == "validation" else torch.arange(task.test_images).numpy()
        batches = evaluation_stream(
            EvaluationViews(pictures, evaluation_view(task.image_size)),
            positions,
            self.spec.batch_size,
            task.image_size,
            self.device,
            task.workers,
            self.rank,
            self.ranks,
        )
        return batches, len(positions)


def default_of(data: FileData) -> Defaults:
    """Return what suits data of this size."""
    return _LARGE_DEFAULTS if len(data.pool.labels) >= _LARGE else _DEFAULTS


def open_folders(settings: Settings) -> FolderTask:
    """Return the task of class folders or of a fine-grained data set.

    Raises:
        LabError: If the network or the augmentation is unknown, the data cannot be read, or the numbers do not fit it.
    """
    augmentation = check_augmentation(settings.augmentation or "crop-flip")
    size = settings.image_size or _IMAGE_SIZE
    if settings.model is not None:
        models.select_model(settings.model, size)
    data = _read(settings.data)
    models.select_model(settings.model or default_of(data).model, size)
    if settings.test_images is not None:
        chosen = draw_test(settings.data, data.test.labels, settings.test_images, most=len(data.test.labels))
        data = FileData(data.name, data.pool, data.test.take(chosen), data.crop)
    train, validation = count_images(settings, len(data.pool.labels))
    return FolderTask(data, train, validation, augmentation, size, loading_processes(settings.jobs))


def _read(source: str) -> FileData:
    for kind in FINE_GRAINED:
        folder = kind.find(Path(source))
        if folder is not None:
            return kind.open(folder)
    found = find_class_folders(Path(source))
    if found is None:
        raise LabError(f"--data {source}: holds no class folders and none of the lists that are known")
    return read_class_folders(source, *found)
