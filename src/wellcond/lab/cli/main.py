"""Reads the command line and runs the command that it names."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from wellcond.lab.errors import CommandEndedError, LabError, one_line
from wellcond.lab.hardware.interrupts import Interrupted
from wellcond.lab.hardware.launch import launched
from wellcond.version import __version__


class Command(Protocol):
    """A module of `wellcond.lab.cli`: its options, and its run."""

    def add_parser(self, commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Declare the command and its options."""

    def run(self, arguments: argparse.Namespace, command_line: str) -> int:
        """Do what it says and return the exit code."""


COMMANDS = ("compare", "train", "reproduce", "calibrate", "repair", "diagnose", "bench", "list")
"""Every command, in the order in which the help shows them; each is a module of this package."""


SHARED_COMMANDS = ("compare", "train")
"""Those that several processes can carry out together, as torchrun or SLURM starts them."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it, and takes options by their whole names alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse values that would be taken for none, or for this folder."""
        given, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(given, action.dest, None)
            name = "/".join(action.option_strings) or action.metavar or action.dest
            # Some versions of argparse make an empty list of a lone --.
            if (value == [] and value != action.default) or (isinstance(value, list) and [] in value):
                raise LabError(f"{name} must not be --")
            # Lists of methods say so themselves.
            if value == "" and action.dest != "methods":
                raise LabError(f"{name} must not be empty")
        return given, rest

    def error(self, message: str) -> NoReturn:
        raise LabError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 1 a run failed, 2 a mistake in the arguments or the data; 130, 143 or 129 where SIGINT
        (Ctrl-C), SIGTERM or SIGHUP ended it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        # A command waits for its own imports alone.
        arguments = _parser(argv[:1] if argv[:1] and argv[0] in COMMANDS else COMMANDS).parse_args(argv)
        if launched().size > 1 and arguments.command not in SHARED_COMMANDS:
            raise LabError(
                f"wellcond {arguments.command} is for one process, not for the {launched().size} of a launch"
            )
        return _module(arguments.command).run(arguments, shlex.join(["wellcond", *argv]))
    except LabError as error:
        _say(f"error: {one_line(str(error))}")
        return 2
    except CommandEndedError as ended:
        # A run may have failed on one process alone.
        _say(str(ended), anywhere=ended.code == 1)
        return ended.code
    except Interrupted as ended:  # by a command that keeps nothing
        _say(f"{ended}.")
        return ended.code


def _say(line: str, anywhere: bool = False) -> None:
    """Say why the command ended; of several processes only the first does, unless it matters where it was."""
    try:
        here = anywhere or launched().rank == 0
    except LabError:  # this may be what is said
        here = True
    if here:
        print(f"wellcond: {line}", file=sys.stderr)


def _module(command: str) -> Command:
    return cast(Command, import_module(f"wellcond.lab.cli.{command}"))


def _parser(named: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """Return what reads the command line, of the named commands alone."""
    parser: argparse.ArgumentParser = _Parser(
        prog="wellcond",
        description="Measure what statistics-driven training techniques gain and cost.",
        epilog="`wellcond compare --help` explains the comparison, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"wellcond {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for command in named:
        _module(command).add_parser(commands)
    return parser
