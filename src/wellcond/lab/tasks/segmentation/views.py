"""Images with their label maps as a network sees them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from wellcond.lab.data.decoding import BrokenImageError, opened_image
from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.errors import DataError
from wellcond.lab.tasks.segmentation.formats import Pair, SegmentationFiles
from wellcond.lab.tasks.segmentation.scores import IGNORED

AUGMENTATIONS = ("none", "flip", "scale-crop-flip")
"""What training images may go through."""

# Of the shorter side, as DeepLab's authors scale.
_SCALES = (0.5, 2.0)
# How label maps hold a number for each pixel: by a palette, or in grey.
_MODES = ("P", "L")


class SegmentationViews:
    """Images of a list of files, each with its label map.

    Args:
        files: The files.
        size: What the shorter side becomes; training also cuts squares of it.
        augmentation: One of `AUGMENTATIONS`; None for evaluation, which sees images whole.
    """

    def __init__(self, files: SegmentationFiles, size: int, augmentation: str | None = None) -> None:
        self.files, self.size, self.augmentation = files, size, augmentation

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """Return the image, uint8 [3, height, width], and the class of each pixel, uint8 [height, width]."""
        pair = self.files.pairs[key.image]
        generator = np.random.default_rng(key.chance)
        scaled = self.augmentation == AUGMENTATIONS[-1]
        scale = generator.uniform(*_SCALES) if scaled else 1.0
        pixels, labels = _read(pair, self.files.numbers, max(1, round(scale * self.size)))
        if self.augmentation is None:
            return pixels, labels
        pixels, labels = _cut(pixels, labels, self.size, generator if scaled else None)
        if self.augmentation != "none" and generator.random() < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return pixels, labels


def check_pairs(files: SegmentationFiles) -> None:
    """Look at the heads of all images and label maps.

    Raises:
        DataError: If a label map holds colours, or is not of the size of its image; the first one is named.
    """
    with ThreadPoolExecutor() as pool:
        for wrong in pool.map(_wrong, files.pairs, chunksize=64):
            if wrong is not None:
                raise DataError(wrong)


def _wrong(pair: Pair) -> str | None:
    try:
        with opened_image(pair.image) as image, opened_image(pair.labels) as labels:
            if labels.mode not in _MODES:
                return f"--data: {pair.labels} must hold a number for each pixel (mode P or L), got mode {labels.mode}"
            if labels.size != image.size:
                return f"--data: {pair.labels} must have the size of its image, {_size(image)}, got {_size(labels)}"
    except BrokenImageError as error:
        return f"--data: {pair.image} or {pair.labels} cannot be decoded ({error})"
    return None


def _size(image: Image.Image) -> str:
    return f"{image.height}x{image.width}"


def _read(pair: Pair, numbers: np.ndarray[tuple[int], np.dtype[np.uint8]], shorter: int) -> tuple[Tensor, Tensor]:
    """Return an image and its classes, brought to a size; of classes the nearest is taken."""
    try:
        with opened_image(pair.image) as image, opened_image(pair.labels) as labels:
            ratio = shorter / min(image.size)
            size = (max(shorter, round(ratio * image.width)), max(shorter, round(ratio * image.height)))
            # Pillow's reading of what is larger than needed is quicker than reading it whole.
            pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
            classes = numbers[np.asarray(labels.resize(size, Image.Resampling.NEAREST))]
    except BrokenImageError as error:
        raise DataError(f"--data: {pair.image} or {pair.labels} cannot be decoded ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(classes)


def _cut(pixels: Tensor, labels: Tensor, size: int, generator: np.random.Generator | None) -> tuple[Tensor, Tensor]:
    """Return a square: from the middle, or from a random place; what lies outside of the image is not counted."""
    height, width = labels.shape
    border = (0, max(0, size - width), 0, max(0, size - height))
    pixels, labels = F.pad(pixels, border), F.pad(labels, border, value=IGNORED)
    room = [side - size for side in labels.shape]
    top, left = [side // 2 for side in room] if generator is None else [int(generator.integers(s + 1)) for s in room]
    window = (slice(top, top + size), slice(left, left + size))
    return pixels[:, window[0], window[1]], labels[window]
