"""The COCO layout: images, and the boxes, classes and masks of the objects in them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wellcond.lab.data.decoding import BrokenImageError, opened_image
from wellcond.lab.data.epoch_loader import Key
from wellcond.lab.data.named_data import GET_COCO
from wellcond.lab.data.splits import Indices
from wellcond.lab.errors import DataError, LabError

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# No decoder takes larger ones.
_LARGEST_SIDE = 65_535


@dataclass(frozen=True)
class CocoPaths:
    """The files of one part of a data set."""

    annotations: Path
    images: Path


def is_coco(path: Path) -> bool:
    """Return whether a folder has COCO's annotations of objects."""
    return next((path / "annotations").glob("instances_*.json"), None) is not None


def find_coco(path: Path) -> tuple[CocoPaths, CocoPaths] | None:
    """Return where the training and the test images lie; None if the folder has no COCO annotations.

    Of several years, the last that has both is taken.

    Raises:
        LabError: If there are annotations, but not of both parts, or not their images.
    """
    folder = path / "annotations"
    found = {
        match.groups(): file
        for file in sorted(folder.glob("instances_*.json"))
        if (match := re.fullmatch(r"instances_(train|val)(.*)", file.stem))
    }
    if not found:
        return None
    suffixes = sorted(suffix for part, suffix in found if part == "train" and ("val", suffix) in found)
    if not suffixes:
        names = ", ".join(file.name for file in found.values())
        raise LabError(f"--data {path}: needs instances_trainX.json and instances_valX.json, found {names}; {GET_COCO}")
    suffix = suffixes[-1]
    parts = []
    for part in ("train", "val"):
        name = f"{part}{suffix}"
        images = next((place for place in (path / name, path / "images" / name) if place.is_dir()), None)
        if images is None:
            raise LabError(f"--data {path}: needs a folder {name} of images beside annotations; {GET_COCO}")
        parts.append(CocoPaths(found[part, suffix], images))
    return parts[0], parts[1]


class CocoImages:
    """One part of a data set.

    Args:
        paths: Where it lies.

    Raises:
        LabError: If the annotations cannot be read, or pycocotools is not installed.
    """

    def __init__(self, paths: CocoPaths) -> None:
        self.paths = paths
        try:
            from pycocotools.coco import COCO
        except ImportError as error:
            raise LabError('COCO needs pycocotools: pip install "wellcond[lab]"') from error
        try:
            self._bytes = paths.annotations.read_bytes()
            content = json.loads(self._bytes)
            check_content(content)
            self.truth = index_objects(COCO(), content)
            self.ids = np.array(sorted(self.truth.imgs), dtype=np.int64)
            self.categories = tuple(sorted(self.truth.cats))
        except Exception as error:  # whatever a file that is something else makes the index raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LabError(f"--data {paths.annotations}: not COCO's instance annotations ({reason})") from error
        self._digest = hashlib.sha256(self._bytes).hexdigest()
        del self._bytes

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the order of the categories' numbers."""
        return tuple(self.truth.cats[number]["name"] for number in self.categories)

    @cached_property
    def _labels(self) -> dict[int, int]:
        # 0 is the background.
        return {category: label for label, category in enumerate(self.categories, start=1)}

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """Return an image's single objects: crowds, and boxes narrower or lower than a pixel, are left out."""
        return [
            thing
            for thing in self.truth.imgToAnns.get(image_id, [])
            if not thing.get("iscrowd", 0) and thing["bbox"][2] >= 1 and thing["bbox"][3] >= 1
        ]

    def with_objects(self) -> Indices:
        """Return the images that have single objects, by their numbers, ascending."""
        return np.array([number for number in self.ids.tolist() if self.objects(number)], dtype=np.int64)

    def files(self, ids: Indices) -> list[Path]:
        """Return the files of these images."""
        return [self.paths.images / self.truth.imgs[number]["file_name"] for number in ids.tolist()]

    def is_upright(self, image_id: int) -> bool:
        """Return whether an image is higher than wide."""
        image = self.truth.imgs[image_id]
        return bool(image["height"] > image["width"])

    def read(self, image_id: int) -> Tensor:
        """Return an image's pixels, uint8, [3, height, width].

        Raises:
            DataError: If the file is missing or cannot be decoded.
        """
        path = self.paths.images / self.truth.imgs[image_id]["file_name"]
        try:
            with opened_image(path) as image:
                pixels = np.array(image.convert("RGB"))
        except BrokenImageError as error:
            raise DataError(f"--data {path}: cannot be read ({error}); unpack it again") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def target(self, image_id: int, with_masks: bool) -> dict[str, Tensor]:
        """Return what torchvision's detectors learn of an image.

        Args:
            image_id: The image's number.
            with_masks: Whether masks are drawn, too.

        Returns:
            ``boxes`` [n, 4], float32, left, top, right and bottom; ``labels`` [n], int64, from 1 on; ``masks``
            [n, height, width], uint8.
        """
        image, things = self.truth.imgs[image_id], self.objects(image_id)
        boxes = torch.tensor([thing["bbox"] for thing in things], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, image["width"])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, image["height"])
        labels = torch.tensor([self._labels[thing["category_id"]] for thing in things], dtype=torch.int64)
        # Clamping may leave nothing of a box outside the image.
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        target = {"boxes": boxes[kept], "labels": labels[kept]}
        if with_masks:
            masks = torch.zeros(len(things), image["height"], image["width"], dtype=torch.uint8)
            for mask, thing in zip(masks, things, strict=True):
                mask.copy_(torch.from_numpy(self.truth.annToMask(thing)))
            target["masks"] = masks[kept]
        return target

    def fingerprint(self) -> str:
        """Return a digest of the annotations."""
        return self._digest


