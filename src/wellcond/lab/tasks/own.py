"""Makes a task of a user's object, whatever its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from wellcond.lab.errors import LabError, naming_errors
from wellcond.lab.tasks.base import Task

METHODS = ("model", "batches", "loss", "scores")
"""What a task must have."""


class Adopted(Task):
    """A task whose class is no subclass of `Task`.

    Args:
        given: An object with the four methods.
    """

    _OPTIONAL = (
        *("metric", "score", "higher_is_better", "epochs", "splits", "samples", "target", "default_methods", "name"),
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
        from wellcond.lab.own_digest import state_digest

        own = getattr(self.given, "fingerprint", None)
        return str(own()) if callable(own) else state_digest(self.given)

    def __getstate__(self) -> dict[str, Any]:
        return {"given": self.given, "metric": self.metric}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.given = state["given"]
        self._adopt()
        vars(self)["metric"] = state["metric"]


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
