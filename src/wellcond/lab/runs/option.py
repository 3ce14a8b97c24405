"""Declares options: fields of a dataclass that hold their help, their name for commands and their check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, TypeAlias

from wellcond.lab.errors import LabError, unknown_name

MOST = 1_000_000
"""The most of anything that is counted and not otherwise limited: epochs, steps, images."""

Check: TypeAlias = Callable[[str, Any], None]
"""Raises a `LabError` for an option's name and a value that it may not have."""

_MOST_COUNTED = 10**9


@dataclass(frozen=True)
class Option:
    """The description of an option in its field, so that commands, files and results need not name it.

    Attributes:
        group: The options that a command offers it with.
        default: Its value unless it is given.
        help: What it means, as a command's help says it.
        metavar: What stands for its value there; None for a switch.
        flag: What commands call it, without the dashes.
        check: Checks a value that is given.
        by_task: Whether a task of one's own decides it, so that it cannot be asked for beside one.
        only_for: The one kind of task that it is for; None: any.
        offered: Whether commands offer it and results list it; otherwise files and Python alone set it.
    """

    group: str
    default: Any
    help: str
    metavar: str | None = None
    flag: str = ""
    check: Check | None = None
    by_task: bool = False
    only_for: str | None = None
    offered: bool = True


def option(group: str, default: object, help: str, metavar: str | None = None, **more: Any) -> Any:
    """Return a field of a dataclass that is an option.

    Args:
        group: The options that a command offers it with.
        default: Its value unless it is given.
        help: What it means, as a command's help says it.
        metavar: What stands for its value there; None for a switch.
        **more: Further attributes of `Option`.
    """
    return field(default=default, metadata={"option": Option(group, default, help, metavar, **more)})


@cache
def options_of(kind: type) -> dict[str, Option]:
    """Return the options among the fields of a dataclass, in their order, each with its flag.

    Args:
        kind: The dataclass.
    """
    found = {each.name: each.metadata["option"] for each in fields(kind) if "option" in each.metadata}
    return {name: replace(said, flag=said.flag or name.replace("_", "-")) for name, said in found.items()}


def check_options(given: Any) -> None:
    """Check each option by itself; None is a value that is left open.

    Args:
        given: An instance of a dataclass with options.

    Raises:
        LabError: If a value is none that its option may have.
    """
    for name, said in options_of(given.__class__).items():
        value = getattr(given, name)
        if value is not None and said.check is not None:
            said.check(said.flag, value)


def check_whole(flag: str, value: int, least: int = 1, most: int = MOST) -> None:
    """Check an integer.

    Args:
        flag: What it was given by, without the dashes.
        value: The integer.
        least: The least that it may be.
        most: The most.

    Raises:
        LabError: If it is less or more.
    """
    if value < least:
        rule = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise LabError(f"--{flag} must be {rule}, got {value}")
    if value > most:
        raise LabError(f"--{flag} must be at most {most}, got {value}")


def whole_number(most: int = _MOST_COUNTED) -> Check:
    """Return the check of a positive integer."""
    return lambda flag, value: check_whole(flag, value, most=most)


def number(rule: str, least: float = -math.inf, below: float = math.inf) -> Check:
    """Return the check of a finite number.

    Args:
        rule: What it must be, in words.
        least: The least that it may be.
        below: What it must stay below.
    """

    def check(flag: str, value: float) -> None:
        if not (math.isfinite(value) and least <= value < below):
            raise LabError(f"--{flag} must be {rule}, got {value:g}")

    return check


def one_of(known: Iterable[str]) -> Check:
    """Return the check of a name.

    Args:
        known: The names, which may be filled in later.
    """

    def check(flag: str, value: str) -> None:
        if value not in known:
            raise unknown_name(flag, value, known)

    return check
