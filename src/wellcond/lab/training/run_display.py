"""Shows the progress of one run: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wellcond.lab.training.measure import measure_of
from wellcond.lab.training.progress import duration

_SECONDS_BETWEEN_LINES = 30.0


class RunDisplay(pl.Callback):
    """Shows the steps of a run and what each epoch measured; on the first of several ranks.

    Args:
        console: Where to.
        steps: Steps of the run.
        score: What the task calls its score.
    """

    def __init__(self, console: Console, steps: int, score: str) -> None:
        self.console, self.steps, self.score = console, steps, score
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=120.0,
        )
        self._task = self._bar.add_task("training", total=steps)
        self._begun = (0, 0.0)
        self._shown = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, perhaps not with the first step."""
        step = trainer.global_step
        self._shown = time.monotonic()
        self._begun = (step, self._shown)
        if trainer.is_global_zero:
            self._bar.start()
            self._bar.update(self._task, completed=step)
            if step:
                self._say(f"goes on after step {step} of {self.steps}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        self._bar.update(self._task, completed=step)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._shown > _SECONDS_BETWEEN_LINES and step < self.steps:
            self._shown = now
            first, since = self._begun
            left = (now - since) / (step - first) * (self.steps - step)
            self._say(f"{step} of {self.steps} steps, about {duration(left)} left")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what the epoch measured."""
        measure = measure_of(trainer)
        if not trainer.is_global_zero or not measure.epochs or measure.diverged:
            return
        epoch = measure.epochs[-1]
        training = "" if epoch.train_score is None else f", training {self.score} {epoch.train_score:.2f}"
        self._say(
            f"epoch {len(measure.epochs)} of {trainer.max_epochs}: loss {epoch.train_loss:.4g}{training}, "
            f"validation {self.score} {epoch.validation_score:.2f}, test {self.score} {epoch.test_score:.2f}, "
            f"{duration(epoch.seconds)} of training"
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End, also when training was interrupted."""
        self._bar.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
