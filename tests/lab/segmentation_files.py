"""Tiny data sets in the layouts of Cityscapes, ADE20K, Pascal VOC and GTA5: a bright square before a dark ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_pair(image: Path, labels: Path, numbers: Sequence[int], seed: int, void: int, bright: int = 200) -> None:
    """Write an image of 24x36 and its label map, in which the first number is the ground and the second the square."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, (24, 36, 3)).astype(np.uint8)
    truth = np.full((24, 36), numbers[0], np.uint8)
    top, left = generator.integers(2, 10, 2)
    pixels[top : top + 12, left : left + 12] += np.uint8(bright - 60)
    truth[top : top + 12, left : left + 12] = numbers[1]
    truth[0] = void
    for file in (image, labels):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    Image.fromarray(truth).save(labels)


def write_cityscapes(root: Path, train: int = 8, val: int = 3, train_ids: bool = False) -> Path:
    kind, numbers, void = ("labelTrainIds", (0, 13), 255) if train_ids else ("labelIds", (7, 26), 0)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            city = ("ulm", "bonn")[number % 2]
            stem = f"{city}_{number:06d}_000019"
            image = root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png"
            labels = root / "gtFine" / part / city / f"{stem}_gtFine_{kind}.png"
            write_pair(image, labels, numbers, 100 * (part == "val") + number, void)
    return root


def write_ade20k(root: Path, train: int = 8, val: int = 3) -> Path:
    for part, count in (("training", train), ("validation", val)):
        for number in range(count):
            stem = f"ADE_{part[:5]}_{number:08d}"
            image, labels = root / "images" / part / f"{stem}.jpg", root / "annotations" / part / f"{stem}.png"
            write_pair(image, labels, (1, 150), 100 * (part == "validation") + number, 0)
    return root


def write_voc(root: Path, train: int = 8, val: int = 3) -> Path:
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, count in (("train", train), ("val", val)):
        names = [f"2007_{100 * (part == 'val') + number:06d}" for number in range(count)]
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
        for number, name in enumerate(names):
            labels = root / "SegmentationClass" / f"{name}.png"
            write_pair(root / "JPEGImages" / f"{name}.jpg", labels, (0, 20), 100 * (part == "val") + number, 255)
            palette = Image.open(labels).convert("L")
            palette.putpalette([channel for number in range(256) for channel in (number, 0, 255 - number)])
            palette.save(labels)  # as they are given out: a number by its colour
    return root


def write_gta5(root: Path, count: int = 10) -> Path:
    for number in range(count):
        name = f"{number + 1:05d}.png"
        write_pair(root / "images" / name, root / "labels" / name, (7, 26), 500 + number, 0, bright=120)
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "cityscapes": write_cityscapes,
    "ade20k": write_ade20k,
    "voc": write_voc,
    "gta5": write_gta5,
}
