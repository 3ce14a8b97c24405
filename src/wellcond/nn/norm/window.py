"""Windows of recent batches: buffers whose oldest entry the newest one replaces."""

from __future__ import annotations

import torch
from torch import Tensor


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
