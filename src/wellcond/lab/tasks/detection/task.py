"""Detection and instance segmentation of the objects in images of the COCO layout."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.lab.data.batches import check_augmentation
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.epoch_loader import EpochLoader, read_samples
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.named_data import GET_COCO
from wellcond.lab.data.splits import Indices, Split, derived_seed, draw_apart, draw_test_numbers
from wellcond.lab.data.streams import loading_processes
from wellcond.lab.errors import LabError
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, DefaultsBySize, Evaluation, Metric, Role
from wellcond.lab.tasks.counts import count_images
from wellcond.lab.tasks.detection.coco import CocoEvaluationViews, CocoImages, CocoTrainingViews, find_coco
from wellcond.lab.tasks.detection.networks import build_detector, select_detector
from wellcond.lab.tasks.detection.scores import as_results, average_precision
from wellcond.lab.tasks.given_data import DataTask, SplitSeed

AUGMENTATIONS = ("none", "flip")
_DEFAULTS = DefaultsBySize(
    small=Defaults(model="fasterrcnn-tiny", epochs=12, batch_size=8, smallest_batch=1),
    large=Defaults(model="fasterrcnn-r50", epochs=12, batch_size=16, smallest_batch=1),
    least=10_000,
)


class DetectionBatch(NamedTuple):
    """Images with their objects.

    Attributes:
        images: Each [3, height, width], between 0 and 1.
        targets: Of each image ``boxes``, ``labels`` and, for masks, ``masks``.
        chance: Seed of the draws in the loss: which anchors and which proposals it takes.
    """

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    chance: int


class DetectionTask(DataTask):
    """Detection of objects: the images of ``train`` train and validate, those of ``val`` only measure.

    Args:
        name: What the data is called.
        pool: Images that training and validation are drawn from; those without objects do neither.
        test: Images that measure.
        test_ids: Which of them.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        image_size: Shorter side that images are brought to; None: that of the network.
        workers: Processes that decode; 0 decodes in the one that trains.
    """

    kind = "detection"
    samples = "images"
    metric = Metric("AP", worst=0.0)

    def __init__(
        self,
        name: str,
        pool: CocoImages,
        test: CocoImages,
        test_ids: Indices,
        train_images: int,
        validation_images: int,
        augmentation: str,
        image_size: int | None = None,
        workers: int = 0,
    ) -> None:
        self.name = name
        self.pool, self.test, self.test_ids = pool, test, test_ids
        self.train_images, self.validation_images = train_images, validation_images
        self.augmentation, self.image_size, self.workers = augmentation, image_size, workers
        self.pool_ids = pool.with_objects()
        self.defaults = _DEFAULTS.of(len(self.pool_ids))

    @cached_property
    def test_images(self) -> int:
        """Images that measure."""
        return len(self.test_ids)

    def fingerprint(self) -> str:
        """Return a digest of the annotations, of which images measure, and of their size in the network."""
        parts = (self.pool.fingerprint(), self.test.fingerprint(), self.test_ids.tolist(), self.image_size)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return classes and image size."""
        size = "the network's" if self.image_size is None else f"shorter side {self.image_size}"
        return {
            "classes": len(self.pool.classes),
            "channels": 3,
            "image_size": size,
            "images without objects": len(self.pool.ids) - len(self.pool_ids),
        }

    def check_files(self) -> None:
        """Open every image, as its format allows, without decoding it.

        Raises:
            DataError: If one is missing or broken.
        """
        check_images(self.pool.files(self.pool_ids) + self.test.files(self.test_ids))

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the detector that a run begins with.

        Args:
            model: A name in `DETECTORS`.
            seed: The run's seed.
            weights: Of the trunk; its stem and its first stage are not trained, then.
        """
        spec = select_detector(model)
        size = spec.image_size if self.image_size is None else self.image_size
        return build_detector(spec, len(self.pool.classes), size, weights)

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> DetectionSeed:
        """Return one seed's images."""
        split = draw_apart(self.pool_ids, spec.train_images, spec.validation_images, spec.seed)
        return DetectionSeed(self, split, spec, device, rank, ranks)


