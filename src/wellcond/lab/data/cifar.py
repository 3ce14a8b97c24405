"""Reading CIFAR-10 and CIFAR-100 as their site gives them out for Python."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from wellcond.lab.data.load import LabelledImages
from wellcond.lab.errors import LabError

FOLDERS = ("cifar-10-batches-py", "cifar-100-python")


def find_cifar(path: Path) -> Path | None:
    """Return the folder of the pickled batches: the path itself, or the one inside it; None if there is none."""
    if path.name in FOLDERS and path.is_dir():
        return path
    inside = [path / folder for folder in FOLDERS if (path / folder).is_dir()]
    if len(inside) > 1:
        raise LabError(f"--data {path}: holds both {' and '.join(FOLDERS)}; name one of them")
    return inside[0] if inside else None


def read_cifar(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """Read the training and the test images.

    Args:
        folder: One of `FOLDERS`.

    Returns:
        The training images and the test images; of CIFAR-100 with the hundred fine classes.

    Raises:
        LabError: If a file is missing or damaged.
    """
    # Only now: torchvision takes seconds to import.
    from torchvision import datasets

    original = datasets.CIFAR10 if folder.name == FOLDERS[0] else datasets.CIFAR100
    for name in [name for name, _ in (*original.train_list, *original.test_list)] + [original.meta["filename"]]:
        if not (folder / name).is_file():
            raise LabError(f"--data {folder}: {name} is missing; unpack {original.url} again")
    # The same reader without its checksums, which refuse every subset and every repacked copy.
    reader = type(
        original.__name__,
        (original,),
        {
            "train_list": [(name, None) for name, _ in original.train_list],
            "test_list": [(name, None) for name, _ in original.test_list],
            "meta": original.meta | {"md5": None},
            "base_folder": folder.name,
        },
    )
    try:
        pool, test = (reader(str(folder.parent), train=train) for train in (True, False))
        return _labelled(pool), _labelled(test)
    except (OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise LabError(f"--data {folder}: damaged or not CIFAR's ({error}); unpack {original.url} again") from error


def _labelled(read: object) -> LabelledImages:
    pixels, targets, classes = (getattr(read, name) for name in ("data", "targets", "classes"))
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return LabelledImages(images, np.asarray(targets, dtype=np.int64), tuple(classes))
