"""A callback for Lightning: attaching, layer schedules, calibration before validation, counts in the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wellcond.integrations.attaching import Attaching, refuse_to_do_nothing
from wellcond.integrations.calibrating import Calibrating
from wellcond.integrations.following import FollowingSchedule, Interval, LayerSchedule, counts, metrics
from wellcond.transforms import GradientTransform

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("wellcond.integrations.lightning needs Lightning: pip install lightning") from error


class WellcondCallback(Callback):
    """Attaches transforms, steps a layer schedule, calibrates before validation, and logs what is counted.

    *Attaching* is a line of `configure_optimizers`, ``wellcond.attach(optimizer, self, ...)``; or the callback does it
    with the ``transforms`` that it is given, to every optimizer of the module, before training and before a checkpoint
    is read. So a config file alone can say it (LightningCLI):

        trainer:
          callbacks:
            - class_path: wellcond.integrations.lightning.WellcondCallback
              init_args:
                transforms:
                  - centralization
                  - class_path: wellcond.FeatureWhitening
                    init_args: {stats_every: 10, solve_every: 100}

    A callback that finds nothing to do when training begins raises.

    *Calibration* lasts for the validation alone: when it ends, the batch normalizations are of the kind, and have the
    statistics, that training gave them, so training goes on, and checkpoints are written, as if there had been none
    (`calibrated`). To use a checkpoint as it was validated, `calibrate` it the same way. The sanity check before
    training, and testing, are not preceded by it. Under DDP all ranks first take the first one's buffers, as they would
    in validation: these are what a checkpoint holds.

    *The schedule* is where it would be if one called its `step()` after every epoch, or every optimizer step, also
    after a resume; its state is in the checkpoint.

    Args:
        schedule: Such as `wellcond.nn.MomentumScheduler(model, total_epochs=180)`.
        schedule_interval: What it counts: ``"epoch"`` or ``"step"`` (``trainer.global_step``).
        calibration_loader: Batches to calibrate with, as `calibrate` takes them; each rank's own part. Not the loader
            that trains, whose workers and shuffling a further pass would disturb. None: no calibration.
        calibration_batch_size: m, the samples behind one set of statistics in training; None: the statistics of all
            samples together.
        calibrate: ``"bn"``, ``"bsr"`` or ``"evalnorm"``, as `what` of `wellcond.calibrate`, and None as there.
        calibration_options: Further options of `calibrate`.
        log_stats: Log the counts at the end of every training epoch, as ``"wellcond/<transform>/<count>"``, and
            `Attachment.metrics` likewise.
        transforms: What to attach to each of the module's optimizers, from left to right: transforms or their names
            (``"centralization"``, ``"whitening"``, ``"descent"``).

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If an argument is out of its range, a batch size is given without a loader, or, when training
            begins, there is nothing to do.

    Example:
        >>> import wellcond
        >>> model = nn.Sequential(nn.Linear(4, 8), wellcond.nn.MomentumBatchNorm1d(8))
        >>> schedule = wellcond.nn.MomentumScheduler(model, total_epochs=20, batch_size=4)
        >>> trainer = Trainer(callbacks=[WellcondCallback(schedule)], logger=False, enable_checkpointing=False)
        >>> any(isinstance(callback, WellcondCallback) for callback in trainer.callbacks)
        True
    """

    def __init__(
        self,
        schedule: LayerSchedule | None = None,
        schedule_interval: Interval = "epoch",
        *,
        calibration_loader: Iterable[Any] | None = None,
        calibration_batch_size: int | None = None,
        calibrate: str | None = None,
        calibration_options: Mapping[str, Any] | None = None,
        log_stats: bool = True,
        transforms: Sequence[GradientTransform | str] | None = None,
    ) -> None:
        self._calibrating = Calibrating(calibration_loader, calibration_batch_size, calibrate, calibration_options)
        self._attaching = Attaching(transforms)
        self._following = FollowingSchedule(schedule, schedule_interval)
        self.log_stats = log_stats

    # attaching ------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, once the optimizers are made and before their state is read from a checkpoint."""
        found = self._attaching.attach(trainer.optimizers, pl_module)
        if self.log_stats:
            metrics(trainer.optimizers)  # has gradients compared in the first step, for the first entry of the log
        does = self._following.schedule is not None or self._calibrating.loader is not None
        refuse_to_do_nothing(self, does or bool(found))

    # the schedule ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the schedule catch up with the epochs that are done."""
        self._following.reach("epoch", trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Have the schedule catch up with the optimizer's steps."""
        self._following.reach("step", trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state, for the checkpoint."""
        return self._following.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's `state_dict`."""
        self._following.load_state_dict(state_dict)

    # calibration ----------------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, in the precision that validation computes in."""
        if self._calibrating.loader is None or trainer.sanity_checking:
            return
        # Validation runs in inference mode, whose tensors training could not use.
        with torch.inference_mode(False), torch.no_grad(), trainer.precision_plugin.forward_context():
            _take_buffers_of_first_rank(trainer.strategy.model)
            self._calibrating.begin(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the batch normalizations what they were; checkpoints are written after this."""
        self._calibrating.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so also if validation fails: a checkpoint may yet be written."""
        self.on_validation_end(trainer, pl_module)

    # the log --------------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what the transforms of all optimizers have counted."""
        if self.log_stats:
            pl_module.log_dict(counts(trainer.optimizers) | metrics(trainer.optimizers), sync_dist=True)


def _take_buffers_of_first_rank(model: nn.Module | None) -> None:
    """Do what DDP does in the first forward pass of a validation, which the calibration's end would undo."""
    if isinstance(model, DistributedDataParallel) and model.broadcast_buffers:
        for buffer in model.module.buffers():
            dist.broadcast(buffer, group=model.process_group, group_src=0)
