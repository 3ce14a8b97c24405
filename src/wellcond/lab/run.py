"""One training run: a method, an lr and a seed, trained by Lightning and measured after every epoch."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

import wellcond
from wellcond.lab.batches import Batch, TrainingBatches, channel_moments, evaluation_batches
from wellcond.lab.extras import collect_extras
from wellcond.lab.images import ImageData
from wellcond.lab.methods import Refresh
from wellcond.lab.models import initial_model
from wellcond.lab.norms import NormSchedule, trained_norm
from wellcond.lab.records import EpochRecord, RunRecord, RunSpec
from wellcond.lab.splits import derived_seed, draw_split


class Stopwatch:
    """Seconds between `start` and `stop`, added up, with the device's queue empty at both."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._started = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        """Begin to count."""
        self._started = self._now()

    def stop(self) -> None:
        """Add what passed since `start`."""
        self.seconds += self._now() - self._started


@dataclass(frozen=True)
class Part:
    """The images of one role in one seed's split, on the device."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SeedData:
    """One seed's data on the device, with the training images' channel moments."""

    train: Part
    validation: Part
    test: Part
    moments: tuple[Tensor, Tensor]


class Runner:
    """Trains the runs of one comparison on its data.

    Args:
        data: The data set, its test images set apart.
        device: Where to train.
    """

    def __init__(self, data: ImageData, device: torch.device) -> None:
        self.data = data
        self.device = device
        self.test = self._on_device(data.test.images, torch.from_numpy(data.test.labels))
        # Runs come seed by seed, so the last seed's data is nearly always the one that is needed.
        self._seed_data = lru_cache(maxsize=1)(self._draw)

    def run(self, spec: RunSpec) -> RunRecord:
        """Train and measure one run.

        Args:
            spec: What to run; the result is a function of this and the data (seconds aside).

        Returns:
            What was measured. A run whose loss becomes NaN or infinite ends there and is marked as diverged.
        """
        data = self._seed_data(spec.seed, spec.train_images, spec.validation_images)
        model = initial_model(
            spec.model, self.data.channels, len(self.data.pool.classes), derived_seed("weights", spec.seed)
        )
        # After the weights are drawn: the methods of a seed share them, whatever layers they train with.
        training = Training(spec, spec.method.with_layers(model, spec.ghost_batch))
        measure = Measure(data, len(self.data.pool.classes), Stopwatch(self.device))
        batches = TrainingBatches(
            data.train.images, data.train.labels, data.moments, spec.batch_size, spec.augmentation, spec.seed
        )
        with _quiet() as caught, self._noise(spec.seed):
            trainer = pl.Trainer(
                accelerator="cuda" if self.device.type == "cuda" else "cpu",
                devices=1,
                max_steps=spec.steps,
                max_epochs=-1,
                callbacks=[measure],
                barebones=True,
            )
            trainer.fit(training, train_dataloaders=batches)
        return RunRecord(
            epochs=tuple(measure.epochs),
            diverged=measure.diverged,
            threads=torch.get_num_threads(),
            transforms=training.transform_stats(),
            warnings=tuple(
                sorted({str(w.message) for w in caught if issubclass(w.category, wellcond.WellcondWarning)})
            ),
            evaluation_seconds=measure.evaluation_seconds(),
            extras={} if measure.diverged else collect_extras(training.model),
        )

    @contextmanager
    def _noise(self, seed: int) -> Iterator[None]:
        """Let layers that draw random numbers draw those of the seed, and leave torch's global generators alone."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed("noise", seed))
            yield

    def _draw(self, seed: int, train: int, validation: int) -> SeedData:
        pool = self.data.pool
        labels = torch.from_numpy(pool.labels)
        split = draw_split(pool.labels, train, validation, seed)
        training, held_out = (
            self._on_device(pool.images[positions], labels[positions])
            for positions in (torch.from_numpy(split.train), torch.from_numpy(split.validation))
        )
        return SeedData(training, held_out, self.test, channel_moments(training.images))

    def _on_device(self, images: Tensor, labels: Tensor) -> Part:
        return Part(images.to(self.device), labels.to(self.device))


