"""The comparison's statistics against scipy and against numbers worked out by hand."""

from __future__ import annotations

import math
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wellcond.lab.comparison.statistics import paired_difference, probability_within, spread

numbers = st.floats(-1e3, 1e3, allow_nan=False)


def test_spread_divides_by_n_minus_one():
    assert spread([1.0, 2.0, 6.0]).mean == 3.0
    # Squares of -2, -1, 3: 14, over 2.
    assert spread([1.0, 2.0, 6.0]).std == pytest.approx(math.sqrt(7.0))


def test_one_seed_has_neither_deviation_nor_interval():
    assert spread([5.0]).std is None
    difference = paired_difference([5.0], [3.0])
    assert (difference.mean, difference.low, difference.high) == (2.0, None, None)
    assert not difference.beyond_chance


def test_interval_of_four_pairs_by_hand():
    difference = paired_difference([3.0, 5.0, 4.0, 8.0], [1.0, 2.0, 3.0, 4.0])
    # Differences 2, 3, 1, 4: mean 2.5, squares 5 / 3, t(0.975, 3) = 3.1824463.
    half = 3.1824463 * math.sqrt(5 / 3) / 2
    assert difference.low == pytest.approx(2.5 - half)
    assert difference.high == pytest.approx(2.5 + half)
    assert difference.beyond_chance


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12), st.floats(0.5, 0.99))
def test_interval_is_scipys(pairs, level):
    values, baseline = (list(side) for side in zip(*pairs, strict=True))
    differences = np.subtract(values, baseline)
    result = paired_difference(values, baseline, level)
    error = stats.sem(differences)
    if error > 1e-9:
        low, high = stats.t.interval(level, len(pairs) - 1, loc=differences.mean(), scale=error)
        assert result.low == pytest.approx(low, rel=1e-6, abs=1e-6)
        assert result.high == pytest.approx(high, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12))
def test_swapping_the_sides_mirrors_the_interval(pairs):
    values, baseline = (list(side) for side in zip(*pairs, strict=True))
    forward, backward = paired_difference(values, baseline), paired_difference(baseline, values)
    assert forward.mean == pytest.approx(-backward.mean)
    assert forward.low == pytest.approx(-backward.high)


def test_equal_values_give_an_interval_of_no_width():
    difference = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (difference.low, difference.high, difference.beyond_chance) == (0.0, 0.0, False)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="equally many values on both sides, got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=8),
    st.floats(-10, 10),
)
def test_the_chance_of_a_target_is_scipys_one_sided_test(values, target):
    found = probability_within(values, target)
    if stdev(values) > 1e-6:
        assert found == pytest.approx(stats.ttest_1samp(values, target, alternative="greater").pvalue, abs=1e-9)
    assert 0 <= found <= 1
    assert probability_within(values[:1], target) is None
