"""The entry point of the `wellcond` command and of `python -m wellcond`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

# What the lab imports beside torch; installed by the `lab` extra.
_LAB_MODULES = (
    "PIL",
    "jinja2",
    "lightning",
    "matplotlib",
    "numpy",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "torchvision",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the program's name; None: those of this process.

    Returns:
        The exit code; 2 also where the lab's dependencies are not installed.
    """
    from wellcond.lab.interrupts import ending_at_once

    # From the first import on: torch and Lightning take seconds, in which Ctrl-C would be a page of their insides.
    with ending_at_once():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    missing = [name for name in _LAB_MODULES if find_spec(name) is None]
    if missing:
        print(
            'wellcond: error: the command line needs the lab extra: pip install "wellcond[lab]" '
            f"(not found: {', '.join(missing)})",
            file=sys.stderr,
        )
        return 2
    from wellcond.lab import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
