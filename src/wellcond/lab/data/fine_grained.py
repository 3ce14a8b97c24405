"""Reading the lists of the fine-grained data sets: CUB-200-2011, Stanford Cars, FGVC-Aircraft and Stanford Dogs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from wellcond.lab.data.image_files import FileData, ImageFiles, listed_images
from wellcond.lab.errors import LabError


@dataclass(frozen=True)
class FineGrained:
    """A data set of one of the formats.

    Attributes:
        name: A short name, fit for a file name.
        folder: What its archive unpacks to; `--data` names it or the folder above.
        marks: Files or folders in it, by which it is known.
        read: From the folder to the training and the test images.
    """

    name: str
    folder: str
    marks: tuple[str, ...]
    read: Callable[[Path], tuple[ImageFiles, ImageFiles]]

    def find(self, path: Path) -> Path | None:
        """Return its folder: the path or the one in it; None if this is something else."""
        for folder in (path, path / self.folder):
            if all((folder / mark).exists() for mark in self.marks):
                return folder
        return None

    def open(self, folder: Path) -> FileData:
        """List its images.

        Raises:
            LabError: If a list is missing or damaged.
        """
        try:
            pool, test = self.read(folder)
        except LabError:
            raise
        except Exception as error:  # the readers of lists and of MATLAB's files have many ways to say it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LabError(f"--data {folder}: lists of {self.name} are missing or damaged ({reason})") from error
        return FileData(self.name, pool, test, "position")


def _read_cub(folder: Path) -> tuple[ImageFiles, ImageFiles]:
    files, labels, trains, names = (
        dict(line.split(maxsplit=1) for line in (folder / name).read_text(encoding="utf-8").splitlines() if line)
        for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    )
    # Classes are numbered from 1.
    classes = tuple(names[str(number + 1)].strip() for number in range(len(names)))

    def part(role: str) -> ImageFiles:
        chosen = [image for image in files if trains[image].strip() == role]
        return listed_images(
            folder / "images",
            [files[image].strip() for image in chosen],
            [int(labels[image]) - 1 for image in chosen],
            classes,
        )

    return part("1"), part("0")


def _read_cars(folder: Path) -> tuple[ImageFiles, ImageFiles]:
    from torchvision.datasets import StanfordCars

    with _called(folder, "stanford_cars") as root:
        train, test = (StanfordCars(root, split, loader=_path) for split in ("train", "test"))
        return _listed(folder, root / "stanford_cars", train), _listed(folder, root / "stanford_cars", test)


def _read_aircraft(folder: Path) -> tuple[ImageFiles, ImageFiles]:
    from torchvision.datasets import FGVCAircraft

    name = "fgvc-aircraft-2013b"
    with _called(folder, name) as root:
        train, test = (FGVCAircraft(root, split, loader=_path) for split in ("trainval", "test"))
        return _listed(folder, root / name, train), _listed(folder, root / name, test)


def _read_dogs(folder: Path) -> tuple[ImageFiles, ImageFiles]:
    from scipy.io import loadmat

    # Its archive of lists has no folder of its own; many unpack it into one.
    lists = folder if (folder / "train_list.mat").exists() else folder / "lists"
    parts = [loadmat(lists / f"{role}_list.mat", squeeze_me=True) for role in ("train", "test")]
    rows = [
        [(str(file), int(label) - 1) for file, label in zip(part["file_list"], part["labels"], strict=True)]
        for part in parts
    ]
    names = {label: file.split("/")[0] for part in rows for file, label in part}
    classes = tuple(names[label] for label in range(len(names)))
    train, test = (
        listed_images(folder / "Images", [file for file, _ in part], [label for _, label in part], classes)
        for part in rows
    )
    return train, test


def _path(path: Any) -> str:
    """Stand in for the function that decodes, so that the data set gives its lists."""
    return str(path)


@contextmanager
def _called(folder: Path, name: str) -> Iterator[Path]:
    """Give the folder above one of this name, which torchvision insists on; a link stands in for another name."""
    if folder.name == name:
        yield folder.parent
        return
    with TemporaryDirectory() as above:
        (Path(above) / name).symlink_to(folder.resolve(), target_is_directory=True)
        yield Path(above)


def _listed(folder: Path, seen: Path, read: Any) -> ImageFiles:
    rows = [read[position] for position in range(len(read))]
    files = [str(Path(file).relative_to(seen)) for file, _ in rows]
    return listed_images(folder, files, [int(label) for _, label in rows], tuple(map(str, read.classes)))


FINE_GRAINED = (
    FineGrained("cub-200-2011", "CUB_200_2011", ("images.txt", "train_test_split.txt", "images"), _read_cub),
    FineGrained("stanford-cars", "stanford_cars", ("devkit", "cars_train", "cars_test"), _read_cars),
    FineGrained("fgvc-aircraft", "fgvc-aircraft-2013b", ("data/images", "data/variants.txt"), _read_aircraft),
    FineGrained("stanford-dogs", "stanford_dogs", ("Images", "lists/train_list.mat"), _read_dogs),
    FineGrained("stanford-dogs", "stanford_dogs", ("Images", "train_list.mat"), _read_dogs),
)
"""The formats, in the order in which they are tried."""
