"""Tiny data sets in the layout of Market-1501: persons are colours, cameras are brightness."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_person(folder: Path, identity: int, camera: int, frame: int, duke: bool = False) -> None:
    """Write an image of 32x16 whose colours are the identity's."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(1000 + identity).integers(30, 200, (4, 1, 3)).repeat(8, axis=0)
    noise = np.random.default_rng((identity + 1, camera, frame)).integers(0, 40, (32, 16, 3))
    pixels = (colours + noise + 5 * camera).clip(0, 255).astype(np.uint8)
    number = "-1" if identity < 0 else f"{identity:04d}"
    name = f"{number}_c{camera}_f{frame:07d}.jpg" if duke else f"{number}_c{camera}s1_{frame:06d}_01.jpg"
    Image.fromarray(pixels).save(folder / name, quality=95)


def write_reid(root: Path, train: int = 8, test: int = 4, each: int = 3, duke: bool = False) -> Path:
    """Write identities of `each` images by each of two cameras; the gallery also has junk and distractors."""
    for identity in range(1, train + 1):
        for camera in (1, 2):
            for frame in range(each):
                write_person(root / "bounding_box_train", identity, camera, frame, duke)
    for identity in range(train + 1, train + test + 1):
        for camera in (1, 2):
            write_person(root / "query", identity, camera, 100, duke)
            for frame in range(each):
                write_person(root / "bounding_box_test", identity, camera, frame, duke)
    for frame in range(3):
        write_person(root / "bounding_box_test", 0, 1 + frame % 2, frame, duke)
        write_person(root / "bounding_box_test", -1, 1, frame, duke)
    return root
