"""Labelled images that stay in their files, and the layout of one folder a class."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wellcond.lab.data.splits import Indices
from wellcond.lab.errors import LabError

Crop = Literal["area", "position"]
"""What training cuts out of an image: a part of random area and shape, or a random place in it."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files with their classes.

    Attributes:
        root: The folder that their names begin at.
        files: Their names, [n]; one array of bytes, because processes that read it do not copy it.
        labels: The class of each image, [n].
        classes: The classes' names.
    """

    root: Path
    files: NDArray[np.bytes_]
    labels: Indices
    classes: tuple[str, ...]

    def take(self, positions: Indices) -> ImageFiles:
        """Return the images at these positions."""
        return ImageFiles(self.root, self.files[positions], self.labels[positions], self.classes)

    def path(self, position: int) -> Path:
        """Return the file of one image."""
        return self.root / os.fsdecode(self.files[position])

    def size(self, position: int) -> int:
        """Return the bytes of one image's file.

        Raises:
            LabError: If it is missing, empty or no file.
        """
        name = os.fsdecode(self.files[position])
        try:
            found = self.path(position).stat()
        except (OSError, ValueError) as error:
            raise LabError(f"--data {self.root}: {name} is missing; unpack it again") from error
        if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
            kind = "empty" if stat.S_ISREG(found.st_mode) else "no file"
            raise LabError(f"--data {self.root}: {name} is {kind}; unpack it again")
        return found.st_size


@dataclass(frozen=True)
class FileData:
    """A data set of image files with its fixed test images set apart.

    Attributes:
        name: A short name, fit for a file name.
        pool: The images that training and validation are drawn from, once per seed.
        test: The images that only measure.
        crop: How its literature cuts training images.
    """

    name: str
    pool: ImageFiles
    test: ImageFiles
    crop: Crop

    def fingerprint(self) -> str:
        """Return a digest of every image's name, size in bytes and class; the pixels of large sets take hours to read.

        Raises:
            LabError: If a file is missing.
        """
        digest = hashlib.sha256(repr(self.pool.classes).encode())
        for part in (self.pool, self.test):
            digest.update(f"{len(part.labels)}".encode())
            for position, (file, label) in enumerate(zip(part.files, part.labels, strict=True)):
                digest.update(b"%s %d %d\n" % (file, part.size(position), label))
        return digest.hexdigest()


def listed_images(root: Path, files: list[str], labels: list[int] | Indices, classes: tuple[str, ...]) -> ImageFiles:
    """Return the images that lists name.

    Args:
        root: The folder that the names begin at.
        files: Their names.
        labels: The class of each image.
        classes: The classes' names.

    Raises:
        LabError: If there are none, or a label stands for no class.
    """
    if not files:
        raise LabError(f"--data {root}: no images are listed")
    positions = np.asarray(labels, dtype=np.int64)
    if positions.min() < 0 or positions.max() >= len(classes):
        raise LabError(
            f"--data {root}: classes must lie between 0 and {len(classes) - 1}, "
            f"found {positions.min()} to {positions.max()}"
        )
    return ImageFiles(root, np.array([os.fsencode(file) for file in files]), positions, classes)


def find_class_folders(path: Path) -> tuple[Path, Path] | None:
    """Return the folders of the training and of the test images, ``train`` and ``val`` (else ``test``); None if absent.

    They hold a folder a class, each with its images.
    """
    train = path / "train"
    held_out = next((path / name for name in ("val", "test") if (path / name).is_dir()), None)
    if not train.is_dir() or held_out is None or not any(entry.is_dir() for entry in train.iterdir()):
        return None
    return train, held_out


def read_class_folders(source: str, train: Path, held_out: Path) -> FileData:
    """List the images of a folder a class.

    Args:
        source: What `--data` named.
        train: The training images.
        held_out: The test images.

    Raises:
        LabError: If a class has no training image, or the classes differ.
    """
    from torchvision.datasets import ImageFolder

    parts = []
    for folder in (train, held_out):
        try:
            read = ImageFolder(str(folder), allow_empty=folder == held_out)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise LabError(f"--data {source}: {folder.name} must hold a folder of images a class: {reason}") from error
        parts.append(read)
    pool, test = parts
    if pool.classes != test.classes:
        odd = sorted(set(pool.classes) ^ set(test.classes))
        raise LabError(
            f"--data {source}: {train.name} and {held_out.name} must hold the same class folders, "
            f"but only one of them has {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''}"
        )
    name = train.parent.resolve().name.lower() or "folders"
    pool, test = (
        listed_images(
            folder,
            [file.removeprefix(f"{folder}{os.sep}") for file, _ in read.samples],
            [label for _, label in read.samples],
            tuple(read.classes),
        )
        for folder, read in ((train, pool), (held_out, test))
    )
    return FileData("".join(c if c.isalnum() else "-" for c in name).strip("-") or "folders", pool, test, "area")
