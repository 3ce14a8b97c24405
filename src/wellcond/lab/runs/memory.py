"""The bytes that training takes: of the network, of the optimizer, and at the peak of a step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], object]
_KINETO_SAYS = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Memory:
    """Bytes that training a network takes on its device.

    Attributes:
        parameters: Of the network's parameters; their gradients take as much again.
        buffers: Of its buffers, running statistics for example.
        optimizer_state: Of all tensors in the optimizer's state, those of attached transforms included.
        peak: The most that torch's tensors held at once in steps that do all that a method ever does (see
            `measure_memory`): the three above, gradients, features, and the batch.
    """

    parameters: int
    buffers: int
    optimizer_state: int
    peak: int


def measure_memory(
    build: Callable[[], tuple[nn.Module, torch.optim.Optimizer, Step]], device: torch.device, steps: int = 2
) -> Memory:
    """Count the bytes of training from nothing: the network is built, and a few steps are made.

    On a CUDA device the peak is that of torch's allocator. On the CPU every allocation and release by a tensor is
    added up, which gives the same number each time, up to a few kB of constants that the first step of a process may
    keep. The resident memory of the process does not: whether memory that was released before is used again, or
    returned to the system, moves it by more than methods differ.

    Args:
        build: Returns a network on the device, its optimizer, and a training step. Everything that counts is made in it
            or in the step; what is rare in training, such as a preconditioner's solves, should be in every step.
        device: The device.
        steps: How many steps; the first one allocates the optimizer's state, so that two are needed for a peak with it.

    Returns:
        The bytes.
    """
    found: list[tuple[nn.Module, torch.optim.Optimizer]] = []

    def train() -> None:
        model, optimizer, step = build()
        for _ in range(steps):
            step()
        found.append((model, optimizer))

    peak = _cuda_peak(train, device) if device.type == "cuda" else _cpu_peak(train)
    ((model, optimizer),) = found
    return Memory(
        parameters=tensor_bytes(model.parameters()),
        buffers=tensor_bytes(model.buffers()),
        optimizer_state=tensor_bytes(_tensors(optimizer.state_dict())),  # also of optimizers within optimizers
        peak=peak,
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors; one that comes twice, or shares its memory with another, counts once.

    >>> weight = torch.zeros(4, 4)
    >>> tensor_bytes([weight, weight.view(16), torch.zeros(3)])
    76
    """
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _cuda_peak(act: Step, device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    act()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def _cpu_peak(act: Step) -> int:
    with _silent_kineto(), _without_collections(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        act()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is released
        peak = max(peak, held)
    return peak


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect garbage now and none in the block: when Python does, the count would depend on what ran before."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _silent_kineto() -> Iterator[None]:
    """Let torch's profiler not describe itself on the terminal."""
    before = os.environ.get(_KINETO_SAYS)
    os.environ[_KINETO_SAYS] = "99" if before is None else before
    try:
        yield
    finally:
        if before is None:
            del os.environ[_KINETO_SAYS]
