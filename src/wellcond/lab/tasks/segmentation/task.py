"""Semantic segmentation of images in folders, also measured on those of another place or style."""

from __future__ import annotations

import hashlib
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.data.batches import check_augmentation, share_of
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.epoch_loader import EpochLoader, read_samples
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.splits import Indices, Split, derived_seed, draw_apart, draw_test_numbers, without
from wellcond.lab.data.streams import loading_processes, normalized
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_data
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, DefaultsBySize, Evaluation, Metric, Role
from wellcond.lab.tasks.counts import count_images
from wellcond.lab.tasks.given_data import DataTask, SplitSeed
from wellcond.lab.tasks.segmentation.formats import SegmentationFiles, find_segmentation
from wellcond.lab.tasks.segmentation.networks import build_segmenter
from wellcond.lab.tasks.segmentation.scores import IGNORED, confusion, mean_iou
from wellcond.lab.tasks.segmentation.specs import select_segmenter
from wellcond.lab.tasks.segmentation.views import AUGMENTATIONS, SegmentationViews, check_pairs

_DEFAULTS = DefaultsBySize(
    small=Defaults(model="fcn-tiny", epochs=20, batch_size=8),
    large=Defaults(model="deeplabv3-r50", epochs=50, batch_size=16),
    least=1_000,
)
_LARGE_SIZE, _SIZE = 512, 96


class SegmentationBatch(NamedTuple):
    """Images [n, 3, size, size], normalized, and the class of each pixel, int64 [n, size, size]."""

    images: Tensor
    labels: Tensor


class SegmentationTask(DataTask):
    """The class of every pixel: some images train and validate, others, perhaps of another place, only measure.

    Args:
        name: What the data is called.
        pool: Images that training and validation are drawn from.
        test: Images that measure.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        image_size: What the shorter side of images becomes; training cuts squares of it.
        elsewhere: Where the images that measure come from, if it is another data set.
        workers: Processes that decode; 0 decodes in the one that trains.
    """

    kind = "segmentation"
    samples = "images"
    metric = Metric("mIoU", worst=0.0)

    def __init__(
        self,
        name: str,
        pool: SegmentationFiles,
        test: SegmentationFiles,
        train_images: int,
        validation_images: int,
        augmentation: str,
        image_size: int,
        elsewhere: str | None = None,
        workers: int = 0,
    ) -> None:
        self.name = name
        self.pool, self.test = pool, test
        self.train_images, self.validation_images, self.test_images = train_images, validation_images, len(test.pairs)
        self.augmentation, self.image_size, self.elsewhere, self.workers = augmentation, image_size, elsewhere, workers
        self.defaults = _DEFAULTS.of(len(pool.pairs))

    @property
    def classes(self) -> int:
        """How many classes there are to tell apart."""
        return len(self.pool.classes)

    def fingerprint(self) -> str:
        """Return a digest of the files' names and sizes, and of what images are brought to."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        parts = (self.pool.fingerprint(), self.test.fingerprint(), self.image_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return classes and sizes, and where the images that measure come from."""
        size = self.image_size
        told = {
            "classes": self.classes,
            "channels": 3,
            "image_size": f"shorter side {size}; training cuts {size}x{size}",
        }
        return told if self.elsewhere is None else told | {"test images": self.elsewhere}

    def check_files(self) -> None:
        """Open every image and label map.

        Raises:
            DataError: If one is missing or broken, or a label map is not of its image.
        """
        for part in (self.pool, self.test):
            check_pairs(part)
            check_images([file for pair in part.pairs for file in (pair.image, pair.labels)])

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        spec = select_segmenter(model)
        return build_segmenter(spec, self.classes, weights)

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> SegmentationSeed:
        """Return one seed's images."""
        split = draw_apart(np.arange(len(self.pool.pairs)), spec.train_images, spec.validation_images, spec.seed)
        return SegmentationSeed(self, split, spec, device, rank, ranks)


