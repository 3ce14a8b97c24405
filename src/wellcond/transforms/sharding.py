"""Weights sharded over ranks (FSDP2), without importing ``torch.distributed.tensor`` where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.layouts.unusual import is_sharded


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, and any other tensor itself.

    Args:
        tensor: Any tensor.

    Returns:
        A plain tensor; writing to it writes to ``tensor``.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def rows_are_whole(layer: Layer) -> bool:
    """Say whether every rank that holds some of a weight holds whole rows, as under FSDP2, which shards output units.

    Args:
        layer: The layer.

    Returns:
        True also for weights that are not sharded; False for those with several groups, whose border a shard may cross.
    """
    if not is_sharded(layer.weight):
        return True
    return layer.layout.output_axis == 0 and layer.groups == 1 and is_sharded_by_first_axis(layer.weight)


def is_sharded_by_first_axis(weight: Tensor) -> bool:
    """Say whether a weight is whole, or split along its first axis alone, as FSDP2 does by default."""
    if not is_sharded(weight):
        return True
    return all(p.is_replicate() or p.is_shard(0) for p in weight.placements)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor on every rank; any other tensor is returned as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def write_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a tensor that may be sharded: each rank takes its own part.

    Args:
        target: What to overwrite.
        value: The same tensor on all ranks, of the target's whole shape.
    """
    if is_sharded(target):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = target.device_mesh
        replicated = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        value = replicated.redistribute(placements=target.placements).to_local()
    local(target).copy_(value)


def units(layer: Layer, tensor: Tensor) -> Tensor:
    """Return what `Layer.unit_mean` can average on this rank: the local part where its units are whole.

    Args:
        layer: The layer.
        tensor: Its weight or gradient.

    Returns:
        The local part if the sharded axis counts output units (groups do not matter then); otherwise ``tensor``, whose
        means cross ranks.
    """
    return local(tensor) if layer.layout.output_axis == 0 else tensor


def units_can_be_averaged(layer: Layer) -> bool:
    """Say whether `Layer.unit_mean` of `units` is defined: not if a shard's border falls inside a group of inputs.

    Args:
        layer: The layer.

    Returns:
        True also for weights that are not sharded.
    """
    if not is_sharded(layer.weight):
        return True
    placements = layer.weight.placements
    if layer.layout.output_axis == 0:
        return all(p.is_replicate() or p.is_shard(0) for p in placements)
    ranks = math.prod(layer.weight.device_mesh.size(axis) for axis, p in enumerate(placements) if p.is_shard())
    return layer.groups == 1 or layer.groups % ranks == 0


def sum_over_shards(values: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Add up over the ranks what each computed from its part of a weight, in one collective per mesh.

    Args:
        values: One tensor per weight, all of one shape.
        weights: The weights; the values of those that are not sharded stay as they are.

    Returns:
        The sums.
    """
    sums = list(values)
    meshes: dict[Any, list[int]] = {}
    for index, weight in enumerate(weights):
        if is_sharded(weight):
            meshes.setdefault((weight.device_mesh, weight.placements, values[index].dtype), []).append(index)
    if not meshes:
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    for (mesh, placements, _), indices in meshes.items():
        parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        stacked = torch.stack([values[index] for index in indices])
        total = DTensor.from_local(stacked, mesh, parts, run_check=False).full_tensor()
        for index, value in zip(indices, total, strict=True):
            sums[index] = value
    return sums
