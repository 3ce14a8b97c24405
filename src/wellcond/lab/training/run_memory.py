"""Counts the bytes that a run's training takes, in steps beside it with its network, method and first batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from wellcond.lab.methods.optimizers import take_step
from wellcond.lab.runs.memory import Memory, Step, measure_memory
from wellcond.lab.runs.records import RunSpec
from wellcond.lab.tasks.base import SeedData, Task
from wellcond.lab.training.network import initial_network

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class RunMemory:
    """Counts the memory of runs; of those that differ in their lr or their length alone, only once.

    Two steps are made apart from the run, with a preconditioner's refresh in each: the peak is that of the step in
    which everything happens, whenever in the run that is.

    Args:
        task: The data and what one does with it.
        device: Where the runs train.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self._counted: dict[RunSpec, Memory] = {}

    def of(self, spec: RunSpec, data: SeedData) -> Memory:
        """Return the bytes that a run takes on its device.

        Args:
            spec: The run.
            data: Its data.
        """
        alike = replace(spec, lr=spec.method.lrs[0], steps=1, stats_every=1, solve_every=1)
        if alike not in self._counted:
            self._counted[alike] = measure_memory(lambda: self._build(alike, data), self.device)
        return self._counted[alike]

    def _build(self, spec: RunSpec, data: SeedData) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
        method = spec.method
        model = initial_network(self.task, spec).to(self.device).train()
        optimizer, _ = method.build(model, spec.lr, spec.refresh)
        batch = next(iter(data.batches()))

        def loss() -> Tensor:
            with torch.autocast(self.device.type, _MIXED.get(spec.precision), enabled=spec.precision in _MIXED):
                return data.loss(model, batch)

        def step() -> None:
            take_step(optimizer, loss, method.second_order, method.clipping)

        return model, optimizer, step
