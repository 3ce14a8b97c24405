"""The grid of every method: a trial is a method with one lr and one value of each swept option."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import wellcond
from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.methods.method import Method
from wellcond.lab.methods.optimizers import known_options

Search = Literal["grid", "random"]
"""How trials are laid out: every combination, or points drawn between the ends of each range."""

Sweep: TypeAlias = tuple[str, tuple[object, ...]]
"""An option's name and the values to try."""

RUN_OPTIONS = ("batch_size", "ghost_batch")
"""Options of a run that can be swept for every method."""

# A grid of one lr that has to be as long as another's becomes this many times wide, with the lr in the middle.
_SPAN = 10.0


@dataclass(frozen=True)
class Trial:
    """A method with one setting of its grid.

    Attributes:
        method: The method, with the swept options that it takes.
        lr: The lr.
        swept: What else the grid sets, as pairs of an option's name and its value.
    """

    method: Method
    lr: float
    swept: tuple[tuple[str, object], ...] = ()

    @property
    def run_options(self) -> dict[str, object]:
        """The swept options of the run, which are fields of `RunSpec`."""
        return {name: value for name, value in self.swept if name in RUN_OPTIONS}


def parse_sweep(text: str) -> Sweep:
    """Read an option sweep from the command line.

    Args:
        text: ``OPTION=VALUE,VALUE,...``; values are Python literals, or else texts.

    Raises:
        LabError: If the text has another form or names a value twice.

    >>> parse_sweep("damping=0.01,0.1,1")
    ('damping', (0.01, 0.1, 1))
    """
    name, separator, values = text.partition("=")
    name = name.strip().replace("-", "_")
    parts = [part.strip() for part in values.split(",")]
    if not separator or not name or not all(parts):
        raise LabError(f"--sweep must look like damping=0.01,0.1,1, got {text!r}")
    sweep = name, tuple(_literal(part) for part in parts)
    check_sweep(*sweep)
    return sweep


def check_sweep(name: str, values: Sequence[object]) -> None:
    """Check what is swept, as far as it can be without the methods.

    Args:
        name: The option.
        values: The values to try.

    Raises:
        LabError: If it is the lr, or there is no value, or a value comes twice.
    """
    if name == "lr":
        raise LabError("--sweep is for other options; --lrs gives the grid of the lr")
    if not values:
        raise LabError(f"--sweep {name} must have at least one value")
    if len(set(map(repr, values))) < len(values):
        raise LabError(f"--sweep {name}={','.join(map(str, values))}: names a value twice")


