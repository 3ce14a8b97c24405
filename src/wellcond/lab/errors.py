"""Mistakes in what was asked for: reported in one line, before anything is trained."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LabError(ValueError):
    """What was asked for cannot be done; the message is one line that names the rule and what was given."""


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
