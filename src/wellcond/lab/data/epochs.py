"""Batches that keep their place: one epoch each time they are iterated over, from any batch on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Epochs(Generic[T]):
    """One epoch of batches each time it is iterated over.

    Attributes:
        epoch: Number of the next epoch, from 0. An iteration that is begun raises it by one.

    Args:
        begin: From an epoch's number, and how many of its batches to leave out, to the rest of them: a function of
            the seed and these two alone.
        length: Batches of an epoch.

    Example:
        >>> epochs = Epochs(lambda epoch, first: iter([(epoch, batch) for batch in range(first, 3)]), 3)
        >>> epochs.resume_at(4, batch=1)
        >>> list(epochs), next(iter(epochs))
        ([(4, 1), (4, 2)], (5, 0))
    """

    def __init__(self, begin: Callable[[int, int], Iterator[T]], length: int) -> None:
        self._begin, self._length = begin, length
        self.epoch = 0
        self._first = 0

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return self._length

    def __iter__(self) -> Iterator[T]:
        """Begin the next epoch."""
        epoch, first = self.epoch, self._first
        self.epoch, self._first = epoch + 1, 0
        yield from self._begin(epoch, first)

    def resume_at(self, epoch: int, batch: int) -> None:
        """Let the next iteration be of this epoch, and begin at this batch, exactly as if it had not been interrupted.

        The iteration yields ``len(self) - batch`` batches; those after it are whole epochs again.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch must be between 0 and {len(self)}, got {batch}")
        self.epoch, self._first = epoch, batch

    def endless(self) -> Iterator[T]:
        """Yield one epoch after another, without an end."""
        while True:
            yield from self
