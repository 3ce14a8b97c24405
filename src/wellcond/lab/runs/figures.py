"""Checks that a figure read back from a file can have been measured: a user may have edited the file."""

from __future__ import annotations

import math
from typing import Any

# A percentage is a quotient of floats.
_ROUNDING = 1e-6


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Check a finite number.

    Args:
        name: What it is, for the message.
        value: What was read.
        low: The least that it may be.
        high: The most.

    Raises:
        ValueError: If it is none, or outside.

    >>> check_number("test_score", 500.0, 0, 100)
    Traceback (most recent call last):
    ValueError: test_score must be a number from 0 to 100, got 500.0
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low - _ROUNDING <= value <= high + _ROUNDING:
        span = f"a number from {low:g} to {high:g}" if math.isfinite(high) else "a finite number"
        if math.isfinite(low) and not math.isfinite(high):
            span = f"a number of at least {low:g}"
        raise ValueError(f"{name} must be {span}, got {value!r}")


def check_count(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Check a whole number, as `check_number` does.

    Raises:
        ValueError: If it is none, or outside.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        span = f"from {low} to {high:g}" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}")
