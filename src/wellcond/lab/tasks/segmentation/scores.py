"""Scores a segmentation by the mean over classes of intersection over union, from a matrix of counts."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = 255
"""The label of a pixel that counts for nothing."""


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how many pixels of each class are taken for each class.

    Args:
        predicted: Classes, of any shape.
        labels: Of the same shape; `IGNORED` counts for nothing.
        classes: How many there are.

    Returns:
        Int64, [true class, predicted class].

    >>> confusion(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]), 2)
    tensor([[1, 1],
            [0, 1]])
    """
    counted = labels != IGNORED
    pairs = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def mean_iou(counts: Tensor) -> tuple[float, float]:
    """Return the mean intersection over union and the share of pixels that are right, both in percent.

    Args:
        counts: From `confusion`, of all images together. A class that neither is there nor is found counts for nothing.

    >>> mean_iou(torch.tensor([[2, 0, 0], [0, 2, 0], [0, 0, 0]]))
    (100.0, 100.0)
    """
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    there = union > 0
    share = right[there] / union[there]
    return 100.0 * float(share.mean()), 100.0 * float(right.sum() / counts.sum())
