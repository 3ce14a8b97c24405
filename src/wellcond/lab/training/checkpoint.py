"""Keeps an unfinished run beside its record, so that the same command goes on from there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from wellcond.lab.data.randomness import GeneratorStates
from wellcond.lab.runs.files import partial
from wellcond.lab.runs.records import RunSpec, RunStore
from wellcond.lab.training.measure import Measure
from wellcond.lab.training.module import Training
from wellcond.runtime.ranks import Ranks

_STATE = "wellcond"


@dataclass(frozen=True)
class Checkpointing:
    """The place of unfinished runs, and the interval at which they are kept.

    Attributes:
        folder: Where the finished ones are.
        every: Seconds between two checkpoints; 0 keeps every step.
    """

    folder: Path
    every: float

    def file(self, spec: RunSpec) -> CheckpointFile:
        """Return the checkpoint of a run, which may not be there."""
        return CheckpointFile(RunStore(self.folder).checkpoint(spec), spec)


@dataclass(frozen=True)
class CheckpointFile:
    """The checkpoint of one run.

    Attributes:
        path: The file.
        spec: The run.
    """

    path: Path
    spec: RunSpec

    def step(self) -> int:
        """Return the steps that the kept run has made; 0 if none is kept, or it is damaged or another run's."""
        if not self.path.exists():
            self._note_others()
            return 0
        try:
            # Mapped, so that only the little that is looked at is read.
            kept = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            key, step = kept[_STATE]["key"], int(kept["global_step"])
        except Exception as error:  # whatever a file that was cut off or is something else makes torch raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            note(f"{self.path} is damaged and is ignored: the run {self.spec.name} begins anew ({first})")
            return 0
        if key != self.spec.key() or not 0 < step < self.spec.steps:
            note(f"{self.path} is of another run and is ignored: the run {self.spec.name} begins anew")
            return 0
        return step

    def _note_others(self) -> None:
        """Say that a run of this name was begun with something else that its key holds."""
        stem = self.path.stem.rpartition("-")[0]
        for other in sorted(self.path.parent.glob(f"{stem}-????????.ckpt")):
            note(f"{other} was begun with other settings, versions or machines and is not continued")


def note(line: str) -> None:
    """Say something that is no error, on the first rank."""
    if Ranks(True).rank == 0:
        print(f"wellcond: note: {line}", file=sys.stderr)


class Keeper(pl.Callback):
    """Keeps an unfinished run now and then, and lets a kept one go on exactly as if it had not stopped.

    Lightning keeps network, optimizer, lr schedule and the place in the loop; this adds the random generators, the
    epoch's losses and scores, buffers that state dicts leave out, and what was warned of, on every rank.

    Args:
        file: The checkpoint.
        every: Seconds between two.
        measure: Its stopwatch does not count the time that keeping takes.
        said: Returns what has been warned of so far.

    Attributes:
        begun: Whether training began, so that what was kept has been read.
        before: What had been warned of when the run was kept.
    """

    def __init__(self, file: CheckpointFile, every: float, measure: Measure, said: Callable[[], list[str]]) -> None:
        self.file, self.every, self.measure, self.said = file, every, measure, said
        self.begun = False
        self.before: list[str] = []
        self._last = time.monotonic()
        self._kept: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not know of."""
        training = cast(Training, pl_module)
        own = {
            "generators": GeneratorStates.now(training.device).to_dict(),
            "losses": [loss.cpu() for loss in training.losses],
            "scored": None if training.scored is None else training.scored.cpu(),
            "decay": None if training.decay is None else training.decay.state_dict(),
            "said": sorted({*self.before, *self.said()}),
        }
        checkpoint[_STATE] = {
            "key": self.file.spec.key(),
            "ranks": _gathered(own),
            "buffers": {name: buffer.cpu() for name, buffer in _unsaved_buffers(training.model)},
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember it until all is set up."""
        self._kept = checkpoint[_STATE]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore buffers, losses, and the penalty's strength."""
        training = cast(Training, pl_module)
        if self._kept is not None:
            own = self._kept["ranks"][trainer.global_rank]
            training.losses = [loss.to(training.device) for loss in own["losses"]]
            training.scored = None if own["scored"] is None else own["scored"].to(training.device)
            self.before = own["said"]
            if training.decay is not None:
                training.decay.load_state_dict(own["decay"])
            for name, buffer in _unsaved_buffers(training.model):
                buffer.copy_(self._kept["buffers"][name])
        self.begun = True
        self._last = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the random generators of a run that was kept between two epochs."""
        self._restore_generators(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the random generators of a run that was kept within an epoch, once its loader has begun."""
        self._restore_generators(trainer, pl_module)

    def _restore_generators(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kept is None:
            return
        own, self._kept = self._kept["ranks"][trainer.global_rank], None
        GeneratorStates.from_dict(own["generators"]).restore(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the run within an epoch, if it is time."""
        # After the last batch comes the evaluation, which belongs to what is kept next.
        if batch_idx + 1 < int(trainer.num_training_batches) and self._due(trainer):
            self.measure.stopwatch.stop()
            self._keep(trainer)
            self.measure.stopwatch.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the run between two epochs, if it is time."""
        if not trainer.should_stop and self._due(trainer):
            self._keep(trainer)

    def _due(self, trainer: pl.Trainer) -> bool:
        if trainer.global_step >= self.file.spec.steps:
            return False
        due = time.monotonic() - self._last >= self.every
        if trainer.world_size == 1:
            return due
        decided = torch.tensor([float(due)], device=trainer.strategy.root_device)
        Ranks(True).send([decided], 0)
        return bool(decided)

    def _keep(self, trainer: pl.Trainer) -> None:
        part = partial(self.file.path)
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.file.path)
        self._last = time.monotonic()


def _unsaved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers that the network's state dict leaves out."""
    return [
        (f"{prefix}.{name}", buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]


def _gathered(own: dict[str, Any]) -> list[Any]:
    """Return what every rank has, in their order."""
    ranks = Ranks(True)
    if ranks.size == 1:
        return [own]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, own)
    return found
