"""Decoding image files: one that is broken is named in one line, also where another process reads it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image

from wellcond.lab.errors import DataError

T = TypeVar("T")
# What is odd in a file and decodes all the same; what does not is said by an error.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# How whole files of these formats end; what decodes them reads most of the file for it.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class BrokenImageError(ValueError):
    """A file or some bytes are not an image, or only a part of one."""


@contextmanager
def opened_image(source: Path | bytes) -> Iterator[Image.Image]:
    """Open an image for the block, which may decode it.

    Args:
        source: The file, or its bytes.

    Raises:
        BrokenImageError: If it is missing, or does not open or decode, whatever its decoder says of that.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except Exception as error:  # each decoder has its own kinds, and an image may be too large to open
        raise BrokenImageError(" ".join(str(error).split()) or type(error).__name__) from error


def check_images(files: Sequence[Path]) -> None:
    """Open every file, and decode those whose end is not that of a whole one.

    An image in whose middle something is wrong may pass: decoding all images of a large set takes hours.

    Args:
        files: The images.

    Raises:
        DataError: If one is missing or broken; the first of them is named.
    """
    with ThreadPoolExecutor() as pool:
        for broken in pool.map(_broken, files, chunksize=64):
            if broken is not None:
                raise DataError(broken)


def _broken(file: Path) -> str | None:
    if not file.is_file():
        return f"--data: {file} is missing{', or is no file' if file.exists() else ''}"
    try:
        with opened_image(file) as image:
            end = _ENDS.get(image.format or "")
            if end is None or not _ends(file, end):
                image.load()
    except BrokenImageError as error:
        return f"--data: {file} cannot be decoded ({error})"
    return None


def _ends(file: Path, end: bytes) -> bool:
    with file.open("rb") as content:
        content.seek(-len(end), io.SEEK_END)
        return content.read() == end


def told(loader: Iterable[T]) -> Iterator[T]:
    """Yield what a loader does; say in one line what a process found wrong, which torch wraps in its traceback."""
    try:
        yield from loader
    except DataError as error:
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