class DetectionSeed(SplitSeed[DetectionTask, Split]):
    """One seed's images: the sum of the detector's losses in training, average precision in evaluation.

    A rank takes every ``ranks``-th image of a batch, from its number on.
    """

    @cached_property
    def masks(self) -> bool:
        """Whether the network finds masks."""
        return select_detector(self.spec.model).masks

    def batches(self) -> Epochs[DetectionBatch]:
        """Return the training batches."""
        pool, spec, train = self.task.pool, self.spec, self.split.train
        upright = np.array([pool.is_upright(number) for number in train.tolist()])
        return EpochLoader(
            CocoTrainingViews(pool, self.masks, flip=spec.augmentation == "flip"),
            partial(grouped_order, train, upright, spec.batch_size, spec.seed),
            len(train) // spec.batch_size,
            spec.seed,
            lambda keys: keys[self.rank :: self.ranks],
            self._to_batch,
            self.task.workers,
        )

    def loss(self, model: nn.Module, batch: DetectionBatch) -> Tensor:
        """Return the sum of the detector's losses.

        What the detector draws is a function of seed, epoch and batch; torch's global generator is left as it was.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(batch.chance)
            losses: dict[str, Tensor] = model(batch.images, batch.targets)
        return torch.stack(list(losses.values())).sum()

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return average precision; a network with an infinite or undefined weight scores NaN.

        Each image goes through the network alone, so that what is found hangs on nothing else.
        """
        images, ids = self._part(role)
        own, keys = self.one_by_one(ids.tolist())
        results: list[dict[str, Any]] = []
        for place, samples in enumerate(read_samples(CocoEvaluationViews(images), keys, self.task.workers)):
            shown = [pixels.to(self.device).float() / 255 for pixels in samples]
            stopwatch.start()
            predictions = model(shown)
            stopwatch.stop()
            if place < len(own):
                results += as_results(own[place], predictions[0], images.categories)
        if self.ranks > 1:
            gathered: list[Any] = [None] * self.ranks
            dist.all_gather_object(gathered, results)
            results = list(chain.from_iterable(gathered))
        # In one order whatever the ranks: ties between scores are broken by it.
        results.sort(key=lambda result: result["image_id"])
        metrics = average_precision(images.truth, ids.tolist(), results, self.masks)
        # Boxes that are not numbers are dropped by the detector: nothing else would show it.
        finite = all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        return Evaluation(metrics.pop("AP") if finite else math.nan, None, len(ids), metrics)

    def _part(self, role: Role) -> tuple[CocoImages, Indices]:
        return (self.task.pool, self.split.validation) if role == "validation" else (self.task.test, self.task.test_ids)

    def _to_batch(self, samples: list[tuple[Tensor, dict[str, Tensor]]], epoch: int, number: int) -> DetectionBatch:
        images = [pixels.to(self.device).float() / 255 for pixels, _ in samples]
        targets = [{name: part.to(self.device) for name, part in target.items()} for _, target in samples]
        purpose = f"loss of epoch {epoch} batch {number} rank {self.rank}"
        return DetectionBatch(images, targets, derived_seed(purpose, self.spec.seed))


def grouped_order(
    images: Indices, upright: np.ndarray[Any, Any], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return an epoch's batches, of upright images or of others, so that little of a batch is padding.

    What is left over of both makes one mixed batch, if it suffices; the rest is left out.

    Args:
        images: The images.
        upright: Of each image, whether it is higher than wide.
        batch_size: Images of a batch.
        seed: The order is a function of this and the epoch.
        epoch: The epoch's number.

    Returns:
        ``len(images) // batch_size`` batches.

    >>> upright = np.array([True, False, False, True, False])
    >>> sorted(sorted(batch) for batch in grouped_order(np.arange(5), upright, 1, seed=0, epoch=0))
    [[0], [1], [2], [3], [4]]
    >>> len(grouped_order(np.arange(5), upright, 2, seed=0, epoch=0))
    2
    """
    generator = np.random.default_rng(derived_seed(f"order of epoch {epoch}", seed))
    order = generator.permutation(len(images))
    batches, left_over = [], []
    for group in (order[upright[order]], order[~upright[order]]):
        whole = len(group) // batch_size * batch_size
        batches += group[:whole].reshape(-1, batch_size).tolist()
        left_over += group[whole:].tolist()
    if len(left_over) >= batch_size:
        batches.append(left_over[:batch_size])
    return [images[batches[number]].tolist() for number in generator.permutation(len(batches))]


def open_detection(settings: Settings) -> DetectionTask:
    """Return the task of a folder of the COCO layout.

    Raises:
        LabError: If the network or the augmentation is unknown, the data cannot be read, or the numbers do not fit it.
    """
    path = Path(settings.data)
    augmentation = check_augmentation(settings.augmentation or "flip", AUGMENTATIONS)
    if settings.model is not None:
        # First: reading a large file only to find the model misspelt would waste a minute.
        select_detector(settings.model)
    paths = find_coco(path)
    if paths is None:
        raise LabError(f"--data {path}: no annotations/instances_*.json in there; {GET_COCO}")
    pool, test = (CocoImages(part) for part in paths)
    if pool.categories != test.categories:
        raise LabError(f"--data {path}: the categories of train and val must be the same")
    usable = len(pool.with_objects())
    train, validation = count_images(settings, usable, "images with objects besides the test images")
    test_ids = _draw_test(settings, test)
    if not any(test.objects(number) for number in test_ids.tolist()):
        raise LabError(f"--data {path}: there are no objects in the {len(test_ids)} images of val")
    return DetectionTask(
        path.resolve().name,
        pool,
        test,
        test_ids,
        train,
        validation,
        augmentation,
        settings.image_size,
        loading_processes(settings.jobs),
    )


def _draw_test(settings: Settings, test: CocoImages) -> Indices:
    wanted, ids = settings.test_images, test.ids
    if wanted is None or wanted == len(ids):
        return ids
    if wanted > len(ids):
        raise LabError(f"--test-images must be at most {len(ids)}, the images of val, got {wanted}")
    return draw_test_numbers(ids, wanted)
