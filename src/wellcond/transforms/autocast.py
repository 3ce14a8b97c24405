"""Autocast, kept away from what must be computed in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def autocast_off(device_types: Iterable[str]) -> Iterator[None]:
    """Keep autocast, in which some call ``optimizer.step()``, away from the transforms' products."""
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield
