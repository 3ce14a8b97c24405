"""Labelled images in memory, and the data sets that `--data` names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wellcond.lab.data.named_data import DIGITS
from wellcond.lab.data.splits import TEST_SEED, Indices, stratified_draw, without
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import short_name


@dataclass(frozen=True)
class LabelledImages:
    """Images of one size with their classes.

    Attributes:
        images: uint8, [n, channels, height, width].
        labels: The class of each image, [n].
        classes: The classes' names.
    """

    images: Tensor
    labels: Indices
    classes: tuple[str, ...]

    def take(self, positions: Indices) -> LabelledImages:
        """Return the images at these positions."""
        return LabelledImages(self.images[torch.from_numpy(positions)], self.labels[positions], self.classes)


@dataclass(frozen=True)
class ImageData:
    """A data set with its fixed test images set apart.

    Attributes:
        name: A short name, fit for a file name.
        pool: The images that training and validation are drawn from, once per seed.
        test: The images that only measure.
    """

    name: str
    pool: LabelledImages
    test: LabelledImages

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.pool.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.pool.images.shape[2], self.pool.images.shape[3]

    def fingerprint(self) -> str:
        """Return a digest of every pixel and label, so that results of other data are never taken for this data's."""
        digest = hashlib.sha256()
        for part in (self.pool, self.test):
            digest.update(repr((tuple(part.images.shape), part.classes)).encode())
            digest.update(np.ascontiguousarray(part.images.numpy()).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()


def load_data(
    source: str, image_size: int | None, test_images: int | None, train_images: int | None = None
) -> ImageData:
    """Load the data set that `--data` names.

    Args:
        source: ``"digits"``, a ``.parquet`` file, a folder of ``*train*.parquet`` and ``*test*.parquet`` files, or
            CIFAR's folder ``cifar-10-batches-py`` or ``cifar-100-python`` or the one above.
        image_size: Height and width to average-pool to; None keeps the images' own.
        test_images: How many images test; None: half of what 1,000 training images leave of the digits, a test file's
            every image, or a fifth of a single file (at most 10,000, and no more than train).
        train_images: How many will train, if that was asked for; only bounds the default of `test_images`.

    Returns:
        The data, with the same test images whatever the seed.

    Raises:
        LabError: If there is no such data, it has another layout, or fewer images than asked for.
    """
    if source == DIGITS:
        return _one_set(DIGITS, _digits(), image_size, test_images, default=lambda n: (n - 1000 + 1) // 2)
    from wellcond.lab.data.cifar import find_cifar, read_cifar

    cifar = find_cifar(Path(source))
    if cifar is not None:
        name = "cifar-10" if cifar.name.startswith("cifar-10-") else "cifar-100"
        return _two_sets(source, name, *read_cifar(cifar), image_size, test_images)
    # Only now: pyarrow and Pillow take a while to import, and the digits need neither.
    from wellcond.lab.data.parquet import find_parquet, read_parquet

    train_files, test_files = find_parquet(source)
    name = short_name(source, "images")
    if not test_files:
        most = min(10_000, train_images or 10_000)
        return _one_set(
            name, read_parquet(train_files), image_size, test_images, default=lambda n: max(1, min(n // 5, most))
        )
    return _two_sets(source, name, read_parquet(train_files), read_parquet(test_files), image_size, test_images)


def _two_sets(
    source: str,
    name: str,
    pool: LabelledImages,
    test: LabelledImages,
    image_size: int | None,
    test_images: int | None,
) -> ImageData:
    if pool.classes != test.classes or pool.images.shape[1:] != test.images.shape[1:]:
        raise LabError(
            f"--data {source}: the train and test files must agree in classes and image shape, "
            f"got {_shape(pool)} and {_shape(test)}"
        )
    if test_images is not None:
        test = test.take(draw_test(source, test.labels, test_images, most=len(test.labels)))
    return ImageData(name, _resized(pool, image_size), _resized(test, image_size))


def _digits() -> LabelledImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
    return LabelledImages(images, digits.target.astype(np.int64), tuple(str(name) for name in digits.target_names))


def _one_set(
    name: str,
    images: LabelledImages,
    image_size: int | None,
    test_images: int | None,
    default: Callable[[int], int],
) -> ImageData:
    count = len(images.labels)
    wanted = default(count) if test_images is None else test_images
    # At least one image must train and one validate.
    positions = draw_test(name, images.labels, wanted, most=count - 2)
    images = _resized(images, image_size)
    return ImageData(name, images.take(without(count, positions)), images.take(positions))


def draw_test(source: str, labels: Indices, wanted: int, most: int) -> Indices:
    """Return the positions of the images that test: the same ones for every seed and comparison.

    Args:
        source: What `--data` named.
        labels: The class of each image, [n].
        wanted: How many test.
        most: How many can.

    Raises:
        LabError: If more are wanted than can test.
    """
    if wanted > most:
        raise LabError(f"--test-images {wanted}: {source} has {len(labels)} images, of which at most {most} can test")
    return stratified_draw(labels, wanted, TEST_SEED)


def _resized(images: LabelledImages, size: int | None) -> LabelledImages:
    height, width = images.images.shape[2:]
    if size is None or size == height == width:
        return images
    if height != width or height % size:
        raise LabError(
            f"--image-size must divide the images' height and width (averaging whole pixels), "
            f"got {size} for images of {height}x{width}"
        )
    # In pieces: the float copy of a whole data set would be four times as large as the data.
    pooled = [
        F.avg_pool2d(piece.float(), height // size).round().to(torch.uint8) for piece in images.images.split(4096)
    ]
    return LabelledImages(torch.cat(pooled), images.labels, images.classes)


def _shape(images: LabelledImages) -> str:
    channels, height, width = images.images.shape[1:]
    return f"{len(images.classes)} classes of {channels}x{height}x{width}"
