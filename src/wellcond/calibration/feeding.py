"""Feeds a loader's batches to a pass: how many of them, until when, and in step where ranks need each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from wellcond.layouts.unusual import is_sharded
from wellcond.runtime.models import samples_of
from wellcond.runtime.ranks import Ranks

ELSEWHERE = "calibrate failed on another rank; nothing has changed"
# What a rank says before each batch.
_HAS_ONE, _HAS_NONE_BUT_A_SPARE, _NEVER_HAD_ONE, _FAILED = range(4)


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Limits:
    """The part of a loader that a pass takes, of each rank.

    Attributes:
        max_batches: At most so many batches; None for all.
        max_samples: At most so many samples; the last batch goes through whole, and is counted in part.
        enough: Asked after each batch whether to stop.
    """

    max_batches: int | None = None
    max_samples: int | None = None
    enough: Callable[[], bool] = _never


class Run:
    """The batches that a pass has gone over, and the division of the present one; the layers' stand-ins ask it.

    Attributes:
        batch_size: m; None where each of the loader's batches is one group, whole.
        samples: Of the loader's present batch; None if not known.
        batches: That the loader gave so far.
        largest: Samples of the largest of them.
        counted: Samples that were counted, as far as they are known.
        spare: Whether the present batch is run for the other ranks' sake alone.
    """

    def __init__(self, batch_size: int | None, limits: Limits) -> None:
        self.batch_size = batch_size
        self.limits = limits
        self.samples: int | None = None
        self.batches = self.largest = self.counted = 0
        self.spare = False
        self._most_rows = 0

    def begin(self, samples: int | None, spare: bool) -> None:
        """Take up a batch."""
        self.samples, self.spare, self._most_rows = samples, spare, 0
        if not spare:
            self.batches += 1
            self.largest = max(self.largest, samples or 0)

    def end(self) -> None:
        """Count a batch that has gone through; where it did not say its samples, those rows that layers saw."""
        if not self.spare:
            samples = self.samples or self._most_rows
            self.largest = max(self.largest, samples)
            left = samples if self.limits.max_samples is None else min(samples, self.limits.max_samples - self.counted)
            self.counted += left if self.batch_size is None else left // self.batch_size * self.batch_size

    def group(self, rows: int) -> tuple[int, int]:
        """Say how a layer's input is divided.

        Args:
            rows: Of the input.

        Returns:
            The rows of a group of m samples, and how many such groups are counted.
        """
        self._most_rows = max(self._most_rows, rows)
        per_sample = 1.0 if self.samples is None else rows / max(self.samples, 1)
        counted = rows
        if self.limits.max_samples is not None:
            counted = min(rows, round((self.limits.max_samples - self.counted) * per_sample))
        if self.batch_size is None:
            return counted, min(counted, 1)
        size = max(round(self.batch_size * per_sample), 1)
        return size, counted // size

    @property
    def is_over(self) -> bool:
        """Whether there is to be no further batch."""
        limits = self.limits
        if self.batches == 0:
            return False
        if limits.max_batches is not None and self.batches >= limits.max_batches:
            return True
        if limits.max_samples is not None and limits.max_samples - self.counted < (self.batch_size or 1):
            return True
        return limits.enough()


def fed(loader: Iterable[Any], run: Run, model: nn.Module, knows_samples: bool) -> Iterator[Any]:
    """Yield a loader's batches, each begun in the books; in step with the other ranks where the model needs that.

    Args:
        loader: Gives batches.
        run: The books; whoever runs a batch ends it there.
        model: That the batches go through.
        knows_samples: Whether a batch's samples can be told from it.
    """
    if communicates(model):
        yield from _in_step(loader, run, model, knows_samples)
        return
    for batch in loader:
        run.begin(samples_of(batch, model) if knows_samples else None, spare=False)
        yield batch
        if run.is_over:
            return


def _in_step(loader: Iterable[Any], run: Run, model: nn.Module, knows_samples: bool) -> Iterator[Any]:
    """Yield as many batches on every rank: one without a batch runs an earlier one, or another rank's, uncounted."""
    ranks = Ranks(True)
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    batches = iter(loader)
    spare: list[Any] = []
    while True:
        error, own = None, []
        try:
            own = [] if run.is_over else list(itertools.islice(batches, 1))
        except Exception as raised:  # The other ranks, which would wait for this one, are told first.
            error = raised
        state = _FAILED if error else _HAS_ONE if own else _HAS_NONE_BUT_A_SPARE if spare else _NEVER_HAD_ONE
        said = ranks.gather(torch.tensor(state, device=device)).tolist()
        if error is not None:
            raise error
        if _FAILED in said:
            raise RuntimeError(ELSEWHERE)
        if _HAS_ONE not in said:
            return
        spare = own or spare
        if _NEVER_HAD_ONE in said:
            lent = list(spare) or [None]
            dist.broadcast_object_list(lent, src=said.index(_HAS_ONE), device=device)
            spare = spare or lent
        run.begin(samples_of(spare[0], model) if knows_samples else None, spare=not own)
        yield spare[0]


def communicates(model: nn.Module) -> bool:
    """Whether a model's forward pass needs all ranks: its parameters are sharded over several.

    >>> communicates(nn.Linear(2, 1))
    False
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return True
    return any(is_sharded(parameter) for parameter in model.parameters())
