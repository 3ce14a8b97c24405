"""Finds out what `--data` names."""

from __future__ import annotations

from wellcond.lab.settings import Settings
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.in_memory import open_in_memory


def open_task(settings: Settings) -> Task:
    """Return the task of the data that the settings name.

    Args:
        settings: What was asked for.

    Returns:
        The task, its data found and checked.

    Raises:
        LabError: If there is no such data, it has an unknown layout, or something asked for does not fit it.
    """
    return open_in_memory(settings)
