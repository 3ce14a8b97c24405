"""What `--data` names: every layout is known by what is in the folder, and what is missing is said in one line."""

from __future__ import annotations

import pytest
from image_sets import write_aircraft, write_cars, write_cifar, write_class_folders, write_cub, write_dogs

from wellcond.lab.errors import LabError
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.folders import FolderTask
from wellcond.lab.tasks.in_memory import InMemoryTask
from wellcond.lab.tasks.open import open_task


def opened(path):
    task = open_task(Settings(data=str(path), image_size=32))
    return type(task), task.name, len(task.data.pool.classes)


def test_digits_and_parquet(tmp_path, write_images):
    assert open_task(Settings()).name == "digits"
    write_images(tmp_path / "train.parquet", count=30)
    write_images(tmp_path / "test.parquet", count=30)
    assert isinstance(open_task(Settings(data=str(tmp_path), model="convnet")), InMemoryTask)
    file = open_task(Settings(data=str(tmp_path / "test.parquet"), model="convnet"))
    assert isinstance(file, InMemoryTask)
    assert file.name == "test"


def test_cifar(tmp_path):
    write_cifar(tmp_path, 10)
    assert opened(tmp_path) == (InMemoryTask, "cifar-10", 10)
    assert opened(tmp_path / "cifar-10-batches-py") == (InMemoryTask, "cifar-10", 10)


def test_class_folders(tmp_path):
    write_class_folders(tmp_path / "Mini ImageNet")
    assert opened(tmp_path / "Mini ImageNet") == (FolderTask, "mini-imagenet", 3)
    (tmp_path / "Mini ImageNet" / "val").rename(tmp_path / "Mini ImageNet" / "test")
    assert opened(tmp_path / "Mini ImageNet") == (FolderTask, "mini-imagenet", 3)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_cub, "cub-200-2011"),
        (write_cars, "stanford-cars"),
        (write_aircraft, "fgvc-aircraft"),
        (write_dogs, "stanford-dogs"),
    ],
)
def test_fine_grained_sets_by_their_folder_and_the_one_above(tmp_path, write, name):
    folder = write(tmp_path)
    assert opened(folder) == opened(tmp_path) == (FolderTask, name, 3)


@pytest.mark.parametrize("write", [write_cub, write_cars, write_aircraft, write_dogs])
def test_fine_grained_sets_by_another_name(tmp_path, write):
    folder = write(tmp_path).rename(tmp_path / "mine")
    task = open_task(Settings(data=str(folder), image_size=32))
    for part in (task.data.pool, task.data.test):
        assert all(part.path(position).is_relative_to(folder) for position in range(len(part.labels)))
        assert all(part.path(position).is_file() for position in range(len(part.labels)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cifar10", "for CIFAR-10 download https://.*/cifar-10-python.tar.gz, unpack it, and name cifar-10-batches-py"),
        ("cifar-100-python", "for CIFAR-100 download https://.*/cifar-100-python.tar.gz, .*name cifar-100-python"),
        ("ImageNet", r"for ImageNet download ILSVRC2012_img_train.tar .* into train/CLASS/\*.JPEG and val/CLASS"),
        ("mini-imagenet", r"for Mini-ImageNet take .* with train/CLASS/\*.jpg and val/CLASS"),
        ("CUB_200_2011", "for CUB-200-2011 download .* and name CUB_200_2011"),
        ("stanford_cars", "for Stanford Cars put .* into a folder stanford_cars"),
        ("fgvc-aircraft-2013b", "for FGVC-Aircraft download https://.*tar.gz, unpack it"),
        ("stanford_dogs", "for Stanford Dogs download images.tar and lists.tar .*"),
    ],
)
def test_well_known_data_that_is_not_there(tmp_path, name, advice):
    with pytest.raises(LabError, match=f"there is no such folder; {advice}") as caught:
        open_task(Settings(data=str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_gets_the_same_advice(tmp_path):
    (tmp_path / "imagenet").mkdir()
    message = "none of the layouts of `wellcond list data`, found nothing; for ImageNet download"
    with pytest.raises(LabError, match=message):
        open_task(Settings(data=str(tmp_path / "imagenet")))


def test_data_of_another_layout(tmp_path):
    with pytest.raises(LabError, match=r"folder of data \(see `wellcond list data`\); there is no .*/pictures"):
        open_task(Settings(data=str(tmp_path / "pictures")))
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(LabError, match="has none of the layouts of `wellcond list data`, found notes.txt"):
        open_task(Settings(data=str(tmp_path)))
