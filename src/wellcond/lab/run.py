"""One training run: a method, an lr and a seed, trained by Lightning and measured after every epoch."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

import wellcond
from wellcond.lab.extras import collect_extras
from wellcond.lab.gamma_decay import BatchNoiseDecay
from wellcond.lab.machine import machine_text
from wellcond.lab.methods import Refresh
from wellcond.lab.norms import NormSchedule, trained_norm
from wellcond.lab.probes import probe_network
from wellcond.lab.records import Coverage, EpochRecord, RunRecord, RunSpec
from wellcond.lab.run_memory import RunMemory
from wellcond.lab.schedule import parse_schedule
from wellcond.lab.splits import derived_seed
from wellcond.lab.stopwatch import Stopwatch
from wellcond.lab.tasks.base import ROLES, Evaluation, Role, SeedData, Task


class Runner:
    """Trains the runs of one comparison.

    Args:
        task: The data and what one does with it.
        device: Where to train.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.memory = RunMemory(task, device)

    def run(self, spec: RunSpec) -> RunRecord:
        """Train and measure one run.

        Args:
            spec: What to run; the result is a function of this and the data (seconds aside).

        Returns:
            What was measured. A run whose loss becomes NaN or infinite ends there and is marked as diverged.
        """
        data = self.task.for_seed(spec, self.device, rank=0, ranks=1)
        model = self.task.initial_model(spec.model, spec.seed, spec.weights)
        # After the weights are drawn: the methods of a seed share them, whatever layers they train with.
        training = Training(spec, spec.method.with_layers(model, spec.ghost_batch), data)
        measure = Measure(data, Stopwatch(self.device))
        with _quiet() as caught, self._noise(spec.seed), _algorithms(spec.deterministic):
            trainer = pl.Trainer(
                accelerator="cuda" if self.device.type == "cuda" else "cpu",
                devices=1,
                max_steps=spec.steps,
                max_epochs=-1,
                precision=spec.precision,
                callbacks=[measure],
                barebones=True,
            )
            trainer.fit(training, train_dataloaders=data.batches())
            memory = self.memory.of(spec, data)
        return RunRecord(
            epochs=tuple(measure.epochs),
            diverged=measure.diverged,
            threads=torch.get_num_threads(),
            transforms=training.transform_stats(),
            warnings=tuple(
                sorted({str(w.message) for w in caught if issubclass(w.category, wellcond.WellcondWarning)})
            ),
            evaluation_seconds=measure.evaluation_seconds(),
            extras={}
            if measure.diverged
            else collect_extras(training.model) | probe_network(training.model, data, spec),
            memory=memory,
            machine=machine_text(),
            coverage=training.coverage(),
        )

    @contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        """Let layers that draw random numbers draw those of the seed, and leave torch's global generators alone."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed("noise", seed))
            yield


class Training(pl.LightningModule):
    """The network, its loss, and the method's optimizer under the run's schedule."""

    def __init__(self, spec: RunSpec, model: nn.Module, data: SeedData) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.data = data
        self.losses: list[Tensor] = []
        self.handle: wellcond.Attachment | None = None
        self.norm_schedule: NormSchedule | None = None
        self.decay: BatchNoiseDecay | None = None

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        """Return the batch's loss, kept for the epoch's mean."""
        with nullcontext() if self.decay is None else self.decay.observing():
            loss = self.data.loss(self.model, batch)
        # Kept on the device: reading it here would make every step wait for the device.
        self.losses.append(loss.detach())
        return loss if self.decay is None else self.decay.added_to(loss)

    def backward(self, loss: Tensor) -> None:
        """Go backward; keep the graph for an optimizer that differentiates the gradient."""
        loss.backward(create_graph=self.spec.method.second_order)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the method's optimizer, its transforms attached, and the schedules of the lr and of the layers."""
        spec = self.spec
        norm = trained_norm(spec.method.norm, spec.ghost_batch)
        if norm is not None:
            members = spec.batch_size if spec.ghost_batch is None else spec.ghost_batch
            self.norm_schedule = norm.make_schedule(self.model, spec.steps, spec.steps_per_epoch, members)
            self.decay = norm.make_decay(self.model, members, spec.stats_every)
        optimizer, self.handle = spec.method.build(self.model, spec.lr, Refresh(spec.stats_every, spec.solve_every))
        schedule = parse_schedule(spec.schedule).scheduler(optimizer, spec.epochs, spec.steps, spec.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        """Let the layers' schedule go on, if it counts steps."""
        if self.spec.method.second_order:
            # Gradients with a graph hold all of the step's activations.
            self.zero_grad(set_to_none=True)
        if self.norm_schedule is not None and self.norm_schedule.every_step:
            self.norm_schedule.scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Let the layers' schedule go on, if it counts epochs."""
        if self.norm_schedule is not None and not self.norm_schedule.every_step:
            self.norm_schedule.scheduler.step()

    def transform_stats(self) -> dict[str, Any]:
        """Return what the transforms count; empty without transforms."""
        return {} if self.handle is None else dict(self.handle.stats())

    def coverage(self) -> dict[str, Coverage]:
        """Return what the transforms do with each parameter; empty without transforms."""
        rows = {} if self.handle is None else self.handle.coverage()
        return {name: [row._asdict() | {"shape": list(row.shape)} for row in some] for name, some in rows.items()}

    def mean_loss(self) -> float:
        """Return the mean loss since the last call."""
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        return loss


class Measure(pl.Callback):
    """Times the training of each epoch and measures the network after it; evaluation does not count as training."""

    def __init__(self, data: SeedData, stopwatch: Stopwatch) -> None:
        self.data = data
        self.stopwatch = stopwatch
        self.evaluation = Stopwatch(stopwatch.device)
        self.evaluated = 0
        self.epochs: list[EpochRecord] = []
        self.diverged = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the stopwatch."""
        self.stopwatch.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the stopwatch and measure; end the run if it diverged."""
        self.stopwatch.stop()
        assert isinstance(pl_module, Training)
        train_loss = pl_module.mean_loss()
        validation, test = (
            self._evaluate(pl_module.model, role, trainer.precision_plugin.forward_context()) for role in ROLES
        )
        measured = (train_loss, validation.score, validation.loss, test.score, test.loss)
        # The loss comes before its step: the last step of an epoch shows only in the evaluation.
        if not all(math.isfinite(figure) for figure in measured if figure is not None):
            self.diverged = True
            trainer.should_stop = True
            return
        self.epochs.append(
            EpochRecord(
                steps=trainer.global_step,
                seconds=self.stopwatch.seconds,
                train_loss=train_loss,
                validation_score=validation.score,
                validation_loss=validation.loss,
                test_score=test.score,
                test_loss=test.loss,
                metrics=test.metrics,
            )
        )

    def evaluation_seconds(self) -> float | None:
        """Return the network's mean seconds for an image in evaluation; None if every epoch ended in divergence."""
        return self.evaluation.seconds / self.evaluated if self.epochs else None

    def _evaluate(self, model: nn.Module, role: Role, autocast: AbstractContextManager[None]) -> Evaluation:
        # Some layers prepare for evaluation when they are told of it; that is part of its cost.
        self.evaluation.start()
        model.eval()
        self.evaluation.stop()
        with torch.no_grad(), autocast:
            evaluation = self.data.evaluate(model, role, self.evaluation)
        model.train()
        self.evaluated += evaluation.images
        return evaluation


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
