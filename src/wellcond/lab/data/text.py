"""Text files as tokens: characters, or bytes where the file is not UTF-8."""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import short_name

Level = Literal["character", "byte"]
"""What a token is."""

_NAMES = (".txt", ".text", ".md", ".rst", ".tex", ".log")
_LOOKED_AT = 65_536
# Files that text is looked for in: what else they are is said by their names.
_OTHERS = (".parquet", ".csv", ".tsv", ".npy", ".npz")


@dataclass(frozen=True)
class Text:
    """A text as numbers.

    Attributes:
        name: A short name, fit for a file name.
        tokens: The number of each character or byte, [n]; as narrow as they allow.
        vocabulary: The characters, or the bytes as numbers in hexadecimal, in the tokens' order.
        level: What a token is.
        digest: Of the file.
    """

    name: str
    tokens: NDArray[np.unsignedinteger]
    vocabulary: tuple[str, ...]
    level: Level
    digest: str


def is_text(path: Path) -> bool:
    """Return whether a file is text, by its name or, if that says nothing, by how it begins."""
    suffix = path.suffix.lower()
    if not path.is_file() or suffix in _OTHERS:
        return False
    if suffix in _NAMES:
        return True
    with path.open("rb") as file:
        begin = file.read(_LOOKED_AT)
    return b"\0" not in begin and _decoded(begin, whole=len(begin) < _LOOKED_AT) is not None


def read_text(path: Path) -> Text:
    """Read a text file.

    Args:
        path: The file. It is decoded as UTF-8; if that cannot be, its bytes are the tokens.

    Raises:
        LabError: If it cannot be read, or is empty.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabError(f"--data {path}: cannot be read ({error.strerror or error})") from error
    decoded = _decoded(content, whole=True)
    if decoded is None:
        level: Level = "byte"
        found, tokens = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
        vocabulary = tuple(f"0x{byte:02x}" for byte in found.tolist())
    else:
        level = "character"
        codes = np.frombuffer(decoded.encode("utf-32-le", "surrogatepass"), np.dtype("<u4"))
        found, tokens = np.unique(codes, return_inverse=True)
        vocabulary = tuple(map(chr, found.tolist()))
    if not tokens.size:
        raise LabError(f"--data {path}: the file is empty, and must be a text")
    if len(vocabulary) == 1:
        raise LabError(f"--data {path}: there is nothing to predict: every {level} is the same, {vocabulary[0]!r}")
    narrow = tokens.astype(np.uint8 if len(vocabulary) <= 256 else np.uint32)
    return Text(short_name(path, "text"), narrow, vocabulary, level, hashlib.sha256(content).hexdigest())


def _decoded(content: bytes, whole: bool) -> str | None:
    """Return the text of UTF-8 bytes, of which the last may be cut off; None if they are none."""
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=whole)
    except UnicodeDecodeError:
        return None
