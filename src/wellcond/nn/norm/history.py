"""Remembers the statistics that recent batches were normalized with, for passes that are repeated."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wellcond.nn.norm.buffers import KeptStatistics
from wellcond.numerics.moments import Moments
from wellcond.runtime.checks import WellcondWarning
from wellcond.runtime.tracing import may_be_repeated


class PastStatistics:
    """The statistics that recent batches were normalized with, for layers that depend on earlier batches.

    Activation checkpointing runs a forward pass again after the history has moved on; the batch is recognized by its
    own mean, and gets what it had. Of several batches with equal means, the latest is taken first, as a backward pass
    comes to them.

    Args:
        length: How many batches to remember: those between a forward pass and its backward.
    """

    def __init__(self, length: int = 128) -> None:
        self._length = length
        self._past: deque[tuple[Tensor, tuple[Tensor, ...]]] = deque(maxlen=length)

    def remember(self, batch: Moments, used: tuple[Tensor, ...]) -> None:
        """Keep what a batch is normalized with, if its forward pass may be run again."""
        if not torch.compiler.is_compiling() and may_be_repeated():
            self._past.append((batch.mean, used))

    def of(
        self, layer: KeptStatistics, batch: Moments, make: Callable[[Moments], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return what a layer normalizes a batch with: what it had, if the pass is repeated, or what `make` gives."""
        used = self.recall(batch) if layer.recomputing else None
        if used is None:
            used = make(batch)
            if layer.training and not layer.recomputing:
                self.remember(batch, used)
        return used

    def recall(self, batch: Moments) -> tuple[Tensor, ...] | None:
        """Return what the batch with this mean was normalized with; None if no batch of its shape is remembered."""
        alike = [index for index, (mean, _) in enumerate(self._past) if mean.shape == batch.mean.shape]
        if not alike:
            return None
        latest_first = alike[::-1]
        distances = torch.stack([(self._past[index][0] - batch.mean).abs().sum() for index in latest_first]).tolist()
        if min(distances) > 1e-3 * float(batch.var.sqrt().sum()):
            warnings.warn(
                f"a forward pass inside a backward pass is none of the last {self._length} that activation "
                "checkpointing could repeat: it is normalized with the statistics of now, so its gradients may be off",
                WellcondWarning,
                stacklevel=2,
            )
            return None
        index = latest_first[distances.index(min(distances))]
        found = self._past[index]
        # The next one with the same mean is the one before; a second backward pass finds them in the same order.
        del self._past[index]
        self._past.appendleft(found)
        return found[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> PastStatistics:
        return PastStatistics(self._length)

    def __reduce__(self) -> tuple[type[PastStatistics], tuple[int]]:
        return PastStatistics, (self._length,)


@torch.library.custom_op("wellcond::snapshot", mutates_args=())
def _snapshot(buffer: Tensor) -> Tensor:
    return buffer.clone()


@_snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


def before_update(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a buffer's value of now, for a computation whose backward comes after the buffer's next update.

    The compiler recomputes cheap operations in the backward, from inputs that the forward has changed by then; it does
    not see into a custom operator, and keeps what that returned.

    Args:
        buffer: That this forward pass will change.
        dtype: Of the value.
    """
    return (_snapshot(buffer) if torch.compiler.is_compiling() else buffer).to(dtype)
