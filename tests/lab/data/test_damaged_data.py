"""Each file of each kind of data, damaged in each way: one line that names it, and no run is begun."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from coco_files import write_coco
from image_sets import write_aircraft, write_cars, write_cifar, write_class_folders, write_cub, write_dogs
from PIL import Image
from reid_files import write_reid

from wellcond.__main__ import main
from wellcond.lab.data.decoding import check_images
from wellcond.lab.data.image_files import find_class_folders, read_class_folders
from wellcond.lab.errors import DataError, LabError
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.reproduction.panels import needed_data, scaled_panels
from wellcond.lab.reproduction.recipe import bundled_recipes
from wellcond.lab.tasks.detection.coco import check_content


class BegunError(Exception):
    """Work was begun."""


@pytest.fixture(autouse=True)
def no_runs(monkeypatch):
    def refuse(*_, **__):
        raise BegunError

    monkeypatch.setattr("wellcond.lab.engines.select._engine", refuse)


def _write_parquet(root: Path, write_images: Callable) -> Path:
    for name in ("train", "test"):
        write_images(root / f"{name}.parquet", count=40)
    return root


def _write_cifar(classes: int) -> Callable[[Path, Callable], Path]:
    def write(root: Path, _: Callable) -> Path:
        write_cifar(root, classes, count=12 if classes == 10 else 100)
        return root

    return write


WRITERS: dict[str, Callable[[Path, Callable], Path]] = {
    "parquet": _write_parquet,
    "cifar 10": _write_cifar(10),
    "cifar 100": _write_cifar(100),
    "class folders": lambda root, _: write_class_folders(root),
    "cub": lambda root, _: write_cub(root),
    "cars": lambda root, _: write_cars(root),
    "aircraft": lambda root, _: write_aircraft(root),
    "dogs": lambda root, _: write_dogs(root),
    "coco": lambda root, _: write_coco(root),
    "reid": lambda root, _: write_reid(root),
}
MODELS = {"coco": "fasterrcnn-tiny", "reid": "reid-tiny"}
IMAGES = (".jpg", ".jpeg", ".png")
NOT_LISTED = ("class folders", "reid")
"""Layouts whose images are those that are there."""


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def _cut(file: Path) -> None:
    content = file.read_bytes()
    half = content[: len(content) // 2]
    # A list that ends with a line is whole, as far as anyone can tell.
    file.write_bytes(half.rstrip(b"\n")[:-1] if half.endswith(b"\n") else half)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": _cut,
    "noise": lambda file: file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size)),
    "folder": _replaced(Path.mkdir),
    "missing": Path.unlink,
    "link to nothing": _replaced(lambda file: file.symlink_to("nowhere")),
    "device": _replaced(lambda file: file.symlink_to("/dev/null")),
    "pipe": _replaced(os.mkfifo),
}


def said(capsys, kind: str, root: Path) -> str:
    """Return the one line that a comparison of the data says."""
    arguments = ["--methods", "SGDM", "--seeds", "1", "--batch-size", "8", "--quiet"]
    arguments += ["--image-size", "32", "--val-images", "8"] if kind == "reid" else []
    arguments += ["--out", str((root if root.is_dir() else root.parent) / "out")]
    model = MODELS.get(kind, "convnet")
    assert main(["compare", "--data", str(root), "--model", model, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"wellcond: error: \S[^\n]*\n", captured.err), captured.err
    return captured.err


@pytest.mark.parametrize("kind", WRITERS)
def test_every_file_of_every_kind(capsys, tmp_path, write_images, kind):
    (tmp_path / "whole").mkdir()
    whole = WRITERS[kind](tmp_path / "whole", write_images)
    with pytest.raises(BegunError):
        said(capsys, kind, whole)
    shutil.rmtree(whole / "out")
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*")) if file.is_file()]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    read = [file for file in images if not (kind == "reid" and file.name.startswith("-1"))]  # junk is never opened
    for file in [file for file in files if file not in images] + read[:1] + read[-1:]:
        for name, damage in DAMAGES.items():
            if file in images and kind in NOT_LISTED and name in ("missing", "folder"):
                continue  # it is no image of the set then
            root = tmp_path / "damaged" / whole.name
            shutil.copytree(whole, root)
            damage(root / file)
            line = said(capsys, kind, root)
            assert str(root) in line, (file, name)
            if file in images:
                assert file.name in line, (file, name)
            shutil.rmtree(root)


def test_a_broken_image_in_the_middle_is_named_before_training(capsys, tmp_path):
    root = write_class_folders(tmp_path)
    broken = sorted((root / "train").rglob("*.png"))[2]
    broken.write_bytes(broken.read_bytes()[: -broken.stat().st_size // 3])
    assert f"{broken} cannot be decoded" in said(capsys, "class folders", root)
    torch.save(initial_model("convnet", 3, 3, seed=0).state_dict(), tmp_path / "weights.pt")
    given = ["--what", "bn", "--batch-size", "4", "--data", str(root), "--image-size", "32"]
    calibrate = [
        "calibrate",
        str(tmp_path / "weights.pt"),
        "--model",
        "convnet",
        *given,
        "--out",
        str(tmp_path / "new"),
    ]
    diagnose = ["diagnose", "convnet", str(root), "--image-size", "32", "--batch-size", "4", "--out", str(tmp_path)]
    for arguments in (calibrate, diagnose):
        assert main(arguments) == 2
        assert re.fullmatch(rf"wellcond: error: --data: {broken} cannot be decoded[^\n]*\n", capsys.readouterr().err)


def test_the_data_of_every_panel_is_looked_at_before_the_first_is_run(capsys, tmp_path, monkeypatch):
    def begin(*_, **__):
        raise BegunError

    monkeypatch.setattr("wellcond.lab.reproduction.reproduce.run_comparison", begin)
    needed = {recipe.name: needed_data(scaled_panels(recipe, "smoke")) for recipe in bundled_recipes()}
    name, data = next((name, data[0]) for name, data in needed.items() if data in (["imagenet"], ["mini-imagenet"]))
    root = write_class_folders(tmp_path / "images")
    arguments = ["reproduce", name, "--scale", "smoke", "--data", f"{data}={root}", "--out", str(tmp_path / "out")]
    with pytest.raises(BegunError):
        main(arguments)
    capsys.readouterr()
    broken = sorted((root / "train").rglob("*.png"))[2]
    broken.write_bytes(broken.read_bytes()[:40])
    assert main(arguments) == 2
    assert f"{broken} cannot be decoded" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"])
def test_images_that_are_cut_anywhere(tmp_path, format):
    file = tmp_path / "image"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    content = buffer.getvalue()
    file.write_bytes(content)
    check_images([file])
    if format == "JPEG":
        file.write_bytes(content + b"\0" * 9)  # some cameras write more after the image
        check_images([file])
    for end in range(0, len(content) * 3 // 4, 41):
        file.write_bytes(content[:end])
        with pytest.raises(DataError, match="image cannot be decoded"):
            check_images([file])


def test_an_image_larger_than_any_memory(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (10, 10)).save(buffer, "BMP")
    content = bytearray(buffer.getvalue())
    content[18:26] = (60_000).to_bytes(4, "little") * 2
    (tmp_path / "large.bmp").write_bytes(content)
    with pytest.raises(DataError, match=r"large\.bmp cannot be decoded"):
        check_images([tmp_path / "large.bmp"])


@pytest.mark.parametrize("label", [2**40, 1000, -1, -(2**40)])
def test_labels_that_no_class_could_have(capsys, tmp_path, encode, label):
    rows = [{"bytes": encode(np.zeros((8, 8, 3), np.uint8)), "path": None}] * 20
    labels = [0, 1] * 9 + [1, label]
    images = pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"img": images, "label": pa.array(labels)}), tmp_path / "images.parquet")
    line = said(capsys, "parquet", tmp_path / "images.parquet")
    assert "must lie between 0 and" in line
    assert str(label) in line


@pytest.mark.parametrize("labels", [[0, 1] * 9 + [1, None], [0, 1] * 9 + [0, 2**63]])
def test_labels_that_are_no_numbers_of_ours(capsys, tmp_path, encode, labels):
    rows = [{"bytes": encode(np.zeros((8, 8, 3), np.uint8)), "path": None}] * 20
    images = pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"img": images, "label": pa.array(labels, pa.uint64())}), tmp_path / "images.parquet")
    assert "label" in said(capsys, "parquet", tmp_path / "images.parquet")


@pytest.mark.parametrize("place", ["/dev/null", "/dev/zero", "pipe", "text", "Ünbekannt\n😀", "/proc/self/mem"])
def test_data_that_is_something_else(capsys, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("text").write_text("no image")
    assert main(["compare", "--data", place]) == 2
    assert re.fullmatch(r"wellcond: error: \S[^\n]*\n", capsys.readouterr().err)


def test_names_of_persons_that_are_too_large(tmp_path):
    from wellcond.lab.tasks.reid.images import read_persons

    for name in (f"{10**30}_c1.jpg", f"0001_c{2**31}.jpg"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(LabError, match="identity and camera must be below"):
            read_persons(tmp_path)
        (tmp_path / name).unlink()


ROW = {"image": {"id": 1, "file_name": "a.jpg", "width": 4, "height": 3}, "category": {"id": 7, "name": "cat"}}
THING = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 2, 2]}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        *(("images", key, value) for key in ("id", "width", "height") for value in (None, "1", 1.5, True, 2**70, [])),
        *(("images", "width", value) for value in (0, -1, 10**9)),
        *(("images", "file_name", value) for value in (None, "", 3)),
        *(("categories", key, None) for key in ("id", "name")),
        *(("annotations", key, value) for key in ("id", "image_id", "category_id") for value in (None, "1", 99.5)),
        *(("annotations", "bbox", value) for value in (None, [], [0, 0, 1], [0, 0, 1, float("nan")], ["0", 0, 1, 1])),
        *(("annotations", key, 99) for key in ("image_id", "category_id")),
    ],
)
def test_annotations_that_lack_something(part, key, value):
    content = {"images": [dict(ROW["image"])], "categories": [dict(ROW["category"])], "annotations": [dict(THING)]}
    check_content(content)
    content[part][0][key] = value
    with pytest.raises(ValueError, match=rf"{part}\[0\] must "):
        check_content(content)
    for changed in (None, [], {}, content | {part: None}, content | {part: [3]}):
        with pytest.raises(ValueError, match=part if isinstance(changed, dict) and changed else "images"):
            check_content(changed)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", WRITERS)
def test_folders_that_may_not_be_read(capsys, tmp_path, write_images, kind):
    root = WRITERS[kind](tmp_path, write_images)
    root.chmod(0)
    try:
        assert "cannot be read" in said(capsys, kind, root)
    finally:
        root.chmod(0o755)


def test_empty_class_folders_and_files_among_them(tmp_path):
    root = write_class_folders(tmp_path)
    shutil.rmtree(root / "train" / "n00")
    (root / "train" / "n00").write_text("a file")
    with pytest.raises(LabError, match="must hold the same class folders"):
        read_class_folders(str(root), *find_class_folders(root))
