"""Tiny copies of well-known image sets in their real formats."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def pixels(label: int, seed: int, height: int = 40, width: int = 44) -> np.ndarray:
    """Return an image with noise, the brighter the higher its class."""
    noise = np.random.default_rng(seed).integers(0, 50, (height, width, 3))
    return (noise + 50 * label).astype(np.uint8)


def write_image(file: Path, label: int, seed: int, height: int = 40, width: int = 44) -> None:
    """Write an image of a class."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(label, seed, height, width)).save(file)


def write_cifar(root: Path, classes: int, count: int = 12) -> dict[str, np.ndarray]:
    """Write pickles of `count` images as CIFAR-10's or CIFAR-100's; return each file's pixels, [n, 3, 32, 32]."""
    ten = classes == 10
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    files = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    written = {}
    for seed, name in enumerate(files):
        images = np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
        labels = [position % classes for position in range(count)]
        named = {"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": [0] * count}
        content = {"data": images.reshape(count, -1), "filenames": [f"{n}.png" for n in range(count)], **named}
        (folder / name).write_bytes(pickle.dumps(content))
        written[name] = images
    names = [f"class {number}" for number in range(classes)]
    meta = {"label_names": names} if ten else {"fine_label_names": names, "coarse_label_names": ["all"]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta))
    return written


def write_class_folders(root: Path, train: int = 8, val: int = 3, classes: int = 3) -> Path:
    """Write a folder of `train` and `val` images a class, of differing sizes, as ImageNet's."""
    for role, count in (("train", train), ("val", val)):
        for label in range(classes):
            for number in range(count):
                file = root / role / f"n0{label}" / f"{role}_{number}.{'JPEG' if number % 2 else 'png'}"
                write_image(file, label, seed=100 * label + number + (50 if role == "val" else 0), width=40 + number)
    return root


def write_cub(root: Path, count: int = 8, classes: int = 3) -> Path:
    """Write CUB_200_2011, of whose images of a class every fourth tests."""
    folder = root / "CUB_200_2011"
    images, labels, split = [], [], []
    for label in range(classes):
        for number in range(count):
            image = len(images) + 1
            name = f"{label + 1:03}.Bird_{label}/Bird_{number}.jpg"
            write_image(folder / "images" / name, label, seed=image)
            images.append(f"{image} {name}\n")
            labels.append(f"{image} {label + 1}\n")
            split.append(f"{image} {int(number % 4 != 3)}\n")
    (folder / "images.txt").write_text("".join(images))
    (folder / "image_class_labels.txt").write_text("".join(labels))
    (folder / "train_test_split.txt").write_text("".join(split))
    (folder / "classes.txt").write_text("".join(f"{n + 1} {n + 1:03}.Bird_{n}\n" for n in range(classes)))
    return folder


def write_cars(root: Path, count: int = 6, classes: int = 3) -> Path:
    """Write stanford_cars: `count` training images a class, half as many that test."""
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(
        folder / "devkit" / "cars_meta.mat", {"class_names": _cells([f"Car {n}" for n in range(classes)], row=True)}
    )
    kind = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    for role, number in (("train", count), ("test", count // 2)):
        rows = []
        for index in range(number * classes):
            name = f"{index + 1:05}.jpg"
            write_image(folder / f"cars_{role}" / name, index % classes, seed=index)
            rows.append((1, 1, 40, 40, index % classes + 1, name))
        file = folder / ("devkit/cars_train_annos.mat" if role == "train" else "cars_test_annos_withlabels.mat")
        savemat(file, {"annotations": np.array(rows, dtype=kind)[None]})
    return folder


def write_aircraft(root: Path, count: int = 8, classes: int = 3) -> Path:
    """Write fgvc-aircraft-2013b: of a variant's images every fourth tests, the others are ``trainval``."""
    data = root / "fgvc-aircraft-2013b" / "data"
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for label in range(classes):
        for number in range(count):
            name = f"{1000 * label + number:07}"
            write_image(data / "images" / f"{name}.jpg", label, seed=1000 * label + number)
            lists["test" if number % 4 == 3 else "trainval"].append(f"{name} Model {label} B\n")
    for role, lines in lists.items():
        (data / f"images_variant_{role}.txt").write_text("".join(lines))
    (data / "variants.txt").write_text("".join(f"Model {n} B\n" for n in range(classes)))
    return data.parent


def write_dogs(root: Path, count: int = 8, classes: int = 3, lists: str = "lists") -> Path:
    """Write stanford_dogs: of a breed's images every fourth tests."""
    folder = root / "stanford_dogs"
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label in range(classes):
        for number in range(count):
            name = f"n0208{label}-Breed/n0208{label}_{number}.jpg"
            write_image(folder / "Images" / name, label, seed=100 * label + number)
            rows["test" if number % 4 == 3 else "train"].append((name, label + 1))
    (folder / lists).mkdir(parents=True, exist_ok=True)
    for role, part in rows.items():
        files = _cells([name for name, _ in part])
        labels = np.array([[label] for _, label in part], dtype=float)
        savemat(folder / lists / f"{role}_list.mat", {"file_list": files, "annotation_list": files, "labels": labels})
    return folder


def _cells(texts: list[str], row: bool = False) -> np.ndarray:
    cells = np.empty(len(texts), dtype=object)
    cells[:] = texts
    return cells[None] if row else cells[:, None]
