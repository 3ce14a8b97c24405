"""Imports a task by its path: a class, a function or an object of a user's own module, or a LightningModule."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from wellcond.lab.errors import LabError
from wellcond.lab.importing import import_path
from wellcond.lab.tasks.base import Task
from wellcond.lab.tasks.own import as_task, built, scored_by

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_value(text: str) -> Any:
    """Read a value as TOML or JSON writes it; anything else is a text.

    >>> [parse_value(text) for text in ("3", "1e-3", "true", "[1, 2]", "null", "cosine")]
    [3, 0.001, True, [1, 2], None, 'cosine']
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text


def open_own(
    path: str,
    arguments: tuple[tuple[str, str], ...],
    data_module: str | None,
    data_arguments: tuple[tuple[str, str], ...],
    score: str | None,
) -> Task:
    """Return the task that an import path names.

    Args:
        path: Of a class, of a function that returns a task, or of a task.
        arguments: What the class or function is called with: names and texts (see `parse_value`).
        data_module: Import path of a LightningDataModule; `path` names a LightningModule, then.
        data_arguments: What that is called with.
        score: Which of its scores counts, such as ``"val_acc:max"``; None: the task says it.

    Raises:
        LabError: If something of these cannot be used.
    """
    found = import_path(path, "--task")
    given = {name: parse_value(text) for name, text in arguments}
    if data_module is not None or _is_lightning(found):
        from wellcond.lab.tasks.lightning_task import LightningTask  # Lightning takes seconds to import

        if not _is_lightning(found):
            raise LabError(f"--data-module is for a LightningModule, and --task {path} is {_kind(found)}")
        data = None
        if data_module is not None:
            source = import_path(data_module, "--data-module")
            values = {name: parse_value(text) for name, text in data_arguments}
            data = built(source, values, f"--data-module {data_module}", "--data-args") if callable(source) else source
        return LightningTask(partial(built, found, given, f"--task {path}"), data, score=score, source=found)
    if data_arguments:
        raise LabError("--data-args is for --data-module")
    if callable(found) and not isinstance(found, Task):
        found = built(found, given, f"--task {path}")
    elif given:
        raise LabError(f"--task-args: --task {path} is {_kind(found)}, which takes none")
    task = as_task(found, f"--task {path}")
    return task if score is None else scored_by(task, score)


def _is_lightning(found: Any) -> bool:
    if not isinstance(found, type):
        return False
    # Without importing Lightning, which takes seconds, where nobody else has.
    names = {f"{kind.__module__}.{kind.__name__}" for kind in found.__mro__}
    return any(name.endswith(".LightningModule") and "lightning" in name for name in names)


def _kind(found: Any) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of {type(found).__name__}"
