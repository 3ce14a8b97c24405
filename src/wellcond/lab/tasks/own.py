"""A user's own task: found by its import path, or handed over as an object."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from wellcond.lab.errors import LabError, naming_errors
from wellcond.lab.tasks.base import Task

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = ("model", "batches", "loss", "scores")
"""What a task must have."""


class Adopted(Task):
    """A task whose class is no subclass of `Task`.

    Args:
        given: An object with the four methods.
    """

    _OPTIONAL = (
        *("metric", "score", "higher_is_better", "epochs", "splits", "samples", "target", "name"),
        *("stop", "describe", "train_score"),
    )

    def __init__(self, given: Any) -> None:
        self.given = given
        self._adopt()

    def _adopt(self) -> None:
        for name in (*METHODS, *self._OPTIONAL):
            if hasattr(self.given, name):
                vars(self)[name] = getattr(self.given, name)
        vars(self).setdefault("name", type(self.given).__name__)

    @property
    def sources(self) -> tuple[Any, ...]:
        """What its code is."""
        return (type(self.given),)

    def fingerprint(self) -> str:
        """Return the object's own fingerprint, or a digest of its attributes."""
        from wellcond.lab.tasks.own_digest import state_digest

        own = getattr(self.given, "fingerprint", None)
        return str(own()) if callable(own) else state_digest(self.given)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.given = state["given"]
        self._adopt()


def as_task(given: Any, what: str = "task") -> Task:
    """Return a task from an object or a class that is one.

    Args:
        given: A `Task`, another object with its four methods, or a class of either that takes no arguments.
        what: How errors call it.

    Raises:
        LabError: If it is none of these.
    """
    if isinstance(given, type):
        given = built(given, {}, what)
    if isinstance(given, Task):
        written = [name for name in METHODS if not _is_inherited(given, name)]
    else:
        written = [name for name in METHODS if callable(getattr(given, name, None))]
    missing = [name for name in METHODS if name not in written]
    if len(missing) == len(METHODS) and isinstance(given, nn.Module):
        raise LabError(
            f"{what} must be a task, got the network {type(given).__name__}: write a class with model, batches, loss "
            "and scores (see wellcond.lab.Task), or hand the class of a LightningModule to wellcond.lab.LightningTask"
        )
    if missing and not _is_built_in(given):
        raise LabError(
            f"{what} must have the methods {', '.join(METHODS)} (see wellcond.lab.Task); {type(given).__name__} has no "
            f"{', '.join(missing)}"
        )
    return given if isinstance(given, Task) else Adopted(given)


def _is_inherited(given: Task, name: str) -> bool:
    return getattr(type(given), name) is getattr(Task, name) and name not in vars(given)


def _is_built_in(given: Any) -> bool:
    return isinstance(given, Task) and type(given).for_seed is not Task.for_seed


def imported(path: str, option: str = "--task") -> Any:
    """Return what an import path names, also from the folder that the command runs in.

    Args:
        path: ``my_project.training:MyTask``, or ``training.py:MyTask``.
        option: How errors call it.

    Raises:
        LabError: If there is no such module, it cannot be imported, or it has no such name.
    """
    module_name, colon, name = path.rpartition(":")
    if not colon or not module_name or not name:
        raise LabError(f"{option} must look like my_project.training:MyTask, got {path!r}")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        file = Path(module_name)
        if not file.is_file():
            raise LabError(f"{option} {path}: there is no file {module_name}")
        folder, module_name = file.resolve().parent, file.stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # The parents of what other processes import must be found there, too.
    importlib.invalidate_caches()
    try:
        with naming_errors(f"{option} {path}: importing it"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise LabError(f"{option} {path}: there is no module {error.name!r} in {folder} or on Python's path") from None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
            raise LabError(f"{option} {path}: {module_name} has no {name}; its classes: {', '.join(known) or 'none'}")
        found = getattr(found, part)
    return found


def built(make: Callable[..., Any], arguments: Mapping[str, Any], what: str, option: str = "--task-args") -> Any:
    """Return what a class or a function makes of these arguments.

    Args:
        make: The class or function.
        arguments: By name.
        what: How errors call it.
        option: What the arguments were given by.

    Raises:
        LabError: If it takes others, or it raises an exception.
    """
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        taken = signature.parameters
        free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        known = [name for name, parameter in taken.items() if parameter.kind is not parameter.VAR_KEYWORD]
        unknown = [name for name in arguments if name not in known and not free]
        if unknown:
            raise LabError(f"{option} {', '.join(unknown)}: {what} takes {', '.join(known) or 'no arguments'}")
        missing = [
            name
            for name, parameter in taken.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            and name not in arguments
        ]
        if missing:
            raise LabError(
                f"{what} needs {', '.join(missing)}: give {option} {' '.join(f'{n}=VALUE' for n in missing)}"
            )
    with naming_errors(f"{what}: building it"):
        return make(**arguments)


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
    found = imported(path)
    given = {name: parse_value(text) for name, text in arguments}
    if data_module is not None or _is_lightning(found):
        from wellcond.lab.tasks.lightning_task import LightningTask

        if not _is_lightning(found):
            raise LabError(f"--data-module is for a LightningModule, and --task {path} is {_kind(found)}")
        data = None
        if data_module is not None:
            source = imported(data_module, "--data-module")
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


def scored_by(task: Task, score: str) -> Task:
    """Return the task with another of its scores as the one that counts.

    Args:
        task: The task; it is changed.
        score: Its name, and after a colon ``max`` or ``min``.

    Raises:
        LabError: If the text has another form.
    """
    vars(task)["metric"] = parse_score(score)
    return task


def parse_score(text: str) -> Any:
    """Return the metric of ``"NAME:max"`` or ``"NAME:min"``.

    Raises:
        LabError: If the text has another form.

    >>> parse_score("val_loss:min").higher_is_better
    False
    """
    from wellcond.lab.runs.metric import Metric

    name, _, way = text.rpartition(":")
    if not name or way not in ("max", "min"):
        raise LabError(f"--score must look like val_acc:max or val_loss:min, got {text!r}")
    return Metric(name, unit="", higher_is_better=way == "max")


def _is_lightning(found: Any) -> bool:
    if not isinstance(found, type):
        return False
    # Without importing Lightning, which takes seconds, where nobody else has.
    names = {f"{kind.__module__}.{kind.__name__}" for kind in found.__mro__}
    return any(name.endswith(".LightningModule") and "lightning" in name for name in names)


def _kind(found: Any) -> str:
    return f"the class {found.__name__}" if isinstance(found, type) else f"an object of {type(found).__name__}"
