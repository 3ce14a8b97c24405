"""Options that name where results go: the paths are checked when they are read, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_output_file, check_output_folder
from wellcond.lab.launch import launched


class _OutputPath(argparse.Action):
    check: ClassVar[Callable[[str, str | Path], Path]]
    kind: ClassVar[Callable[[str], object]]

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Check the path and keep it."""
        option = option_string or self.dest
        if not isinstance(values, str) or not values:
            # Some versions of argparse make an empty list of a lone --.
            raise LabError(f"{option} must not be {'empty' if values == '' else '--'}")
        # Of several processes only the first writes, perhaps on a machine of its own.
        if launched().rank == 0:
            type(self).check(option, values)
        setattr(namespace, self.dest, type(self).kind(values))


class OutputFile(_OutputPath):
    """A file that the command writes, as a `Path`."""

    check = staticmethod(check_output_file)
    kind = Path


class OutputFolder(_OutputPath):
    """A folder that the command writes to and makes if need be, as text."""

    check = staticmethod(check_output_folder)
    kind = str
