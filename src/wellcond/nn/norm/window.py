"""Windows of recent batches: buffers whose oldest entry the newest one replaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def replace_oldest(window: Tensor, batches: Tensor, newest: Tensor) -> None:
    """Put the newest entry in the place of the oldest.

    Args:
        window: Shape [C, entries, ...], changed in place.
        batches: How many entries came before, an integer tensor.
        newest: Shape [C, ...].

    Example:
        >>> window = torch.zeros(1, 2)
        >>> for batch in range(3):
        ...     replace_oldest(window, torch.tensor(batch), torch.tensor([batch + 1.0]))
        >>> window
        tensor([[3., 2.]])
    """
    if window.shape[1]:
        place = torch.remainder(batches, window.shape[1]).view(1)
        window.index_copy_(1, place, newest.detach().unsqueeze(1).to(window.dtype))


def filled(window: Tensor, batches: Tensor) -> Tensor:
    """Return which entries a window has, as ones and zeros.

    >>> filled(torch.zeros(1, 3), torch.tensor(2))
    tensor([1., 1., 0.])
    """
    return (torch.arange(window.shape[1], device=window.device) < batches).to(window.dtype)


def empty_where_missing(layer: nn.Module, names: Sequence[str], state_dict: dict[str, Any], prefix: str) -> None:
    """Let a checkpoint without all of a layer's windows and counters have empty ones, whole.

    A plain batch normalization's has none; a layer that is made anew with another window keeps what fits, and a counter
    alone would count entries that are not there.

    Args:
        layer: That has the buffers.
        names: Of the windows and their counters.
        state_dict: Completed in place.
        prefix: Of the layer.
    """
    if prefix + "running_mean" in state_dict and not all(prefix + name in state_dict for name in names):
        device = state_dict[prefix + "running_mean"].device
        state_dict |= {prefix + name: torch.zeros_like(getattr(layer, name), device=device) for name in names}
