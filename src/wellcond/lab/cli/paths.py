"""Options that name where results go: the paths are checked when they are read, before any work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_output_file, check_output_folder
from wellcond.lab.hardware.launch import launched


class _OutputPath(argparse.Action):
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
            self.check(option, values)
        setattr(namespace, self.dest, self.kept(values))

    def check(self, option: str, given: str) -> None:
        """Raise a `LabError` if nothing can be written there."""
        raise NotImplementedError

    def kept(self, given: str) -> Path | str:
        """Return what the command gets."""
        return given


class OutputFile(_OutputPath):
    """A file that the command writes, as a `Path`."""

    def check(self, option: str, given: str) -> None:
        """Raise a `LabError` if it cannot be written."""
        check_output_file(option, given)

    def kept(self, given: str) -> Path:
        """Return its path."""
        return Path(given)


class OutputFolder(_OutputPath):
    """A folder that the command writes to and makes if need be, as text."""

    def check(self, option: str, given: str) -> None:
        """Raise a `LabError` if it cannot be written to or made."""
        check_output_folder(option, given)
