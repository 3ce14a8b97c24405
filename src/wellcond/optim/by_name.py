"""Named optimizers by their names, for code and config files, with intervals that suit a run."""

from __future__ import annotations

import difflib
import inspect
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from wellcond.deferred import defer, parameters_of
from wellcond.optim.attached import Attached
from wellcond.optim.named import DWSGDM, FSGD, WSGDM, FAdam, WAdam
from wellcond.runtime.checks import check_positive_integer

# What the named optimizers' signatures show beside options of torch's optimizer and of the transform.
_OURS = ("model", "lr", "params", "as_published")

_NAMED: dict[str, type[FSGD | WSGDM | FAdam | WAdam | DWSGDM]] = {
    kind.__name__.casefold(): kind for kind in (FSGD, WSGDM, FAdam, WAdam, DWSGDM)
}


def names(pattern: str = "*") -> list[str]:
    """Return the names of the named optimizers.

    Args:
        pattern: What they must match; ``*`` stands for any signs, and case does not matter.

    Example:
        >>> names("w*")
        ['wadam', 'wsgdm']
    """
    return sorted(name for name in _NAMED if fnmatchcase(name, pattern.casefold()))


def intervals(total_steps: int) -> dict[str, int]:
    """Return a preconditioner's intervals that suit a run of this many steps.

    The defaults (50 and 500) are for long runs; one of 200 steps would hardly refresh with them.

    Args:
        total_steps: Optimizer steps of the run.

    Returns:
        ``stats_every`` and ``solve_every``, for a transform or a named optimizer.

    Raises:
        ValueError: If it is no positive integer.

    Example:
        >>> intervals(186)
        {'stats_every': 5, 'solve_every': 25}
        >>> intervals(40_000)
        {'stats_every': 50, 'solve_every': 500}
    """
    check_positive_integer("total_steps", total_steps)
    if total_steps >= 2000:
        return {"stats_every": 50, "solve_every": 500}
    stats_every = max(1, round(total_steps / 40))
    return {"stats_every": stats_every, "solve_every": 5 * stats_every}


def from_parameters(
    params: ParamsT, name: str, lr: float | torch.Tensor, total_steps: int | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Return a named optimizer from parameters alone, for LightningCLI, Hydra and others that know no model yet.

    It is the torch optimizer, and refuses to step until the transform is attached: by wellcond's callback
    (`wellcond.integrations`) when training begins, or by `attach_deferred`.

    Args:
        params: Parameters, or groups of them.
        name: As `create` takes it.
        lr: Learning rate.
        total_steps: Optimizer steps of the run, in place of intervals by hand.
        **options: Further options of the torch optimizer and of the transform.

    Raises:
        TypeError: If an option is unknown, or the parameters are none.
        ValueError: If no optimizer has the name, or an option is outside its range.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> type(from_parameters(model.parameters(), "wadam", lr=1e-3, total_steps=200)).__name__
        'AdamW'
    """
    kind = _named(name)
    base = next(
        each for each in kind.__mro__ if issubclass(each, torch.optim.Optimizer) and not issubclass(each, Attached)
    )
    shown = {key: each.default for key, each in inspect.signature(kind).parameters.items() if each.name not in _OURS}
    for option in options.keys() - shown.keys():
        near = difflib.get_close_matches(option, shown, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{kind.__name__} has no option {option!r}{hint}")
    given = shown | ({} if total_steps is None else intervals(total_steps)) | options
    of_transform = {key: given.pop(key) for key in inspect.signature(kind.transform_type).parameters}
    optimizer: torch.optim.Optimizer = base(parameters_of(params), lr=lr, **given)
    defer(optimizer, kind.transform_type(**of_transform))
    return optimizer


def create(name: str, model: nn.Module, total_steps: int | None = None, **options: Any) -> torch.optim.Optimizer:
    """Return a named optimizer, for code and for config files that name it.

    Args:
        name: ``"fsgd"``, ``"wsgdm"``, ``"fadam"``, ``"wadam"``, ``"dwsgdm"``; case, hyphens, underscores do not matter
            (``"W-SGDM"``).
        model: The model; its layers' inputs are observed.
        total_steps: Optimizer steps of the run: takes the intervals that suit it (see `intervals`).
        **options: As the class of that name takes them: ``lr``, ``params``, ``damping``, …

    Raises:
        TypeError: If ``model`` is no module, or an option is unknown or missing.
        ValueError: If no optimizer has the name, or an option is outside its range.

    Example:
        >>> type(create("w-sgdm", nn.Linear(4, 2), lr=0.1, stats_every=10)).__name__
        'WSGDM'
    """
    if total_steps is not None:
        options = intervals(total_steps) | options
    optimizer: torch.optim.Optimizer = _named(name)(model, **options)
    return optimizer


def _named(name: str) -> Any:
    if not isinstance(name, str):
        raise TypeError(f"name must be a text such as 'wsgdm', got {type(name).__name__}")
    plain = name.casefold().replace("-", "").replace("_", "")
    if plain not in _NAMED:
        near = difflib.get_close_matches(plain, _NAMED, n=1)
        guess = f": did you mean {near[0]!r}?" if near else ":"
        raise ValueError(f"no optimizer is called {name!r}{guess} Known: {', '.join(_NAMED)}")
    return _NAMED[plain]
