"""Ctrl-C ends a comparison at once, and its finished runs are kept."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from wellcond.lab.hardware.launch import launched


class Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which Lightning turns into an exit of its own."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise `Interrupted` within the block.

    Of several processes of a launch each ends at once instead, and the first says so: one that waits for another cannot
    be told in any other way.

    Raises:
        Interrupted: Once, for the first Ctrl-C.
    """
    here = launched()
    ending = _end if here.rank == 0 else signal.SIG_DFL
    previous = signal.signal(signal.SIGINT, _interrupt if here.size == 1 else ending)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # A second Ctrl-C while this one is handled would only add a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Interrupted


def _end(number: int, frame: FrameType | None) -> NoReturn:
    print("wellcond: interrupted; the same command continues with what was last kept.", file=sys.stderr, flush=True)
    os._exit(130)
