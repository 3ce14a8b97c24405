"""Watches a calibration: how precise its statistics are by now, whether that is enough, and what to show of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from wellcond.calibration.progress import CalibrationProgress, ProgressLine, Show
from wellcond.calibration.replay import Passed, Seen
from wellcond.calibration.standard_error import LEAST_GROUPS, StandardError, largest
from wellcond.runtime.checks import WellcondWarning
from wellcond.runtime.ranks import Ranks


class CalibrationWatch:
    """Watches one calibration.

    Args:
        names: Of the layers.
        until: The standard error that is enough; None where that is not asked.
        progress: True for a line on the standard error stream, or a function to call after each batch.
    """

    def __init__(self, names: Iterable[str], until: float | None, progress: bool | Show) -> None:
        self._until = until
        self._errors = {name: StandardError() for name in names} if until is not None else {}
        self._line = ProgressLine() if progress is True and Ranks(True).rank == 0 else None
        self._show: Show | None = self._line if isinstance(progress, bool) else progress
        self.last = CalibrationProgress(0, 0, None)

    def observe(self, name: str, seen: Seen, weight: float) -> None:
        """Take in what a layer saw."""
        if self._until is not None:
            self._errors[name].take(seen, weight)

    def after(self, passed: Passed) -> None:
        """Take in that a batch has gone through."""
        self.last = CalibrationProgress(passed.batches, passed.samples, largest(self._errors.values()))
        if self._show is not None:
            self._show(self.last)

    def is_enough(self) -> bool:
        """Whether the statistics are precise enough."""
        error = self.last.standard_error
        return self._until is not None and error is not None and error <= self._until

    def end(self) -> None:
        """End the line that shows the progress."""
        if self._line is not None:
            self._line.end()

    def warn(self) -> None:
        """Say if what was asked for was not reached."""
        error, until = self.last.standard_error, self._until
        if until is None or self.last.batches == 0 or self.is_enough():
            return
        if error is None:
            warnings.warn(
                f"calibrate: fewer than {LEAST_GROUPS} batches, too few to tell a standard error for until={until:g}",
                WellcondWarning,
                stacklevel=4,
            )
            return
        warnings.warn(
            f"calibrate: the loader ended at a standard error of {error:.2g}, above until={until:g}",
            WellcondWarning,
            stacklevel=4,
        )
