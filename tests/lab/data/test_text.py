"""Text files as tokens: characters of UTF-8, bytes of anything else; what is text and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.lab.data.text import is_text, read_text
from wellcond.lab.errors import LabError


def written(folder: Path, content: bytes, name: str = "War and Peace.txt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@given(text=st.text(min_size=2).filter(lambda text: len(set(text)) > 1 and not text.startswith("\ufeff")))
def test_characters_come_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    found = read_text(written(tmp_path_factory.mktemp("text"), text.encode()))
    assert found.level == "character"
    assert "".join(found.vocabulary[token] for token in found.tokens.tolist()) == text
    assert list(found.vocabulary) == sorted(set(text))


@given(content=st.binary(min_size=2).filter(lambda content: len(set(content)) > 1))
def test_bytes_come_back_where_they_are_no_text(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    content += b"\xff\xfe"
    found = read_text(written(tmp_path_factory.mktemp("bytes"), content))
    assert found.level == "byte"
    assert bytes(int(found.vocabulary[token], 16) for token in found.tokens.tolist()) == content


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    assert read_text(written(tmp_path, "\ufeffab".encode())).vocabulary == ("a", "b")


def test_tokens_are_as_narrow_as_they_can_be(tmp_path: Path) -> None:
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    assert read_text(written(tmp_path, many.encode())).tokens.dtype == np.uint32
    assert read_text(written(tmp_path, b"to be")).tokens.dtype == np.uint8


def test_the_name_is_fit_for_a_file_and_the_digest_tells_texts_apart(tmp_path: Path) -> None:
    one, other = (read_text(written(tmp_path, content)) for content in (b"one", b"other"))
    assert one.name == "war-and-peace"
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "the file is empty"), (b"\xef\xbb\xbf", "is empty"), (b"aaaa", "every character")]
)
def test_texts_without_anything_to_predict(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(LabError, match=said):
        read_text(written(tmp_path, content))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("book.txt", b"\xff\x00", True),
        ("README", b"Read me.", True),
        ("program.py", b"print()", True),
        ("cut", ("é" * 40_000).encode()[:65_537], True),
        ("cut badly", b"a" * 65_535 + b"\xff" * 9, False),
        ("archive", b"PK\x03\x04\x00\x00", False),
        ("latin", "é".encode("latin-1"), False),
        ("table.csv", b"a,b", False),
        ("array.npy", b"a,b", False),
    ],
)
def test_what_is_text(tmp_path: Path, name: str, content: bytes, text: bool) -> None:
    assert is_text(written(tmp_path, content, name)) is text
    assert not is_text(tmp_path)
