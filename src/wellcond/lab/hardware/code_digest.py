"""The digest of the code that computes a run: kept runs of other code are not taken for this code's."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import wellcond
from wellcond.lab.source_text import code_of

# Of wellcond, everything computes but what is named here; "lab" is taken apart below.
_ELSEWHERE = ("__main__", "integrations", "lab")
# Of the lab, only these files and folders do. The others plan and present, or are told in a run's settings.
_COMPUTING = (
    "data",
    "hardware/strategies",
    "methods",
    "networks",
    "runs/memory",
    "runs/stopwatch",
    "tasks",
    "training",
)
# In these folders, only these files do not: they hold the names that settings choose from, find data and weights by
# name, and show how far runs are.
_PRESENTING = (
    "data/named_data",
    "networks/named_weights",
    "training/logs",
    "training/progress",
    "training/run_display",
)
_PACKAGE = Path(wellcond.__file__).parent


def computing_files(package: Path | None = None) -> list[Path]:
    """Return the files whose code decides what a run computes, in one order.

    Args:
        package: The folder of wellcond; None for the one that runs.
    """
    package = package or _PACKAGE
    return [file for file in sorted(package.rglob("*.py")) if _computes(file.relative_to(package).with_suffix(""))]


def code_digest(package: Path | None = None) -> str:
    """Return a digest of the code that decides what a run computes; of docstrings and comments it does not hang.

    Args:
        package: The folder of wellcond; None for the one that runs.
    """
    return _digest(package or _PACKAGE)


@cache
def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for file in computing_files(package):
        digest.update(code_of(file.read_text(encoding="utf-8")))
    return digest.hexdigest()


def _computes(file: Path) -> bool:
    first, *rest = file.parts
    if first != "lab":
        return first not in _ELSEWHERE
    names = {"/".join(rest[:1]), "/".join(rest[:2])}
    return bool(names & set(_COMPUTING)) and not names & set(_PRESENTING)
