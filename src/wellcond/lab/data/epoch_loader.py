"""Batches of samples that are read from their files on the way, each a function of its key alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader

from wellcond.lab.data.decoding import told
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.splits import derived_seed

T = TypeVar("T")


class Key(NamedTuple):
    """A sample of an epoch.

    Attributes:
        image: Position of its image.
        chance: Seed of its augmentation.
    """

    image: int
    chance: int


class Samples(Protocol):
    """Samples, read by their keys."""

    def __getitem__(self, key: Key, /) -> Any:
        """Return a sample; a function of the key alone."""


class EpochLoader(Epochs[T]):
    """One epoch of batches each time it is iterated over.

    Args:
        samples: Where they are read from.
        epoch_order: From an epoch's number to the images of its batches, those of all ranks together.
        length: Batches of an epoch.
        seed: Of the augmentation's chances.
        share: Which part of a batch this rank reads.
        to_batch: From a rank's samples and the (epoch, number) of their batch to the batch on the device.
        workers: Processes that read; 0 reads in the one that trains.
    """

    def __init__(
        self,
        samples: Samples,
        epoch_order: Callable[[int], Sequence[Sequence[int]]],
        length: int,
        seed: int,
        share: Callable[[Sequence[Key]], Sequence[Key]],
        to_batch: Callable[[list[Any], int, int], T],
        workers: int = 0,
    ) -> None:
        self.samples, self.epoch_order, self.seed = samples, epoch_order, seed
        self.share, self.to_batch, self.workers = share, to_batch, workers
        super().__init__(self._epoch, length)

    def _epoch(self, epoch: int, first: int) -> Iterator[T]:
        keys = list(self._keys(epoch, first))
        for number, samples in enumerate(read_samples(self.samples, keys, self.workers), start=first):
            yield self.to_batch(samples, epoch, number)

    def _keys(self, epoch: int, first: int) -> Iterator[Sequence[Key]]:
        for number, images in enumerate(self.epoch_order(epoch)):
            if number < first:
                continue
            # By the place in the global batch: the same image is seen the same whatever rank reads it.
            yield self.share(
                [
                    Key(image, derived_seed(f"augmentation of epoch {epoch} batch {number} place {place}", self.seed))
                    for place, image in enumerate(images)
                ]
            )


def read_samples(samples: Samples, batches: Iterable[Sequence[Key]], workers: int) -> Iterator[list[Any]]:
    """Yield each batch's samples, in order.

    Args:
        samples: Where they are read from.
        batches: Their keys.
        workers: Processes that read; 0 reads here.
    """
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]  # only indexed, so the key may be of any kind
        batch_sampler=list(batches),  # type: ignore[arg-type]  # typed for integers
        collate_fn=list,
        num_workers=workers,
        # Its own: it would draw a number from torch's global one at each start, which a resumed run would see.
        generator=torch.Generator(),
    )
    yield from told(loader)
