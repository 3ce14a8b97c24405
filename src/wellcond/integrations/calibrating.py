"""Calibration that lasts for a validation alone, as the frameworks' callbacks need it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from wellcond.calibration.models import calibrated
from wellcond.runtime.checks import check_positive_integer


class Calibrating:
    """Calibrates a model before a validation, and makes it afterwards what it was.

    Args:
        loader: Batches, as `wellcond.calibrate` takes them; None: there is no calibration.
        batch_size: As in `wellcond.calibrate`.
        what: As in `wellcond.calibrate`.
        options: Further ones of `wellcond.calibrate`.

    Raises:
        ValueError: If a batch size is given without a loader.
    """

    def __init__(
        self,
        loader: Iterable[Any] | None,
        batch_size: int | None,
        what: str | None,
        options: Mapping[str, Any] | None,
    ) -> None:
        if loader is None and batch_size is not None:
            raise ValueError("calibration_batch_size and calibration_loader must be given together")
        if batch_size is not None:
            check_positive_integer("calibration_batch_size", batch_size)
        self.loader, self._batch_size, self._what, self._options = loader, batch_size, what, dict(options or {})
        self._present: AbstractContextManager[nn.Module] | None = None

    def begin(self, model: nn.Module) -> None:
        """Calibrate, if there is a loader and the model is not calibrated."""
        if self.loader is None or self._present is not None:
            return
        calibration = calibrated(model, self.loader, self._batch_size, self._what, **self._options)
        calibration.__enter__()
        self._present = calibration

    def end(self) -> None:
        """Make the batch normalizations what they were, if they are calibrated."""
        calibration, self._present = self._present, None
        if calibration is not None:
            calibration.__exit__(None, None, None)
