"""Times the training of each epoch and measures the network after it."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from wellcond.lab.errors import DataError
from wellcond.lab.runs.records import EpochRecord
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.base import Evaluation, Role, SeedData
from wellcond.lab.training.module import Training
from wellcond.runtime.ranks import Ranks


class Measure(pl.Callback):
    """Times the training of each epoch and measures the network after it; evaluation does not count as training.

    Of several ranks the first one's running statistics are evaluated, as data parallelism keeps them.

    Args:
        data: The seed's data.
        stopwatch: Runs in training.
        steps: Steps of the run.
    """

    def __init__(self, data: SeedData, stopwatch: Stopwatch, steps: int) -> None:
        self.data, self.steps = data, steps
        self.stopwatch = stopwatch
        self.evaluation = Stopwatch(stopwatch.device)
        self.evaluated = 0
        self.epochs: list[EpochRecord] = []
        self.diverged = self.stopped = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the stopwatch where a run goes on within an epoch, which is not begun again."""
        if trainer.global_step % int(trainer.num_training_batches):
            self.stopwatch.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the stopwatch."""
        self.stopwatch.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the stopwatch and measure; end the run if it diverged."""
        self.stopwatch.stop()
        training = cast(Training, pl_module)
        ranks = Ranks(True)
        train_loss = float(ranks.total(training.mean_loss()) / ranks.size)
        scored = training.take_scored()
        train_score = None if scored is None else _quotient(ranks.total(scored))
        ranks.send(list(training.model.buffers()), 0)
        found = {
            role: self._evaluate(training.model, role, trainer.precision_plugin.forward_context())
            for role in self.data.roles
        }
        test = found["test"]
        validation = found.get("validation", test)
        measured = (train_loss, train_score, validation.score, validation.loss, test.score, test.loss)
        # The loss comes before its step: the last step of an epoch shows only in the evaluation.
        if not all(math.isfinite(figure) for figure in measured if figure is not None):
            self._refuse_faulty_scores(training.model, train_loss, (validation.score, test.score))
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
                train_score=train_score,
            )
        )
        if trainer.global_step < self.steps and self.data.stop([epoch.validation_score for epoch in self.epochs]):
            self.stopped = trainer.should_stop = True

    def _refuse_faulty_scores(self, model: nn.Module, train_loss: float, scores: tuple[float, float]) -> None:
        """Raise a `DataError` if it is the scores that are at fault, and not the network."""
        if math.isfinite(train_loss) and any(map(math.isnan, scores)) and self.data.is_sound(model):
            raise DataError(
                f"scores() gave {scores[0]:g} and {scores[1]:g} (validation, test) after epoch {len(self.epochs) + 1}, "
                "and the network and its loss are finite: a score must be a number"
            )

    def evaluation_seconds(self) -> float | None:
        """Return the network's mean seconds for an image in evaluation; None if every epoch ended in divergence."""
        return self.evaluation.seconds / self.evaluated if self.epochs else None

    def state_dict(self) -> dict[str, Any]:
        """Return what a run that goes on needs."""
        return {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "seconds": self.stopwatch.seconds,
            "evaluation_seconds": self.evaluation.seconds,
            "evaluated": self.evaluated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.epochs = [EpochRecord(**epoch) for epoch in state_dict["epochs"]]
        self.stopwatch.seconds = state_dict["seconds"]
        self.evaluation.seconds = state_dict["evaluation_seconds"]
        self.evaluated = state_dict["evaluated"]

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


def _quotient(scored: Tensor) -> float:
    total, number = scored.tolist()
    return float(total / number)


def measure_of(trainer: pl.Trainer) -> Measure:
    """Return what measures the run that a trainer carries out."""
    # Lightning sets the attribute without declaring it.
    callbacks: list[pl.Callback] = cast(Any, trainer).callbacks
    return next(callback for callback in callbacks if isinstance(callback, Measure))


class NormSteps(pl.Callback):
    """Lets the schedule of a network's layers go on, after every step or every epoch, whichever it counts."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._training: Training | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the layers to what was kept, if a run goes on; the schedule has just been made."""
        self._training = cast(Training, pl_module)
        if self._kept is not None and self._training.norm_schedule is not None:
            self._training.norm_schedule.scheduler.load_state_dict(self._kept)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on if it counts steps."""
        self._step(every_step=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on if it counts epochs."""
        self._step(every_step=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state; empty without one."""
        schedule = None if self._training is None else self._training.norm_schedule
        return {} if schedule is None else {"schedule": schedule.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._kept = state_dict["schedule"]

    def _step(self, every_step: bool) -> None:
        schedule = None if self._training is None else self._training.norm_schedule
        if schedule is not None and schedule.every_step == every_step:
            schedule.scheduler.step()


class SharedBuffers(pl.Callback):
    """Gives every rank the first one's buffers before each step, as DDP does by itself and sharding does not."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Send them."""
        buffers: list[Tensor] = list(pl_module.buffers())
        Ranks(True).send(buffers, 0)
