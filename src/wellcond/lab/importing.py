"""Things of one's own by their import path, ``package.module:name``; modules may lie in the current folder."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from wellcond.lab.errors import LabError, one_line, unknown_name


def is_import_path(text: str) -> bool:
    """Return whether a text is written as an import path.

    >>> is_import_path("my_project.optim:Lion"), is_import_path("SGDM")
    (True, False)
    """
    return ":" in text


def import_path(path: str) -> Any:
    """Return what an import path names.

    Args:
        path: ``package.module:name``.

    Raises:
        LabError: If the path has another form, the module cannot be imported, or there is no such name in it.

    >>> import_path("collections:OrderedDict").__name__
    'OrderedDict'
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise LabError(f"an import path must look like package.module:name, got {path!r}")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the module's own mistakes, whatever they are
        hint = _hint(error, module_name)
        raise LabError(one_line(f"cannot import {module_name}: {type(error).__name__}: {error}{hint}")) from error
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise unknown_name(f"name in {module_name}", name, known[:20])
        found = getattr(found, part)
    return found


def source_digest(found: Any) -> str:
    """Return a digest of the file that a class or function is written in; "" where there is none to read.

    Runs of a user's own code are told apart by it, when the code is changed.
    """
    try:
        file = inspect.getsourcefile(found)
        return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _hint(error: Exception, module_name: str) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "pytorch_optimizer":
        return ": pip install 'wellcond[peers]'"
    if isinstance(error, ModuleNotFoundError) and error.name and module_name.split(".")[0] == error.name.split(".")[0]:
        return " (modules are looked for in the current folder and among what is installed)"
    return ""
