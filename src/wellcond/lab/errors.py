"""Mistakes in what was asked for: reported in one line, before anything is trained."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class LabError(ValueError):
    """A command or setting that cannot be carried out; the message is one line: the rule, and what was given."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> LabError:
    """Return the error for a name that is in no registry, with the nearest known name if one is near.

    Args:
        kind: What the name stands for, in the singular ("method", "model").
        name: The name that was given.
        known: Every name that would have been accepted, in the order in which they are listed.

    Returns:
        The error, for the caller to raise.

    >>> str(unknown_name("method", "W-SDGM", ["SGDM", "W-SGDM"]))
    "unknown method 'W-SDGM': did you mean 'W-SGDM'? Known: SGDM, W-SGDM"
    """
    known = list(known)
    by_folded = {candidate.casefold(): candidate for candidate in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    guess = f" did you mean {by_folded[near[0]]!r}?" if near else ""
    return LabError(f"unknown {kind} {name!r}:{guess} Known: {', '.join(known)}")


class DataError(LabError):
    """A file of the data cannot be read, which may show only when a run comes to it."""


def one_line(text: str) -> str:
    r"""Return a text on one line: names of files may hold the ends of lines, and messages of other libraries do.

    >>> print(one_line("a\nb"))
    a\nb
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class CommandEndedError(RuntimeError):
    """A command cannot go on, through no mistake in what was asked for.

    Args:
        message: What to say after the program's name.
        code: The exit code.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Turn an exception of a user's code into one line that says where it was raised.

    Args:
        what: What was being done.

    Raises:
        LabError: If the block raises an exception that is none.
    """
    try:
        yield
    except LabError:
        raise
    except ModuleNotFoundError as error:
        if error.name and _frames(error) == []:
            raise
        raise LabError(f"{what} failed: {_said(error)}") from error
    except Exception as error:
        raise LabError(f"{what} failed: {_said(error)}") from error


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the places of an exception that are not in wellcond or in Python's import machinery."""
    here = f"{os.sep}wellcond{os.sep}lab{os.sep}"
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if here not in frame.filename and not frame.filename.startswith("<") and "importlib" not in frame.filename
    ]


def _said(error: BaseException) -> str:
    frames = _frames(error)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if first else ''}{first}{place}"
