"""Shows the progress of a comparison: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class RunProgress:
    """Counts finished runs, as a context manager.

    Args:
        console: Where to show it.
        quiet: Show nothing.

    Attributes:
        done: Runs that are finished, those that an earlier command finished included.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.total = 0
        self.finished = 0
        self.done = 0
        self.quiet = quiet
        self._shown = 0.0
        self._first_finished: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not shows_bars(console),
            transient=True,
            speed_estimate_period=120.0,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, missing: int, kept: int, later: int) -> None:
        """Say what comes next.

        Args:
            missing: Runs to execute now.
            kept: Runs that an earlier command finished; said, but not counted, since they take no time.
            later: Runs that will follow.
        """
        self.done += kept
        if kept:
            self.say(f"{kept} finished runs are there already")
        self.total = self.finished + missing + later
        self._bar.update(self._task, total=self.total)

    def advance(self, name: str) -> None:
        """Count one finished run.

        Args:
            name: The run's method.
        """
        self.finished += 1
        self.done += 1
        self._bar.update(self._task, completed=self.finished, description=f"{name:<10}")
        now = time.monotonic()
        if self._first_finished is None:
            # The first run also waits for imports, which says nothing of the others.
            self._first_finished = now
        share = self.finished / self.total
        if not shows_bars(self.console) and (share >= self._shown + 0.1 or share == 1):
            self._shown = share
            pace = (now - self._first_finished) / max(1, self.finished - 1)
            left = (
                f", about {duration(pace * (self.total - self.finished))} left"
                if 1 < self.finished < self.total
                else ""
            )
            self.say(f"{self.finished} of {self.total} runs{left}")

    def say(self, line: str) -> None:
        """Show a line, unless it is to be quiet."""
        if not self.quiet:
            self.console.print(line, highlight=False)


class StepProgress:
    """Counts steps of known number, as a context manager: a bar on a terminal, a line now and then elsewhere.

    Args:
        console: Where to show it.
        what: What the steps do, for the first line.
        quiet: Show nothing.
        every: Seconds between two lines where there is no terminal.
    """

    def __init__(self, console: Console, what: str, quiet: bool = False, every: float = 10.0) -> None:
        self.console, self.what, self.quiet, self.every = console, what, quiet, every
        self.total = 0
        self.done = 0
        self._begun = self._shown = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        """Say how many steps there will be."""
        self.total = total
        self._bar.update(self._task, total=total)
        self._say(f"{self.what}: {total} steps")

    def advance(self, name: str, steps: int = 1) -> None:
        """Count steps that are done.

        Args:
            name: What they were for.
            steps: How many.
        """
        self.done += steps
        self._bar.update(self._task, completed=self.done, description=name)
        now = time.monotonic()
        if now - self._shown >= self.every and self.done < self.total:
            self._shown = now
            self._say(f"{self.done} of {self.total} steps after {duration(now - self._begun)}; now {name}")

    def _say(self, line: str) -> None:
        if not self.quiet and not self.console.is_terminal:
            self.console.print(line, highlight=False, soft_wrap=True)


def shows_bars(console: Console) -> bool:
    """Return whether a console can redraw a bar: a terminal, or a notebook that has widgets."""
    return console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)


def duration(seconds: float) -> str:
    """Return seconds in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
