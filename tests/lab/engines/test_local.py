"""Workers on this machine: whatever a run raises is answered, and one that has ended is told with its exit code."""

from __future__ import annotations

import os
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wellcond.lab.engines import local
from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import DataError

SPECS: list[Any] = [SimpleNamespace(name="the first"), SimpleNamespace(name="the second")]
SETTINGS = SimpleNamespace(task_is_given=False, accelerator="cpu", checkpoint_every=0.0)
STORE: Any = SimpleNamespace(folder=Path())


def at_once(connection: Connection) -> None:
    """End before anything is asked."""


def without_reading(connection: Connection) -> None:
    """End when something is asked, and leave it unread."""
    connection.poll(None)


def within_the_run(connection: Connection) -> None:
    connection.recv()


def after_an_answer(connection: Connection) -> None:
    connection.recv()
    connection.send(7)


class Ended:
    """Stands in for a process that was killed."""

    exitcode = -9

    def __init__(self, until: Any, connection: Connection) -> None:
        self.until, self.connection = until, Connection(os.dup(connection.fileno()))
        self.thread = threading.Thread(target=self.act)

    def act(self) -> None:
        with self.connection:
            self.until(self.connection)

    def start(self) -> None:
        self.thread.start()
        if self.until is at_once:
            self.thread.join()

    def join(self) -> None:
        self.thread.join()

    def terminate(self) -> None:
        """It has ended."""


@pytest.mark.parametrize("until", [at_once, without_reading, within_the_run, after_an_answer])
def test_a_worker_that_ended_is_told_with_its_exit_code(until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(Pipe=Pipe, Process=lambda target, args, daemon: Ended(until, args[0]))
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)
    plan: Any = SimpleNamespace(settings=SETTINGS, threads=1)
    found = []
    with pytest.raises(RunFailedError, match="its process ended with exit code -9") as caught:
        found += local.WorkerProcesses(1).execute(plan, SPECS, STORE)
    assert str(caught.value).startswith(f"the run {SPECS[until is after_an_answer].name} failed")


ERRORS = [EOFError("cut off"), BrokenPipeError("a pipe"), ConnectionResetError("a download"), RuntimeError("bad luck")]


@pytest.mark.parametrize("error", [*ERRORS, DataError("a broken file")], ids=repr)
def test_whatever_a_run_raises_is_answered(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(spec: int) -> str:
        if spec == 1:
            raise error
        return "a record"

    monkeypatch.setattr(local, "_end_with_the_parent", lambda: None)
    monkeypatch.setattr("wellcond.lab.training.runner.Runner", lambda *_, **__: SimpleNamespace(run=run))
    here, there = Pipe()
    worker = threading.Thread(target=local._work, args=(there, SETTINGS, object(), 1, STORE))
    worker.start()
    here.send(1)
    answer = here.recv()
    if isinstance(error, DataError):
        assert isinstance(answer, DataError)
        assert str(answer) == str(error)
    else:
        assert answer.startswith("Traceback")
        assert answer.endswith(f"{type(error).__name__}: {error}\n")
    here.send(2)
    assert here.recv() == "a record"
    here.close()
    worker.join()
