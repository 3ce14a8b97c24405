"""Classification of images that stay in their files: class folders as ImageNet's, and the fine-grained data sets."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from wellcond.lab.data.batches import Batch, check_augmentation
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.fine_grained import FINE_GRAINED
from wellcond.lab.data.image_files import FileData, find_class_folders, read_class_folders
from wellcond.lab.data.load import draw_test
from wellcond.lab.data.splits import Split, draw_split
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
from wellcond.lab.tasks.base import Defaults, DefaultsBySize, Role
from wellcond.lab.tasks.classification import ClassifiedSeed, ImageClassification
from wellcond.lab.tasks.counts import count_images

_IMAGE_SIZE = 224
_DEFAULTS = DefaultsBySize(
    small=Defaults(model="torchvision:resnet18", epochs=30, batch_size=32),
    large=Defaults(model="torchvision:resnet50", epochs=100, batch_size=256),
    least=100_000,
)


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
        defaults = _DEFAULTS.of(len(data.pool.labels))
        super().__init__(data, train_images, validation_images, augmentation, defaults, image_size)
        self.data, self.workers = data, workers

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

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> FolderSeed:
        """Return one seed's images."""
        drawn = draw_split(self.data.pool.labels, spec.train_images, spec.validation_images, spec.seed)
        return FolderSeed(self, drawn, spec, device, rank, ranks)


class FolderSeed(ClassifiedSeed[FolderTask, Split]):
    """One seed's images, decoded on their way to the device."""

    def batches(self) -> Epochs[Batch]:
        """Return the training batches."""
        task, spec = self.task, self.spec
        view = training_view(task.data.crop, spec.augmentation, task.image_size)
        return StreamedBatches(
            TrainingViews(task.pool, view, spec.seed),
            self.split.train,
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
        positions = self.split.validation if role == "validation" else torch.arange(task.test_images).numpy()
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
    models.select_model(settings.model or _DEFAULTS.of(len(data.pool.labels)).model, size)
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
