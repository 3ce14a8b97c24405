"""Splits a model's parameters between two optimizers: the weights inside the network, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from wellcond.layouts import Layer, find_layers
from wellcond.transforms.base import GradientTransform


@dataclass(frozen=True)
class HiddenWeights:
    """A model's parameters in two lists; printed, a table of them with the reasons.

    Attributes:
        hidden: The weights inside the model.
        rest: All others that are trained.
        reasons: By qualified name: which list, and what is done or why the parameter is with the rest.
    """

    hidden: list[nn.Parameter]
    rest: list[nn.Parameter]
    reasons: dict[str, tuple[str, str]]
    shapes: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        """Write one line a parameter, in the model's order."""
        names = max(map(len, self.reasons), default=0)
        sizes = max((len(str(shape)) for shape in self.shapes.values()), default=0)
        return "\n".join(
            f"{place:<6}  {name:<{names}}  {self.shapes[name]!s:<{sizes}}  {reason}"
            for name, (place, reason) in self.reasons.items()
        )


def split(transform: GradientTransform, model: nn.Module, outputs: Sequence[str] | None) -> HiddenWeights:
    """Divide a model's parameters by what a transform covers, the layers of the model's output left out.

    Args:
        transform: Whose `cover_shared` decides.
        model: The model.
        outputs: Names of the modules that make its output; None: the last that is covered.

    Returns:
        The two lists; frozen parameters are in neither.

    Raises:
        TypeError: If ``model`` is no module.
        ValueError: If nothing is hidden, or a name is no layer's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = find_layers(model)
    uses: dict[int, list[Layer]] = {}
    for layer in found:
        uses.setdefault(id(layer.weight), []).append(layer)
    coverage = {key: transform.cover_shared(layers) for key, layers in uses.items()}
    covered = [layer for layer in found if coverage[id(layer.weight)].applies]
    last = {id(layer.weight) for layer in covered[-1:]} if outputs is None else _named(covered, outputs)
    reasons: dict[str, tuple[str, str]] = {}
    lists: dict[str, list[nn.Parameter]] = {"hidden": [], "rest": [], "frozen": []}
    for name, parameter in model.named_parameters():
        decision = coverage.get(id(parameter))
        place, reason = "rest", "not a matrix"
        if not parameter.requires_grad:
            place, reason = "frozen", "requires_grad=False"
        elif id(parameter) in last:
            reason = "the last layer" if outputs is None else "an output layer"
        elif decision is not None:
            place, reason = ("hidden" if decision.applies else "rest"), decision.how.removeprefix("unchanged: ")
        elif name in found.unfit or name in found.unknown:
            reason = found.unfit.get(name, f"no rule for the layer type {found.unknown.get(name)}")
        reasons[name] = place, reason
        lists[place].append(parameter)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = HiddenWeights(lists["hidden"], lists["rest"], reasons, shapes)
    if not weights.hidden:
        raise ValueError(f"{type(model).__name__} has no hidden weight:\n{weights}")
    return weights


def _named(covered: Sequence[Layer], outputs: Sequence[str]) -> set[int]:
    """Return the ``id`` of the weights of the named modules."""
    by_module: dict[str, set[int]] = {}
    for layer in covered:
        by_module.setdefault(layer.module_name, set()).add(id(layer.weight))
    if isinstance(outputs, str) or any(name not in by_module for name in outputs):
        raise ValueError(
            f"outputs must be a list of names of layers with a weight that is covered, got {outputs!r}; there are: "
            f"{', '.join(by_module)}"
        )
    return {key for name in outputs for key in by_module[name]}
