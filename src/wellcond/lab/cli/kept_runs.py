"""What becomes of the finished runs when a command ends early."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import CommandEndedError
from wellcond.lab.hardware.interrupts import Interrupted, interruptible
from wellcond.lab.training.progress import RunProgress


@contextmanager
def keeping_runs(progress: RunProgress, folder: Path) -> Iterator[None]:
    """Show the progress of the block's runs, and say where they are kept if it is interrupted or one of them fails.

    Args:
        progress: Counts the runs.
        folder: Where they are kept.

    Raises:
        CommandEndedError: If the block is interrupted or a run fails.
    """
    try:
        with interruptible(), progress:
            yield
    except Interrupted as ended:
        raise CommandEndedError(
            f"{ended}; {progress.done} finished runs are kept in {folder}; the same command continues.", ended.code
        ) from None
    except RunFailedError as error:
        raise CommandEndedError(
            f"error: {error}\n{progress.done} finished runs are kept in {folder}.", code=1
        ) from error
