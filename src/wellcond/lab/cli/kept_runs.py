"""Shows the progress of a command's runs, and says where the finished ones are kept when it ends early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import CommandEndedError
from wellcond.lab.hardware.interrupts import Interrupted, interruptible
from wellcond.lab.training.progress import RunProgress


@contextmanager
def keeping_runs(folder: Path, quiet: bool) -> Iterator[RunProgress]:
    """Show the progress of the block's runs, and say where they are kept if it is interrupted or one of them fails.

    Args:
        folder: Where they are kept.
        quiet: Whether no progress is shown.

    Yields:
        What counts the runs.

    Raises:
        CommandEndedError: If the block is interrupted or a run fails.
    """
    progress = RunProgress(Console(stderr=True), quiet=quiet)
    try:
        with interruptible(), progress:
            yield progress
    except Interrupted as ended:
        raise CommandEndedError(
            f"{ended}; {progress.done} finished runs are kept in {folder}; the same command continues.", ended.code
        ) from None
    except RunFailedError as error:
        raise CommandEndedError(
            f"error: {error}\n{progress.done} finished runs are kept in {folder}.", code=1
        ) from error
