"""One training run: a method, an lr and a seed, trained by Lightning and measured after every epoch."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

import wellcond
from wellcond.lab.data.randomness import seeded
from wellcond.lab.hardware.launch import from_first, launched
from wellcond.lab.hardware.machine import machine_text
from wellcond.lab.hardware.strategies import EndAtOnce, trainer_options
from wellcond.lab.methods.optimizers import use_weights
from wellcond.lab.runs.files import replacing
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.records import RunRecord, RunSpec
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.base import SeedData, Task
from wellcond.lab.training.budget import Budget
from wellcond.lab.training.checkpoint import CheckpointFile, Checkpointing, Keeper, note
from wellcond.lab.training.extras import collect_extras
from wellcond.lab.training.measure import Measure, NormSteps, SharedBuffers
from wellcond.lab.training.module import Training
from wellcond.lab.training.network import initial_network
from wellcond.lab.training.probes import probe_network
from wellcond.lab.training.run_memory import RunMemory
from wellcond.runtime.ranks import Ranks

__all__ = ["Runner", "Training"]


class Runner:
    """Trains runs, in this process or, as one of several ranks, together with the others.

    Args:
        task: The data and what one does with it.
        device: Where to train.
        strategy: How several ranks train together, one of `STRATEGIES`.
        checkpoints: Where and how often unfinished runs are kept; None keeps none.
        watchers: Callbacks that are told how training goes.
        weights: File for the trained network's state dict; None keeps none.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        strategy: str = "auto",
        checkpoints: Checkpointing | None = None,
        watchers: Sequence[pl.Callback] = (),
        weights: Path | None = None,
    ) -> None:
        self.task = task
        self.device = device
        self.strategy = strategy
        self.checkpoints = checkpoints
        self.watchers = tuple(watchers)
        self.weights = weights
        self.memory = RunMemory(task, device)
        self.ranks = Ranks(True)

    def run(self, spec: RunSpec) -> RunRecord:
        """Train and measure one run, or what is left of it.

        Args:
            spec: What to run; the result is a function of this, the data and the number of ranks (seconds aside).

        Returns:
            What was measured, the same on every rank. A run whose loss becomes NaN or infinite ends there and is marked
            as diverged.
        """
        file = None if self.checkpoints is None else self.checkpoints.file(spec)
        kept = 0 if file is None else from_first(file.step)
        try:
            return self._run(spec, file, kept)
        except _UnreadableError as error:
            note(f"what was kept of the run {spec.name} cannot be continued and is ignored: it begins anew ({error})")
            return self._run(spec, file, 0)

    def _run(self, spec: RunSpec, file: CheckpointFile | None, kept: int) -> RunRecord:
        data = self.task.for_seed(spec, self.device, self.ranks.rank, self.ranks.size)
        sharded = self.strategy == "fsdp" and self.ranks.size > 1
        training = Training(spec, initial_network(self.task, spec), data, self.ranks.size, sharded)
        measure = Measure(data, Stopwatch(self.device), spec.steps)
        batches = Budget(data.batches(), spec.steps)
        if kept:
            batches.resume_at(kept)
        with _quiet() as caught, self._noise(spec.seed), _algorithms(spec.deterministic):
            keeper = None
            # Their order is that in which they are told: what is kept has all that the others did.
            callbacks: list[pl.Callback] = [EndAtOnce(), *([SharedBuffers()] if sharded else []), measure, NormSteps()]
            callbacks += self.watchers
            if file is not None and self.checkpoints is not None:
                keeper = Keeper(file, self.checkpoints.every, measure, lambda: _said(caught))
                callbacks.append(keeper)
            trainer = pl.Trainer(
                max_epochs=batches.epochs,
                precision=spec.precision,
                callbacks=callbacks,
                barebones=True,
                use_distributed_sampler=False,
                **trainer_options(self.strategy, self.device, launched()),
            )
            try:
                trainer.fit(training, train_dataloaders=batches, ckpt_path=file.path if file and kept else None)
            except Exception as error:
                if kept and keeper is not None and not keeper.begun:
                    raise _UnreadableError((str(error).splitlines() or [type(error).__name__])[0]) from error
                raise
            for optimizer in trainer.optimizers:
                use_weights(optimizer, training=False)
            memory = self._memory(spec, data)
        model = self._trained(spec, training, sharded)
        if self.weights is not None and self.ranks.rank == 0:
            _save_weights(model, self.weights)
        record = RunRecord(
            epochs=tuple(measure.epochs),
            diverged=measure.diverged,
            stopped=measure.stopped,
            threads=torch.get_num_threads(),
            transforms=training.transform_stats(),
            warnings=tuple(sorted({*_said(caught), *(keeper.before if keeper else ())})),
            evaluation_seconds=measure.evaluation_seconds(),
            extras={} if measure.diverged else collect_extras(model) | probe_network(model, data, spec),
            memory=memory,
            machine=machine_text(),
            coverage=training.coverage(),
        )
        return from_first(lambda: record)

    def _trained(self, spec: RunSpec, training: Training, sharded: bool) -> nn.Module:
        """Return the trained network, whole."""
        if not sharded:
            return training.model
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = get_model_state_dict(training.model, options=StateDictOptions(full_state_dict=True))
        model = initial_network(self.task, spec)
        model.load_state_dict(whole)
        return model.to(self.device)

    def _memory(self, spec: RunSpec, data: SeedData) -> Memory | None:
        # On several ranks, what connects them takes memory, too, which is not counted here.
        return self.memory.of(spec, data) if self.ranks.size == 1 else None

    @contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        """Let layers that draw random numbers draw those of the seed, and leave the global generators alone."""
        purpose = "noise" if self.ranks.rank == 0 else f"noise of rank {self.ranks.rank}"
        with seeded(purpose, seed, self.device):
            yield


class _UnreadableError(RuntimeError):
    """What was kept of a run does not fit the run."""


def _save_weights(model: nn.Module, file: Path) -> None:
    with replacing(file) as part:
        torch.save({name: value.cpu() for name, value in model.state_dict().items()}, part)


def _said(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, wellcond.WellcondWarning)]


@contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """Allow only deterministic algorithms in the block, if that is asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Silence Lightning, which describes itself at each start, and collect the warnings that are raised."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
