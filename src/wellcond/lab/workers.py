"""Executes runs, in this process or in several: yields each record as its run finishes."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from wellcond.lab.machine import training_device
from wellcond.lab.plan import Plan
from wellcond.lab.records import RunRecord, RunSpec
from wellcond.lab.settings import Settings
from wellcond.lab.tasks.open import open_task

Finished = tuple[RunSpec, RunRecord]


class RunFailedError(RuntimeError):
    """A run raised an exception or its process ended.

    Args:
        spec: The run.
        reason: The traceback, or how the process ended.
    """

    def __init__(self, spec: RunSpec, reason: str) -> None:
        super().__init__(f"the run {spec.name} failed:\n{reason.rstrip()}")


def execute(plan: Plan, specs: Sequence[RunSpec]) -> Iterator[Finished]:
    """Execute runs, as many at a time as the settings say.

    Args:
        plan: The comparison that they belong to.
        specs: The runs, begun in this order.

    Yields:
        Each run with its record, in the order in which they finish.

    Raises:
        RunFailedError: If one fails; those that were running with it are given up.
    """
    if plan.settings.jobs == 1:
        yield from _execute_here(plan, specs)
    elif specs:
        yield from _execute_in_workers(plan, specs)


def _execute_here(plan: Plan, specs: Sequence[RunSpec]) -> Iterator[Finished]:
    # Lightning takes seconds to import; a command that has nothing left to run should not wait for it.
    from wellcond.lab.run import Runner

    runner = Runner(plan.task, training_device())
    for spec in specs:
        try:
            record = runner.run(spec)
        except Exception as error:
            raise RunFailedError(spec, traceback.format_exc()) from error
        yield spec, record


def _execute_in_workers(plan: Plan, specs: Sequence[RunSpec]) -> Iterator[Finished]:
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(specs))
    running: dict[Connection, tuple[SpawnProcess, RunSpec]] = {}
    try:
        for _ in range(min(plan.settings.jobs, len(specs))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, plan.settings, plan.threads), daemon=True)
            _start_deaf_to_interrupts(process)
            there.close()
            spec = waiting.pop()
            here.send(spec)
            running[here] = (process, spec)
        while running:
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                process, spec = running.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:
                    process.join()
                    raise RunFailedError(spec, f"its process ended with exit code {process.exitcode}") from None
                if isinstance(result, str):
                    raise RunFailedError(spec, result)
                if waiting:
                    following = waiting.pop()
                    connection.send(following)
                    running[connection] = (process, following)
                else:
                    connection.close()
                    process.join()
                yield spec, result
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()


def _start_deaf_to_interrupts(process: SpawnProcess) -> None:
    """Start a process that ignores Ctrl-C, which reaches the whole group: the parent decides what it means."""
    # An ignored signal stays ignored in the new process, also while it imports; a handler set there would come late.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, previous)


def _work(connection: Connection, settings: Settings, threads: int) -> None:
    """Serve runs until the connection closes; answer each with its record, or with a traceback."""
    try:
        from wellcond.lab.run import Runner

        torch.set_num_threads(threads)
        runner = Runner(open_task(settings), training_device())
        while True:
            connection.send(runner.run(connection.recv()))
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        connection.send(traceback.format_exc())
