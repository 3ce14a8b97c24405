"""Data sets that recipes name: what each is, and where a user's copy of it lies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from wellcond.lab.errors import LabError, unknown_name

DIGITS = "digits"
"""The name of the data that comes with the lab."""

AUGMENTATIONS = ("none", "flip", "crop-flip")
"""What training images may go through."""

VARIABLE = "WELLCOND_DATA"
"""The environment variable that may name a folder with all data sets, each under its name."""

NAMED_DATA = {
    "digits": "scikit-learn's bundled digits; needs no path",
    "cifar10": "the folder cifar-10-batches-py of cifar-10-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar100": "the folder cifar-100-python of cifar-100-python.tar.gz (www.cs.toronto.edu/~kriz/cifar.html)",
    "cifar10-jpeg": "a folder with *train*.parquet and *test*.parquet files of CIFAR-10 (Hugging Face layout)",
    "mini-imagenet": "a folder with train/ and val/, a subfolder of images for each of 100 classes",
    "imagenet": "a folder with train/ and val/, a subfolder of images for each of 1,000 classes (image-net.org)",
    "aircraft": "the folder fgvc-aircraft-2013b (www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft)",
    "cars": "the folder of Stanford Cars: cars_train, cars_test and devkit",
    "dogs": "the folder of Stanford Dogs: Images and the lists train_list.mat, test_list.mat",
    "cub": "the folder CUB_200_2011 (www.vision.caltech.edu/datasets/cub_200_2011)",
    "coco": "a folder with train2017, val2017 and annotations/instances_*2017.json (cocodataset.org)",
    "cityscapes": "a folder with leftImg8bit/ and gtFine/ (cityscapes-dataset.com)",
    "ade20k": "the folder ADEChallengeData2016 (sceneparsing.csail.mit.edu)",
    "gta5": "a folder with images/ and labels/ of GTA5 (download.visinf.tu-darmstadt.de/data/from_games)",
    "market1501": "a folder with bounding_box_train, query and bounding_box_test (Market-1501)",
    "dukemtmc": "a folder with bounding_box_train, query and bounding_box_test (DukeMTMC-reID)",
}
"""From a name to what a user's copy must be."""

GET_COCO = (
    "download train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org, unpack them "
    "into one folder (annotations/instances_train2017.json, train2017/, ...), and name it"
)
"""Where COCO comes from."""

GET_REID = (
    "download Market-1501-v15.09.15.zip (https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html) or "
    "DukeMTMC-reID.zip (from a mirror: its site is gone), unpack it, and name the folder that has "
    "bounding_box_train, query, bounding_box_test in it"
)
"""Where Market-1501 and DukeMTMC-reID come from."""


def bind_data(given: Sequence[str], needed: Sequence[str]) -> dict[str, str]:
    """Return where each data set lies.

    Args:
        given: ``NAME=PATH`` each, or a path alone if one data set is needed.
        needed: Names in `NAMED_DATA`.

    Returns:
        From each needed name to its path.

    Raises:
        LabError: If a name is unknown or given twice, or a data set that is needed has no path.

    >>> bind_data(["cifar10=/data/cifar-10-batches-py"], ["cifar10"])
    {'cifar10': '/data/cifar-10-batches-py'}
    >>> bind_data(["images.parquet"], ["cifar10-jpeg"])
    {'cifar10-jpeg': 'images.parquet'}
    """
    bound: dict[str, str] = {}
    wanted = [name for name in dict.fromkeys(needed) if name != DIGITS]
    for text in given:
        name, path = _read(text, wanted)
        if name in bound:
            raise LabError(f"--data must give each data set once, got {name} twice")
        bound[name] = path
    found = {name: _path(name, bound, os.environ) for name in dict.fromkeys(needed)}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        asked = ", ".join(f"{name}=PATH" for name in missing)
        what = [f"{name}: {NAMED_DATA[name]}" if len(missing) > 1 else NAMED_DATA[name] for name in missing]
        raise LabError(f"--data {asked} must say where the data lie: {'; '.join(what)}")
    return {name: path for name, path in found.items() if path is not None}


def _read(text: str, wanted: Sequence[str]) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator:
        if len(wanted) != 1:
            raise LabError(f"--data must look like NAME=PATH for each of {', '.join(wanted) or 'none'}, got {text!r}")
        return wanted[0], text
    if name not in NAMED_DATA:
        raise unknown_name("data", name, NAMED_DATA)
    if not path:
        raise LabError(f"--data must look like NAME=PATH, got {text!r}")
    return name, path


def _path(name: str, bound: Mapping[str, str], environment: Mapping[str, str]) -> str | None:
    if name == DIGITS:
        return DIGITS
    if name in bound:
        return bound[name]
    if VARIABLE in environment and (folder := Path(environment[VARIABLE]) / name).exists():
        return str(folder)
    return None
