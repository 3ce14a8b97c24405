"""Reading images: the parquet layouts that are accepted, and what is said about the others."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from wellcond.lab.data.load import load_data
from wellcond.lab.data.parquet import read_parquet
from wellcond.lab.errors import LabError


def test_pixels_and_labels_survive(tmp_path, write_images):
    file = tmp_path / "images.parquet"
    pixels = write_images(file, count=9)
    images = read_parquet([file])
    assert images.images.dtype == torch.uint8
    assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert images.labels.tolist() == [0, 1, 2] * 3
    assert images.classes == ("dark", "mid", "bright")


def test_grey_images_have_one_channel(tmp_path, write_images):
    file = tmp_path / "images.parquet"
    pixels = write_images(file, count=6, grey=True)
    assert np.array_equal(read_parquet([file]).images[:, 0].numpy(), pixels)


def test_columns_are_found_by_type_without_a_description(tmp_path, write_images):
    file = tmp_path / "images.parquet"
    write_images(file, count=6, described=False, column="picture")
    images = read_parquet([file])
    assert len(images.labels) == 6
    assert images.classes == ("0", "1", "2")


def test_shards_are_joined_in_order(tmp_path, write_images):
    shards = [tmp_path / f"train-{index}.parquet" for index in range(2)]
    pixels = [write_images(file, count=6, seed=seed) for seed, file in enumerate(shards)]
    assert np.array_equal(read_parquet(shards).images.permute(0, 2, 3, 1).numpy(), np.concatenate(pixels))


def test_a_folder_tests_on_its_test_file(tmp_path, write_images):
    write_images(tmp_path / "my-train-0.parquet", count=6)
    write_images(tmp_path / "my-train-1.parquet", count=6, seed=1)
    test = write_images(tmp_path / "my-test.parquet", count=9, seed=2)
    data = load_data(str(tmp_path), None, None)
    assert len(data.pool.labels) == 12
    assert np.array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), test)
    assert len(load_data(str(tmp_path), None, test_images=3).test.labels) == 3


def test_a_single_file_is_split(tmp_path, write_images):
    write_images(tmp_path / "images.parquet", count=30)
    data = load_data(str(tmp_path / "images.parquet"), None, None)
    assert (len(data.pool.labels), len(data.test.labels)) == (24, 6)
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]


def test_resizing_averages_whole_pixels(tmp_path, write_images):
    pixels = write_images(tmp_path / "images.parquet", count=30, size=8)
    data = load_data(str(tmp_path / "images.parquet"), image_size=4, test_images=None)
    assert data.size == (4, 4)
    pooled = np.round(pixels.reshape(30, 4, 2, 4, 2, 3).mean(axis=(2, 4)))
    total = sum(part.images.sum().item() for part in (data.pool, data.test))
    assert abs(total - pooled.sum()) <= pooled.size * 0.5
    with pytest.raises(
        LabError, match="--image-size must divide the images' height and width .*, got 3 for images of 8x8"
    ):
        load_data(str(tmp_path / "images.parquet"), image_size=3, test_images=None)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"text": pa.array(["a"]), "label": pa.array([0])}, "text: string, label: int64"),
        ({"img": pa.array([{"bytes": b"", "path": ""}]), "name": pa.array(["cat"])}, "name: string"),
        ({"img": pa.array([b"raw"]), "label": pa.array([0])}, "img: binary, label: int64"),
    ],
)
def test_another_layout_is_described(tmp_path, columns, found):
    pq.write_table(pa.table(columns), tmp_path / "other.parquet")
    with pytest.raises(LabError, match=r"expected the Hugging Face image layout: .*; found ") as caught:
        load_data(str(tmp_path / "other.parquet"), None, None)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_description_is_ignored(tmp_path, write_images):
    file = tmp_path / "images.parquet"
    write_images(file, count=3)
    table = pq.read_table(file)
    odd = [{"info": {"features": 3}}, *({"info": {"features": {"label": {"names": names}}}} for names in (3, True, {}))]
    for description in ("not json", "{}", "[" * 100_000, *map(json.dumps, odd)):
        pq.write_table(table.replace_schema_metadata({"huggingface": description}), file)
        assert read_parquet([file]).labels.tolist() == [0, 1, 2]


def test_what_is_wrong_with_images_is_said(tmp_path, encode):
    def write(name, images, labels=None):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        labels = list(range(len(images))) if labels is None else labels
        rows = [None if image is None else {"bytes": image, "path": None} for image in images]
        pq.write_table(
            pa.table({"img": pa.array(rows, type=kind), "label": pa.array(labels, pa.int64())}), tmp_path / name
        )
        return [tmp_path / name]

    small, large = (encode(np.zeros((size, size), np.uint8)) for size in (4, 6))
    with pytest.raises(LabError, match="all images must have one size, found 4x4, 6x6"):
        read_parquet(write("sizes.parquet", [small, large]))
    with pytest.raises(LabError, match="the image of row 1 cannot be decoded"):
        read_parquet(write("broken.parquet", [small, b"not an image"]))
    with pytest.raises(LabError, match="the image of row 1 cannot be decoded"):
        read_parquet(write("cut.parquet", [small, small[: len(small) // 2]]))
    with pytest.raises(LabError, match="the image of row 1 has no bytes"):
        read_parquet(write("null.parquet", [small, None]))
    with pytest.raises(LabError, match="labels must lie between 0 and 1, found -1 to 1"):
        read_parquet(write("labels.parquet", [small, small], [-1, 1]))
    with pytest.raises(LabError, match="holds no images"):
        read_parquet(write("empty.parquet", []))


def test_the_fingerprint_tells_data_apart(tmp_path, write_images):
    prints = set()
    for seed in range(2):
        write_images(tmp_path / "images.parquet", count=30, seed=seed)
        for size in (4, 8):
            prints.add(load_data(str(tmp_path / "images.parquet"), size, None).fingerprint())
            prints.add(load_data(str(tmp_path / "images.parquet"), size, 3).fingerprint())
    assert len(prints) == 8
