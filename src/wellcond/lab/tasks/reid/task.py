"""Person re-identification: the network finds a person whom other cameras have seen, among persons new to it."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from wellcond.lab.data.batches import check_augmentation
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.epoch_loader import EpochLoader, Key, read_samples
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.splits import TEST_SEED
from wellcond.lab.data.streams import loading_processes, normalized
from wellcond.lab.errors import LabError
from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.runs.training_options import SeedSpec
from wellcond.lab.tasks.base import Defaults, DefaultsBySize, Evaluation, Metric, Role
from wellcond.lab.tasks.counts import count_images
from wellcond.lab.tasks.given_data import DataTask, SplitSeed
from wellcond.lab.tasks.reid.batches import AUGMENTATIONS, IMAGES_EACH, PersonViews, identity_order
from wellcond.lab.tasks.reid.images import (
    FOLDERS,
    PersonImages,
    PersonSearch,
    PersonSplit,
    draw_identities,
    draw_persons,
    held_out_surplus,
    read_persons,
)
from wellcond.lab.tasks.reid.networks import build_reid, reid_loss
from wellcond.lab.tasks.reid.scores import guessing_precision, search_scores
from wellcond.lab.tasks.reid.specs import select_reid
from wellcond.runtime.models import unwrapped
from wellcond.runtime.ranks import Ranks

_HEIGHT = 256
_SMALLEST = 2 * IMAGES_EACH
_DEFAULTS = DefaultsBySize(
    small=Defaults(model="reid-tiny", epochs=12, batch_size=16, smallest_batch=_SMALLEST),
    large=Defaults(model="reid-r50", epochs=120, batch_size=64, smallest_batch=_SMALLEST),
    least=5_000,
)
_EVALUATED = 128


class PersonBatch(NamedTuple):
    """Normalized images [n, 3, height, width] and their identities' numbers among those that train, [n]."""

    images: Tensor
    labels: Tensor


