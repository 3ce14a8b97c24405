"""A callback for Hugging Face's Trainer: attaching, schedules, calibration before evaluation, counts in the log."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wellcond.integrations.attaching import Attaching, refuse_to_do_nothing
from wellcond.integrations.calibrating import Calibrating
from wellcond.integrations.following import FollowingSchedule, Interval, LayerSchedule, counts, metrics
from wellcond.runtime.checks import WellcondWarning, check_positive_integer
from wellcond.transforms import GradientTransform

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("wellcond.integrations.transformers needs Transformers: pip install transformers") from error


class WellcondTrainerCallback(TrainerCallback):
    """Attaches transforms, steps a layer schedule, calibrates before evaluation, and logs what is counted.

    *Attaching* is a line before the Trainer is made, ``wellcond.attach(optimizer, model, ...)`` and
    ``Trainer(optimizers=(optimizer, scheduler), ...)``; or the callback does it when training begins, with the
    ``transforms`` that it is given, to the optimizer that the Trainer has made. The Trainer makes
    a named optimizer with ``optimizer_cls_and_kwargs=(wellcond.optim.WAdam, {"model": model, "lr": 1e-3})``; all
    parameters are one group then. A callback that finds nothing to do when training begins raises.

    *The schedule* is where it would be if one called its `step()` after every epoch, or every optimizer step, also
    after a resume. The Trainer restores no callback's state by default, so the schedule must be a function of its count
    alone: give `wellcond.nn.MomentumScheduler` its batch_size.

    *Calibration* lasts for the evaluations that training makes (``eval_strategy``) alone: when they end, the batch
    normalizations are what they were, so training goes on, and checkpoints are written, as if there had been none. An
    evaluation of your own, ``trainer.evaluate()``, is put into ``with wellcond.calibrated(model, ...)``.

    *The counts* go into every entry of ``trainer.state.log_history`` that has a training loss, and into what later
    callbacks get. The Trainer puts its reporters (TensorBoard, W&B) first; for them, too,
    ``trainer.callback_handler.callbacks.insert(0, callback)`` instead of ``callbacks=[callback]``.

    Args:
        schedule: Such as `wellcond.nn.MomentumScheduler(model, total_epochs=180, batch_size=8)`.
        schedule_interval: What it counts: ``"epoch"`` or ``"step"`` (``state.global_step``).
        log_stats: Add the counts, as ``"wellcond/<transform>/<count>"``, and `Attachment.metrics` likewise.
        calibration_loader: Batches to calibrate with, as `wellcond.calibrate` takes them; each rank's own part. Not the
            loader that trains. None: no calibration.
        calibration_batch_size: m, the samples behind one set of statistics in training; None: the statistics of all
            samples together.
        calibrate: ``"bn"``, ``"bsr"`` or ``"evalnorm"``, as `what` of `wellcond.calibrate`, and None as there.
        calibration_options: Further options of `wellcond.calibrate`.
        evaluation_sets: How many sets the Trainer evaluates each time: more than one for a mapping of them.
        transforms: What to attach to the optimizer, from left to right: transforms or their names
            (``"centralization"``, ``"whitening"``, ``"descent"``).

    Raises:
        TypeError: If the schedule or a transform is none.
        ValueError: If an argument is out of its range, no transform has a name, or, when training begins, there is
            nothing to do.

    Warns:
        WellcondWarning: If there were more evaluations than `evaluation_sets` says, of which only so many were
            calibrated.

    Example:
        >>> import torch, wellcond
        >>> model = wellcond.nn.MomentumBatchNorm1d(3)
        >>> schedule = wellcond.nn.MomentumScheduler(model, total_epochs=20, batch_size=4)
        >>> callback = WellcondTrainerCallback(schedule)
        >>> isinstance(callback, TrainerCallback)
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
        evaluation_sets: int = 1,
        log_stats: bool = True,
        transforms: Sequence[GradientTransform | str] | None = None,
    ) -> None:
        check_positive_integer("evaluation_sets", evaluation_sets)
        self._calibrating = Calibrating(calibration_loader, calibration_batch_size, calibrate, calibration_options)
        self._evaluation_sets, self._evaluated = evaluation_sets, 0
        self._attaching = Attaching(transforms)
        self._following = FollowingSchedule(schedule, schedule_interval)
        self.log_stats = log_stats

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the optimizer, which may have read its state, ours included, from a checkpoint."""
        found = [] if optimizer is None else self._attaching.attach([optimizer], model)
        does = self._following.schedule is not None or self._calibrating.loader is not None
        refuse_to_do_nothing(self, does or bool(found))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the schedule catch up with the epochs that are done."""
        # A sum of fractions, so perhaps a little less than a whole number.
        self._following.reach("epoch", int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the schedule catch up with the optimizer's steps."""
        self._calibrating.end()  # An evaluation that failed, and was survived, has not ended it.
        self._following.reach("step", state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Calibrate, if an evaluation follows."""
        self._evaluated = 0
        if control.should_evaluate and model is not None:
            self._calibrating.begin(model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Calibrate, if an evaluation follows."""
        self.on_step_end(args, state, control, model=model)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the batch normalizations what they were; checkpoints are written after this."""
        self._evaluated += 1
        sets = self._evaluation_sets
        if self._evaluated == sets:
            self._calibrating.end()
        elif self._evaluated == sets + 1 and self._calibrating.loader is not None and state.global_step:
            warnings.warn(
                f"more evaluations followed one another than evaluation_sets={sets}: only so many were calibrated",
                WellcondWarning,
                stacklevel=2,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make them so in any case."""
        self._calibrating.end()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add what the transforms have counted."""
        if not self.log_stats or logs is None or "loss" not in logs or optimizer is None:
            return
        found = counts([optimizer]) | metrics([optimizer], synchronize=True)
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
