"""Parameter groups by what parameters are, with the reason why each parameter is where it is."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_REST = "no group asks for it"


@dataclass(frozen=True)
class _Place:
    """A parameter, its qualified name, and the module that has it."""

    name: str
    parameter: nn.Parameter
    module: nn.Module
    head: bool


def _is_norm(place: _Place) -> bool:
    known = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    # Libraries have norms of their own; all that is learned in them are vectors.
    called = "norm" in type(place.module).__name__.casefold()
    return isinstance(place.module, known) or (called and place.parameter.ndim <= 1)


SELECTORS: dict[str, Callable[[_Place], bool]] = {
    "norms": _is_norm,
    "biases": lambda place: place.name.rpartition(".")[2].endswith("bias"),
    "vectors": lambda place: place.parameter.ndim <= 1,
    "embeddings": lambda place: isinstance(place.module, (nn.Embedding, nn.EmbeddingBag)),
    "convolutions": lambda place: isinstance(place.module, _ConvNd),
    "linears": lambda place: isinstance(place.module, nn.Linear),
    "head": lambda place: place.head,
}
"""Names of sets of parameters: those of normalization layers, biases, everything of at most one dimension, those of
embeddings, of convolutions and of linear layers, and those of the last layer that has a matrix."""


class Group:
    """Parameters that take options of their own.

    Args:
        *selectors: Names in `SELECTORS`; or patterns of qualified names (``"layer4.*"``, ``"*.bias"``), of which one
            without a wildcard means a parameter, or all of a module. A parameter that any of them selects belongs.
        **options: The optimizer's options for them, such as ``weight_decay=0.0``.

    Raises:
        ValueError: If no selector or no option is given.
        TypeError: If a selector is no text.
    """

    def __init__(self, *selectors: str, **options: Any) -> None:
        for selector in selectors:
            if not isinstance(selector, str):
                raise TypeError(f"selectors must be texts such as 'norms' or 'layer4.*', got {selector!r}")
        if not selectors or not options:
            raise ValueError("a group must have a selector and an option, such as Group('norms', weight_decay=0.0)")
        if "params" in options:
            raise ValueError("params is what the selectors choose: it cannot be an option of a group")
        self.selectors, self.options = selectors, options

    def why(self, place: _Place) -> str | None:
        """Return which selector takes a parameter; None if none does."""
        return next((selector for selector in self.selectors if _selects(selector, place)), None)

    def __repr__(self) -> str:
        given = [*map(repr, self.selectors), *(f"{key}={value!r}" for key, value in self.options.items())]
        return f"Group({', '.join(given)})"


class ParameterGroups(list[dict[str, Any]]):
    """A list of parameter groups, as any torch optimizer takes it, that can say how it came about.

    Attributes:
        reasons: From a parameter's qualified name to its group's place in the list and the reason.
    """

    def __init__(self, groups: list[dict[str, Any]], reasons: dict[str, tuple[int, str]]) -> None:
        super().__init__(groups)
        self.reasons = reasons

    def report(self) -> str:
        """Return one line for each parameter: its name, its shape, its group's options, and why it is there."""
        shapes = {
            id(parameter): "x".join(map(str, parameter.shape)) or "1" for each in self for parameter in each["params"]
        }
        listed = [iter(each["params"]) for each in self]
        rows = []
        for name, (place, why) in self.reasons.items():
            options = ", ".join(f"{key}={value!r}" for key, value in self[place].items() if key != "params")
            rows.append((name, shapes[id(next(listed[place]))], f"group {place}", options or "the defaults", why))
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
        )


def parameter_groups(model: nn.Module, *groups: Group) -> ParameterGroups:
    """Return a model's parameters in groups: each in the first that selects it, the others in one of their own.

    Groups that select nothing are left out; parameters that modules share are taken once, by their first name.

    Args:
        model: The model.
        *groups: The groups, in the order in which they are asked.

    Returns:
        The groups, in that order, the others last. `ParameterGroups.report` says why each parameter is where it is.

    Raises:
        TypeError: If the model is no module, or a group is none.
        ValueError: If a selector is no name and matches no parameter.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = parameter_groups(model, Group("norms", "biases", weight_decay=0.0), Group("head", lr=1e-4))
        >>> print(groups.report())
        0.weight  8x4  group 2  the defaults      no group asks for it
        0.bias    8    group 0  weight_decay=0.0  biases
        1.weight  8    group 0  weight_decay=0.0  norms
        1.bias    8    group 0  weight_decay=0.0  norms
        2.weight  2x8  group 1  lr=0.0001         head
        2.bias    2    group 0  weight_decay=0.0  biases
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for group in groups:
        if not isinstance(group, Group):
            raise TypeError(f"groups must be wellcond.optim.Group(...), got {group!r}")
    places = list(_places(model))
    for selector in (selector for group in groups for selector in group.selectors):
        if selector not in SELECTORS and not any(_selects(selector, place) for place in places):
            near = difflib.get_close_matches(selector, [*SELECTORS, *(place.name for place in places)], n=1)
            guess = f": did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"no parameter is selected by {selector!r}{guess} A selector must be one of {', '.join(SELECTORS)}, "
                "or a pattern of parameters' names"
            )
    chosen: list[list[nn.Parameter]] = [[] for _ in (*groups, None)]
    found: dict[str, tuple[int, str]] = {}
    for place in places:
        asked = ((index, why) for index, group in enumerate(groups) if (why := group.why(place)) is not None)
        index, why = next(asked, (len(groups), _REST))
        chosen[index].append(place.parameter)
        found[place.name] = (index, why)
    kept = [index for index, parameters in enumerate(chosen) if parameters]
    made = [{"params": chosen[index], **(groups[index].options if index < len(groups) else {})} for index in kept]
    return ParameterGroups(made, {name: (kept.index(index), why) for name, (index, why) in found.items()})


def _places(model: nn.Module) -> Iterator[_Place]:
    modules = dict(model.named_modules())
    last = next(
        (module for module in reversed(list(model.modules())) if any(p.ndim >= 2 for p in module.parameters(False))),
        None,
    )
    for name, parameter in model.named_parameters():
        module = modules[name.rpartition(".")[0]]
        yield _Place(name, parameter, module, module is last)


def _selects(selector: str, place: _Place) -> bool:
    if selector in SELECTORS:
        return SELECTORS[selector](place)
    return fnmatchcase(place.name, selector) or fnmatchcase(place.name, f"{selector}.*")
