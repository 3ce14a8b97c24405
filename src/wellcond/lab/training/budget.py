"""The batches of a run of so many steps, perhaps fewer than its last epoch has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from wellcond.lab.data.epochs import Epochs


class Budget:
    """A run's batches: whole epochs, and of the last as many as are left.

    Args:
        batches: The epochs.
        steps: Steps of the run.
    """

    def __init__(self, batches: Epochs[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps
        self._skipped = 0

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.steps // len(self))

    def resume_at(self, step: int) -> None:
        """Let the next iteration begin with the batch of this step of the run."""
        self.batches.resume_at(*divmod(step, len(self)))
        self._skipped = step % len(self)

    def __iter__(self) -> Iterator[Any]:
        begun, self._skipped = self.batches.epoch * len(self) + self._skipped, 0
        yield from islice(self.batches, self.steps - begun)
