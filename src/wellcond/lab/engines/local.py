"""Executes runs on this machine, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

import torch

from wellcond.lab.engines.select import Finished, RunFailedError, given_task, told_by_worker
from wellcond.lab.errors import DataError
from wellcond.lab.hardware.machine import training_device
from wellcond.lab.plan import Plan
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.open import open_task

if TYPE_CHECKING:
    from wellcond.lab.training.runner import Runner


class ThisProcess:
    """Executes runs here, one after another."""

    def execute(self, plan: Plan, specs: Sequence[RunSpec], store: RunStore) -> Iterator[Finished]:
        """Execute runs; see `Engine.execute`."""
        # Lightning takes seconds to import; a command that has nothing left to run should not wait for it.
        from wellcond.lab.training.checkpoint import Checkpointing
        from wellcond.lab.training.runner import Runner

        settings = plan.settings
        checkpoints = Checkpointing(store.folder, settings.checkpoint_every)
        runner = Runner(plan.task, training_device(settings.accelerator), settings.strategy, checkpoints)
        for spec in specs:
            try:
                record = runner.run(spec)
            except DataError:
                raise
            except Exception as error:
                raise RunFailedError(spec, traceback.format_exc()) from error
            yield spec, record


class WorkerProcesses:
    """Executes runs in processes of their own, which share this machine.

    Args:
        jobs: Runs at the same time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def execute(self, plan: Plan, specs: Sequence[RunSpec], store: RunStore) -> Iterator[Finished]:
        """Execute runs; see `Engine.execute`."""
        context = multiprocessing.get_context("spawn")
        given = given_task(plan)
        waiting = list(reversed(specs))
        running: dict[Connection, tuple[SpawnProcess, RunSpec]] = {}
        try:
            for _ in range(min(self.jobs, len(specs))):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(there, plan.settings, given, plan.threads, store), daemon=True
                )
                _start_deaf_to_interrupts(process)
                there.close()
                running[here] = (process, waiting.pop())
                _ask(here, running[here][1])
            while running:
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    process, spec = running[connection]
                    try:
                        answer = connection.recv()
                    except (EOFError, ConnectionError):  # the latter where it has not read what it was asked
                        process.join()
                        raise RunFailedError(spec, f"its process ended with exit code {process.exitcode}") from None
                    finished = told_by_worker(spec, answer)
                    if waiting:
                        running[connection] = (process, waiting.pop())
                        _ask(connection, running[connection][1])
                    else:
                        del running[connection]
                        connection.close()
                        process.join()
                    yield finished
        finally:
            for process, _ in running.values():
                process.terminate()
                process.join()


def _start_deaf_to_interrupts(process: SpawnProcess) -> None:
    """Start a process that ignores what a terminal sends to its whole group: the parent decides what it means."""
    # An ignored signal stays ignored in the new process, also while it imports; a handler set there would come late.
    deaf = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in deaf}
    try:
        process.start()
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def _ask(connection: Connection, spec: RunSpec) -> None:
    """Send a worker its next run; that it has ended shows where its answer is read."""
    with suppress(ConnectionError):
        connection.send(spec)


def _end_with_the_parent() -> None:
    """End this process when its parent does, however that ends: its run would write beside that of the next command."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _work(connection: Connection, settings: Settings, given: Task | None, threads: int, store: RunStore) -> None:
    """Serve runs until the connection closes; answer each with its record, a mistake in the data, or a traceback."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    run: Callable[[RunSpec], RunRecord] | None = None
    # The connection's errors alone: a run may raise the same ones, when it reads a file that was cut off for example.
    with suppress(EOFError, ConnectionError):
        while True:
            spec = connection.recv()
            answer: RunRecord | DataError | str
            try:
                if run is None:
                    run = _runner(settings, given, threads, store).run
                answer = run(spec)
            except DataError as error:
                answer = error
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)


def _runner(settings: Settings, given: Task | None, threads: int, store: RunStore) -> Runner:
    from wellcond.lab.training.checkpoint import Checkpointing
    from wellcond.lab.training.runner import Runner

    torch.set_num_threads(threads)
    checkpoints = Checkpointing(store.folder, settings.checkpoint_every)
    return Runner(given or open_task(settings), training_device(settings.accelerator), checkpoints=checkpoints)
