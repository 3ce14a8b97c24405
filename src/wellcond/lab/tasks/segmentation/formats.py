"""The layouts of segmentation data: the places of images and label maps, and the meaning of the labels' numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wellcond.lab.data.splits import Indices
from wellcond.lab.errors import LabError
from wellcond.lab.tasks.segmentation.scores import IGNORED

# In the order of the numbers that are trained on.
CITYSCAPES = (
    *(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
    ),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
ADE20K = tuple(f"class {number}" for number in range(1, 151))

_IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Pair:
    """An image and the file of its label map."""

    image: Path
    labels: Path


@dataclass(frozen=True)
class SegmentationFiles:
    """Images with label maps of one part of a data set.

    Attributes:
        pairs: The files.
        classes: The classes' names.
        numbers: Uint8, [256]: from a label map's number to the class, or to `IGNORED`.
    """

    pairs: tuple[Pair, ...]
    classes: tuple[str, ...]
    numbers: NDArray[np.uint8]

    def take(self, positions: Indices) -> SegmentationFiles:
        """Return some of them."""
        return SegmentationFiles(tuple(self.pairs[at] for at in positions.tolist()), self.classes, self.numbers)

    def fingerprint(self) -> str:
        """Return a digest of the files' names and sizes, and of what their numbers mean."""
        digest = hashlib.sha256(repr(self.classes).encode() + self.numbers.tobytes())
        for pair in self.pairs:
            for file in (pair.image, pair.labels):
                digest.update(f"{file.name}:{file.stat().st_size};".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Format:
    """A layout of segmentation data.

    Attributes:
        name: What it is called.
        find: From a folder to where it lies in it, or None.
        read: From there to what trains and what measures; the latter is None where the layout does not say it.
    """

    name: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path], tuple[SegmentationFiles, SegmentationFiles | None]]


def find_segmentation(path: Path) -> tuple[Format, Path] | None:
    """Return the layout of a folder and where in it the data lies; None if it has none of them."""
    for kind in FORMATS:
        root = kind.find(path)
        if root is not None:
            return kind, root
    return None


def _numbers(classes: Mapping[int, int]) -> NDArray[np.uint8]:
    numbers = np.full(256, IGNORED, dtype=np.uint8)
    for number, label in classes.items():
        numbers[number] = label
    return numbers


_BY_ID = _numbers({number: label for label, number in enumerate(_CITYSCAPES_IDS)})
_BY_TRAIN_ID = _numbers({label: label for label in range(len(CITYSCAPES))})


def _find_cityscapes(path: Path) -> Path | None:
    there = (path / "leftImg8bit" / "train").is_dir() and (path / "gtFine" / "train").is_dir()
    return path if there else None


def _read_cityscapes(root: Path) -> tuple[SegmentationFiles, SegmentationFiles]:
    ending = "_leftImg8bit.png"
    train = sorted((root / "leftImg8bit" / "train").glob(f"*/*{ending}"))
    # The site gives label maps of ids; its scripts make those of the numbers that are trained on.
    ready = bool(train) and _cityscapes_labels(root, "train", train[0], "labelTrainIds").is_file()
    kind, numbers = ("labelTrainIds", _BY_TRAIN_ID) if ready else ("labelIds", _BY_ID)
    parts = []
    for part in ("train", "val"):
        images = sorted((root / "leftImg8bit" / part).glob(f"*/*{ending}"))
        pairs = tuple(Pair(image, _cityscapes_labels(root, part, image, kind)) for image in images)
        parts.append(_checked(root / "leftImg8bit" / part, pairs, CITYSCAPES, numbers))
    return parts[0], parts[1]


def _cityscapes_labels(root: Path, part: str, image: Path, kind: str) -> Path:
    stem = image.name.removesuffix("_leftImg8bit.png")
    return root / "gtFine" / part / image.parent.name / f"{stem}_gtFine_{kind}.png"


def _find_ade20k(path: Path) -> Path | None:
    for root in (path, path / "ADEChallengeData2016"):
        if (root / "images" / "training").is_dir() and (root / "annotations" / "training").is_dir():
            return root
    return None


def _read_ade20k(root: Path) -> tuple[SegmentationFiles, SegmentationFiles]:
    numbers = _numbers({label + 1: label for label in range(len(ADE20K))})
    parts = []
    for part in ("training", "validation"):
        images = _images(root / "images" / part)
        pairs = tuple(Pair(image, root / "annotations" / part / f"{image.stem}.png") for image in images)
        parts.append(_checked(root / "images" / part, pairs, ADE20K, numbers))
    return parts[0], parts[1]


def _find_voc(path: Path) -> Path | None:
    for root in (path, path / "VOC2012", path / "VOCdevkit" / "VOC2012"):
        if (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
            return root
    return None


def _read_voc(root: Path) -> tuple[SegmentationFiles, SegmentationFiles]:
    numbers = _numbers({label: label for label in range(len(VOC))})
    parts = []
    for part in ("train", "val"):
        file = root / "ImageSets" / "Segmentation" / f"{part}.txt"
        try:
            names = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise LabError(f"--data {file}: cannot be read ({reason})") from error
        pairs = tuple(
            Pair(root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png") for name in names
        )
        parts.append(_checked(file, pairs, VOC, numbers))
    return parts[0], parts[1]


def _find_gta5(path: Path) -> Path | None:
    if not ((path / "images").is_dir() and (path / "labels").is_dir()):
        return None
    return path if next((path / "images").glob("*.png"), None) is not None else None


def _read_gta5(root: Path) -> tuple[SegmentationFiles, None]:
    pairs = tuple(Pair(image, root / "labels" / image.name) for image in _images(root / "images"))
    return _checked(root / "images", pairs, CITYSCAPES, _BY_ID), None


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise LabError(f"--data {folder}: there is no such folder")
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGES)


def _checked(
    place: Path, pairs: tuple[Pair, ...], classes: tuple[str, ...], numbers: NDArray[np.uint8]
) -> SegmentationFiles:
    if not pairs:
        raise LabError(f"--data {place}: holds no images")
    for pair in pairs:
        for file in (pair.image, pair.labels):
            if not file.is_file():
                raise LabError(f"--data: {file} is missing{', or is no file' if file.exists() else ''}")
    return SegmentationFiles(pairs, classes, numbers)


FORMATS = (
    Format("Cityscapes", _find_cityscapes, _read_cityscapes),
    Format("ADE20K", _find_ade20k, _read_ade20k),
    Format("Pascal VOC", _find_voc, _read_voc),
    Format("GTA5", _find_gta5, _read_gta5),
)
"""Every layout, in the order in which they are tried."""
