"""Checks of the arguments of closed forms."""

from __future__ import annotations

import math
from typing import Literal, get_args

Formula = Literal["derived", "thesis"]
"""Which formula, where the thesis prints another than the one that follows from its definitions."""

FORMULAS: tuple[str, ...] = get_args(Formula)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_integer(name: str, value: int, at_least: int = 1) -> None:
    """Raise ValueError unless the value is an integer of at least this."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless the value is a finite number between the two, ends included."""
    if is_number(value) and low <= value <= high:
        return
    rule = "a finite number"
    if high < math.inf:
        rule = f"a number from {low:g} to {high:g}"
    elif low > -math.inf:
        rule = f"a finite number of at least {low:g}"
    raise ValueError(f"{name} must be {rule}, got {value!r}")


def check_formula(name: str, value: str) -> None:
    """Raise ValueError unless the value is one of `FORMULAS`."""
    if value not in FORMULAS:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, FORMULAS))}, got {value!r}")
