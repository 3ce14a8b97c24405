"""Adds up the seconds of parts of a run."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds between `start` and `stop`, added up, with the device's queue empty at both.

    Args:
        device: The device whose work is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._started = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._started = self._now()

    def stop(self) -> None:
        """Add what passed since `start`."""
        self.seconds += self._now() - self._started
