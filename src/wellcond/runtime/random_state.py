"""States of the random generators, put back so that a forward pass that runs again draws the same numbers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


class RandomState:
    """The state of the global generators: torch's, on the CPU and on one device, Python's and NumPy's.

    Nothing waits for the device: where its generator stands is known to the CPU.

    Args:
        device: The device beside the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_device: Any = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        self._torch = torch.get_rng_state()
        self._other = None if self._of_device is None else self._of_device.get_rng_state(device)
        self._python = random.getstate()
        self._numpy = (numpy := sys.modules.get("numpy.random")) and numpy.get_state()

    def put_back(self) -> None:
        """Have the generators stand here again."""
        torch.set_rng_state(self._torch)
        if self._of_device is not None:
            self._of_device.set_rng_state(self._other, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy.random"].set_state(self._numpy)


@contextlib.contextmanager
def random_numbers_kept(device: torch.device, start: RandomState | None = None) -> Iterator[None]:
    """Leave the generators as they stand, whatever is drawn meanwhile.

    Args:
        device: The device beside the CPU.
        start: Where they stand meanwhile; None: where they do now.
    """
    now = RandomState(device)
    if start is not None:
        start.put_back()
    try:
        yield
    finally:
        now.put_back()
