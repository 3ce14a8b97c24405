"""Reading images from parquet files in the Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from wellcond.lab.data.decoding import BrokenImageError, opened_image
from wellcond.lab.data.load import LabelledImages
from wellcond.lab.errors import LabError

# The most classes that labels alone stand for, if there are not more images than that.
_UNNAMED = 1000
_EXPECTED = "expected the Hugging Face image layout: an image column of struct<bytes, path> and an integer label column"


def find_parquet(source: str) -> tuple[list[Path], list[Path]]:
    """Return the training and the test files that a path stands for.

    Args:
        source: A parquet file, or a folder of ``*train*.parquet`` and ``*test*.parquet`` files (or shards).

    Returns:
        The training files and the test files, each sorted by name; for a single file the second is empty.

    Raises:
        LabError: If there is no such path, or the folder lacks either kind.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        train = [file for file in files if "train" in file.name]
        test = [file for file in files if "test" in file.name and "train" not in file.name]
        if not train or not test:
            found = ", ".join(file.name for file in files[:5]) or "no parquet file"
            raise LabError(
                f"--data {source}: a folder must hold *train*.parquet and *test*.parquet files, found {found}"
            )
        return train, test
    if not path.exists():
        raise LabError(
            "--data must be 'digits', a parquet file or a folder of data (see `wellcond list data`); "
            f"there is no {source}"
        )
    return [path], []


def read_parquet(files: Sequence[Path]) -> LabelledImages:
    """Read and decode every image of one or more shards.

    Args:
        files: The shards, in order.

    Returns:
        The images; grey if the first one is grey, otherwise RGB.

    Raises:
        LabError: If a file is not parquet or has another layout, if the images differ in size, or one does not decode.
    """
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    names: tuple[str, ...] | None = None
    mode: str | None = None
    for file in files:
        table, image_column, label_column, shard_names = _read_table(file)
        names = names or shard_names
        encoded = [row["bytes"] if row else None for row in table.column(image_column).to_pylist()]
        if not encoded:
            raise LabError(f"--data {file}: the file holds no images")
        if mode is None:
            mode = "L" if _pixels(file, 0, encoded[0]).ndim == 2 else "RGB"
        images.append(_decode(file, encoded, mode))
        labels.append(_labels(file, table.column(label_column)))
    sizes = sorted({part.shape[1:3] for part in images})
    if len(sizes) > 1:
        raise LabError(f"--data {files[0]}: all images must have one size, found {_sizes(sizes)}")
    pixels = np.concatenate(images)
    classes = np.concatenate(labels)
    if names is None:
        # Not as many as the largest label says, whatever that is: each takes part of the network and of every list.
        most = max(_UNNAMED, len(classes))
        if classes.max() >= most:
            raise LabError(
                f"--data {files[0]}: labels of classes without names must lie between 0 and {most - 1}, found "
                f"{classes.max()}; the classes' names belong into the file's Hugging Face metadata"
            )
        names = tuple(str(label) for label in range(int(classes.max()) + 1))
    if classes.min() < 0 or classes.max() >= len(names):
        raise LabError(
            f"--data {files[0]}: labels must lie between 0 and {len(names) - 1}, "
            f"found {classes.min()} to {classes.max()}"
        )
    tensor = torch.from_numpy(pixels if pixels.ndim == 4 else pixels[..., None]).permute(0, 3, 1, 2).contiguous()
    return LabelledImages(tensor, classes, names)


def _read_table(file: Path) -> tuple[pa.Table, str, str, tuple[str, ...] | None]:
    try:
        schema = pq.read_schema(file)
        image_column, label_column, names = _columns(file, schema)
        return pq.read_table(file, columns=[image_column, label_column]), image_column, label_column, names
    except LabError:
        raise
    except pa.ArrowInvalid as error:
        raise LabError(f"--data {file}: {_EXPECTED}, but this is not a parquet file") from error
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged after its beginning
        raise LabError(f"--data {file}: cannot be read ({' '.join(str(error).split())})") from error


def _labels(file: Path, column: pa.ChunkedArray) -> NDArray[np.int64]:
    if column.null_count:
        raise LabError(f"--data {file}: each image must have a label, and {column.null_count} have none")
    try:
        return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)
    except pa.ArrowInvalid as error:
        raise LabError(f"--data {file}: a label is too large ({error})") from error


def _columns(file: Path, schema: pa.Schema) -> tuple[str, str, tuple[str, ...] | None]:
    """Return the image column, the label column and the classes' names, by the metadata or else by type."""
    features = _features(schema)
    images = [name for name, feature in features.items() if feature.get("_type") == "Image" and name in schema.names]
    labels = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    images = [field.name for field in schema if field.name in images or (not images and _is_image(field.type))]
    labels = [
        field.name for field in schema if (field.name in labels or not labels) and pa.types.is_integer(field.type)
    ]
    if len(labels) > 1:
        labels = [name for name in labels if name in ("label", "labels", "fine_label")]
    if not images or not labels or not _is_image(schema.field(images[0]).type):
        found = ", ".join(f"{field.name}: {field.type}" for field in schema) or "no column"
        raise LabError(f"--data {file}: {_EXPECTED}; found {found}")
    names = features.get(labels[0], {}).get("names")
    return images[0], labels[0], tuple(map(str, names)) if names and isinstance(names, list) else None


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """Return the Hugging Face description of the columns; empty if there is none that can be read."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    if not isinstance(described, dict):
        return {}
    return {name: feature for name, feature in described.items() if isinstance(feature, dict)}


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    content = kind.field("bytes").type
    return bool(pa.types.is_binary(content) or pa.types.is_large_binary(content))


def _pixels(file: Path, row: int, encoded: bytes | None, mode: str | None = None) -> NDArray[np.uint8]:
    """Return an image's pixels; without a mode grey ones as they are, and others in RGB."""
    if encoded is None:
        raise LabError(f"--data {file}: the image of row {row} has no bytes")
    try:
        with opened_image(encoded) as image:
            return np.asarray(image.convert(mode or ("L" if image.mode in ("1", "L") else "RGB")))
    except BrokenImageError as error:
        raise LabError(f"--data {file}: the image of row {row} cannot be decoded") from error


def _decode(file: Path, encoded: Sequence[bytes | None], mode: str) -> NDArray[np.uint8]:
    def pixels(row: int) -> NDArray[np.uint8]:
        return _pixels(file, row, encoded[row], mode)

    # Threads, because the decoders release the interpreter lock.
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(pixels, range(len(encoded)), chunksize=256))
    sizes = sorted({image.shape[:2] for image in decoded})
    if len(sizes) > 1:
        raise LabError(f"--data {file}: all images must have one size, found {_sizes(sizes)}")
    return np.stack(decoded)


def _sizes(sizes: Sequence[tuple[int, ...]]) -> str:
    listed = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
    return listed + (", ..." if len(sizes) > 4 else "")
