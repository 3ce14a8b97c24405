"""Selects the engine that executes runs: this process, several of them, or the machines of a Ray cluster."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from wellcond.lab.errors import DataError, LabError
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore

if TYPE_CHECKING:
    from wellcond.lab.plan import Plan
    from wellcond.lab.tasks.base import Task

Finished: TypeAlias = tuple[RunSpec, RunRecord]


class RunFailedError(RuntimeError):
    """A run raised an exception or its process ended.

    Args:
        spec: The run.
        reason: The traceback, or how the process ended.
    """

    def __init__(self, spec: RunSpec, reason: str) -> None:
        super().__init__(f"the run {spec.name} failed:\n{reason.rstrip()}")


def told_by_worker(spec: RunSpec, answer: RunRecord | DataError | str) -> Finished:
    """Return a run with the record that another process answered.

    Args:
        spec: The run.
        answer: Its record, what is wrong with a file of the data, or why it failed.

    Raises:
        DataError: If a file of the data is broken.
        RunFailedError: If the run failed.
    """
    if isinstance(answer, DataError):
        raise answer
    if isinstance(answer, str):
        raise RunFailedError(spec, answer)
    return spec, answer


def given_task(plan: Plan) -> Task | None:
    """Return the task that another process cannot open from the settings alone, found fit to be sent there; else None.

    Args:
        plan: The comparison.

    Raises:
        LabError: If it cannot be sent.
    """
    if not plan.settings.task_is_given:
        return None
    task, what = plan.task, "several processes (jobs, engine)"
    if any(getattr(source, "__module__", "") == "__main__" for source in task.sources) and not _has_a_script():
        raise LabError(f"{what} need a task that they can import: put {task.name} into a module")
    try:
        pickle.dumps(task)
    except Exception as error:
        raise LabError(f"{what} need a task that can be pickled, and {task.name} cannot: {error}") from error
    return task


def _has_a_script() -> bool:
    """Return whether what runs here is a file, which new processes run again under another name."""
    return bool(getattr(sys.modules["__main__"], "__file__", None))


class Engine(Protocol):
    """Executes runs, which do not depend on each other, somewhere; keeping their records is the caller's part."""

    def execute(self, plan: Plan, specs: Sequence[RunSpec], store: RunStore) -> Iterator[Finished]:
        """Execute runs.

        Args:
            plan: The comparison that they belong to.
            specs: The runs, begun in this order; at least one.
            store: Where unfinished runs are kept.

        Yields:
            Each run with its record, in the order in which they finish.

        Raises:
            DataError: If a file of the data is broken.
            RunFailedError: If one fails; those that were running with it are given up.
        """


def execute(plan: Plan, specs: Sequence[RunSpec], store: RunStore) -> Iterator[Finished]:
    """Execute runs with the engine that the settings name, as many at a time as they say.

    Args:
        plan: The comparison that they belong to.
        specs: The runs, begun in this order.
        store: Where unfinished runs are kept.

    Yields:
        Each run with its record, in the order in which they finish.

    Raises:
        LabError: If there is no such Ray cluster, or a file of the data is broken.
        RunFailedError: If a run fails; those that were running with it are given up.
    """
    if specs:
        from wellcond.lab.hardware.machine import training_device

        plan.task.check(training_device(plan.settings.accelerator))
        yield from _engine(plan).execute(plan, specs, store)


def _engine(plan: Plan) -> Engine:
    settings = plan.settings
    if settings.engine == "ray":
        from wellcond.lab.engines.ray import RayCluster

        return RayCluster(settings.ray_address)
    from wellcond.lab.engines.local import ThisProcess, WorkerProcesses

    return ThisProcess() if settings.jobs == 1 else WorkerProcesses(settings.jobs)
