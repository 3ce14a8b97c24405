"""Ghost Batch Normalization: statistics over groups of the batch, as if each group were on a device of its own."""

from __future__ import annotations

import torch
from torch import nn

from wellcond.nn.norm.base import StatisticsNorm
from wellcond.runtime.checks import check_positive_integer


class GhostBatchNorm(StatisticsNorm):
    """Ghost Batch Normalization of inputs of any number of dimensions; use `GhostBatchNorm1d`, `2d` or `3d`."""

    def __init__(
        self,
        num_features: int,
        group_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_integer("group_size", group_size)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, group_size=group_size, device=device, dtype=dtype
        )


class GhostBatchNorm1d(GhostBatchNorm, nn.BatchNorm1d):
    """Batch normalization of [N, C] or [N, C, L] in groups of `group_size` samples (Hoffer et al., 2017).

    Each group, consecutive samples of the batch, is normalized with its own mean and variance; the running statistics
    take in the groups' average. In evaluation it is `nn.BatchNorm1d`. This is how training on many devices with
    `group_size` samples each is simulated on one.

    Args:
        num_features: C.
        group_size: Samples of a group. A remainder of more than half a group is a group of its own; a smaller one joins
            the last group.
        eps: ε, added to the variance.
        momentum: Weight of a new batch in the running statistics; None for equal weights.
        affine: Learn γ and β.
        track_running_stats: Keep running statistics; without, evaluation uses the batch's own, in groups.
        device: Of the parameters and statistics.
        dtype: Of the parameters; statistics are float32 or wider.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = GhostBatchNorm1d(3, group_size=2, affine=False)
        >>> layer(torch.randn(8, 3, 5))[:2].mean((0, 2)).abs().max() < 1e-6
        tensor(True)
    """


class GhostBatchNorm2d(GhostBatchNorm, nn.BatchNorm2d):
    """`GhostBatchNorm1d` of [N, C, H, W].

    Example:
        >>> GhostBatchNorm2d(8, group_size=4)
        GhostBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, group_size=4)
    """


class GhostBatchNorm3d(GhostBatchNorm, nn.BatchNorm3d):
    """`GhostBatchNorm1d` of [N, C, D, H, W]."""