class SegmentationSeed(SplitSeed[SegmentationTask, Split]):
    """One seed's images: the cross-entropy of pixels in training, mIoU in evaluation.

    Each rank takes as many images of a batch, one after the other.
    """

    def batches(self) -> Epochs[SegmentationBatch]:
        """Return the training batches."""
        task, spec, train = self.task, self.spec, self.split.train
        share = share_of(spec.batch_size, self.rank, self.ranks)
        return EpochLoader(
            SegmentationViews(task.pool, task.image_size, spec.augmentation),
            partial(_shuffled, train, spec.batch_size, spec.seed),
            len(train) // spec.batch_size,
            spec.seed,
            lambda keys: keys[share],
            self._to_batch,
            task.workers,
        )

    def loss(self, model: nn.Module, batch: SegmentationBatch) -> Tensor:
        """Return the mean cross-entropy of the pixels that count; 0 where none does."""
        logits = model(batch.images)
        total = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum")
        return total / (batch.labels != IGNORED).sum().clamp(min=1)

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return mIoU, the share of pixels that are right, and the pixels' mean cross-entropy.

        Each image goes through the network alone, whole.
        """
        files = self.task.pool.take(self.split.validation) if role == "validation" else self.task.test
        count, classes = len(files.pairs), self.task.classes
        own, keys = self.one_by_one(range(count))
        counts = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        views = SegmentationViews(files, self.task.image_size)
        for place, ((pixels, labels),) in enumerate(read_samples(views, keys, self.task.workers)):
            shown, wanted = normalized(pixels[None], self.device), labels[None].to(self.device).long()
            stopwatch.start()
            logits = model(shown)
            stopwatch.stop()
            if place < len(own):
                logits = logits.float()
                loss += F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").double()
                counts += confusion(logits.argmax(1), wanted, classes)
        if self.ranks > 1:
            dist.all_reduce(counts)
            dist.all_reduce(loss)
        score, right = mean_iou(counts)
        return Evaluation(score, float(loss) / int(counts.sum()), count, {"pixel accuracy": right})

    def _to_batch(self, samples: list[tuple[Tensor, Tensor]], epoch: int, number: int) -> SegmentationBatch:
        pixels, labels = zip(*samples, strict=True)
        return SegmentationBatch(
            normalized(torch.stack(pixels), self.device), torch.stack(labels).to(self.device).long()
        )


def _shuffled(images: Indices, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches, the incomplete last one left out."""
    order = np.random.default_rng(derived_seed(f"order of epoch {epoch}", seed)).permutation(images)
    whole = len(images) // batch_size * batch_size
    batches: list[list[int]] = order[:whole].reshape(-1, batch_size).tolist()
    return batches


def open_segmentation(settings: Settings) -> SegmentationTask:
    """Return the task of a folder of the layout of Cityscapes, ADE20K, Pascal VOC or GTA5.

    Raises:
        LabError: If the network or the augmentation is unknown, the data cannot be read, or the numbers do not fit it.
    """
    augmentation = check_augmentation(settings.augmentation or AUGMENTATIONS[-1], AUGMENTATIONS)
    if settings.model is not None:
        select_segmenter(settings.model)
    path = Path(settings.data)
    pool, test = _read(path, "--data")
    elsewhere = None
    if settings.test_data is not None:
        other = Path(settings.test_data)
        if not other.is_dir():
            raise LabError(f"--test-data {other}: there is no such folder")
        check_data("--test-data", other)
        whole, given = _read(other, "--test-data")
        test, elsewhere = given or whole, str(other)
        if test.classes != pool.classes:
            raise LabError(
                f"--test-data {other}: must have the {len(pool.classes)} classes of {path}, "
                f"got {len(test.classes)} others"
            )
    if test is None:
        chosen = draw_test_numbers(np.arange(len(pool.pairs)), max(1, len(pool.pairs) // 5))
        pool, test = pool.take(without(len(pool.pairs), chosen)), pool.take(chosen)
    if settings.test_images is not None:
        if settings.test_images > len(test.pairs):
            raise LabError(f"--test-images must be at most {len(test.pairs)}, got {settings.test_images}")
        test = test.take(draw_test_numbers(np.arange(len(test.pairs)), settings.test_images))
    train, validation = count_images(settings, len(pool.pairs))
    size = settings.image_size or (_LARGE_SIZE if len(pool.pairs) >= _DEFAULTS.least else _SIZE)
    name = path.resolve().name
    workers = loading_processes(settings.jobs)
    return SegmentationTask(name, pool, test, train, validation, augmentation, size, elsewhere, workers)


def _read(path: Path, option: str) -> tuple[SegmentationFiles, SegmentationFiles | None]:
    found = find_segmentation(path)
    if found is None:
        raise LabError(f"{option} {path}: has none of the layouts of segmentation (see `wellcond list data`)")
    kind, root = found
    return kind.read(root)
