"""Sums over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def shared_group(synchronize: bool | dist.ProcessGroup) -> dist.ProcessGroup | None:
    """Return the group over which statistics are added, or None if this process is alone or wants to be.

    Args:
        synchronize: True for the default group, a group, or False.

    Returns:
        A group of at least two ranks, or None.
    """
    if synchronize is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if synchronize is True else synchronize
    return group if group is not None and dist.get_world_size(group) > 1 else None


def add_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each tensor by its sum over ranks, in one flattened collective per dtype and device.

    Args:
        tensors: Of the same shapes, in the same order, on all ranks; changed in place.
        group: The ranks.
    """
    # In one order on all ranks, or their collectives would not match.
    for like in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        same = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == like]
        flat = torch.cat([tensor.flatten() for tensor in same])
        dist.all_reduce(flat, group=group)
        parts = torch.split(flat, [tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
