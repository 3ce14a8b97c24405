"""Training images of persons: batches of P identities with K images each, augmented as in the strong baseline."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wellcond.lab.data.decoding import BrokenImageError, opened_image
from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.data.splits import Indices, derived_seed
from wellcond.lab.errors import DataError
from wellcond.lab.tasks.reid.images import PersonImages

IMAGES_EACH = 4
"""K: images of each identity in a batch."""

AUGMENTATIONS = ("none", "flip", "crop-flip", "crop-flip-erase")

# Of ImageNet's training images, as a colour.
_MEAN_COLOUR = (124, 116, 104)
# Of random erasing (Zhong et al. 2020): shares of the area, and the least ratio of the sides.
_ERASED = (0.02, 0.4)
_FLATTEST = 0.3


def identity_order(labels: Indices, persons: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches: P random identities, K images of each, one identity after the other.

    Each identity's images are dealt out K at a time, each once, before any is dealt again; where fewer than K are left
    they wait for the next deal. Of an identity with fewer than K images some are drawn twice.

    Args:
        labels: Of each image, [n].
        persons: P, at most the identities that there are.
        seed: The order is a function of this and the epoch.
        epoch: The epoch's number.

    Returns:
        ``n // (P K)`` batches of positions.
    """
    generator = np.random.default_rng(derived_seed(f"order of epoch {epoch}", seed))
    owned = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    hands: list[list[list[int]]] = [[] for _ in owned]
    batches = []
    for _ in range(len(labels) // (persons * IMAGES_EACH)):
        ready = [person for person, hand in enumerate(hands) if hand]
        if len(ready) < persons:
            for person, hand in enumerate(hands):
                if not hand:
                    hands[person] = _deal(owned[person], generator)
            ready = list(range(len(owned)))
        chosen = generator.choice(ready, size=persons, replace=False)
        batches.append([image for person in chosen.tolist() for image in hands[person].pop()])
    return batches


def _deal(images: Indices, generator: np.random.Generator) -> list[list[int]]:
    if len(images) < IMAGES_EACH:
        return [generator.choice(images, size=IMAGES_EACH, replace=True).tolist()]
    whole = len(images) // IMAGES_EACH * IMAGES_EACH
    hands: list[list[int]] = generator.permutation(images)[:whole].reshape(-1, IMAGES_EACH).tolist()
    return hands


class PersonViews:
    """Images of persons, scaled to one size and augmented: uint8, [3, height, width].

    Args:
        images: The images.
        height: Of a view; its width is half of it.
        augmentation: ``"none"``, ``"flip"`` (mirror half of them), ``"crop-flip"`` (also cut at random out of the image
            with a black border, 10 pixels at height 256) or ``"crop-flip-erase"`` (also, in half of them, paint over a
            rectangle).
    """

    def __init__(self, images: PersonImages, height: int, augmentation: str = "none") -> None:
        self.images, self.height, self.width = images, height, height // 2
        self.augmentation = augmentation

    def __getitem__(self, key: Key) -> Tensor:
        path = self.images.files[key.image]
        try:
            with opened_image(path) as image:
                scaled = image.convert("RGB").resize((self.width, self.height), Image.Resampling.BILINEAR)
        except BrokenImageError as error:
            raise DataError(f"--data {path}: cannot be read ({error}); unpack it again") from error
        pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)
        chances = np.random.default_rng(key.chance)
        if "flip" in self.augmentation and chances.random() < 0.5:
            pixels = pixels.flip(-1)
        if "crop" in self.augmentation:
            pixels = cropped(pixels, max(1, round(10 * self.height / 256)), chances)
        if "erase" in self.augmentation and chances.random() < 0.5:
            pixels = erased(pixels, chances)
        return pixels


def cropped(pixels: Tensor, border: int, chances: np.random.Generator) -> Tensor:
    """Return as large a part of the image with a black border, at a random place."""
    height, width = pixels.shape[-2:]
    top, left = chances.integers(2 * border + 1, size=2).tolist()
    return torch.nn.functional.pad(pixels, (border,) * 4)[:, top : top + height, left : left + width]


def erased(pixels: Tensor, chances: np.random.Generator) -> Tensor:
    """Return an image with a random rectangle in the mean colour, which becomes 0 when it is normalized.

    The rectangle has between 2 and 40 % of the area, and sides in a ratio between 0.3 and 1 / 0.3; after 100 draws that
    do not fit the image stays whole.
    """
    height, width = pixels.shape[-2:]
    for _ in range(100):
        area = chances.uniform(*_ERASED) * height * width
        ratio = chances.uniform(_FLATTEST, 1 / _FLATTEST)
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows < height and 0 < columns < width:
            top, left = chances.integers(height - rows + 1), chances.integers(width - columns + 1)
            pixels = pixels.clone()
            pixels[:, top : top + rows, left : left + columns] = torch.tensor(_MEAN_COLOUR, dtype=pixels.dtype)[
                :, None, None
            ]
            return pixels
    return pixels
