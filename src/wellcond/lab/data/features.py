"""Frozen features: a `.npz` file with what a network computed of each sample, and its label."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wellcond.lab.data.table_files import Categories, Column, Numbers
from wellcond.lab.data.tables import Table, read_target
from wellcond.lab.errors import LabError

_INPUTS = ("x", "features", "X")
_TARGETS = ("y", "labels", "Y", "targets")
_EXPECTED = "must hold x (or features) of [n, features] and y (or labels) of [n], and may hold x_test and y_test"


def is_features(path: Path) -> bool:
    """Return whether a file is one of numpy's archives, by its name."""
    return path.is_file() and path.suffix.lower() == ".npz"


def read_features(path: Path, name: str, kind: str | None) -> Table:
    """Read frozen features.

    Args:
        path: The ``.npz`` file.
        name: What the data is called.
        kind: What is learned of the labels; None for what they look like.

    Returns:
        The features as a table; with ``x_test`` and ``y_test`` these test.

    Raises:
        LabError: If it cannot be read, an array is missing or of another shape, or a feature is not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, NotImplementedError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LabError(f"--data {path}: cannot be read as a .npz file ({reason[:200]})") from error
    inputs, targets = _part(path, arrays, "")
    test = None
    if any(f"{key}_test" in arrays for key in (*_INPUTS, *_TARGETS)):
        test_inputs, test_targets = _part(path, arrays, "_test")
        if test_inputs.shape[1] != inputs.shape[1]:
            raise LabError(
                f"--data {path}: x_test must have the {inputs.shape[1]} features of x, got {test_inputs.shape[1]}"
            )
        test = np.arange(len(inputs), len(inputs) + len(test_inputs))
        inputs, targets = np.concatenate([inputs, test_inputs]), np.concatenate([targets, test_targets])
    least = 10
    if len(inputs) < least:
        raise LabError(f"--data {path}: must hold at least {least} samples, got {len(inputs)}")
    target = read_target(str(path), _labels(path, targets), np.arange(len(targets)), kind)
    return Table(name, inputs, np.empty((len(inputs), 0), np.int64), (), target, test)


def _part(
    path: Path, arrays: dict[str, NDArray[np.generic]], ending: str
) -> tuple[NDArray[np.float32], NDArray[np.generic]]:
    found = []
    for names in (_INPUTS, _TARGETS):
        key = next((name + ending for name in names if name + ending in arrays), None)
        if key is None:
            listed = ", ".join(arrays) or "nothing"
            raise LabError(f"--data {path}: {_EXPECTED}; found {listed}")
        found.append((key, arrays[key]))
    (x, inputs), (y, targets) = found
    if inputs.ndim != 2 or inputs.dtype.kind not in "biuf" or not inputs.size:
        raise LabError(f"--data {path}: {x} must be numbers [n, features], got {inputs.dtype} {list(inputs.shape)}")
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.ndim != 1 or len(targets) != len(inputs) or targets.dtype.kind not in "biufUS":
        raise LabError(
            f"--data {path}: {y} must be a number or a word for each of the {len(inputs)} rows of {x}, "
            f"got {targets.dtype} {list(targets.shape)}"
        )
    with np.errstate(over="ignore"):  # said below
        numbers = inputs.astype(np.float32)
    broken = int((~np.isfinite(numbers)).any(axis=1).sum())
    if broken:
        raise LabError(f"--data {path}: {x} must be finite in float32, and {broken} of its rows are not")
    return numbers, targets


def _labels(path: Path, targets: NDArray[np.generic]) -> Column:
    if targets.dtype.kind in "US":
        words, codes = np.unique(targets.astype(str), return_inverse=True)
        return Categories("y", codes.astype(np.int64), tuple(words.tolist()))
    values = targets.astype(np.float64)
    if not np.isfinite(values).all():
        raise LabError(
            f"--data {path}: y must be finite, and {int((~np.isfinite(values)).sum())} of its values are not"
        )
    return Numbers("y", values, bool((values == np.round(values)).all()))
