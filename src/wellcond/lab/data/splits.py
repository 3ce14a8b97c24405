"""Stratified draws: which images train, which validate and which test."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def derived_seed(purpose: str, seed: int) -> int:
    """Return a seed for one purpose, so that the draws of different purposes are independent of each other.

    >>> derived_seed("order", 0) != derived_seed("weights", 0)
    True
    """
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


TEST_SEED = derived_seed("test", 0)
"""Seed of what tests: it is chosen once, so that every comparison on the same data tests on the same samples."""


def stratified_draw(labels: Indices, count: int, seed: int) -> Indices:
    """Draw images so that each class has the share that it has among all.

    Args:
        labels: The class of each image, [n].
        count: How many to draw, at most n.
        seed: The draw is a function of the labels, the count and this.

    Returns:
        The positions of the drawn images in `labels`, ascending, [count].

    Raises:
        ValueError: If `count` is not between 0 and n.

    >>> stratified_draw(np.array([0, 0, 1, 1, 1, 1]), 3, seed=0).size
    3
    """
    if not 0 <= count <= labels.size:
        raise ValueError(f"count must be between 0 and {labels.size}, got {count}")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    generator = np.random.default_rng(seed)
    classes, sizes = np.unique(labels, return_counts=True)
    shares = count * sizes / labels.size
    counts = np.floor(shares).astype(np.int64)
    # Largest remainders take what flooring left over; ties go to the lower class.
    left_over = count - int(counts.sum())
    counts[np.argsort(-(shares - counts), kind="stable")[:left_over]] += 1
    drawn = [
        generator.choice(np.flatnonzero(labels == label), size=number, replace=False)
        for label, number in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def without(count: int, drawn: Indices) -> Indices:
    """Return the positions among `count` that were not drawn, ascending."""
    kept = np.ones(count, dtype=bool)
    kept[drawn] = False
    return np.flatnonzero(kept).astype(np.int64)


@dataclass(frozen=True)
class Split:
    """Positions, in the pool of images that do not test, of those that train and those that validate."""

    train: Indices
    validation: Indices


def draw_split(labels: Indices, train: int, validation: int, seed: int) -> Split:
    """Draw one seed's training and validation images from the pool.

    Args:
        labels: The class of each image of the pool, [n].
        train: How many images train.
        validation: How many validate; together at most n.
        seed: The comparison's seed.

    Returns:
        Two disjoint stratified sets.
    """
    held_out = stratified_draw(labels, validation, derived_seed("validation", seed))
    rest = without(labels.size, held_out)
    chosen = stratified_draw(labels[rest], train, derived_seed("train", seed))
    return Split(train=rest[chosen], validation=held_out)


def draw_test_numbers(pool: Indices, count: int) -> Indices:
    """Draw the images that test from a pool without classes; ascending."""
    return np.sort(np.random.default_rng(TEST_SEED).permutation(pool)[:count])


def draw_apart(pool: Indices, train: int, validation: int, seed: int) -> Split:
    """Draw one seed's training and validation images from a pool without classes.

    Args:
        pool: The images' numbers, [n].
        train: How many train.
        validation: How many validate; together at most n.
        seed: The comparison's seed.

    Returns:
        Two disjoint sets of numbers, each ascending.
    """
    order = np.random.default_rng(derived_seed("validation", seed)).permutation(pool)
    return Split(train=np.sort(order[validation : validation + train]), validation=np.sort(order[:validation]))