class Training(pl.LightningModule):
    """The network, its loss, and the method's optimizer under a cosine schedule that ends at 0 with the run."""

    def __init__(self, spec: RunSpec, model: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.model = model
        self.losses: list[Tensor] = []
        self.handle: wellcond.Attachment | None = None
        self.norm_schedule: NormSchedule | None = None

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the batch's cross-entropy, kept for the epoch's mean."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        # Kept on the device: reading it here would make every step wait for the device.
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the method's optimizer, its transforms attached, and the schedules of the lr and of the layers."""
        spec = self.spec
        norm = trained_norm(spec.method.norm, spec.ghost_batch)
        if norm is not None:
            members = spec.batch_size if spec.ghost_batch is None else spec.ghost_batch
            self.norm_schedule = norm.make_schedule(self.model, spec.steps, spec.steps_per_epoch, members)
        optimizer, self.handle = spec.method.build(self.model, spec.lr, Refresh(spec.stats_every, spec.solve_every))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=spec.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Let the layers' schedule go on, if it counts steps."""
        if self.norm_schedule is not None and self.norm_schedule.every_step:
            self.norm_schedule.scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Let the layers' schedule go on, if it counts epochs."""
        if self.norm_schedule is not None and not self.norm_schedule.every_step:
            self.norm_schedule.scheduler.step()

    def transform_stats(self) -> dict[str, Any]:
        """Return what the transforms count; empty without transforms."""
        return {} if self.handle is None else dict(self.handle.stats())

    def mean_loss(self) -> float:
        """Return the mean loss since the last call."""
        loss = float(torch.stack(self.losses).mean())
        self.losses.clear()
        return loss


class Measure(pl.Callback):
    """Times the training of each epoch and measures the network after it; evaluation does not count as training."""

    def __init__(self, data: SeedData, classes: int, stopwatch: Stopwatch) -> None:
        self.data = data
        self.stopwatch = stopwatch
        self.evaluation = Stopwatch(stopwatch.device)
        self.evaluated = 0
        self.accuracy = MulticlassAccuracy(num_classes=classes, average="micro").to(data.test.labels.device)
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
        validation = self._evaluate(pl_module.model, self.data.validation)
        test = self._evaluate(pl_module.model, self.data.test)
        # The loss comes before its step: the last step of an epoch shows only in the evaluation.
        if not all(math.isfinite(loss) for loss in (train_loss, validation[1], test[1])):
            self.diverged = True
            trainer.should_stop = True
            return
        self.epochs.append(
            EpochRecord(
                steps=trainer.global_step,
                seconds=self.stopwatch.seconds,
                train_loss=train_loss,
                validation_accuracy=validation[0],
                validation_loss=validation[1],
                test_accuracy=test[0],
                test_loss=test[1],
            )
        )

    def evaluation_seconds(self) -> float | None:
        """Return the network's mean seconds for an image in evaluation; None if every epoch ended in divergence."""
        return self.evaluation.seconds / self.evaluated if self.epochs else None

    def _evaluate(self, model: nn.Module, part: Part) -> tuple[float, float]:
        """Return accuracy in percent and mean cross-entropy."""
        self.accuracy.reset()
        loss = torch.zeros((), device=part.labels.device)
        # Some layers prepare for evaluation when they are told of it; that is part of its cost.
        self.evaluation.start()
        model.eval()
        self.evaluation.stop()
        with torch.no_grad():
            for images, labels in evaluation_batches(part.images, part.labels, self.data.moments):
                self.evaluation.start()
                logits = model(images)
                self.evaluation.stop()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                self.accuracy.update(logits, labels)
        model.train()
        self.evaluated += len(part.labels)
        return 100.0 * float(self.accuracy.compute()), float(loss) / len(part.labels)


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
