"""Writes names and sizes as messages and reports show them."""

from __future__ import annotations

from collections.abc import Iterable


def quoted_names(names: Iterable[str]) -> str:
    """Return names as an error lists them.

    >>> quoted_names(["0", "head.fc"])
    "'0', 'head.fc'"
    """
    return ", ".join(map(repr, names))


def bytes_text(count: int) -> str:
    """Return a number of bytes for people.

    >>> bytes_text(512), bytes_text(2_500), bytes_text(134_087_000), bytes_text(12_000_000_000)
    ('512 B', '2.5 kB', '134.1 MB', '12.0 GB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
