"""The global random generators of Python, numpy and torch: seeded for a purpose, and left as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wellcond.lab.data.splits import derived_seed


@dataclass(frozen=True)
class GeneratorStates:
    """The states of all global generators of a process.

    Attributes:
        python: Of `random`.
        numpy: Of `numpy.random`.
        cpu: Of torch on the CPU.
        cuda: Of torch on the CUDA device that trains; None on the CPU.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> GeneratorStates:
        """Return the states as they are.

        Args:
            device: What trains.
        """
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda)  # noqa: NPY002

    def restore(self, device: torch.device) -> None:
        """Set the generators to these states.

        Args:
            device: What trains.
        """
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.random.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)

    def to_dict(self) -> dict[str, Any]:
        """Return the states as tensors and plain numbers, which a checkpoint can hold."""
        kind, key, *rest = self.numpy
        numbers = torch.from_numpy(key.astype(np.int64))
        return {"python": self.python, "numpy": (kind, numbers, *rest), "cpu": self.cpu, "cuda": self.cuda}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> GeneratorStates:
        """Return the states that `to_dict` gave."""
        kind, numbers, *rest = kept["numpy"]
        return cls(kept["python"], (kind, numbers.numpy().astype(np.uint32), *rest), kept["cpu"], kept["cuda"])


def seed_generators(purpose: str, seed: int, device: torch.device) -> None:
    """Seed all global generators.

    Args:
        purpose: What the numbers are for; those of different purposes are independent of each other.
        seed: The run's seed.
        device: What trains.
    """
    number = derived_seed(purpose, seed)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


@contextmanager
def seeded(purpose: str, seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed all global generators in the block, and leave them as they were.

    Args:
        purpose: What the numbers are for.
        seed: The run's seed.
        device: What trains; None: only the CPU draws.

    >>> with seeded("example", 0):
    ...     first = torch.rand(2)
    >>> with seeded("example", 0):
    ...     bool((torch.rand(2) == first).all())
    True
    """
    device = torch.device("cpu") if device is None else device
    before = GeneratorStates.now(device)
    try:
        seed_generators(purpose, seed, device)
        yield
    finally:
        before.restore(device)


class Strand:
    """A sequence of random numbers of its own: blocks that draw from it do not see what is drawn between them.

    Args:
        purpose: What the numbers are for.
        seed: The run's seed.
        device: What trains.
    """

    def __init__(self, purpose: str, seed: int, device: torch.device) -> None:
        self.device = device
        with seeded(purpose, seed, device):
            self._states = GeneratorStates.now(device)

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw from this sequence in the block, and leave the global generators as they were."""
        before = GeneratorStates.now(self.device)
        self._states.restore(self.device)
        try:
            yield
        finally:
            self._states = GeneratorStates.now(self.device)
            before.restore(self.device)
