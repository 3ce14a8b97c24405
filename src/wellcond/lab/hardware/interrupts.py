"""Ctrl-C, a request to end and a lost terminal: one line and the shell's exit code; what is finished is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from wellcond.lab.errors import LabError
from wellcond.lab.hardware.launch import launched

_SAID = {"SIGINT": "interrupted", "SIGTERM": "asked to end (SIGTERM)", "SIGHUP": "its terminal is gone (SIGHUP)"}
_STDOUT, _STDERR = 1, 2
_MOMENT = 1.0
_CONTINUES = "; the same command continues with what was last kept"

# What the innermost block wants done, by signal: for who takes a handler away and gives it back (Lightning does).
_wanted: dict[int, Any] = {}


class Interrupted(BaseException):
    """A signal that ends the command. Not KeyboardInterrupt, which Lightning turns into an exit of its own.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that a shell gives for the signal.

        >>> Interrupted(signal.SIGTERM).code
        143
        """
        return 128 + self.number

    def __str__(self) -> str:
        return _SAID.get(signal.Signals(self.number).name, signal.Signals(self.number).name)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let a signal end the process in the block with one line, wherever it is: while it imports, for example.

    Nothing is unwound: files appear complete or not at all, and processes of our own are killed.
    """
    with _ending_together() if _is_one_of_several() else _handling(_end):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a signal raise `Interrupted` within the block; a second one ends the process at once.

    Of several processes of a launch each ends at once instead, and the first says so.

    Raises:
        Interrupted: For the first signal.
    """
    with _ending_together() if _is_one_of_several() else _handling(_interrupt):
        yield


def take_back() -> None:
    """Handle signals as the innermost block says, where a library has put a handler of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _wanted.get(signal.SIGTERM, signal.SIG_DFL))


def signals() -> list[signal.Signals]:
    """Return the signals that end a command: those of `_SAID` that this platform has and that nohup has not taken."""
    known = [getattr(signal, name) for name in _SAID if hasattr(signal, name)]
    return [number for number in known if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = dict(_wanted)
    previous = {number: signal.signal(number, handler) for number in signals()}
    _wanted.update(dict.fromkeys(previous, handler))
    try:
        yield
    finally:
        _wanted.clear()
        _wanted.update(before)
        for number, earlier in previous.items():
            signal.signal(number, earlier)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # Raised within a destructor it would be lost, and a second signal while this one is handled would only add a
    # traceback: the next one does not raise.
    for each in signals():
        signal.signal(each, _end)
    raise Interrupted(number)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    _say_and_exit(number, "")


def _say_and_exit(number: int, more: str) -> NoReturn:
    ended = Interrupted(number)
    _say(ended, more)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(ended.code)


def _say(ended: Interrupted, more: str) -> None:
    # Not print, which cannot be entered twice: the signal may have come within one. A bar had hidden the cursor.
    shown = "\x1b[?25h" if os.isatty(_STDERR) else ""
    os.write(_STDERR, f"{shown}wellcond: {ended}{more}.\n".encode())


# several processes ---------------------------------------------------------------------------------------------------


def _is_one_of_several() -> bool:
    try:
        return launched().size > 1
    except LabError:  # a launch that cannot be: the command says so
        return False


@contextmanager
def _ending_together() -> Iterator[None]:
    """End this process of a launch by a signal even while it waits for another one.

    A handler runs between two steps of the interpreter, and so not before a collective has failed because the other
    process is gone. The system tells of a signal at once by a pipe, to which a thread listens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    listened, told = os.pipe()
    os.set_blocking(told, False)
    threading.Thread(target=_end_when_told, args=(listened,), daemon=True).start()
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        with _handling(_stay):
            yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(told)


def _stay(number: int, frame: FrameType | None) -> None:
    # Whatever was going on is not gone on with, and fails at nothing; the thread ends the process meanwhile.
    time.sleep(10 * _MOMENT)


def _end_when_told(listened: int) -> None:
    ends = set(signals())
    while told := os.read(listened, 1):
        if told[0] in ends:
            break
    os.close(listened)
    if not told:
        return
    ended = Interrupted(told[0])
    if launched().rank == 0:
        _say(ended, _CONTINUES)
    # The others may get the signal a moment later, and one that is gone may make another fail: nobody is to read of it.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, _STDOUT)
    os.dup2(nothing, _STDERR)
    time.sleep(_MOMENT)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(ended.code)


def _forget_in_a_copy() -> None:
    """Let a process that this one forks, to decode images, end by signals of its own alone."""
    if any(handler is _stay for handler in _wanted.values()):
        signal.set_wakeup_fd(-1)
        for number in signals():
            signal.signal(number, signal.SIG_DFL)
        _wanted.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_a_copy)
