"""Splits are disjoint, stratified, and fixed where they must be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split, stratified_draw, without

labels_strategy = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(np.array)


@given(labels_strategy, st.data(), st.integers(0, 1000))
def test_a_draw_is_stratified_to_within_one_image_a_class(labels, data, seed):
    count = data.draw(st.integers(0, labels.size))
    drawn = stratified_draw(labels, count, seed)
    assert len(set(drawn.tolist())) == count
    for label in np.unique(labels):
        share = count * np.mean(labels == label)
        assert abs(np.sum(labels[drawn] == label) - share) < 1 + 1e-9


@given(labels_strategy, st.data(), st.integers(0, 1000))
def test_training_and_validation_are_disjoint(labels, data, seed):
    validation = data.draw(st.integers(0, labels.size))
    train = data.draw(st.integers(0, labels.size - validation))
    split = draw_split(labels, train, validation, seed)
    assert (split.train.size, split.validation.size) == (train, validation)
    assert not set(split.train.tolist()) & set(split.validation.tolist())


def test_seeds_draw_differently_and_repeatably():
    labels = np.arange(200) % 10
    first, again, other = (draw_split(labels, 100, 50, seed) for seed in (0, 0, 1))
    assert np.array_equal(first.train, again.train)
    assert np.array_equal(first.validation, again.validation)
    assert not np.array_equal(first.train, other.train)


def test_drawing_too_many_says_how_many_there_are():
    with pytest.raises(ValueError, match="count must be between 0 and 3, got 4"):
        stratified_draw(np.zeros(3, dtype=np.int64), 4, seed=0)


def test_without_is_the_complement():
    assert without(5, np.array([1, 3])).tolist() == [0, 2, 4]


def test_the_digits_test_images_are_fixed_and_apart():
    first, again = load_data("digits", None, None), load_data("digits", None, None)
    assert len(first.test.labels) == 399
    assert len(first.pool.labels) == 1797 - 399
    assert first.fingerprint() == again.fingerprint()
    counts = np.bincount(first.test.labels)
    assert counts.max() - counts.min() <= 3  # the digits' classes are nearly equal in size
    pool = {image.numpy().tobytes() for image in first.pool.images}
    test = {image.numpy().tobytes() for image in first.test.images}
    assert len(pool & test) <= 1  # no image is in both sets (the data itself may hold a duplicate)
