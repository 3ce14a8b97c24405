"""Paths that a command is given: looked at before it begins any work, and left as they are."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from wellcond.lab.errors import LabError


def short_name(path: str | Path, otherwise: str) -> str:
    """Return what a file or folder is called, fit for the name of another one.

    Args:
        path: The file or folder.
        otherwise: What it is called where nothing of its name is fit.

    >>> short_name("data/War and Peace.txt", "text")
    'war-and-peace'
    """
    return re.sub(r"[^a-z0-9]+", "-", Path(path).resolve().stem.lower()).strip("-") or otherwise


def is_there(path: str | Path) -> bool:
    """Return whether something is there; of a name that nothing could have, nothing is."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def check_input_file(option: str, file: str | Path) -> Path:
    """Return the path of a file that can be read.

    Args:
        option: What named it, for the message.
        file: The file.

    Raises:
        LabError: If there is none, it is a folder or a device, or it cannot be opened.
    """
    path = Path(file)
    try:
        if path.is_dir():
            raise LabError(f"{option} {path}: is a folder, and must be a file")
        if not path.is_file():
            raise LabError(f"{option} {path}: {'is no regular file' if path.exists() else 'there is no such file'}")
        with path.open("rb"):
            return path
    except LabError:
        raise
    except (OSError, ValueError) as error:
        raise LabError(f"{option} {path}: cannot be read ({_reason(error)})") from error


def check_data(option: str, path: Path) -> None:
    """Check that data is a file, or a folder of files and folders, and can be opened.

    Args:
        option: What named it.
        path: The data, which exists. Of a folder, what lies in it and in its folders is looked at.

    Raises:
        LabError: If it, or something in it, is a device, a pipe or a link to nothing, or cannot be opened.
    """
    if not path.is_dir():
        check_input_file(option, path)
        return
    try:
        for entry in _entries(path, depth=2):
            if not (entry.is_file() or entry.is_dir()):
                kind = "a link to nothing" if not Path(entry.path).exists() else "neither a file nor a folder"
                raise LabError(f"{option} {entry.path}: is {kind}")
    except OSError as error:
        raise LabError(f"{option} {error.filename or path}: cannot be read ({_reason(error)})") from error


def check_output_file(option: str, file: str | Path) -> Path:
    """Return the path of a file that can be written; it is neither made nor changed.

    Args:
        option: What named it.
        file: The file.

    Raises:
        LabError: If it is a folder or a device, or its folder is missing or cannot be written to.
    """
    path = Path(file)
    try:
        if not path.parent.is_dir():
            raise LabError(f"{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            raise LabError(f"{option} {path}: is a folder, and must be a file")
        if path.exists() and not path.is_file():
            raise LabError(f"{option} {path}: is no regular file, and would be replaced by one")
        # It is first written beside, under a name of some characters more.
        _try_to_write(path.parent, f".{path.name}.{'x' * 12}")
    except LabError:
        raise
    except (OSError, ValueError) as error:
        raise LabError(f"{option} {path}: cannot write there ({_reason(error)})") from error
    return path


def check_output_folder(option: str, folder: str | Path) -> Path:
    """Return the path of a folder that can be written to, or be made; neither is done.

    Args:
        option: What named it.
        folder: The folder.

    Raises:
        LabError: If it, or the nearest one above that exists, is no folder or cannot be written to, or if a folder lies
            in it where a file of results would.
    """
    path = Path(folder)
    try:
        there = path
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise LabError(f"{option} {path}: cannot write there ({there} is not a folder)")
        for name in path.relative_to(there).parts or ("runs",):
            _try_to_write(there, name)
        # A path as a whole can be too long, too, with what will lie in it.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path / "runs" / ("x" * 128))
        if there == path:
            _check_results(option, path)
    except LabError:
        raise
    except (OSError, ValueError) as error:
        raise LabError(f"{option} {path}: cannot write there ({_reason(error)})") from error
    return path


_RESULTS = (".html", ".json", ".csv", ".png", ".pt")
_FOLDERS_OF_RESULTS = ("runs", "logs")


def _check_results(option: str, folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.suffix in _RESULTS and entry.is_dir():
            raise LabError(f"{option} {folder}: cannot write there ({entry.name} is a folder, and must be a file)")
        if entry.name in _FOLDERS_OF_RESULTS and not entry.is_dir():
            raise LabError(f"{option} {folder}: cannot write there ({entry.name} is not a folder)")
        if entry.name in _FOLDERS_OF_RESULTS:
            _try_to_write(entry, "runs")


def _try_to_write(folder: Path, name: str) -> None:
    """Raise an OSError or a ValueError if a file of this name cannot be made; it leaves none."""
    with contextlib.suppress(FileNotFoundError):
        # Looking for a name that is too long, or none at all, raises what writing it would.
        os.lstat(folder / name)
    # By trying: what a mount, a quota or an access list allows is not in the permissions.
    with tempfile.TemporaryFile(dir=folder):
        pass


def _entries(folder: Path, depth: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            yield entry
            if depth > 1 and entry.is_dir():
                yield from _entries(Path(entry.path), depth - 1)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
