"""Batches of images that are decoded on the way, by processes beside the one that trains."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wellcond.lab.data.batches import Batch, share_of
from wellcond.lab.data.decoding import told
from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.splits import Indices, derived_seed
from wellcond.lab.data.views import TrainingViews

_MOST_WORKERS = 16
# Of ImageNet's training images, in 0…255: what networks that were trained on it expect.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


def loading_processes(jobs: int = 1) -> int:
    """Return how many processes decode for each of this many runs at a time: the cores that training leaves free.

    0, so that the training process decodes itself, where there is one core for a run, or where processes must not be
    started.
    """
    if multiprocessing.current_process().daemon:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // jobs - 1))


def normalized(images: Tensor, device: torch.device) -> Tensor:
    """Return the images on the device, each channel shifted and scaled by ImageNet's mean and standard deviation.

    Args:
        images: uint8, [n, 3, height, width]; bytes, because they are a quarter of what floats would be to move.
        device: Where to.
    """
    mean, std = (torch.tensor(moment, device=device)[:, None, None] for moment in (_MEAN, _STD))
    return (images.to(device, non_blocking=True).float() - mean) / std


class StreamedBatches(Epochs[Batch]):
    """One epoch of shuffled, augmented batches each time it is iterated over; an incomplete last batch is left out.

    Order and views are a function of the seed, the epoch and the image, whatever the number of processes.

    Args:
        views: The images of the pool.
        positions: Those that train, [n].
        batch_size: Images of a batch, those of all ranks together.
        image_size: Height and width of a view.
        device: Where the batches go.
        workers: Processes that decode; 0 decodes here.
        rank: Which process of the run this is; each takes as many images of a batch, one after the other.
        ranks: How many processes the run has.
    """

    def __init__(
        self,
        views: TrainingViews,
        positions: Indices,
        batch_size: int,
        image_size: int,
        device: torch.device,
        workers: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.device = device
        self._sampler = _EpochSampler(
            torch.from_numpy(positions), batch_size, views.seed, share_of(batch_size, rank, ranks)
        )
        self._loader = _loader(views, self._sampler, image_size, device, workers, persistent=True)
        super().__init__(self._epoch, len(self._sampler))

    def _epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        self._sampler.epoch, self._sampler.first = epoch, first
        for images, labels in told(self._loader):
            yield normalized(images, self.device), labels.to(self.device, non_blocking=True)


class _EpochSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, position) of each image of a rank's share of each batch."""

    def __init__(self, positions: Tensor, batch_size: int, seed: int, share: slice) -> None:
        self.positions, self.batch_size, self.seed, self.share = positions, batch_size, seed, share
        self.epoch = self.first = 0

    def __len__(self) -> int:
        return len(self.positions) // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        generator = torch.Generator().manual_seed(derived_seed(f"order of epoch {epoch}", self.seed))
        order = self.positions[torch.randperm(len(self.positions), generator=generator)]
        for whole in order[: len(self) * self.batch_size].split(self.batch_size)[self.first :]:
            yield [(epoch, position) for position in whole[self.share].tolist()]


def evaluation_stream(
    views: Dataset[Any],
    positions: Indices,
    batch_size: int,
    image_size: int,
    device: torch.device,
    workers: int,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """Yield every image once, in order, normalized.

    Args:
        views: The images.
        positions: Which of them, [n].
        batch_size: Images of a batch, those of all ranks together.
        image_size: Height and width of a view.
        device: Where the batches go.
        workers: Processes that decode; 0 decodes here.
        rank: Which process this is: it takes every ``ranks``-th image of a batch, from this one on, perhaps none.
        ranks: How many processes there are; all get equally many batches.
    """
    shares = [whole[rank::ranks].tolist() for whole in torch.from_numpy(positions).split(batch_size)]
    for images, labels in told(_loader(views, shares, image_size, device, workers, persistent=False)):
        yield normalized(images, device), labels.to(device, non_blocking=True)


def _loader(
    views: Dataset[Any],
    batches: Sampler[Any] | Sequence[Any],
    image_size: int,
    device: torch.device,
    workers: int,
    persistent: bool,
) -> DataLoader[Any]:
    return DataLoader(
        views,
        batch_sampler=batches,
        collate_fn=partial(_collate, image_size),
        num_workers=workers,
        persistent_workers=persistent and workers > 0,
        pin_memory=device.type == "cuda",
        # Its own: it would draw a number from torch's global one at each start, which a resumed run would see.
        generator=torch.Generator(),
    )


def _collate(image_size: int, views: Sequence[tuple[Tensor, int]]) -> Batch:
    if not views:  # a rank's share of a small last batch
        return torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    images, labels = zip(*views, strict=True)
    return torch.stack(images), torch.tensor(labels)
