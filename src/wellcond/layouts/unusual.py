"""Tensors that are no plain arrays of numbers: nested, sharded, sparse, quantized, of flat pieces, without values."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from wellcond.layouts.watching import UnknownInputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Say whether a tensor is a DTensor.

    Args:
        tensor: Any tensor.

    Returns:
        True for a DTensor, however it is placed.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    # The module takes a second to import, and no DTensor exists before someone has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def plain_input(value: Any, trailing: int | None) -> Any:
    """Return an input as a plain tensor.

    Args:
        value: An argument of a layer's rows; what is no tensor is returned as it is.
        trailing: How many of its last axes make up one row, where rows do not depend on each other; None otherwise.

    Returns:
        The tensor itself; of a nested one, its parts' rows one after the other; of a sharded one, this rank's part.

    Raises:
        UnknownInputError: If it is of a kind whose rows cannot be laid out.
    """
    if not isinstance(value, Tensor):
        return value
    if is_sharded(value):
        return _own_part(value, trailing)
    if value.is_nested:
        if trailing is None:
            raise UnknownInputError("its input is a nested tensor, whose parts this kind of layer has no rule for")
        parts = [part.reshape(-1, *part.shape[part.dim() - trailing :]) for part in value.unbind()]
        return torch.cat(parts)
    if value.layout != torch.strided:
        raise UnknownInputError(f"its input is a sparse tensor ({value.layout})")
    if value.is_quantized or value.is_complex():
        raise UnknownInputError(f"its input is {'quantized' if value.is_quantized else 'complex'} ({value.dtype})")
    return value


def _own_part(value: DTensor, trailing: int | None) -> Tensor:
    """Return this rank's part of a sharded input, if that is whole rows."""
    last = value.dim() - (value.dim() - 1 if trailing is None else trailing)
    for placement in value.placements:
        if placement.is_partial() or (placement.is_shard() and getattr(placement, "dim", 0) % value.dim() >= last):
            raise UnknownInputError(f"its input is sharded over ranks otherwise than by whole rows ({placement})")
    return value.to_local()


def why_unfit(weight: Tensor) -> str | None:
    """Say why a weight's gradient cannot be transformed, whatever the layer's rule; None if it can.

    Args:
        weight: The weight.

    Returns:
        The reason, for reports.

    Example:
        >>> why_unfit(nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False))
        'its weight has the dtype torch.int8'
        >>> why_unfit(nn.Parameter(torch.zeros(2, 2))) is None
        True
    """
    if weight.is_nested:
        return "its weight is a nested tensor"
    if weight.layout != torch.strided:
        return f"its weight is a sparse tensor ({weight.layout})"
    if weight.is_quantized or not (weight.is_floating_point() or weight.is_complex()) or weight.dtype.itemsize < 2:
        return f"its weight has the dtype {weight.dtype}"
    inner = weight.data if type(weight) is nn.Parameter else weight
    if is_traceable_wrapper_subclass(inner) and not is_sharded(inner):
        return f"its weight is a {type(inner).__name__}, a tensor of its own kind"
    return None


def leaves_flat_pieces(module: nn.Module) -> bool:
    """Whether a module is a wrapper that keeps the weights inside it as flat pieces of them: FSDP1 with several ranks.

    Args:
        module: Any module.

    Returns:
        True for a ``FullyShardedDataParallel`` that shards.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FullyShardedDataParallel):
        return False
    return bool(module.sharding_strategy is not fsdp.ShardingStrategy.NO_SHARD)
