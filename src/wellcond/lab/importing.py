"""Things of one's own by their import path, ``package.module:name``; modules may lie in the current folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from wellcond.lab.errors import LabError, naming_errors, one_line


def is_import_path(text: str) -> bool:
    """Return whether a text is written as an import path.

    >>> is_import_path("my_project.optim:Lion"), is_import_path("SGDM")
    (True, False)
    """
    return ":" in text


def import_path(path: str, option: str = "") -> Any:
    """Return what an import path names.

    Args:
        path: ``package.module:name``, or ``file.py:name``.
        option: What it was given by, for errors.

    Raises:
        LabError: If the path has another form, the module cannot be imported, or there is no such name in it.

    >>> import_path("collections:OrderedDict").__name__
    'OrderedDict'
    """
    module_name, colon, name = path.rpartition(":")
    is_file = module_name.endswith(".py")
    parts = [*name.split("."), *([] if is_file else module_name.split("."))]
    if not colon or not all(part.isidentifier() for part in parts):
        raise LabError(f"{option or 'an import path'} must look like my_project.training:MyTask, got {path!r}")
    said = f"{option} {path}".strip()
    folder = Path.cwd()
    if is_file:
        if not Path(module_name).is_file():
            raise LabError(f"{said}: there is no file {module_name}")
        folder, module_name = Path(module_name).resolve().parent, Path(module_name).stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # What other processes have written meanwhile must be found, too.
    importlib.invalidate_caches()
    try:
        with naming_errors(f"{said}: importing it"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        hint = ": pip install 'wellcond[peers]'" if error.name == "pytorch_optimizer" else ""
        place = f"in {folder} or on Python's path"
        raise LabError(one_line(f"{said}: there is no module {error.name!r} {place}{hint}")) from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
            raise LabError(f"{said}: {module_name} has no {name}; its classes: {', '.join(known[:20]) or 'none'}")
        found = getattr(found, part)
    return found
