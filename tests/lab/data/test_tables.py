"""Tables from every kind of file: types, gaps, targets, and what cannot be one; encoded by the rows that train."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wellcond.lab.data.encoding import encode, encoded_columns
from wellcond.lab.data.features import read_features
from wellcond.lab.data.table_files import Categories, Numbers, is_table, read_columns
from wellcond.lab.data.tables import Table, make_table
from wellcond.lab.errors import LabError

CSV = """age,work,income,"why, not",y
17,clerk,3.5,a,yes
,clerk,NA,b,no
40,,inf,a,yes
41.5,smith,-2,?,no
"""


def written(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def opened(
    folder: Path, text: str, name: str = "table.csv", target: str | None = None, kind: str | None = None
) -> Table:
    path = written(folder, text, name)
    return make_table(path, "table", read_columns(path), target, kind)


def lines(*rows: str, header: str = "a,b,y") -> str:
    return "\n".join([header, *rows]) + "\n"


MANY = tuple(f"{row},{'uv'[row % 2]},{'yes' if row % 3 else 'no'}" for row in range(12))


def test_numbers_words_and_gaps_of_csv(tmp_path: Path) -> None:
    age, work, income, why, y = read_columns(written(tmp_path, CSV))
    assert isinstance(age, Numbers)
    np.testing.assert_array_equal(age.values, [17, np.nan, 40, 41.5])
    assert not age.whole
    assert isinstance(work, Categories)
    assert (work.words, work.codes.tolist()) == (("clerk", "smith"), [0, 0, -1, 1])
    np.testing.assert_array_equal(income.values, [3.5, np.nan, np.nan, -2])
    assert (why.name, why.codes.tolist()) == ("why, not", [0, 1, 0, -1])
    assert y.words == ("no", "yes")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters(tmp_path: Path, delimiter: str) -> None:
    name = "table.tsv" if delimiter == "\t" else "table.csv"
    columns = read_columns(written(tmp_path, CSV.replace("why, not", "why").replace(",", delimiter), name))
    assert [column.name for column in columns] == ["age", "work", "income", "why", "y"]


def test_a_first_line_of_numbers_names_nothing(tmp_path: Path) -> None:
    columns = read_columns(written(tmp_path, "1,2\n3,4\n"))
    assert [column.values.tolist() for column in columns] == [[1, 3], [2, 4]]


VALUES: dict[str, list[Any]] = {
    "whole": [1, None, 3],
    "real": [0.5, float("inf"), None],
    "truth": [True, False, None],
    "decimal": [Decimal("1.5"), None, Decimal("2.5")],
    "date": [datetime.date(2020, 1, 1), None, datetime.date(2020, 1, 2)],
    "time": [datetime.datetime(2020, 1, 1), None, datetime.datetime(2021, 1, 1)],
    "words": ["b", None, "a"],
}


@pytest.mark.parametrize("name", VALUES)
def test_every_type_of_parquet(tmp_path: Path, name: str) -> None:
    column = pa.array(VALUES[name])
    columns = [column, column.dictionary_encode()] if name == "words" else [column]
    pq.write_table(pa.table({str(place): each for place, each in enumerate(columns)}), tmp_path / "t.parquet")
    for found in read_columns(tmp_path / "t.parquet"):
        missing = [value is None or value == float("inf") for value in VALUES[name]]
        assert found.missing.tolist() == missing
        there = [value for value, gone in zip(VALUES[name], missing, strict=True) if not gone]
        if isinstance(found, Categories):
            assert [found.words[code] for code in found.codes if code >= 0] == there
        else:
            order = found.values[~found.missing].argsort().tolist()
            assert order == sorted(range(len(there)), key=there.__getitem__)


def test_columns_of_nothing_are_left_out_and_others_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"no": pa.nulls(2), "nan": [float("nan")] * 2, "a": [1, 2]}), tmp_path / "t.parquet")
    assert [column.name for column in read_columns(tmp_path / "t.parquet")] == ["a"]
    pq.write_table(pa.table({"a": [[1], [2]]}), tmp_path / "t.parquet")
    with pytest.raises(LabError, match=r"the column 'a' is of list<.*must be of numbers or of words"):
        read_columns(tmp_path / "t.parquet")


def test_numpy_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2))
    assert [column.values.tolist() for column in read_columns(tmp_path / "a.npy")] == [[0, 2, 4], [1, 3, 5]]
    np.save(tmp_path / "a.npy", np.array([(1.5, "u"), (2.5, "v")], dtype=[("a", "f8"), ("b", "U1")]))
    first, second = read_columns(tmp_path / "a.npy")
    assert (first.name, first.values.tolist(), second.words) == ("a", [1.5, 2.5], ("u", "v"))
    for array in (np.arange(3), np.zeros((2, 0)), np.zeros((2, 2), complex), np.array(["a"])):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(LabError, match=r"must hold an array \[rows, columns\] of numbers"):
            read_columns(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([[None]], dtype=object))
    with pytest.raises(LabError, match="cannot be read as a table"):
        read_columns(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("a,b\n1,2,3\n", "cannot be read as a table"),
        ("a,a\n1,2\n", "two columns are called 'a'"),
        ("a\0,b\n1,2\n", "it is no text"),
    ],
)
def test_csv_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(LabError, match=said):
        read_columns(written(tmp_path, text))


def test_csv_of_another_encoding_names_the_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a,b\nü,1\n".encode("latin-1"))
    with pytest.raises(LabError, match="the column 'a' is of binary; .* in UTF-8"):
        read_columns(tmp_path / "t.csv")


def test_the_target_is_the_last_column_or_the_named_one(tmp_path: Path) -> None:
    table = opened(tmp_path, lines(*MANY))
    assert (table.target.name, table.target.kind, table.target.classes) == ("y", "classification", ("no", "yes"))
    assert table.numbers.tolist() == [[row] for row in range(12)]
    assert table.codes.tolist() == [[1 + row % 2] for row in range(12)]
    assert table.sizes == (3,)
    table = opened(tmp_path, lines(*MANY), target="a")
    assert (table.target.kind, table.target.numbers.tolist(), table.sizes) == ("regression", list(range(12)), (3, 3))
    with pytest.raises(LabError, match="column.*'Y'.*y"):
        opened(tmp_path, lines(*MANY), target="Y")


@pytest.mark.parametrize(
    ("values", "kind", "learned"),
    [
        ([0, 1] * 10, None, "classification"),
        ([True, False] * 10, None, "classification"),
        ([0.5, 1.5] * 10, None, "regression"),
        (list(range(21)) * 2, None, "regression"),
        (list(range(20)) * 2, None, "classification"),
        (list(range(20)) * 2, "regression", "regression"),
        ([0.5, 1.5] * 10, "classification", "classification"),
        (["u", "v"] * 10, None, "classification"),
    ],
)
def test_what_is_learned(tmp_path: Path, values: list[Any], kind: str | None, learned: str) -> None:
    table = opened(tmp_path, lines(*(f"{row},{value}" for row, value in enumerate(values)), header="a,y"), kind=kind)
    assert table.target.kind == learned
    if learned == "classification":
        assert [table.target.classes[label] for label in table.target.labels] == [
            value if isinstance(value, str) else f"{float(value):g}" for value in values
        ]
    else:
        assert table.target.numbers.tolist() == values


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        (MANY[:9], None, "at least 10 rows with a target, got 9"),
        ([f"{row},u,1" for row in range(12)], None, "'y' is 1 in every row"),
        ([f"{row},u,word" for row in range(12)], None, "'y' is word in every row"),
        ([f"{row},u,word{row % 4}" for row in range(12)], "regression", "'y' is of words, such as 'word0'"),
        ([f"{row},u,word{row}" for row in range(12)], None, "12 classes in 12 rows, too many"),
        ([f"{row},u,{row}.5" for row in range(12)], "classification", "12 classes in 12 rows, too many"),
    ],
)
def test_targets_that_cannot_be_learned(tmp_path: Path, rows: list[str], kind: str | None, said: str) -> None:
    with pytest.raises(LabError, match=said):
        opened(tmp_path, lines(*rows), kind=kind)


def test_a_table_of_one_column(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="must have a column beside the target, found y"):
        opened(tmp_path, lines(*map(str, range(12)), header="y"))


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    rows = [f"{'' if row % 4 == 0 else row},key{row},{'' if row == 5 else row % 2}" for row in range(40)]
    table = opened(tmp_path, lines(*rows))
    assert len(table) == 39
    assert table.notes == {
        "rows without a target": "1, left out",
        "columns left out": "b: another word in nearly every row",
        "missing values": "10 in 1 column: of numbers the mean and a column that tells of it, of words a category of "
        "its own",
    }


def test_what_is_a_table(tmp_path: Path, write_images: Any) -> None:
    write_images(tmp_path / "images.parquet", count=3)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    written(tmp_path, CSV)
    found = {file.name: is_table(file) for file in tmp_path.iterdir()}
    assert found == {"images.parquet": False, "t.parquet": True, "broken.parquet": False, "table.csv": True}


# encoded ------------------------------------------------------------------------------------------------------------


def table_of(numbers: Any, codes: Any = None, sizes: tuple[int, ...] = ()) -> Table:
    values = np.asarray(numbers, dtype=np.float64)
    whole = np.empty((len(values), 0), np.int64) if codes is None else np.asarray(codes)
    return Table("t", values, whole, sizes, None)  # type: ignore[arg-type]


def test_numbers_are_standardized_by_the_rows_that_train() -> None:
    generator = np.random.default_rng(0)
    values = 3.0 * generator.normal(size=(50, 2)) + 1e6
    train = np.arange(0, 50, 2)
    encoded = encode(table_of(values), train, standardize=True).double().numpy()
    np.testing.assert_allclose(encoded, (values - values[train].mean(0)) / values[train].std(0), atol=1e-5)
    np.testing.assert_array_equal(encode(table_of(values), train, standardize=False), values.astype(np.float32))


def test_gaps_are_the_mean_and_told_of() -> None:
    values = [[1.0, np.nan], [3.0, np.nan], [np.nan, 5.0], [7.0, 6.0]]
    table = table_of(values)
    encoded = encode(table, np.array([0, 1]), standardize=True)
    assert encoded_columns(table).numbers == 4
    assert encoded.tolist() == [[-1, 0, 0, 1], [1, 0, 0, 1], [0, 5, 1, 0], [5, 6, 0, 0]]


def test_few_categories_are_columns_and_many_are_numbers() -> None:
    table = table_of(np.zeros((4, 0)), [[1, 18], [2, 3], [2, 18], [0, 4]], (3, 20))
    assert encoded_columns(table).numbers == 3
    assert encoded_columns(table).sizes == (20,)
    # The last row does not train: of its category of the second column nothing is known.
    encoded = encode(table, np.array([0, 1, 2]), standardize=True)
    assert encoded.tolist() == [[0, 1, 0, 18], [0, 0, 1, 3], [0, 0, 1, 18], [1, 0, 0, 0]]


def test_constant_columns_stay_finite() -> None:
    for value in (0.1, 1e-30, 0.0, -1e30):
        encoded = encode(table_of([[value], [value], [value]]), np.arange(3), True)
        assert float(encoded.abs().max()) <= 1e-12 * abs(value)


# frozen features ----------------------------------------------------------------------------------------------------

X, Y = np.random.default_rng(0).normal(size=(12, 3)), np.arange(12) % 2


def features(folder: Path, kind: str | None = None, **arrays: Any) -> Table:
    np.savez(folder / "f.npz", **arrays)
    return read_features(folder / "f.npz", "f", kind)


def test_features_by_each_of_their_names(tmp_path: Path) -> None:
    for names in (("x", "y"), ("features", "labels"), ("X", "Y"), ("x", "labels")):
        table = features(tmp_path, **dict(zip(names, (X, Y), strict=True)))
        np.testing.assert_array_equal(table.numbers, X.astype(np.float32))
        assert (table.target.labels.tolist(), table.test) == (Y.tolist(), None)


def test_features_with_rows_that_test(tmp_path: Path) -> None:
    table = features(tmp_path, x=X, y=Y, x_test=X[:4] + 1, y_test=Y[:4])
    assert (len(table), table.test.tolist()) == (16, [12, 13, 14, 15])
    assert features(tmp_path, x=X, y=np.array(["u", "v"] * 6)).target.classes == ("u", "v")
    assert features(tmp_path, x=X, y=X[:, :1]).target.kind == "regression"
    assert features(tmp_path, x=X, y=Y, kind="regression").target.kind == "regression"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X}, "must hold x .* found x"),
        ({"a": X, "b": Y}, "found a, b"),
        ({"x": X, "y": Y[:5]}, r"y must be a number or a word for each of the 12 rows of x, got int64 \[5\]"),
        ({"x": X, "y": np.eye(12)}, r"got float64 \[12, 12\]"),
        ({"x": X[:, 0], "y": Y}, r"x must be numbers \[n, features\], got float64 \[12\]"),
        ({"x": X.astype(complex), "y": Y}, "got complex128"),
        ({"x": np.where(X > 1, np.nan, X), "y": Y}, "x must be finite in float32, and"),
        ({"x": X * 1e40, "y": Y}, "x must be finite in float32, and 12 of its rows are not"),
        ({"x": X, "y": np.where(Y, np.inf, 0.0)}, "y must be finite, and 6 of its values are not"),
        ({"x": X, "y": Y, "x_test": X[:, :2], "y_test": Y}, "x_test must have the 3 features of x, got 2"),
        ({"x": X, "y": Y, "x_test": X}, "must hold x"),
        ({"x": X[:4], "y": Y[:4]}, "at least 10 samples, got 4"),
        ({"x": X.astype(object), "y": Y}, "cannot be read as a .npz file"),
    ],
)
def test_features_that_lack_something(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        features(tmp_path, **arrays)
