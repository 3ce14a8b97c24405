"""Whether a kept record is one that a run can have written: what is read back from a file may have been edited."""

from __future__ import annotations

import math
from typing import Any

from wellcond.lab.memory import Memory
from wellcond.lab.records import EpochRecord, RunRecord

# A percentage is a quotient of floats.
_ROUNDING = 1e-6


def check_record(record: RunRecord, steps: int) -> None:
    """Check a record that was read from a file.

    Args:
        record: The record.
        steps: Steps of its run.

    Raises:
        ValueError: If it holds what no run measures; the message names the figure and what was found.

    >>> epoch = EpochRecord(10, 1.0, 0.5, 90.0, 0.4, 500.0, 0.4)
    >>> check_record(RunRecord((epoch,), False, 1, {}, ()), steps=10)
    Traceback (most recent call last):
    ValueError: test_score must be a number from 0 to 100, got 500.0
    """
    before = EpochRecord(0, 0.0, 0.0, 0.0, None, 0.0, None)
    for epoch in record.epochs:
        _check_epoch(epoch, before, steps)
        before = epoch
    if not isinstance(record.diverged, bool):
        raise ValueError(f"diverged must be true or false, got {record.diverged!r}")
    if not record.diverged and before.steps != steps:
        raise ValueError(f"the last epoch must end after {steps} steps, got {before.steps}")
    _check_whole("threads", record.threads, 1, math.inf)
    if record.evaluation_seconds is not None:
        _check_number("evaluation_seconds", record.evaluation_seconds, 0, math.inf)
    if record.memory is not None:
        for name in Memory.__dataclass_fields__:
            _check_whole(f"memory.{name}", getattr(record.memory, name), 0, math.inf)
    for name, kind in (("transforms", dict), ("extras", dict), ("coverage", dict), ("machine", str)):
        if not isinstance(getattr(record, name), kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(record, name)!r}")
    if not all(isinstance(said, str) for said in record.warnings):
        raise ValueError(f"warnings must be texts, got {record.warnings!r}")


def _check_epoch(epoch: EpochRecord, before: EpochRecord, steps: int) -> None:
    _check_whole("steps", epoch.steps, before.steps + 1, steps)
    _check_number("seconds", epoch.seconds, before.seconds, math.inf)
    _check_number("train_loss", epoch.train_loss, -math.inf, math.inf)
    for name in ("validation_score", "test_score"):
        _check_number(name, getattr(epoch, name), 0, 100)
    for name in ("validation_loss", "test_loss"):
        if getattr(epoch, name) is not None:
            _check_number(name, getattr(epoch, name), -math.inf, math.inf)
    if not isinstance(epoch.metrics, dict):
        raise ValueError(f"metrics must be figures by name, got {epoch.metrics!r}")
    for name, value in epoch.metrics.items():
        _check_number(f"metrics.{name}", value, 0, 100)


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low - _ROUNDING <= value <= high + _ROUNDING:
        span = f"a number from {low:g} to {high:g}" if math.isfinite(high) else "a finite number"
        if math.isfinite(low) and not math.isfinite(high):
            span = f"a number of at least {low:g}"
        raise ValueError(f"{name} must be {span}, got {value!r}")


def _check_whole(name: str, value: Any, low: int, high: float) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        span = f"from {low} to {high:g}" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} must be a whole number {span}, got {value!r}")
