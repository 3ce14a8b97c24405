"""Reading CIFAR-10 and CIFAR-100 as their site gives them out for Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wellcond.lab.data.load import LabelledImages
from wellcond.lab.data.plain_pickle import read_plain_pickle
from wellcond.lab.errors import LabError


@dataclass(frozen=True)
class _Cifar:
    """How one of the two lies on a disk.

    Attributes:
        url: Its archive.
        train: Files of the training images.
        test: The file of the test images.
        meta: The file of the classes' names.
        labels: What the labels are called in the former.
        names: What the names are called in the latter.
    """

    url: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str


_CIFARS = {
    "cifar-10-batches-py": _Cifar(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar-100-python": _Cifar(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        ("train",),
        "test",
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
}
FOLDERS = tuple(_CIFARS)


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

    The batches are pickles, and no checksum is asked for, so that subsets and repacked copies can be read: only arrays,
    texts, numbers, lists and dicts are (see `read_plain_pickle`).

    Args:
        folder: One of `FOLDERS`.

    Returns:
        The training images and the test images; of CIFAR-100 with the hundred fine classes.

    Raises:
        LabError: If a file is missing or damaged, or holds anything else.
    """
    layout = _CIFARS[folder.name]
    for name in (*layout.train, layout.test, layout.meta):
        if not (folder / name).is_file():
            raise LabError(f"--data {folder}: {name} is missing; unpack {layout.url} again")
    try:
        names = read_plain_pickle(folder / layout.meta)[layout.names]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LabError(f"{folder / layout.meta}: {layout.names} must be a list of names")
        classes = tuple(names)
        pool, test = (_read(folder, files, layout.labels, classes) for files in (layout.train, (layout.test,)))
        return pool, test
    except LabError as error:
        raise LabError(f"--data {error}; unpack {layout.url} again") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise LabError(f"--data {folder}: not CIFAR's ({error!r}); unpack {layout.url} again") from error


def _read(folder: Path, files: tuple[str, ...], labels: str, classes: tuple[str, ...]) -> LabelledImages:
    pixels, targets = [], []
    for name in files:
        batch = read_plain_pickle(folder / name)
        images = np.asarray(batch["data"])
        given = np.asarray(batch[labels])
        if images.dtype != np.uint8 or images.size != given.size * 3 * 32 * 32:
            raise LabError(f"{folder / name}: must hold 3x32x32 bytes an image, found {images.dtype} {images.shape}")
        if given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= len(classes)):
            raise LabError(f"{folder / name}: labels must be integers between 0 and {len(classes) - 1}")
        pixels.append(images.reshape(-1, 3, 32, 32))
        targets.append(given.astype(np.int64).ravel())
    found = np.concatenate(targets)
    if not found.size:
        raise LabError(f"{folder / files[0]}: the file holds no images")
    return LabelledImages(torch.from_numpy(np.concatenate(pixels)), found, classes)
