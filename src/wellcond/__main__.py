"""The entry point of the `wellcond` command and of `python -m wellcond`."""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

_EXTRA = "lab"
# As the shell reports a process that SIGPIPE has ended.
_UNREAD = 141


def missing_packages() -> list[str]:
    """Return the packages of the ``lab`` extra that are not installed; none where wellcond itself is not.

    The extra's list in pyproject.toml is the only one: installing writes it into the package's metadata.
    """
    try:
        wanted = metadata.requires("wellcond") or []
    except metadata.PackageNotFoundError:
        return []
    missing = []
    for requirement in wanted:
        name, _, marker = requirement.partition(";")
        old = re.search(r"python_version\s*<\s*['\"](\d+)\.(\d+)['\"]", marker)
        if not re.search(rf"extra\s*==\s*['\"]{_EXTRA}['\"]", marker):
            continue
        if old is None or sys.version_info < (int(old[1]), int(old[2])):
            found = re.match(r"[A-Za-z0-9._-]+", name.strip())
            if found is not None and not _is_installed(found[0]):
                missing.append(found[0])
    return missing


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the program's name; None: those of this process.

    Returns:
        The exit code; 2 also where the lab's dependencies are not installed, 141 where what read the output has ended.
    """
    from wellcond.lab.hardware.interrupts import ending_at_once

    # From the first import on: torch and Lightning take seconds, in which Ctrl-C would be a page of their insides.
    with ending_at_once():
        try:
            code = _run(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            # As in `wellcond list | head`: nobody reads on, also not what the interpreter would flush at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _UNREAD
    return code


def _run(argv: Sequence[str] | None) -> int:
    missing = missing_packages()
    if missing:
        print(
            'wellcond: error: the command line needs the lab extra: pip install "wellcond[lab]" '
            f"(not found: {', '.join(missing)})",
            file=sys.stderr,
        )
        return 2
    from wellcond.lab.cli.main import main as run

    return run(argv)


def _end(code: int) -> NoReturn:
    """End the process; one of several without taking the interpreter apart, which has aborted it (code 134).

    Threads of torch may still run after the process group is gone. What was registered for the end is done first.
    """
    if "LOCAL_RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