def _literal(text: str) -> object:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def make_trials(
    methods: Sequence[Method], sweeps: Sequence[Sweep] = (), search: Search = "grid", count: int | None = None
) -> dict[str, tuple[Trial, ...]]:
    """Return the grid of each method; all grids are equally long.

    A method that does not have a swept option tries more lrs in its place, spaced evenly (in the logarithm) between
    the ends of its lr grid.

    Args:
        methods: The methods, whose lr grids are equally long.
        sweeps: What is swept.
        search: ``"grid"`` for all combinations; ``"random"`` draws every number between the ends of its values (in the
            logarithm if they are positive) and everything else from them, the same draws for every method.
        count: Trials of each method in a random search; None: as many as the longest grid has.

    Returns:
        The trials by method, in the order of the grid.

    Raises:
        LabError: If no method has a swept option.
    """
    names = [name for name, _ in sweeps]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise LabError(f"--sweep must name each option once, got {repeated!r} twice")
    taken = {method.name: [sweep for sweep in sweeps if _takes(method, sweep[0])] for method in methods}
    for sweep in sweeps:
        if not any(sweep in mine for mine in taken.values()):
            known = [*RUN_OPTIONS, *dict.fromkeys(name for method in methods for name in sweepable_options(method))]
            raise unknown_name("option to sweep", sweep[0], known)
    others = {method.name: math.prod(len(values) for _, values in taken[method.name]) for method in methods}
    longest = max(len(method.lrs) * others[method.name] for method in methods)
    # A whole number of lrs for each combination of the other options, whichever a method has.
    common = math.lcm(*others.values())
    longest = -(-longest // common) * common
    if search == "random":
        return {method.name: _drawn(method, taken[method.name], sweeps, count or longest) for method in methods}
    return {method.name: _grid(method, taken[method.name], longest) for method in methods}


def _grid(method: Method, sweeps: Sequence[Sweep], length: int) -> tuple[Trial, ...]:
    others = math.prod(len(values) for _, values in sweeps)
    lrs = _spaced(method.lrs, length // others)
    points = list(itertools.product(*(values for _, values in sweeps)))
    names = [name for name, _ in sweeps]
    return tuple(_trial(method, lr, tuple(zip(names, values, strict=True))) for values in points for lr in lrs)


def _spaced(lrs: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return so many lrs between the same ends; these themselves if there are as many.

    >>> _spaced((0.01, 0.1), 3)
    (0.01, 0.0316228, 0.1)
    """
    if len(lrs) == count:
        return lrs
    low, high = (lrs[0], lrs[-1]) if len(lrs) > 1 else (lrs[0] / _SPAN**0.5, lrs[0] * _SPAN**0.5)
    return tuple(float(f"{low * (high / low) ** (place / (count - 1)):.6g}") for place in range(count))


def _drawn(method: Method, taken: Sequence[Sweep], sweeps: Sequence[Sweep], count: int) -> tuple[Trial, ...]:
    # Drawn for every sweep, whether the method takes it or not, so that all methods get the same draws.
    generator = random.Random(0)
    trials = []
    for _ in range(count):
        lr = float(f"{_between(method.lrs, generator.random())}")
        values = {sweep: _between(sweep[1], generator.random()) for sweep in sweeps}
        swept = tuple((sweep[0], value) for sweep, value in values.items() if sweep in taken)
        trials.append(_trial(method, lr, swept))
    return tuple(sorted(trials, key=lambda trial: trial.lr))


def _between(values: Sequence[object], share: float) -> object:
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return values[int(share * len(values))]
    low, high = min(numbers), max(numbers)
    drawn = low * (high / low) ** share if low > 0 else low + (high - low) * share
    return round(drawn) if all(isinstance(value, int) for value in numbers) else float(f"{drawn:.6g}")


def _trial(method: Method, lr: float, swept: tuple[tuple[str, object], ...]) -> Trial:
    for name, value in swept:
        method = _with_option(method, name, value)
    return Trial(method, lr, swept)


def sweepable_options(method: Method) -> list[str]:
    """Return the names of the options that a method can sweep, beside those of every run."""
    names = [name for spec in method.transforms for name in _arguments(spec.name)] + known_options(method.optimizer)
    return [
        *dict.fromkeys(names),
        *([] if method.norm is None else [f"norm.{name}" for name, _ in method.norm.options]),
    ]


def _arguments(transform: str) -> list[str]:
    return [name for name in inspect.signature(getattr(wellcond, transform)).parameters if name != "self"]


def _takes(method: Method, name: str) -> bool:
    if name.startswith("norm."):
        return method.norm is not None
    return name in RUN_OPTIONS or name in sweepable_options(method)


def _with_option(method: Method, name: str, value: object) -> Method:
    """Return a method with another value of an option: of its transforms, else of its optimizer, else of its norms."""

    def merged(options: tuple[tuple[str, object], ...], key: str = name) -> tuple[tuple[str, object], ...]:
        return tuple((dict(options) | {key: value}).items())

    if name in RUN_OPTIONS:
        return method
    if name.startswith("norm.") and method.norm is not None:
        options = merged(method.norm.options, name.removeprefix("norm."))
        return replace(method, norm=replace(method.norm, options=options))
    known = [name in _arguments(spec.name) for spec in method.transforms]
    if any(known):
        changed = tuple(
            replace(spec, options=merged(spec.options)) if has else spec
            for spec, has in zip(method.transforms, known, strict=True)
        )
        return replace(method, transforms=changed)
    return replace(method, options=merged(method.options))
