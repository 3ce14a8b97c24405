"""Locks a folder of results for one command at a time; the system releases the lock however its holder ends."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wellcond.lab.errors import LabError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


@contextmanager
def locked(folder: Path, here: bool = True) -> Iterator[None]:
    """Keep other commands out of a folder while the block runs.

    The lock is the system's, on an open file: it ends with the process, also with one that is killed, and the file that
    stays behind means nothing. Where a file system has no locks, the block runs without one, and a note says so.

    Args:
        folder: The folder; it must exist.
        here: Whether this process takes it; of several that work together only the first does.

    Raises:
        LabError: If another command is at work there.
    """
    if not here or fcntl is None:
        yield
        return
    with (folder / NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(
                f"--out {folder}: {_holder(folder)} is at work there; wait until it has ended, or name another folder"
            ) from None
        except OSError as error:
            print(f"wellcond: note: {folder} cannot be locked ({error.strerror or error})", file=sys.stderr)
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "machine": platform.node()}) + "\n")
        file.flush()
        yield


def _holder(folder: Path) -> str:
    try:
        held = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return f"another wellcond command (process {held['process']} on {held['machine']})"
    except (OSError, ValueError, TypeError, KeyError):
        return "another wellcond command"
