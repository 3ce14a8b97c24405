"""Opens the task that `--data` or `--task` names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wellcond.lab.data.named_data import DIGITS, GET_COCO, GET_REID
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_data
from wellcond.lab.methods.method import DEFAULT_METHODS, TEXT_METHODS

if TYPE_CHECKING:
    from wellcond.lab.runs.settings import Settings
    from wellcond.lab.tasks.base import Task


@dataclass(frozen=True)
class DataLayout:
    """A way in which data lies on a disk.

    Attributes:
        name: What `--data` names, as `wellcond list` shows it.
        description: One line for `wellcond list`.
        is_here: Whether a path that exists has this layout.
        open: From the settings to the task.
        takes: Options of data that other data does not have.
        methods: What is compared on it where no methods are named.
    """

    name: str
    description: str
    is_here: Callable[[Path], bool]
    open: Callable[[Settings], Task]
    takes: tuple[str, ...] = ()
    methods: tuple[str, ...] = DEFAULT_METHODS


# What finds and opens is imported when it is asked: `wellcond list` only names the layouts, and torchvision's detectors
# take seconds.
def _is_cifar(path: Path) -> bool:
    from wellcond.lab.data.cifar import find_cifar

    return find_cifar(path) is not None


def _is_fine_grained(path: Path) -> bool:
    from wellcond.lab.data.fine_grained import FINE_GRAINED

    return any(kind.find(path) is not None for kind in FINE_GRAINED)


def _is_coco(path: Path) -> bool:
    from wellcond.lab.tasks.detection.coco import is_coco

    return is_coco(path)


def _is_reid(path: Path) -> bool:
    from wellcond.lab.tasks.reid.images import is_reid

    return is_reid(path)


def _is_class_folders(path: Path) -> bool:
    from wellcond.lab.data.image_files import find_class_folders

    return find_class_folders(path) is not None


def _is_segmentation(path: Path) -> bool:
    from wellcond.lab.tasks.segmentation.formats import find_segmentation

    return path.is_dir() and find_segmentation(path) is not None


def _open_segmentation(settings: Settings) -> Task:
    from wellcond.lab.tasks.segmentation.task import open_segmentation

    return open_segmentation(settings)


def _is_text(path: Path) -> bool:
    from wellcond.lab.data.text import is_text

    return is_text(path)


def _is_table(path: Path) -> bool:
    from wellcond.lab.data.table_files import is_table

    return is_table(path)


def _is_features(path: Path) -> bool:
    from wellcond.lab.data.features import is_features

    return is_features(path)


def _open_text(settings: Settings) -> Task:
    from wellcond.lab.tasks.text import open_text

    return open_text(settings)


def _open_table(settings: Settings) -> Task:
    from wellcond.lab.tasks.table import open_table

    return open_table(settings)


def _open_features(settings: Settings) -> Task:
    from wellcond.lab.tasks.table import open_features

    return open_features(settings)


def _open_in_memory(settings: Settings) -> Task:
    from wellcond.lab.tasks.in_memory import open_in_memory

    return open_in_memory(settings)


def _open_folders(settings: Settings) -> Task:
    from wellcond.lab.tasks.folders import open_folders

    return open_folders(settings)


def _open_detection(settings: Settings) -> Task:
    from wellcond.lab.tasks.detection.task import open_detection

    return open_detection(settings)


def _open_reid(settings: Settings) -> Task:
    from wellcond.lab.tasks.reid.task import open_reid

    return open_reid(settings)


LAYOUTS = (
    DataLayout(
        "FILE.txt, or another text file",
        "language modelling: a small GPT predicts the next character (byte, if it is not UTF-8); the last tenth tests",
        _is_text,
        _open_text,
        methods=TEXT_METHODS,
    ),
    DataLayout(
        "FILE.csv, .tsv, .npy, or .parquet without images",
        "a table: classification or regression of a column (--target-column, --kind); a fifth of the rows tests",
        _is_table,
        _open_table,
        takes=("target_column", "kind"),
    ),
    DataLayout(
        "FILE.npz",
        "frozen features x [n, features] with labels y [n], perhaps x_test and y_test: a linear or small head",
        _is_features,
        _open_features,
        takes=("kind",),
    ),
    DataLayout(
        "FILE.parquet",
        "an image column of struct<bytes, path> and an integer label column; a fifth of it tests",
        lambda path: path.is_file(),
        _open_in_memory,
    ),
    DataLayout(
        "FOLDER",
        "the same, with *train*.parquet and *test*.parquet files; shards are joined",
        lambda path: next(path.glob("*.parquet"), None) is not None,
        _open_in_memory,
    ),
    DataLayout(
        "cifar-10-batches-py, cifar-100-python",
        "CIFAR as its site gives it out for Python; or the folder above",
        _is_cifar,
        _open_in_memory,
    ),
    DataLayout(
        "CUB_200_2011, stanford_cars, fgvc-aircraft-2013b, stanford_dogs",
        "the fine-grained sets as they unpack, with their own lists; or the folder above",
        _is_fine_grained,
        _open_folders,
    ),
    DataLayout(
        "annotations/instances_train*.json, train*/, and the same of val",
        "COCO: detection, or with masks instance segmentation; val only measures",
        _is_coco,
        _open_detection,
    ),
    DataLayout(
        "bounding_box_train, query, bounding_box_test",
        "Market-1501, DukeMTMC-reID: person re-identification; the query's persons only measure",
        _is_reid,
        _open_reid,
    ),
    DataLayout(
        "leftImg8bit + gtFine, ADEChallengeData2016, VOC2012, images + labels",
        "Cityscapes, ADE20K, Pascal VOC, GTA5: semantic segmentation; val only measures, or that of --test-data",
        _is_segmentation,
        _open_segmentation,
        takes=("test_data",),
    ),
    DataLayout(
        "train/CLASS/*, val/CLASS/*",
        "ImageNet, Mini-ImageNet and others: a folder of images a class; val (or test) only measures",
        _is_class_folders,
        _open_folders,
    ),
)
"""Every layout, in the order in which they are tried."""


@dataclass(frozen=True)
class Source:
    """The origin of well-known data, shown to a user who names it and does not have it.

    Attributes:
        pattern: A regular expression that its path matches, whatever the case.
        name: What it is called.
        get: What to download and where to put it.
    """

    pattern: str
    name: str
    get: str


SOURCES = (
    Source(
        "cityscapes",
        "Cityscapes",
        "download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com, "
        "unpack both into one folder, and name it",
    ),
    Source(
        "ade20?k|adechallenge",
        "ADE20K",
        "download ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu, unpack it, and name "
        "ADEChallengeData2016",
    ),
    Source(
        r"\bvoc",
        "Pascal VOC",
        "download VOCtrainval_11-May-2012.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2012, unpack it, and name "
        "VOCdevkit/VOC2012",
    ),
    Source(
        "gta.?5",
        "GTA5",
        "download the images and labels from https://download.visinf.tu-darmstadt.de/data/from_games, unpack them into "
        "one folder with images/ and labels/, and name it",
    ),
    Source("coco", "COCO", GET_COCO),
    Source("market|duke", "Market-1501 and DukeMTMC-reID", GET_REID),
    Source(
        r"cifar-?_?100",
        "CIFAR-100",
        "download https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz, unpack it, and name cifar-100-python",
    ),
    Source(
        r"cifar",
        "CIFAR-10",
        "download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, unpack it, and name cifar-10-batches-py",
    ),
    Source(
        r"mini.?imagenet",
        "Mini-ImageNet",
        "take its 100 classes out of ImageNet, with train/CLASS/*.jpg and val/CLASS/*.jpg of the same classes, and "
        "name the folder above",
    ),
    Source(
        r"imagenet|ilsvrc",
        "ImageNet",
        "download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org, sort them into "
        "train/CLASS/*.JPEG and val/CLASS/*.JPEG, and name the folder above",
    ),
    Source(
        r"cub",
        "CUB-200-2011",
        "download CUB_200_2011.tgz from https://www.vision.caltech.edu/datasets/cub_200_2011, unpack it, and name "
        "CUB_200_2011",
    ),
    Source(
        r"\bcars\b|stanford.?cars",
        "Stanford Cars",
        "put devkit, cars_train, cars_test and cars_test_annos_withlabels.mat (from a mirror: its site is gone) into "
        "a folder stanford_cars, and name it",
    ),
    Source(
        r"aircraft",
        "FGVC-Aircraft",
        "download https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz, unpack it, "
        "and name fgvc-aircraft-2013b",
    ),
    Source(
        r"\bdogs\b|stanford.?dogs",
        "Stanford Dogs",
        "download images.tar and lists.tar from http://vision.stanford.edu/aditya86/ImageNetDogs, unpack both into a "
        "folder stanford_dogs, and name it",
    ),
)
"""Well-known data; the first pattern that a path matches counts."""


def open_task(settings: Settings) -> Task:
    """Return the task of the data that the settings name.

    Args:
        settings: What was asked for.

    Returns:
        The task, its data found and checked.

    Raises:
        LabError: If there is no such data, it has an unknown layout, or something asked for does not fit it.
    """
    if settings.task is not None:
        from wellcond.lab.tasks.by_path import open_own

        if settings.task_is_given:
            raise LabError(f"the task {settings.task} was handed over as an object, and cannot be opened anew")
        return open_own(settings.task, settings.task_args, settings.data_module, settings.data_args, settings.score)
    layout = find_layout(settings.data)
    for option in dict.fromkeys(option for each in LAYOUTS for option in each.takes):
        if getattr(settings, option) is not None and (layout is None or option not in layout.takes):
            takers = ", ".join(each.name for each in LAYOUTS if option in each.takes)
            raise LabError(f"--{option.replace('_', '-')} is not for {settings.data}; it is for {takers}")
    if layout is None:
        return _open_in_memory(settings)
    try:
        return layout.open(settings)
    except OSError as error:
        # Without the right to read it, or gone meanwhile.
        place = error.filename or settings.data
        raise LabError(f"--data {place}: cannot be read ({error.strerror or error})") from error


def find_layout(data: str) -> DataLayout | None:
    """Return the layout of data, without reading it; None for the digits.

    Args:
        data: What `--data` names.

    Raises:
        LabError: If there is no such data, it has an unknown layout, or something in it is neither file nor folder.
    """
    if data == DIGITS:
        return None
    path = Path(data)
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:  # no name that a file could have
        raise LabError(f"--data {path}: cannot be read ({error})") from error
    if not exists:
        advice = _advice(path)
        if advice:
            raise LabError(f"--data {path}: there is no such folder{advice}")
        raise LabError(
            "--data must be 'digits', a parquet file or a folder of data (see `wellcond list data`); "
            f"there is no {path}"
        )
    check_data("--data", path)
    try:
        for layout in LAYOUTS:
            if layout.is_here(path):
                return layout
    except OSError as error:
        raise LabError(f"--data {path}: cannot be read ({error.strerror or error})") from error
    if path.is_file():
        raise LabError(f"--data {path}: has none of the layouts of `wellcond list data`")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
    raise LabError(f"--data {path}: has none of the layouts of `wellcond list data`, found {found}{_advice(path)}")


def _advice(path: Path) -> str:
    """Return what to download, if the path looks like data that is well known."""
    for source in SOURCES:
        if re.search(source.pattern, path.name, re.IGNORECASE):
            return f"; for {source.name} {source.get}"
    return ""
