"""Checks of arguments that several parts of the library take."""

from __future__ import annotations


def check_positive_integer(argument: str, value: object) -> None:
    """Raise a ValueError naming the argument unless ``value`` is an integer of at least 1.

    >>> check_positive_integer("stats_every", -3)
    Traceback (most recent call last):
        ...
    ValueError: stats_every must be a positive integer, got -3
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument} must be a positive integer, got {value!r}")
