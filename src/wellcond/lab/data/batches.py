"""Batches of images that are already in memory: shuffled, augmented and normalized on the device that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.named_data import AUGMENTATIONS
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.errors import unknown_name

Batch = tuple[Tensor, Tensor]


def check_augmentation(name: str, known: Sequence[str] = AUGMENTATIONS) -> str:
    """Return the name.

    Args:
        name: The name.
        known: Those that there are.

    Raises:
        LabError: If no augmentation has it.
    """
    if name not in known:
        raise unknown_name("augmentation", name, known)
    return name


@dataclass(frozen=True)
class Moves:
    """The places that each image's pixels come from, [n, height] and [n, width], in the image with its black border."""

    rows: Tensor
    columns: Tensor
    border: int

    def take(self, positions: slice) -> Moves:
        """Return the moves of some of the images."""
        return Moves(self.rows[positions], self.columns[positions], self.border)


def draw_moves(count: int, height: int, width: int, name: str, generator: torch.Generator) -> Moves | None:
    """Draw how each image is mirrored and shifted, without looking at it.

    Args:
        count: How many images.
        height: Of an image.
        width: Of an image.
        name: One of `AUGMENTATIONS`.
        generator: Where the chances come from; on the CPU, so that they are the same on every device.

    Returns:
        The moves; None for ``"none"``.
    """
    if name == "none":
        return None
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width).expand(count, width)
    columns = torch.where(mirrored, columns.flip(1), columns)
    rows = torch.arange(height).expand(count, height)
    if name != "crop-flip":
        return Moves(rows, columns, 0)
    border = max(1, height // 8)
    rows = rows + torch.randint(2 * border + 1, (count, 1), generator=generator)
    columns = columns + torch.randint(2 * border + 1, (count, 1), generator=generator)
    return Moves(rows, columns, border)


def move_pixels(images: Tensor, moves: Moves | None) -> Tensor:
    """Return the images with their pixels moved."""
    if moves is None:
        return images
    if moves.border:
        images = torch.nn.functional.pad(images, (moves.border,) * 4)
    # One gather for both: the position in the source of each row and each column.
    rows, columns = moves.rows.to(images.device), moves.columns.to(images.device)
    each = torch.arange(len(images), device=images.device)
    # The indexed axes come first and the sliced one last: [n, height, width, channels].
    gathered = images[each[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return gathered.permute(0, 3, 1, 2)


def augment(images: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return the images, each mirrored or shifted at random.

    Args:
        images: [n, channels, height, width], any dtype.
        name: ``"none"``, ``"flip"`` (mirror half of them) or ``"crop-flip"`` (also cut at random out of the image with
            a black border of an eighth of its height).
        generator: Where the chances come from; on the CPU, so that they are the same on every device.

    Returns:
        The images, of the same shape.
    """
    count, _, height, width = images.shape
    return move_pixels(images, draw_moves(count, height, width, name, generator))


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel.

    Args:
        images: uint8, [n, channels, height, width].

    Returns:
        Two float32 tensors, [channels, 1, 1]; the standard deviation is 1 where a channel is constant.
    """
    values = torch.arange(256, dtype=torch.float64)
    # A histogram gives exact sums without a float copy of the data set.
    shares = torch.stack(
        [torch.bincount(channel.flatten().int(), minlength=256).double() for channel in images.cpu().unbind(1)]
    )
    shares /= shares.sum(dim=1, keepdim=True)
    mean = shares @ values
    std = (shares @ values.square() - mean.square()).clamp(min=0).sqrt()
    std[std == 0] = 1.0
    return mean.float()[:, None, None].to(images.device), std.float()[:, None, None].to(images.device)


def share_of(batch_size: int, rank: int, ranks: int) -> slice:
    """Return which images of a batch a rank takes.

    >>> share_of(8, 1, 2)
    slice(4, 8, None)
    """
    return slice(batch_size * rank // ranks, batch_size * (rank + 1) // ranks)


class TrainingBatches(Epochs[Batch]):
    """One epoch of shuffled, augmented batches each time it is iterated over; an incomplete last batch is left out.

    Args:
        images: uint8, [n, channels, height, width], on the device that trains.
        labels: [n], on the same device.
        moments: Mean and standard deviation that normalize, each [channels, 1, 1].
        batch_size: Images of a batch, those of all ranks together.
        augmentation: One of `AUGMENTATIONS`.
        seed: Order and augmentation of each epoch are a function of this and the epoch's number.
        rank: Which process of the run this is; each takes as many images of a batch, one after the other, so that the
            ghost groups of one process are the shares of several.
        ranks: How many processes the run has.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        moments: tuple[Tensor, Tensor],
        batch_size: int,
        augmentation: str,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images, self.labels, self.moments = images, labels, moments
        self.batch_size, self.augmentation, self.seed = batch_size, augmentation, seed
        self.share = share_of(batch_size, rank, ranks)
        super().__init__(self._epoch, len(labels) // batch_size)

    def _epoch(self, epoch: int, first: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(derived_seed(f"order of epoch {epoch}", self.seed))
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        mean, std = self.moments
        height, width = self.images.shape[2:]
        for index, whole in enumerate(order[: len(self) * self.batch_size].split(self.batch_size)):
            # Drawn for the whole batch, also where it is skipped: what an image goes through hangs on nothing else.
            moves = draw_moves(len(whole), height, width, self.augmentation, generator)
            if index < first:
                continue
            positions = whole[self.share]
            images = move_pixels(self.images[positions], None if moves is None else moves.take(self.share))
            yield (images.float() - mean) / std, self.labels[positions]


def evaluation_batches(
    images: Tensor, labels: Tensor, moments: tuple[Tensor, Tensor], rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yield every image once, in order, normalized.

    Args:
        images: uint8, [n, channels, height, width].
        labels: [n].
        moments: Mean and standard deviation that normalize, each [channels, 1, 1].
        rank: Which process this is: it takes every ``ranks``-th image of a batch, from this one on, perhaps none.
        ranks: How many processes there are; all get equally many batches.
    """
    mean, std = moments
    for some_images, some_labels in zip(images.split(500), labels.split(500), strict=True):
        yield (some_images[rank::ranks].float() - mean) / std, some_labels[rank::ranks]
