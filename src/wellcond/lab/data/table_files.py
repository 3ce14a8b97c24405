"""Reading tables: CSV, parquet and numpy files as columns of numbers or of categories."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from wellcond.lab.errors import LabError

# What stands for nothing in files, beside what pyarrow knows (an empty field, NA, NaN, null, ...).
_MISSING = ("?", "None", "none", "-")
_DELIMITERS = (",", ";", "\t", "|")
_NUMERIC = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)


@dataclass(frozen=True)
class Numbers:
    """A column of numbers.

    Attributes:
        name: The column's.
        values: Float64, [n]; NaN where one is missing.
        whole: Whether all that are there are integers.
    """

    name: str
    values: NDArray[np.float64]
    whole: bool

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Where there is no value."""
        return np.isnan(self.values)


@dataclass(frozen=True)
class Categories:
    """A column of words.

    Attributes:
        name: The column's.
        codes: Int64, [n]; the position of each in `words`, −1 where one is missing.
        words: What occurs, sorted.
    """

    name: str
    codes: NDArray[np.int64]
    words: tuple[str, ...]

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Where there is no word."""
        return self.codes < 0


Column: TypeAlias = Numbers | Categories


def is_table(path: Path) -> bool:
    """Return whether a file is a table, by its name; of a parquet file, whether it holds no images."""
    suffix = path.suffix.lower()
    if not path.is_file():
        return False
    return suffix in (".csv", ".tsv", ".npy") or (suffix == ".parquet" and not _may_hold_images(path))


def read_columns(path: Path) -> list[Column]:
    """Read a table.

    Args:
        path: A ``.csv`` or ``.tsv`` file, whose first line names the columns unless it is of numbers alone; a
            ``.parquet`` file; or a ``.npy`` file with an array [n, columns] of numbers, or with named fields.

    Returns:
        The columns in their order; those without any value are left out.

    Raises:
        LabError: If it cannot be read, or a column is neither of numbers nor of words.
    """
    read = {".npy": _read_numpy, ".parquet": _read_parquet}.get(path.suffix.lower(), _read_csv)
    try:
        table = read(path)
        columns = [_column(path, name, table.column(place)) for place, name in enumerate(table.column_names)]
    except LabError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError, SyntaxError) as error:
        # A header of numpy that is none is a syntax error.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LabError(f"--data {path}: cannot be read as a table ({reason[:200]})") from error
    return [column for column in columns if column is not None]


def _may_hold_images(path: Path) -> bool:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError):
        return True  # whoever reads it says what is wrong
    return any(pa.types.is_struct(field.type) for field in schema)


def _read_parquet(path: Path) -> pa.Table:
    table = pq.read_table(path)
    _check_names(path, table.column_names)
    return table


def _read_csv(path: Path) -> pa.Table:
    with path.open("rb") as file:
        begin = file.readline(1 << 20)
    if not begin.strip():
        raise LabError(f"--data {path}: the file is empty, or its first line is")
    if b"\0" in begin:
        raise LabError(f"--data {path}: cannot be read as a table (it is no text)")
    first = begin.decode("utf-8-sig", "replace").rstrip("\r\n")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(_DELIMITERS, key=first.count)
    named = not all(_is_number(cell) for cell in first.split(delimiter))
    missing = [*pacsv.ConvertOptions().null_values, *_MISSING]
    table = pacsv.read_csv(
        path,
        read_options=pacsv.ReadOptions(autogenerate_column_names=not named, use_threads=False),
        parse_options=pacsv.ParseOptions(delimiter=delimiter),
        convert_options=pacsv.ConvertOptions(null_values=missing, strings_can_be_null=True),
    )
    _check_names(path, table.column_names)
    return table


def _read_numpy(path: Path) -> pa.Table:
    array = np.load(path, allow_pickle=False)
    if array.dtype.names is not None and array.ndim == 1:
        return pa.table({name: pa.array(array[name]) for name in array.dtype.names})
    if array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
        raise LabError(
            f"--data {path}: must hold an array [rows, columns] of numbers, or one with named fields, "
            f"got {array.dtype} {list(array.shape)}"
        )
    return pa.table({f"column {place}": pa.array(array[:, place]) for place in range(array.shape[1])})


def _check_names(path: Path, names: list[str]) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise LabError(f"--data {path}: two columns are called {twice[0]!r}")


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip().strip('"'))
    except ValueError:
        return False
    return True


def _column(path: Path, name: str, column: pa.ChunkedArray) -> Column | None:
    """Return a column; None if it has no value."""
    if column.null_count == len(column):
        return None
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        column = column.cast(pa.timestamp("us")).cast(pa.int64())
    elif pa.types.is_time(kind) or pa.types.is_duration(kind):
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    kind = column.type
    if any(is_kind(kind) for is_kind in _NUMERIC):
        values = np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64).copy()
        values[~np.isfinite(values)] = np.nan
        there = values[~np.isnan(values)]
        return Numbers(name, values, bool((there == np.round(there)).all())) if there.size else None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _categories(name, column)
    raise LabError(f"--data {path}: the column {name!r} is of {kind}; columns must be of numbers or of words in UTF-8")


def _categories(name: str, column: pa.ChunkedArray) -> Categories:
    encoded = pa.concat_arrays(column.chunks).dictionary_encode()
    words = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    codes = np.asarray(encoded.indices.fill_null(-1).to_numpy(), dtype=np.int64)
    # By the words themselves: in which order they occur says nothing.
    order = np.argsort(words.astype(str), kind="stable")
    places = np.empty(len(words) + 1, dtype=np.int64)
    places[order] = np.arange(len(words))
    places[-1] = -1
    return Categories(name, places[codes], tuple(str(word) for word in words[order]))