class CocoTrainingViews:
    """Training images with their targets, mirrored at random.

    Args:
        images: Where they come from.
        with_masks: Whether masks are drawn.
        flip: Whether half of them are mirrored.
    """

    def __init__(self, images: CocoImages, with_masks: bool, flip: bool) -> None:
        self.images, self.with_masks, self.flip = images, with_masks, flip

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, target = self.images.read(key.image), self.images.target(key.image, self.with_masks)
        if self.flip and np.random.default_rng(key.chance).random() < 0.5:
            return mirrored(pixels, target)
        return pixels, target


class CocoEvaluationViews:
    """Images as they are.

    Args:
        images: Where they come from.
    """

    def __init__(self, images: CocoImages) -> None:
        self.images = images

    def __getitem__(self, key: Key) -> Tensor:
        return self.images.read(key.image)


def mirrored(pixels: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image and its target with left and right exchanged."""
    width = pixels.shape[-1]
    left, top, right, bottom = target["boxes"].unbind(1)
    target = target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return pixels.flip(-1), target


def check_content(content: Any) -> None:
    """Check that annotations have what is read of them.

    Raises:
        ValueError: If something is missing or of another kind; it names the first place.
    """
    needed: dict[str, dict[str, Callable[[Any], bool]]] = {
        "images": {"id": _is_number, "file_name": _is_name, "width": _is_side, "height": _is_side},
        "categories": {"id": _is_number, "name": _is_name},
        "annotations": {"id": _is_number, "image_id": _is_number, "category_id": _is_number, "bbox": _is_box},
    }
    for part, keys in needed.items():
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or (not rows and part != "annotations"):
            raise ValueError(f"there must be a list of {part}")
        for place, row in enumerate(rows):
            for key, fits in keys.items():
                if not isinstance(row, dict) or not fits(row.get(key)):
                    found = repr(row.get(key) if isinstance(row, dict) else row)
                    raise ValueError(f"{part}[{place}] must have a {key}, found {found[:60]}")
    images, categories = ({row["id"] for row in content[part]} for part in ("images", "categories"))
    for place, row in enumerate(content["annotations"]):
        if row["image_id"] not in images or row["category_id"] not in categories:
            raise ValueError(f"annotations[{place}] must be of an image and a category that are listed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_side(value: Any) -> bool:
    return _is_number(value) and 0 < value <= _LARGEST_SIDE


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(side, (int, float)) and math.isfinite(side) for side in value)
    )


def index_objects(coco: COCO, content: dict[str, Any]) -> COCO:
    """Give an empty index its content; what it prints is dropped."""
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
