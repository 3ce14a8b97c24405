"""Full precision under autocast, for statistics and their roots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


def without_autocast(*devices: torch.device) -> AbstractContextManager[object]:
    """Disable autocast on some devices, under which products are of half precision; the meta device has none.

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(torch.device("cpu")):
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.float32
    """
    if len(devices) != 1:
        return _without_any(devices)
    kind = devices[0].type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


@contextmanager
def _without_any(devices: tuple[torch.device, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for device in devices:
            stack.enter_context(without_autocast(device))
        yield
