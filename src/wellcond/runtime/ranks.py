"""The ranks of a process group: sums over them, and work shared among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Ranks:
    """The processes that train one model together; one alone where nothing is distributed.

    Args:
        synchronize: True for the default process group, a group, or False for this process alone.

    Example:
        >>> Ranks(False).size
        1
    """

    def __init__(self, synchronize: bool | dist.ProcessGroup) -> None:
        self._group: dist.ProcessGroup | None = None
        if synchronize is not False and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD if synchronize is True else synchronize
            self._group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.size = 1 if self._group is None else dist.get_world_size(self._group)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks, in one flattened collective per dtype and device.

        Args:
            tensors: Of the same shapes, in the same order, on all ranks; changed in place.
        """
        if self._group is None:
            return
        for same in _alike(tensors):
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.all_reduce(flat, group=self._group)
            _scatter(flat, same)

    def total(self, tensor: Tensor) -> Tensor:
        """Return a tensor's sum over ranks, leaving the tensor as it is."""
        total = tensor.clone()
        self.add([total])
        return total

    def differentiable_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks; the gradient is the sum of what all ranks' losses say of this rank's.

        Args:
            tensor: Of the same shape on all ranks.

        Returns:
            Shape [ranks, *shape], in the order of the ranks.
        """
        if self._group is None:
            return tensor.unsqueeze(0)
        gathered: Tensor = _Gather.apply(tensor, self)
        return gathered

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks.

        Args:
            tensor: Of the same shape on all ranks.

        Returns:
            Shape [ranks, *shape], in the order of the ranks.
        """
        if self._group is None:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(self.size * tensor.numel())
        # Newer versions of torch warn of the older name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, tensor.reshape(-1).contiguous(), group=self._group)
        return gathered.view(self.size, *tensor.shape)

    def gather_objects(self, value: object) -> list[Any]:
        """Return what each rank gives, anything that can be pickled, in the order of the ranks."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Replace each tensor by that of one rank, in one flattened collective per dtype and device.

        Args:
            tensors: Of the same shapes, in the same order, on all ranks; changed in place.
            owner: Whose tensors.
        """
        if self._group is None:
            return
        for same in _alike(tensors):
            flat = torch.cat([tensor.flatten() for tensor in same])
            dist.broadcast(flat, src=dist.get_global_rank(self._group, owner), group=self._group)
            if owner != self.rank:
                _scatter(flat, same)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Share work out: the most expensive piece first, each to the rank with the least so far.

        Args:
            costs: Of each piece, the same on all ranks.

        Returns:
            The rank of each piece.
        """
        load = [0.0] * self.size
        owner = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owner[index] = load.index(min(load))
            load[owner[index]] += costs[index]
        return owner


class _Gather(torch.autograd.Function):
    """`Ranks.gather`; its backward communicates, so all ranks must call it, in the same order."""

    @staticmethod
    def forward(tensor: Tensor, ranks: Ranks) -> Tensor:
        """Gather."""
        return ranks.gather(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the ranks."""
        ctx.ranks = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the sum over ranks of the gradients of this rank's tensor."""
        return ctx.ranks.total(grad.contiguous())[ctx.ranks.rank], None


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by dtype and device, in one order on all ranks, or their collectives would not match."""
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    return [[tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind] for kind in kinds]


def _scatter(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy the pieces of a flat tensor where they belong."""
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
