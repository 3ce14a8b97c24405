"""Ctrl-C ends a comparison at once, and its finished runs are kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Interrupted(BaseException):
    """Ctrl-C. Not KeyboardInterrupt, which Lightning turns into an exit of its own."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise `Interrupted` within the block.

    Raises:
        Interrupted: Once, for the first Ctrl-C.
    """
    previous = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # A second Ctrl-C while this one is handled would only add a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise Interrupted
