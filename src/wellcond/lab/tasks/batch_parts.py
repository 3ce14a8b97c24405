"""Moves the tensors of a batch to a device and shares its rows among ranks, however the tensors are nested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from wellcond.lab.errors import DataError


class Share(NamedTuple):
    """A rank's rows of a batch that could not be shared equally.

    Attributes:
        batch: The rows.
        weight: What its mean loss counts in the mean over ranks.
    """

    batch: Any
    weight: float


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with everything that can be moved on the device.

    Args:
        batch: Tensors and whatever has a method ``to``, in any nesting of tuples, lists, dicts and dataclasses.
        device: Where to.
    """

    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device, non_blocking=True)
        return part.to(device) if _moves(part) else part

    return _mapped(moved, batch)


def rows_of(batch: Any) -> int:
    """Return how many samples a batch has: the rows of its first tensor that has any; 0 without one.

    >>> rows_of({"pixels": torch.zeros(8, 3), "weight": torch.tensor(1.0)})
    8
    """
    for part in _leaves(batch):
        if isinstance(part, Tensor) and part.dim():
            return len(part)
    return 0


def shared(batch: Any, rank: int, ranks: int) -> Any:
    """Return a rank's rows of a batch, one after the other; what has other rows than the batch goes to every rank.

    Args:
        batch: The batch of all ranks together.
        rank: Which process this is.
        ranks: How many there are.

    Returns:
        The rows; a `Share` where ranks have unequally many.

    Raises:
        DataError: If there are fewer rows than ranks.

    >>> shared((torch.arange(4), "all"), rank=1, ranks=2)
    (tensor([2, 3]), 'all')
    """
    if ranks == 1:
        return batch
    rows = rows_of(batch)
    if rows < ranks:
        raise DataError(
            f"a batch of {rows} rows cannot be shared by {ranks} processes: make it larger, or let batches() take rank "
            "and ranks and return each process its own"
        )
    begin, end = rows * rank // ranks, rows * (rank + 1) // ranks

    def cut(part: Any) -> Any:
        return part[begin:end] if isinstance(part, Tensor) and part.dim() and len(part) == rows else part

    own = _mapped(cut, batch)
    return own if rows % ranks == 0 else Share(own, (end - begin) * ranks / rows)


def _moves(part: Any) -> bool:
    return callable(getattr(part, "to", None)) and not isinstance(part, type)


def _mapped(change: Callable[[Any], Any], batch: Any) -> Any:
    def leaf(part: Any) -> Any:
        if is_dataclass(part) and not isinstance(part, type) and not _moves(part):
            inner = {item.name: _mapped(change, getattr(part, item.name)) for item in fields(part) if item.init}
            return replace(part, **inner)
        return change(part)

    return tree_map(leaf, batch, is_leaf=_moves)


def _leaves(batch: Any) -> list[Any]:
    found = []
    for part in tree_leaves(batch, is_leaf=_moves):
        if is_dataclass(part) and not isinstance(part, type):
            found += [leaf for item in fields(part) for leaf in _leaves(getattr(part, item.name))]
        elif not isinstance(part, Tensor) and callable(getattr(part, "values", None)):
            found += _leaves(list(part.values()))  # a tokenizer's dictionary, for example
        else:
            found.append(part)
    return found
