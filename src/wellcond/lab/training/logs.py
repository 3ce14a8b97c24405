"""A run's course as it happens: a CSV file, and TensorBoard."""

from __future__ import annotations

import csv
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from wellcond.lab.training.measure import measure_of
from wellcond.lab.training.module import Training

_FOLDER = "logs"


class RunLog(pl.Callback):
    """Writes the loss and the lr now and then, and after each epoch what was measured and what the transforms counted.

    A run that goes on goes on in the same files: what was written after its checkpoint is taken back. Only the first of
    several ranks writes; the loss of a step is that of its share of the batch.

    Args:
        folder: Where to; the files lie in ``logs/<name>``.
        name: The run's.
        every: Steps between two lines.
    """

    def __init__(self, folder: Path, name: str, every: int) -> None:
        self.folder, self.name, self.every = folder, name, every
        self._csv: CSVLogger | None = None
        self._board: TensorBoardLogger | None = None
        self._logged_epochs = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the files."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        self._logged_epochs = len(measure_of(trainer).epochs)
        kept = _rows(self.folder / _FOLDER / self.name / "metrics.csv", step)
        self._csv = CSVLogger(self.folder, name=_FOLDER, version=self.name)
        for row in kept:
            self._csv.log_metrics(row, int(row.pop("step")))
        self._csv.save()
        _wait_for_a_later_name(self.folder / _FOLDER / self.name)
        self._board = TensorBoardLogger(self.folder, name=_FOLDER, version=self.name, purge_step=step + 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's loss and lr, if it is time."""
        if self._csv is not None and trainer.global_step % self.every == 0:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            self._write(trainer, {"loss": float(cast(Training, pl_module).losses[-1]), "next_lr": float(lr)})

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was measured, and save the files."""
        measured = measure_of(trainer).epochs
        if self._csv is None or len(measured) == self._logged_epochs:
            return
        self._logged_epochs = len(measured)
        epoch = asdict(measured[-1])
        figures = {f"test_{name}": value for name, value in epoch.pop("metrics").items()}
        del epoch["steps"]
        figures |= {name: value for name, value in epoch.items() if value is not None}
        for transform, counts in cast(Training, pl_module).transform_stats().items():
            figures |= {f"{transform}/{name}": float(count) for name, count in counts.items()}
        self._write(trainer, figures)
        self._save()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the files: a run that goes on from here goes on in them."""
        self._save()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save and close them."""
        self._save()
        if self._board is not None:
            self._board.finalize("finished")

    def _write(self, trainer: pl.Trainer, figures: dict[str, float]) -> None:
        assert self._csv is not None
        assert self._board is not None
        self._csv.log_metrics({**figures}, trainer.global_step)
        self._board.log_metrics(figures, trainer.global_step)

    def _save(self) -> None:
        if self._csv is not None:
            self._csv.save()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until TensorBoard's next file is named after those there: it reads files in the order of their names.

    A name begins with the second in which the file was opened; a process's files of one second are in no order.
    """
    seconds = {file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")}
    while str(int(time.time())) in seconds:
        time.sleep(0.05)


def _rows(file: Path, step: int) -> list[dict[str, Tensor | float]]:
    """Return the lines of a CSV file up to a step; none if the run begins."""
    if step == 0 or not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        read: list[dict[str, Tensor | float]] = [
            {name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)
        ]
    return [row for row in read if row["step"] <= step]
