"""Tables as what a network learns from: numbers, categories, and a target that is a class or a number."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from wellcond.lab.data.splits import Indices
from wellcond.lab.data.table_files import Categories, Column, Numbers
from wellcond.lab.errors import LabError, unknown_name

Learned = Literal["classification", "regression"]
"""What is learned of a target."""

_Entry = TypeVar("_Entry", np.float64, np.int64)

KINDS: tuple[Learned, ...] = ("classification", "regression")

# Integers of at most so many values are classes.
_FEW = 20
_MOST_CLASSES = 1000
_LEAST_ROWS = 10


@dataclass(frozen=True)
class Target:
    """The class or the number that is to be told of each row.

    Attributes:
        name: The column's.
        labels: The class of each row, [n]; zeros where a number is to be told.
        numbers: The number of each row, [n]; the labels where it is a class.
        classes: The classes' names; none for a number.
    """

    name: str
    labels: Indices
    numbers: NDArray[np.float64]
    classes: tuple[str, ...]

    @property
    def kind(self) -> Learned:
        """What is learned of it."""
        return "classification" if self.classes else "regression"

    def take(self, rows: Indices) -> Target:
        """Return that of some rows."""
        return replace(self, labels=self.labels[rows], numbers=self.numbers[rows])


@dataclass(frozen=True)
class Table:
    """Rows with their target; those that test are chosen, or given.

    Attributes:
        name: A short name, fit for a file name.
        numbers: Floating-point, [n, columns]; NaN where one is missing.
        codes: Int64, [n, columns of categories]; 0 where one is missing, and from 1 on the categories'.
        sizes: How many categories each of those columns has, the missing one included.
        target: What is to be told.
        test: The positions of rows that test, where the data says so; else None.
        notes: What was done with the data, for the report, by what it is about.
    """

    name: str
    numbers: NDArray[np.floating[Any]]
    codes: NDArray[np.int64]
    sizes: tuple[int, ...]
    target: Target
    test: Indices | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def fingerprint(self) -> str:
        """Return a digest of every number, category and target."""
        digest = hashlib.sha256(repr((self.sizes, self.target.classes)).encode())
        for part in (self.numbers, self.codes, self.target.labels, self.target.numbers):
            digest.update(repr(part.shape).encode())
            digest.update(np.ascontiguousarray(part).data)
        if self.test is not None:
            digest.update(self.test.tobytes())
        return digest.hexdigest()


def make_table(path: Path, name: str, columns: Sequence[Column], target_column: str | None, kind: str | None) -> Table:
    """Return the table of a file's columns.

    Args:
        path: The file, for messages.
        name: What the data is called.
        columns: From `read_columns`.
        target_column: The column that is to be told; None for the last.
        kind: One of `KINDS`; None: classification of words, of truth values and of integers of at most 20 values
            that are no more than half the rows.

    Returns:
        The table, without the rows that have no target, and without columns in which every word is another.

    Raises:
        LabError: If there is no such column, too few rows or no column beside it, or the target does not suit the kind.
    """
    by_name = {column.name: column for column in columns}
    if target_column is not None and target_column not in by_name:
        raise unknown_name("column", target_column, by_name)
    if len(columns) < 2:
        raise LabError(f"--data {path}: must have a column beside the target, found {', '.join(by_name) or 'none'}")
    given = columns[-1] if target_column is None else by_name[target_column]
    rows = np.flatnonzero(~given.missing)
    if len(rows) < _LEAST_ROWS:
        raise LabError(f"--data {path}: must have at least {_LEAST_ROWS} rows with a target, got {len(rows)}")
    notes = {}
    if len(rows) < len(given.missing):
        notes["rows without a target"] = f"{len(given.missing) - len(rows)}, left out"
    inputs = [column for column in columns if column is not given]
    names = [column.name for column in inputs if isinstance(column, Categories) and _names_rows(column, rows)]
    if names:
        notes["columns left out"] = f"{', '.join(names)}: another word in nearly every row"
        inputs = [column for column in inputs if column.name not in names]
    if not inputs:
        raise LabError(f"--data {path}: no column is left beside the target: {notes['columns left out']}")
    return _assembled(name, inputs, rows, read_target(str(path), given, rows, kind), notes)


def read_target(place: str, column: Column, rows: Indices, kind: str | None) -> Target:
    """Return what is to be told of some rows.

    Args:
        place: Where it stands, for messages.
        column: The target's.
        rows: Those that have one.
        kind: One of `KINDS`; None for what it looks like.

    Raises:
        LabError: If it does not suit the kind.
    """
    if isinstance(column, Categories):
        if kind == "regression":
            raise LabError(f"--kind regression: the target {column.name!r} is of words, such as {column.words[0]!r}")
        labels, classes = column.codes[rows], column.words
        there, labels = np.unique(labels, return_inverse=True)
        classes = tuple(classes[code] for code in there.tolist())
    else:
        values = column.values[rows]
        there, labels = np.unique(values, return_inverse=True)
        if kind == "regression" or (kind is None and not (column.whole and len(there) <= min(_FEW, len(rows) // 2))):
            if len(there) < 2:
                raise LabError(f"--data {place}: the target {column.name!r} is {there[0]:g} in every row")
            return Target(column.name, np.zeros(len(rows), np.int64), values, ())
        classes = tuple(f"{value:g}" for value in there.tolist())
    if len(classes) < 2:
        raise LabError(f"--data {place}: the target {column.name!r} is {classes[0]} in every row")
    if len(classes) > min(_MOST_CLASSES, len(rows) // 2):
        raise LabError(
            f"--data {place}: the target {column.name!r} has {len(classes)} classes in {len(rows)} rows, too many to "
            "learn; name another --target-column, or --kind regression"
        )
    return Target(column.name, labels.astype(np.int64), labels.astype(np.float64), classes)


def _names_rows(column: Categories, rows: Indices) -> bool:
    """Return whether a column names its rows rather than tells something of them."""
    codes = column.codes[rows]
    there = codes[codes >= 0]
    return len(np.unique(there)) > max(_FEW, 0.9 * len(there))


def _assembled(name: str, inputs: Sequence[Column], rows: Indices, target: Target, notes: dict[str, str]) -> Table:
    numbers = [column for column in inputs if isinstance(column, Numbers)]
    words = [column for column in inputs if isinstance(column, Categories)]
    gaps = {column.name: int(column.missing[rows].sum()) for column in inputs}
    if any(gaps.values()):
        there = sum(1 for gap in gaps.values() if gap)
        notes["missing values"] = (
            f"{sum(gaps.values())} in {there} column{'s' if there > 1 else ''}: of numbers the mean and a column that "
            "tells of it, of words a category of its own"
        )
    return Table(
        name,
        _stacked([column.values[rows] for column in numbers], len(rows), np.float64),
        _stacked([column.codes[rows] + 1 for column in words], len(rows), np.int64),
        tuple(len(column.words) + 1 for column in words),
        target,
        notes=notes,
    )


def _stacked(columns: Sequence[NDArray[_Entry]], rows: int, kind: type[_Entry]) -> NDArray[_Entry]:
    return np.stack(columns, axis=1) if columns else np.empty((rows, 0), kind)
