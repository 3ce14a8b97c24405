"""Writes files so that they are whole or absent, and numbers as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any


def partial(path: Path) -> Path:
    """Return where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a file to write that takes the place of another when it is complete.

    No reader ever sees a part of it. If the block raises, what was there stays.

    Args:
        path: The file to replace or to make.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file by way of a temporary one beside it, so that no reader ever sees a part of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(content: dict[str, Any]) -> str:
    """Return results as JSON with a line for each entry: small, and still to be read by eye.

    A list of dicts has a line for each of them, and so on inward, as has a dict of dicts.

    Args:
        content: What JSON takes; floats that are infinite or no number become null.

    >>> print(to_json({"title": "a", "methods": [{"name": "b", "lr": 0.1}, {"name": "c", "lr": 0.3}]}), end="")
    {
    "title": "a",
    "methods": [
    {"name": "b", "lr": 0.1},
    {"name": "c", "lr": 0.3}
    ]
    }
    """
    lines = [f"{json.dumps(str(key))}: {_lines(_finite(value))}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return json.dumps(value, allow_nan=False)
    return "[\n" + ",\n".join(_entry(item) for item in value) + "\n]"


def _entry(item: dict[str, Any]) -> str:
    """Return a dict in one line, but for its list of methods."""
    if "methods" not in item:
        return json.dumps(item, allow_nan=False)
    less = json.dumps({key: value for key, value in item.items() if key != "methods"}, allow_nan=False)
    return f'{less[:-1]}, "methods": {_lines(item["methods"])}}}'


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def rounded(value: Any) -> Any:
    """Return a value with its floats cut to six digits: what files hold, and what tables are made of.

    Args:
        value: A number, or dataclasses, dicts, lists and tuples of numbers.

    >>> rounded({"a": (1.23456789, 2)})
    {'a': (1.23457, 2)}
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rounded(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: rounded(getattr(value, part.name)) for part in fields(value) if part.init})
    return value
