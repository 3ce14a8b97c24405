"""A covering set of cases: any two values of two axes meet in one of them, without the product of all axes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, combinations, groupby, product
from typing import Any

import pytest

# A place of each axis.
Row = tuple[int, ...]
# A place of one axis and one of another, as (axis, place) each.
Pair = tuple[tuple[int, int], tuple[int, int]]


def covering(sizes: Sequence[int], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Return rows of places in axes such that every pair of places that an allowed row has is in a row.

    Greedily, and the same each time: for each place of the first axis as few rows as meet all places of the others,
    which are spread evenly over each other; then rows for what has not met.

    Args:
        sizes: How many values each axis has.
        allowed: Whether a row can be; by default all can.

    >>> covering([3, 2, 2])
    [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (2, 0, 0), (2, 1, 1)]
    """
    rows = [row for row in product(*map(range, sizes)) if allowed(row)]
    pairs = {row: list(combinations(enumerate(row), 2)) for row in rows}
    met: Counter[Pair] = Counter()
    chosen = []

    def cover(candidates: list[Row], left: set[Pair]) -> None:
        def gain(row: Row) -> tuple[int, int]:
            # Of those that bring as much, the one whose pairs have met least often.
            return len(left.intersection(pairs[row])), -sum(met[pair] for pair in pairs[row])

        while left:
            best = max(candidates, key=gain)
            left.difference_update(pairs[best])
            met.update(pairs[best])
            chosen.append(best)

    for _, group in groupby(rows, key=lambda row: row[0]):
        same = list(group)
        cover(same, {pair for row in same for pair in pairs[row][: len(sizes) - 1]})
    cover(rows, {pair for row in rows for pair in pairs[row]} - set(met))
    return sorted(chosen)


def parametrize_pairs(
    *axes: tuple[str, Mapping[str, Any] | Iterable[Any]], allowed: Callable[..., bool] = lambda *values: True
) -> pytest.MarkDecorator:
    """Run a test for a covering set of the axes' values; complete along the first axis, whatever the others are.

    Args:
        axes: Each an argument's name, or several in one text, with its values, or with a mapping from what the test is
            to be called to a value; of several arguments a value is a tuple.
        allowed: Takes a value of each axis; whether they can be together.
    """
    names = [[name.strip() for name in text.split(",")] for text, _ in axes]
    cases = [
        list(values.items()) if isinstance(values, Mapping) else [(_called(value), value) for value in values]
        for _, values in axes
    ]

    def at(row: Row) -> list[Any]:
        return [axis[place][1] for axis, place in zip(cases, row, strict=True)]

    rows = covering([len(axis) for axis in cases], lambda row: allowed(*at(row)))
    arguments = []
    for row in rows:
        spread = [value if len(own) > 1 else (value,) for own, value in zip(names, at(row), strict=True)]
        arguments.append(tuple(chain.from_iterable(spread)))
    ids = ["-".join(axis[place][0] for axis, place in zip(cases, row, strict=True)) for row in rows]
    return pytest.mark.parametrize(list(chain.from_iterable(names)), arguments, ids=ids)


def _called(value: Any) -> str:
    # The same in every process: no address of a function.
    return str(getattr(value, "__name__", value))
