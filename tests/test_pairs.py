"""Covering sets of cases cover."""

from itertools import combinations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from pairs import covering, parametrize_pairs


def met(rows):
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), data=st.data())
def test_every_pair_that_can_meet_meets(sizes, data):
    possible = list(product(*map(range, sizes)))
    forbidden = data.draw(st.sets(st.sampled_from(possible), max_size=len(possible) - 1))
    rows = covering(sizes, lambda row: row not in forbidden)
    assert met(rows) == met(set(possible) - forbidden)
    assert not forbidden & set(rows)
    assert rows == sorted(set(rows)) == covering(sizes, lambda row: row not in forbidden)


def test_far_fewer_rows_than_the_product():
    assert len(covering([35, 3, 2, 2, 2])) <= 35 * 4
    assert len(covering([15, 8, 2])) == 15 * 8


def test_values_come_under_their_names():
    axes = (("kind", {"one": 1, "two": 2}), ("cast", (False, True)), ("left, right", [(int, "a"), (len, "b")]))
    mark = parametrize_pairs(*axes, allowed=lambda kind, cast, way: (kind, cast) != (2, True))
    assert mark.args[0] == ["kind", "cast", "left", "right"]
    called = {1: "one", 2: "two", (int, "a"): str((int, "a")), (len, "b"): str((len, "b"))}
    for name, (kind, cast, *way) in zip(mark.kwargs["ids"], mark.args[1], strict=True):
        assert name == f"{called[kind]}-{cast}-{called[tuple(way)]}"
    assert {(kind, cast) for kind, cast, *_ in mark.args[1]} == {(1, False), (1, True), (2, False)}


def test_values_of_one_name_are_different_cases():
    mark = parametrize_pairs(("make", [lambda: 1, lambda: 2]), ("times", [1, 2]))
    assert {(make(), times) for make, times in mark.args[1]} == set(product([1, 2], [1, 2]))
    assert set(mark.kwargs["ids"]) == {"<lambda>-1", "<lambda>-2"}