class ReidTask(DataTask):
    """Re-identification: some identities of the training images validate, one's own in each seed.

    Args:
        name: What the data is called.
        pool: Images that training and validation are drawn from.
        test: The search that measures.
        train_images: Images that train in each seed.
        validation_images: Images that choose the lr in each seed.
        augmentation: One of `AUGMENTATIONS`.
        height: Of the images in the network; they are half as wide.
        workers: Processes that decode; 0 decodes in the one that trains.
    """

    kind = "re-identification"
    samples = "images"
    metric = Metric("mAP")

    def __init__(
        self,
        name: str,
        pool: PersonImages,
        test: PersonSearch,
        train_images: int,
        validation_images: int,
        augmentation: str,
        height: int = _HEIGHT,
        workers: int = 0,
    ) -> None:
        self.name = name
        self.pool, self.test = pool, test
        self.train_images, self.validation_images = train_images, validation_images
        self.augmentation, self.height, self.workers = augmentation, height, workers
        self.defaults = _DEFAULTS.of(len(pool))
        # Runs come seed by seed, so the last seed's split is nearly always the one that is needed.
        self.split = lru_cache(maxsize=1)(self._draw)

    @cached_property
    def test_images(self) -> int:
        """Images that measure: those that are searched for, and those that are searched in."""
        return len(self.test.query) + len(self.test.gallery)

    @cached_property
    def chance(self) -> float:
        """The expected mAP of a random order, in percent."""
        query, gallery = (
            (torch.from_numpy(part.identities), torch.from_numpy(part.cameras))
            for part in (self.test.query, self.test.gallery)
        )
        return guessing_precision(query, gallery)

    def fingerprint(self) -> str:
        """Return a digest of the images' names and sizes in bytes, of which measure, and of their height."""
        parts = [part.fingerprint() for part in (self.pool, self.test.query, self.test.gallery)]
        return hashlib.sha256(repr((parts, self.height)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return identities, cameras and image size."""
        return {
            "identities besides the test": len(np.unique(self.pool.identities)),
            "test queries": len(self.test.query),
            "cameras": len(np.unique(self.pool.cameras)),
            "channels": 3,
            "image_size": f"{self.height}x{self.height // 2}",
        }

    def check_files(self) -> None:
        """Open every image, as its format allows, without decoding it.

        Raises:
            DataError: If one is missing or broken.
        """
        check_images([*self.pool.files, *self.test.query.files, *self.test.gallery.files])

    def network(self, model: str, seed: int, weights: str | None) -> nn.Module:
        """Return the network that a run begins with."""
        spec = select_reid(model)
        classes = len(np.unique(self.split(seed).train.identities))
        return build_reid(spec, classes, weights)

    def for_seed(self, spec: SeedSpec, device: torch.device, rank: int, ranks: int) -> ReidSeed:
        """Return one seed's images.

        Raises:
            LabError: If the identities of a batch cannot be shared equally among the ranks.
        """
        return ReidSeed(self, self.split(spec.seed), spec, device, rank, ranks)

    def _draw(self, seed: int) -> PersonSplit:
        return draw_persons(self.pool, self.train_images, self.validation_images, seed)


class ReidSeed(SplitSeed[ReidTask, PersonSplit]):
    """One seed's images: identity, triplet and center loss in training, mAP of a search in evaluation.

    Args:
        task: The data.
        split: The images that train and validate.
        spec: The run.
        device: Where the batches go.
        rank: Which process of the run this is: it takes every ``ranks``-th identity of a batch, from this one on.
        ranks: How many processes the run has.
    """

    def __init__(
        self, task: ReidTask, split: PersonSplit, spec: SeedSpec, device: torch.device, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(task, split, spec, device, rank, ranks)
        self.group = Ranks(ranks > 1)
        self.persons = spec.batch_size // IMAGES_EACH
        check_batch(spec.batch_size, split)
        if self.persons % ranks:
            raise LabError(
                f"--batch-size {spec.batch_size}: its {self.persons} identities must be a multiple of the {ranks} "
                "processes that train"
            )
        self.labels = np.unique(split.train.identities, return_inverse=True)[1]

    def batches(self) -> Epochs[PersonBatch]:
        """Return the training batches."""
        spec = self.spec
        return EpochLoader(
            LabelledViews(PersonViews(self.split.train, self.task.height, spec.augmentation), self.labels),
            partial(identity_order, self.labels, self.persons, spec.seed),
            len(self.split.train) // spec.batch_size,
            spec.seed,
            lambda keys: [key for place, key in enumerate(keys) if place // IMAGES_EACH % self.ranks == self.rank],
            self._to_batch,
            self.task.workers,
        )

    def loss(self, model: nn.Module, batch: PersonBatch) -> Tensor:
        """Return the loss; the network's centers move."""
        return reid_loss(model(batch.images), batch.labels, unwrapped(model).get_buffer("centers"), self.group)

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return mAP and the share of queries found among the first; features that are not finite score NaN."""
        search = self.split.validation if role == "validation" else self.task.test
        images = search.query.joined(search.gallery)
        features = self._features(model, images, stopwatch)
        identities, cameras = (torch.from_numpy(part).to(self.device) for part in (images.identities, images.cameras))
        asked = len(search.query)
        query = (features[:asked], identities[:asked], cameras[:asked])
        scores = search_scores(query, (features[asked:], identities[asked:], cameras[asked:]))
        score = scores.pop("mAP")
        return Evaluation(score if bool(features.isfinite().all()) else math.nan, None, len(images), scores)

    def _features(self, model: nn.Module, images: PersonImages, stopwatch: Stopwatch) -> Tensor:
        """Return the features of all images, on every rank."""
        each = -(-len(images) // self.ranks)
        # All ranks take equally many: the last ones come twice where they do not suffice.
        own = [min(place, len(images) - 1) for place in range(self.rank * each, (self.rank + 1) * each)]
        keys = [[Key(place, 0) for place in own[start : start + _EVALUATED]] for start in range(0, each, _EVALUATED)]
        parts = []
        for samples in read_samples(PersonViews(images, self.task.height), keys, self.task.workers):
            shown = normalized(torch.stack(samples), self.device)
            stopwatch.start()
            parts.append(model(shown))
            stopwatch.stop()
        return self.group.gather(torch.cat(parts).float()).flatten(0, 1)[: len(images)]

    def _to_batch(self, samples: list[tuple[Tensor, int]], epoch: int, number: int) -> PersonBatch:
        images, labels = zip(*samples, strict=True)
        return PersonBatch(normalized(torch.stack(images), self.device), torch.tensor(labels, device=self.device))


class LabelledViews:
    """Views with the numbers of their identities.

    Args:
        views: The views.
        labels: Of each image.
    """

    def __init__(self, views: PersonViews, labels: np.ndarray[Any, Any]) -> None:
        self.views, self.labels = views, labels

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        return self.views[key], int(self.labels[key.image])


def check_batch(batch_size: int, split: PersonSplit) -> None:
    """Check that a batch can be made of whole identities.

    Raises:
        LabError: If not.
    """
    there = len(np.unique(split.train.identities))
    if batch_size % IMAGES_EACH or not 2 <= batch_size // IMAGES_EACH <= there:
        raise LabError(
            f"--batch-size must be {IMAGES_EACH} times the identities of a batch, of which there are 2 to {there}, "
            f"got {batch_size}"
        )


def open_reid(settings: Settings) -> ReidTask:
    """Return the task of a folder of the layout of Market-1501.

    Raises:
        LabError: If the network or the augmentation is unknown, the data cannot be read, or the numbers do not fit it.
    """
    path = Path(settings.data)
    augmentation = check_augmentation(settings.augmentation or AUGMENTATIONS[-1], AUGMENTATIONS)
    if settings.model is not None:
        select_reid(settings.model)
    pool, query, gallery = (read_persons(path / name) for name in FOLDERS)
    # Distractors are no person to be learned.
    pool = pool.take(np.flatnonzero(pool.identities > 0))
    train, validation = _counts(settings, pool)
    test = _draw_test(settings, PersonSearch(query, gallery))
    height = settings.image_size or _HEIGHT
    name = path.resolve().name
    task = ReidTask(name, pool, test, train, validation, augmentation, height, loading_processes(settings.jobs))
    for seed in range(settings.seeds):
        _check_search(f"seed {seed}: --val-images {validation}", task.split(seed).validation)
        check_batch(settings.batch_size or task.defaults.batch_size, task.split(seed))
    return task


def _counts(settings: Settings, pool: PersonImages) -> tuple[int, int]:
    """Return how many images of the pool train and how many validate."""
    usable = len(pool) - held_out_surplus(pool.identities)
    left_out = "without those that are left over of identities that validate"
    return count_images(settings, usable, f"images besides the test images ({left_out})", most=usable)


def _draw_test(settings: Settings, test: PersonSearch) -> PersonSearch:
    images, asked = test.query.joined(test.gallery), len(test.query)
    wanted = len(images) if settings.test_images is None else settings.test_images
    if wanted > len(images):
        raise LabError(f"--test-images must be at most {len(images)}, those of query and gallery, got {wanted}")
    if wanted < len(images):
        drawn = draw_identities(images.identities, wanted, TEST_SEED)
        test = PersonSearch(images.take(drawn[drawn < asked]), images.take(drawn[drawn >= asked]))
    _check_search(f"--test-images {wanted}", test)
    return test


def _check_search(what: str, search: PersonSearch) -> None:
    query, gallery = search.query, search.gallery
    for identity, camera in zip(query.identities, query.cameras, strict=True):
        if ((gallery.identities == identity) & (gallery.cameras != camera)).any():
            return
    raise LabError(f"{what}: too few, no person is seen by two cameras in them")
