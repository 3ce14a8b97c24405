"""What a classifier scores: accuracy and cross-entropy over the batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.data.batches import Batch
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.base import Evaluation

_TOP = 5


def evaluate_classifier(
    model: nn.Module,
    batches: Iterable[Batch],
    count: int,
    classes: int,
    device: torch.device,
    ranks: int,
    stopwatch: Stopwatch,
) -> Evaluation:
    """Return accuracy, also among the five highest logits if there are more classes, and mean cross-entropy.

    Args:
        model: The network, in evaluation mode.
        batches: This rank's share of each batch of images and labels, perhaps none of one.
        count: Images of all ranks together.
        classes: How many classes there are.
        device: Where the batches are.
        ranks: How many processes the run has.
        stopwatch: Runs in forward passes only.
    """
    loss = torch.zeros((), device=device)
    first, among = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    for images, labels in batches:
        # A network that is sharded over the ranks needs all of them in every forward pass, images or not.
        shown = images if len(labels) else images.new_zeros(1, *images.shape[1:])
        stopwatch.start()
        logits = model(shown)
        stopwatch.stop()
        logits = logits[: len(labels)].float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        first += (logits.argmax(1) == labels).sum()
        if classes > _TOP:
            among += (logits.topk(_TOP, dim=1).indices == labels[:, None]).sum()
    sums = torch.stack([loss.double(), first.double(), among.double()])
    if ranks > 1:
        dist.all_reduce(sums)
    metrics = {f"top-{_TOP}": 100.0 * float(sums[2].float() / count)} if classes > _TOP else {}
    return Evaluation(100.0 * float(sums[1].float() / count), float(sums[0]) / count, count, metrics)


def batch_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the images that are right, in percent, and their number, as `SeedData.train_score` wants it.

    Args:
        logits: [n, classes].
        labels: [n].

    >>> batch_accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor([100.,   2.], dtype=torch.float64)
    """
    right = (logits.argmax(1) == labels).sum(dtype=torch.float64)
    return torch.stack([100.0 * right, torch.full_like(right, len(labels))])
