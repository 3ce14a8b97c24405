"""Takes a network's weakest channels away, and takes the statistics anew that this makes stale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.calibration.models import calibrate
from wellcond.repair.channels import Channels, find_channels
from wellcond.runtime.checks import checked
from wellcond.runtime.models import unwrapped


@checked
def prune_channels(
    model: nn.Module,
    share: float,
    loader: Iterable[Any] | None = None,
    *,
    remove: bool = True,
    **options: Any,
) -> nn.Module:
    """Take a share of each layer's channels away, those with the smallest weights, and give the rest its statistics.

    Channels that have to be the same (the branches of a residual connection, a depthwise convolution and what feeds it)
    go together. The score of a channel is the sum over the weights that make it of their squared norms, each weight's
    divided by its mean. Channels of the output, and those that meet an operation that is not known, stay.

    Args:
        model: A network of convolutions, linear layers and batch normalizations that `torch.fx` can trace.
        share: Of the channels, from 0 to 1, both excluded; at least one of them stays.
        loader: Training data, as `wellcond.calibrate` takes it. None: the statistics stay those of the whole network.
        remove: True: layers become smaller, and their parameters new ones: make the optimizer afterwards. False: the
            channels become zeros, and all shapes stay; the network computes the same.
        **options: Further ones of `wellcond.calibrate`.

    Returns:
        `model`.

    Raises:
        TypeError: If the model cannot be traced.
        ValueError: If the share is out of its range, or no channel can be taken away; the reasons are named.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017), with squared norms.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> prune_channels(model, 0.5, [torch.randn(4, 3, 8, 8)])[0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    found = find_channels(unwrapped(model))
    free = [channels for channels in found if channels.fixed is None]
    if not free:
        reasons = "; ".join(dict.fromkeys(f"{each.modules[0]!r} {each.fixed}" for each in found if each.modules))
        raise ValueError(f"{type(model).__name__} has no channels that could be taken away: {reasons}")
    with torch.no_grad():
        orders = [_scores(channels).argsort(descending=True) for channels in free]  # Before any weight changes.
        for channels, order in zip(free, orders, strict=True):
            gone = min(int(share * channels.size), channels.size - 1)
            if remove:
                channels.select(order[: channels.size - gone].sort().values)
            else:
                channels.blank(order[channels.size - gone :])
    return model if loader is None else calibrate(model, loader, **options)


def _scores(channels: Channels) -> Tensor:
    scores = torch.zeros(channels.size, dtype=torch.float64)
    for module, name, dim, role, _ in channels.uses:
        weight = module._parameters.get(name)
        if role == "makes" and name == "weight" and weight is not None:
            norms = weight.detach().double().cpu().movedim(dim, 0).flatten(1).square().sum(1)
            scores += norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return scores
