"""The experiment harness: trains a network with and without the techniques and shows what each gained and cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellcond.lab.comparing import Result, compare
    from wellcond.lab.errors import LabError
    from wellcond.lab.methods.method import method
    from wellcond.lab.runs.metric import Metric
    from wellcond.lab.tasks.base import Task
    from wellcond.lab.tasks.lightning_task import LightningTask

__all__ = ["LabError", "LightningTask", "Metric", "Result", "Task", "compare", "method"]

# Names are looked up when they are first used, as those of wellcond itself.
_PLACES = {
    "LabError": "wellcond.lab.errors",
    "LightningTask": "wellcond.lab.tasks.lightning_task",
    "Metric": "wellcond.lab.runs.metric",
    "Result": "wellcond.lab.comparing",
    "Task": "wellcond.lab.tasks.base",
    "compare": "wellcond.lab.comparing",
    "method": "wellcond.lab.methods.method",
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Import what a public name stands for, once."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(_PLACES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
