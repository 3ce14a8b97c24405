"""The methods that can be compared: those of the list, and those that a user writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from wellcond.lab.errors import LabError, unknown_name
from wellcond.lab.importing import is_import_path
from wellcond.lab.methods.grammar import split_list
from wellcond.lab.methods.reading import read_method
from wellcond.lab.methods.spec import Method, Refresh, TransformSpec
from wellcond.lab.methods.table import LISTED

__all__ = [
    "DEFAULT_METHODS",
    "METHODS",
    "TEXT_METHODS",
    "Method",
    "Refresh",
    "TransformSpec",
    "baselines",
    "method",
    "parse_lrs",
    "select_methods",
    "split_list",
    "with_lrs",
]


def _listed() -> dict[str, Method]:
    found: dict[str, Method] = {}
    for text, description in LISTED:
        # Unchecked: it is ours, and checking needs torch, for which `wellcond list` does not wait.
        one = replace(read_method(text, found, check=False), description=description)
        found[one.name] = one
    return found


METHODS = _listed()
"""Every method of the list by its name, in the order in which reports list them."""

DEFAULT_METHODS = ("SGDM", "SGDM+GC", "W-SGDM", "FSGD", "AdamW", "AdamW+GC", "W-Adam", "FAdam")
"""What is compared where neither the user nor the task names methods."""

TEXT_METHODS = ("AdamW", "AdamW+GC", "W-Adam")
"""What is compared on texts: nobody trains a transformer by SGD, and what takes minutes is tried."""


def method(text: str, name: str | None = None, lrs: Sequence[float] | None = None) -> Method:
    """Return a method that is written as on the command line.

    Args:
        text: ``"AdamW(weight_decay=0.05) + GradientCentralization + FeatureWhitening(damping=0.01)"``, or a name of
            `wellcond list methods`.
        name: What it is called; None: what the text says, or else the text.
        lrs: Its lr grid; None: the text's, or else its optimizer's.

    Raises:
        LabError: If the text has another form, or a word or an option is unknown; it names the token and its place.

    >>> method("AdamW(weight_decay=0.1) + GradientCentralization", name="mine", lrs=[1e-3, 3e-3]).written()
    'mine = AdamW(weight_decay=0.1) + GradientCentralization + lrs=[0.001, 0.003]'
    """
    found = read_method(text, METHODS)
    if lrs is not None:
        found = replace(found, lrs=read_method(f"SGD() + lrs={list(lrs)!r}", METHODS).lrs)
    return found if name is None else replace(found, name=name)


def parse_lrs(text: str) -> tuple[str, tuple[float, ...]]:
    """Read an lr grid from the command line.

    Args:
        text: ``OPTIMIZER=LR,LR,...``, the optimizer as `Method.optimizer` has it.

    Returns:
        The optimizer and its grid, ascending.

    Raises:
        LabError: If the text has another form, the optimizer is of no method, or an lr is not a positive number.

    >>> parse_lrs("SGD=0.2,0.02,0.06")
    ('SGD', (0.02, 0.06, 0.2))
    """
    optimizer, separator, values = text.partition("=")
    known = list(dict.fromkeys(method.optimizer for method in METHODS.values()))
    if not separator:
        raise LabError(f"--lrs must look like SGD=0.02,0.06,0.2, got {text!r}")
    if optimizer not in known and not is_import_path(optimizer):
        raise unknown_name("optimizer", optimizer, known)
    try:
        lrs = tuple(sorted({float(value) for value in values.split(",")}))
    except ValueError:
        raise LabError(f"--lrs {text}: learning rates must be numbers") from None
    if not all(0 < lr < math.inf for lr in lrs):
        raise LabError(f"--lrs {text}: learning rates must be positive")
    return optimizer, lrs


def given_grids(
    lrs: Mapping[str, Sequence[float]] | Sequence[float] | None, methods: Sequence[Method]
) -> dict[str, tuple[float, ...]]:
    """Return lr grids by optimizer from what was given in Python.

    Args:
        lrs: By optimizer, one for all, or None for none.
        methods: The methods.

    Raises:
        LabError: If an lr is not a positive number, or an optimizer is of no method.

    >>> given_grids([0.1, 0.03], select_methods(["SGDM", "AdamW"]))
    {'SGD': (0.03, 0.1), 'AdamW': (0.03, 0.1)}
    """
    optimizers = list(dict.fromkeys(method.optimizer for method in methods))
    grids = {} if lrs is None else lrs if isinstance(lrs, Mapping) else dict.fromkeys(optimizers, lrs)
    for optimizer, values in grids.items():
        if optimizer not in optimizers:
            raise unknown_name("optimizer", optimizer, optimizers)
        if isinstance(values, (str, float, int)) or not len(values):
            raise LabError(f"lrs must be lists of learning rates, got {values!r} for {optimizer}")
        if not all(isinstance(lr, (int, float)) and 0 < lr < math.inf for lr in values):
            raise LabError(f"lrs must be positive numbers, got {list(values)} for {optimizer}")
    return {optimizer: tuple(sorted({float(lr) for lr in values})) for optimizer, values in grids.items()}


def with_lrs(methods: Sequence[Method], grids: Mapping[str, tuple[float, ...]]) -> tuple[Method, ...]:
    """Return the methods with other lr grids.

    Args:
        methods: The methods.
        grids: From an optimizer's name to the grid of all methods that use it; the others keep theirs.

    Returns:
        The methods, in the same order.

    Raises:
        LabError: If the methods would try different numbers of lrs: that would not be equal tuning effort.
    """
    for optimizer in grids:
        if is_import_path(optimizer) and optimizer not in {method.optimizer for method in methods}:
            raise unknown_name("optimizer of these methods", optimizer, dict.fromkeys(m.optimizer for m in methods))
    changed = tuple(replace(method, lrs=grids.get(method.optimizer, method.lrs)) for method in methods)
    counts = {method.name: len(method.lrs) for method in changed}
    if len(set(counts.values())) > 1:
        of_optimizers = {
            method.optimizer: {m.lrs for m in changed if m.optimizer == method.optimizer} for method in changed
        }
        if all(len({len(lrs) for lrs in some}) == 1 for some in of_optimizers.values()):
            counts = {method.optimizer: len(method.lrs) for method in changed}
        given = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise LabError(f"--lrs must give every method the same number of learning rates to try, got {given}")
    return changed


def select_methods(texts: Sequence[str], more: Mapping[str, Method] | None = None) -> tuple[Method, ...]:
    """Return the methods of these names, or that these texts say, in the order given.

    Args:
        texts: Names in `METHODS`, exactly as spelled there, or methods as they are written.
        more: Further methods by name; they go before those of `METHODS`.

    Returns:
        The methods.

    Raises:
        LabError: If there is none, two have one name, or a text cannot be read.

    >>> [method.name for method in select_methods(["W-SGDM", "mine = SGD(momentum=0.9)"])]
    ['W-SGDM', 'mine']
    """
    known = METHODS | dict(more or {})
    if not texts:
        raise LabError(f"--methods must name at least one method. Known: {', '.join(known)}")
    methods = tuple(read_method(text, known) for text in texts)
    names = [method.name for method in methods]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise LabError(f"--methods must name each method once, got {name!r} twice")
    return methods


def baselines(methods: Sequence[Method]) -> dict[str, str]:
    """Return each method's baseline among these methods.

    Args:
        methods: The methods of one comparison; at least one.

    Returns:
        From each method's name to its baseline's name: its own, or the first method's if its own is not compared. One
        that names none has the first that is its optimizer alone, or else the first.

    Raises:
        LabError: If a baseline is neither compared nor a method of the list.

    >>> baselines(select_methods(["FSGD", "SGDM+GC", "mine = AdamW() + GradientCentralization", "plain = AdamW()"]))
    {'FSGD': 'FSGD', 'SGDM+GC': 'FSGD', 'mine': 'plain', 'plain': 'FSGD'}
    """
    names = [method.name for method in methods]
    found = {}
    for method in methods:
        if method.baseline in names:
            found[method.name] = str(method.baseline)
            continue
        if method.baseline is not None and method.baseline not in METHODS:
            raise LabError(f"method {method.name}: {unknown_name('baseline', method.baseline, names)}")
        alone = (m.name for m in methods if m.is_plain and m is not method and m.optimizer == method.optimizer)
        same = None if method.baseline is not None or method.is_plain else next(alone, None)
        found[method.name] = same or names[0]
    return found
