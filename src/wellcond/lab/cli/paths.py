"""Checks the paths of results when the command line is read, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_output_file, check_output_folder
from wellcond.lab.hardware.launch import launched


class _OutputPath(argparse.Action):
    kept: type[Path | str]
    """What the command gets."""
    check: Callable[[str, str], Path]
    """Raises a `LabError` if nothing can be written there."""

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
        setattr(namespace, self.dest, self.kept(values))
        # Of several processes only the first writes, perhaps on a machine of its own.
        if launched().rank == 0:
            self.check(option, values)


class OutputFile(_OutputPath):
    """A file that the command writes, as a `Path`."""

    kept, check = Path, staticmethod(check_output_file)


class OutputFolder(_OutputPath):
    """A folder that the command writes to and makes if need be, as text."""

    kept, check = str, staticmethod(check_output_folder)
