"""From an image file to what a network sees: decoding, and the cuts of training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from wellcond.lab.data.decoding import BrokenImageError, opened_image
from wellcond.lab.data.image_files import Crop, ImageFiles
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.errors import DataError

# Images are kept decoded if there are at most so many and their pixels take at most so many bytes.
_MOST_IMAGES = 100_000
_MOST_BYTES = 2 * 1024**3

View = Callable[[Tensor], Tensor]


def shorter_side(size: int) -> int:
    """Return what the shorter side of an image is resized to before a square is cut out: 256 for 224.

    >>> shorter_side(224)
    256
    """
    return round(size * 8 / 7)


def training_view(crop: Crop, augmentation: str, size: int) -> View:
    """Return what a training image goes through, by torch's global generator.

    Args:
        crop: How ``"crop-flip"`` cuts.
        augmentation: ``"none"`` is the evaluation's view, ``"flip"`` mirrors half of the images, and ``"crop-flip"``
            cuts at random too.
        size: Height and width that the network sees.

    Returns:
        From an image, uint8, [3, height, width], to [3, size, size].
    """
    from torchvision.transforms import v2

    if augmentation == "none":
        return evaluation_view(size)
    if augmentation == "flip":
        cuts: list[Any] = [v2.Resize(shorter_side(size), antialias=True), v2.CenterCrop(size)]
    elif crop == "area":
        cuts = [v2.RandomResizedCrop(size, antialias=True)]
    else:
        cuts = [v2.Resize(shorter_side(size), antialias=True), v2.RandomCrop(size)]
    view: View = v2.Compose([*cuts, v2.RandomHorizontalFlip()])
    return view


def evaluation_view(size: int) -> View:
    """Return what an image goes through that validates or tests: resized, and its centre cut out."""
    from torchvision.transforms import v2

    view: View = v2.Compose([v2.Resize(shorter_side(size), antialias=True), v2.CenterCrop(size)])
    return view


class Pictures:
    """The decoded images of a list of files, from memory if they fit.

    Args:
        files: The images.
        keep: Whether to decode them all now, if they are at most 100,000 images of 2 GiB together.
    """

    def __init__(self, files: ImageFiles, keep: bool = True) -> None:
        self.files = files
        self._starts: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if not keep or len(files.labels) > _MOST_IMAGES:
            return
        sizes = [self._size(position) for position in range(len(files.labels))]
        pixels = [3 * width * height for width, height in sizes]
        if sum(pixels) > _MOST_BYTES:
            return
        # One tensor: the processes that load share it, which a list of many would not survive.
        self._starts = np.cumsum([0, *pixels])
        self._shapes = [(height, width, 3) for width, height in sizes]
        self._pixels = torch.empty(sum(pixels), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._keep, range(len(pixels)), chunksize=64))

    @property
    def in_memory(self) -> bool:
        """Whether the images are kept decoded."""
        return self._starts is not None

    def __getitem__(self, position: int) -> Tensor:
        """Return an image, uint8 RGB, [3, height, width].

        Raises:
            DataError: If the file does not decode.
        """
        if self._starts is None:
            return self._decode(position)
        start, end = self._starts[position : position + 2]
        return self._pixels[start:end].view(self._shapes[position]).permute(2, 0, 1)

    def _keep(self, position: int) -> None:
        assert self._starts is not None
        start, end = self._starts[position : position + 2]
        # Channels last in memory, as decoding gives them: resizing is fastest so, and no pixel differs in its rounding.
        self._pixels[start:end] = self._decode(position).permute(1, 2, 0).flatten()

    def _size(self, position: int) -> tuple[int, int]:
        try:
            with opened_image(self.files.path(position)) as image:
                return image.width, image.height
        except BrokenImageError as error:
            raise self._broken(position) from error

    def _decode(self, position: int) -> Tensor:
        try:
            with opened_image(self.files.path(position)) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except BrokenImageError as error:
            raise self._broken(position) from error

    def _broken(self, position: int) -> DataError:
        path = self.files.path(position)
        return DataError(f"--data: {path} {'cannot be decoded' if path.exists() else 'is missing'}")


class TrainingViews(Dataset[tuple[Tensor, int]]):
    """Training images by (epoch, position): their view is a function of the seed and these alone.

    Args:
        pictures: The images.
        view: What they go through, by torch's global generator.
        seed: The run's seed.
    """

    def __init__(self, pictures: Pictures, view: View, seed: int) -> None:
        self.pictures, self.view, self.seed = pictures, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, position = key
        with torch.random.fork_rng(devices=[]):
            # The CPU's generator alone: `torch.manual_seed` would start the device's again too.
            torch.default_generator.manual_seed(derived_seed(f"view of image {position} in epoch {epoch}", self.seed))
            return self.view(self.pictures[position]), int(self.pictures.files.labels[position])


class EvaluationViews(Dataset[tuple[Tensor, int]]):
    """Images that validate or test, by position.

    Args:
        pictures: The images.
        view: What they go through.
    """

    def __init__(self, pictures: Pictures, view: View) -> None:
        self.pictures, self.view = pictures, view

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.view(self.pictures[position]), int(self.pictures.files.labels[position])
