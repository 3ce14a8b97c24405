"""Shows how far a pass is, in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple, TextIO, TypeAlias


class CalibrationProgress(NamedTuple):
    """The progress of a pass of `wellcond.calibrate`, of this rank.

    Attributes:
        batches: That have gone through.
        samples: That were counted.
        standard_error: Of the statistics so far, as `until` means it; None while it is not known or not asked for.
    """

    batches: int
    samples: int
    standard_error: float | None

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f", standard error {self.standard_error:.2g}"
        return f"{_counted(self.batches, 'batch', 'es')}, {_counted(self.samples, 'sample', 's')}{error}"


Show: TypeAlias = Callable[[CalibrationProgress], object]


class ProgressLine:
    """Writes the present state over the last one, a few times a second; where nothing can be written over, at the end.

    Args:
        stream: Where to write; None for the standard error stream.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._start = time.monotonic()
        self._shown = -1.0
        self._last: CalibrationProgress | None = None

    def __call__(self, progress: CalibrationProgress) -> None:
        """Take in the state."""
        self._last = progress
        seconds = time.monotonic() - self._start
        if self._stream.isatty() and seconds - self._shown > 0.2:
            self._shown = seconds
            self._stream.write(f"\r{self._text(seconds)}")
            self._stream.flush()

    def end(self) -> None:
        """Write the last state, and a new line."""
        if self._last is not None:
            again = "\r" if self._shown >= 0 else ""
            self._stream.write(f"{again}{self._text(time.monotonic() - self._start)}\n")
            self._stream.flush()

    def _text(self, seconds: float) -> str:
        return f"calibrate: {self._last} in {seconds:.1f} s "


def _counted(number: int, noun: str, plural: str) -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
