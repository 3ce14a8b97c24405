"""Runs that end too early, and a comparison that another process can be killed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from wellcond.lab.comparison.compare import Comparison, run_comparison
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.records import RunSpec, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.base import SeedData, Task
from wellcond.lab.training.checkpoint import Checkpointing, Keeper
from wellcond.lab.training.progress import RunProgress
from wellcond.lab.training.run_memory import RunMemory
from wellcond.lab.training.runner import Runner

COMPARED = Settings(
    methods=("SGDM", "W-SGDM", "MBN"),
    lrs=(("SGD", (0.1,)),),
    seeds=2,
    epochs=2,
    train_images=256,
    validation_images=64,
    test_images=64,
    batch_size=16,
)


class StoppedError(Exception):
    """As if the process had been killed."""


@contextmanager
def stop_at(steps: int) -> Iterator[None]:
    """End every run in the block as soon as it has been kept after so many steps, and keep none before."""
    keep = Keeper._keep

    def due(self, trainer):
        return trainer.global_step == steps < self.file.spec.steps

    def keep_and_stop(self, trainer):
        keep(self, trainer)
        if trainer.global_step == steps:
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "_due", due)
        patch.setattr(Keeper, "_keep", keep_and_stop)
        yield


def stop_after(task: Task, checkpoints: Checkpointing, spec: RunSpec, steps: int) -> None:
    """Begin a run, and end it as soon as it has been kept after so many steps."""
    with stop_at(steps), pytest.raises(StoppedError):
        Runner(task, torch.device("cpu"), checkpoints=checkpoints).run(spec)


def uncounted(self: RunMemory, spec: RunSpec, data: SeedData) -> None:
    """Stand in for `RunMemory.of`, which collects the whole test process's garbage: that takes longer than a run."""


def compare(folder: str, keep_every: float = 0.0) -> Comparison:
    """Carry out or continue a small comparison; its equal-time part, which hangs on times, is left out."""
    torch.set_num_threads(1)
    RunMemory.of = uncounted  # type: ignore[method-assign]  # in a process of its own, or under a fixture
    plan, store = make_plan(replace(COMPARED, checkpoint_every=keep_every)), RunStore(Path(folder))
    return run_comparison(plan, store, RunProgress(Console(), quiet=True), equal_time=False)
