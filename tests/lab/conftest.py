"""Tiny parquet files in the Hugging Face image layout, and a tiny comparison."""

from __future__ import annotations

import gc
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


def _encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """Return an image file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _make_pixels(count: int, size: int, grey: bool, seed: int) -> np.ndarray:
    """Return random images, each brighter the higher its class."""
    shape = (count, size, size) if grey else (count, size, size, 3)
    noise = np.random.default_rng(seed).integers(0, 60, shape)
    brightness = 60 * (np.arange(count) % 3)
    return (noise + brightness.reshape(-1, *[1] * (len(shape) - 1))).astype(np.uint8)


def _write_images(
    path: Path,
    count: int,
    size: int = 8,
    grey: bool = False,
    seed: int = 0,
    described: bool = True,
    column: str = "img",
) -> np.ndarray:
    """Write a shard of three classes in turn; return its pixels."""
    pixels = _make_pixels(count, size, grey, seed)
    rows = [{"bytes": _encode(image), "path": None} for image in pixels]
    table = pa.table(
        {
            "id": pa.array([f"row {row}" for row in range(count)]),
            column: pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array([row % 3 for row in range(count)], type=pa.int64()),
        }
    )
    if described:
        features = {
            "id": {"dtype": "string", "_type": "Value"},
            column: {"_type": "Image"},
            "label": {"names": ["dark", "mid", "bright"], "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return pixels


@pytest.fixture
def encode():
    """The function that encodes pixels as an image file."""
    return _encode


@pytest.fixture
def write_images():
    """The function that writes a shard."""
    return _write_images


@pytest.fixture(scope="session")
def quick_collections():
    """Import what runs need, and let collections of garbage pass it over: each run's would take longer than the run."""
    importlib.import_module("wellcond.lab.training.runner")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
