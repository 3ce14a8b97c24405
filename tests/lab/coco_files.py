"""Tiny data sets in the COCO layout: coloured boxes on grey noise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
COLOURS = {3: (220, 40, 40), 7: (40, 40, 220)}


def rectangle(number: int, image_id: int, category: int, box: list[float], crowd: int = 0) -> dict:
    """Return an object whose mask is its box, as COCO writes it."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    segmentation: object = [[left, top, right, top, right, bottom, left, bottom]]
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": width * height,
        "iscrowd": crowd,
        "segmentation": segmentation,
    }


def write_part(root: Path, part: str, count: int, first_id: int, empty: int = 0) -> dict:
    """Write images of 64x48 and 48x64 in turn with one or two objects each, the last `empty` of them without."""
    generator = np.random.default_rng(first_id)
    folder = root / part
    folder.mkdir(parents=True)
    images, things = [], []
    for number in range(count):
        image_id = first_id + number
        width, height = (64, 48) if number % 3 else (48, 64)
        pixels = generator.integers(100, 140, (height, width, 3)).astype(np.uint8)
        for place in range(0 if number >= count - empty else 1 + number % 2):
            category = 3 if (number + place) % 2 else 7
            left, top = 2 + 24 * place, 4 + int(generator.integers(8))
            pixels[top : top + 20, left : left + 18] = COLOURS[category]
            things.append(rectangle(1000 * first_id + len(things) + 1, image_id, category, [left, top, 18, 20]))
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=95)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    content = {"images": images, "annotations": things, "categories": CATEGORIES}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return content


def write_coco(root: Path, train: int = 14, test: int = 4) -> Path:
    """Write a data set of which two training images have no objects."""
    write_part(root, "train2017", train, 100, empty=2)
    write_part(root, "val2017", test, 500)
    return root
