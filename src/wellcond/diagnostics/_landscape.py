"""Measures the loss and its gradient at several distances along the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.diagnostics.passes import Loss, centred_layers, check_where, left_as_found, loss_of, norm_of, widened
from wellcond.diagnostics.tables import axes_for, table
from wellcond.runtime.checks import Predicate, checked
from wellcond.runtime.models import Call, device_of, moved, unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, repr=False)
class Landscape:
    """The result of `landscape`, along a step; printed, it is a table.

    Attributes:
        loss: L(w).
        gradient_norm: ‖g‖, the norm of the direction.
        step_sizes: Each η.
        losses: L(w − η g).
        gradient_changes: ‖∇L(w) − ∇L(w − η g)‖.
        distances: ‖w − (w − η g)‖: η‖g‖, but for the rounding of the weights.
        centralize: Whether gradients were centred.
    """

    loss: float
    gradient_norm: float
    step_sizes: tuple[float, ...]
    losses: tuple[float, ...]
    gradient_changes: tuple[float, ...]
    distances: tuple[float, ...]
    centralize: bool

    @property
    def smoothness(self) -> tuple[float, ...]:
        """‖∇L(w) − ∇L(w − η g)‖/(η‖g‖) at each η; 0 where rounding left the weights in their place."""
        pairs = zip(self.gradient_changes, self.distances, strict=True)
        return tuple(change / distance if distance else 0.0 for change, distance in pairs)

    @property
    def effective_smoothness(self) -> float:
        """The "effective β-smoothness" of the step: the largest of `smoothness`."""
        return math.nan if any(map(math.isnan, self.smoothness)) else max(self.smoothness)

    @property
    def loss_range(self) -> tuple[float, float]:
        """The smallest and the largest loss along the step."""
        return (math.nan, math.nan) if any(map(math.isnan, self.losses)) else (min(self.losses), max(self.losses))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists and numbers, for JSON."""
        return {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "step_sizes": list(self.step_sizes),
            "losses": list(self.losses),
            "gradient_changes": list(self.gradient_changes),
            "distances": list(self.distances),
            "centralize": self.centralize,
            "smoothness": list(self.smoothness),
            "effective_smoothness": self.effective_smoothness,
            "loss_range": list(self.loss_range),
        }

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Plot the loss along the step.

        Args:
            ax: Where to; a new figure by default. Several landscapes can go on one.
            label: For the legend, before the effective smoothness.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = axes_for(ax, "Landscape.plot")
        points = sorted(zip((0.0, *self.step_sizes), (self.loss, *self.losses), strict=True))
        beta = f"β = {self.effective_smoothness:.3g}"
        ax.plot(*zip(*points, strict=True), marker=".", label=beta if label is None else f"{label}, {beta}")
        ax.set_xlabel("step size η")
        ax.set_ylabel("L(w − η Φ(∇L))" if self.centralize else "L(w − η ∇L)")
        ax.legend()
        return ax

    def __str__(self) -> str:
        columns = (self.step_sizes, self.losses, self.gradient_changes, self.smoothness)
        rows = [[f"{values[0]:g}", *(f"{value:.4g}" for value in values[1:])] for values in zip(*columns, strict=True)]
        kind = "centred gradient" if self.centralize else "gradient"
        title = (
            f"Loss {self.loss:.4g} along a step against its {kind} of norm {self.gradient_norm:.4g}: "
            f"effective smoothness {self.effective_smoothness:.4g}"
        )
        return table(title, ["step size", "loss", "gradient's change", "per distance"], rows)

    __repr__ = __str__


@checked
def landscape(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    call: Call | None = None,
    where: Predicate | None = None,
    step_sizes: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4),
    centralize: bool = False,
) -> Landscape:
    """Walk along one step of gradient descent and measure the loss, and how far the gradient can be relied on.

    At w − η g for each η, with g = ∇L(w): the loss, the change of the gradient ‖∇L(w) − ∇L(w − η g)‖, and that per
    distance, whose maximum is the "effective β-smoothness" of Santurkar et al., *How Does Batch Normalization Help
    Optimization?* (NeurIPS 2018), which the thesis takes up for 4.8. It is at most the largest ‖∇²L‖ along the way.

    Every evaluation is of the same function: with the same random numbers (dropout), and buffers as they were found.
    The model runs in the modes that it is in, and is left as it is found, as by `gradient_statistics`; the weights'
    own memory is never written to.

    Args:
        model: Any model; may be wrapped for DDP or compiled.
        batch: A tensor; a tuple or list, whose first element is the input; or a mapping, for ``model(**batch)``. It is
            moved to the model's device.
        loss: ``loss(output, batch)`` gives the scalar.
        call: ``call(model, batch)`` gives the output of a model that is run otherwise.
        where: A predicate of (module name, module) that says whose parameters w is; all that require a gradient by
            default.
        step_sizes: Each η; positive.
        centralize: Measure the landscape of training with gradient centralization: Φ(∇L) everywhere instead of ∇L.

    Returns:
        Loss, gradient change and smoothness at each η.

    Raises:
        TypeError: If `where` is not callable or the loss is no tensor.
        ValueError: If an argument is out of its range, there are no such parameters, or the loss does not depend on
            them.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> def loss(output, batch):
        ...     return 3 * output.square().sum()
        >>> found = landscape(model, torch.ones(1, 1), loss, step_sizes=(0.01,))
        >>> round(found.effective_smoothness, 3)  # the second derivative
        6.0
    """
    sizes = tuple(step_sizes)
    if not sizes or not all(math.isfinite(size) and size > 0 for size in sizes):
        raise ValueError(f"step_sizes must be positive numbers, at least one, got {step_sizes!r}")
    inner = unwrapped(model)
    parameters = _parameters(inner, where)
    centred = {id(layer.weight): layer for layer in centred_layers(inner, where)} if centralize else {}

    def evaluate() -> tuple[float, list[Tensor | None]]:
        with left_as_found(inner):
            value = loss_of(inner, batch, loss, call)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        gradients: list[Tensor | None] = []
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is None:
                gradients.append(None)
                continue
            gradient = widened(gradient)
            layer = centred.get(id(parameter))
            gradients.append(gradient if layer is None else gradient - layer.unit_mean(gradient))
        return float(value.detach()), gradients

    with torch.inference_mode(False):
        batch = moved(batch, device_of(inner))
        start, direction = evaluate()
        if all(own is None for own in direction):
            raise ValueError(f"the loss does not depend on any of the selected parameters of {type(inner).__name__}")
        losses, changes, distances = [], [], []
        for size in sizes:
            with _moved_by(parameters, direction, -size) as distance:
                value, gradients = evaluate()
            losses.append(value)
            changes.append(norm_of([_difference(a, b) for a, b in zip(direction, gradients, strict=True)]))
            distances.append(distance)
    return Landscape(
        start, norm_of(direction), sizes, tuple(losses), tuple(changes), tuple(distances), centralize=bool(centralize)
    )


def _parameters(model: nn.Module, where: Predicate | None) -> list[nn.Parameter]:
    """Return the parameters that require a gradient, of the modules that are selected."""
    check_where(where)
    found: dict[nn.Parameter, None] = {}
    for name, module in model.named_modules():
        if where is None or where(name, module):
            found.update(dict.fromkeys(module.parameters(recurse=False)))
            if parametrize.is_parametrized(module):
                # What the module's weight is computed from is the module's, too.
                found.update(dict.fromkeys(cast(nn.Module, module.parametrizations).parameters()))
    found = {parameter: None for parameter in found if parameter.requires_grad}
    if not found:
        selected = "" if where is None else " that where selects"
        raise ValueError(f"{type(model).__name__} has no parameter{selected} that requires a gradient")
    return list(found)


@contextmanager
def _moved_by(parameters: Sequence[nn.Parameter], direction: Sequence[Tensor | None], size: float) -> Iterator[float]:
    """Give parameters other values for a while, in other memory; yield how far they went."""
    memory = [parameter.data for parameter in parameters]
    try:
        moves: list[Tensor | None] = []
        for parameter, own, step in zip(parameters, memory, direction, strict=True):
            if step is not None:
                wide = widened(own)
                # A weight of few digits does not get all the way.
                parameter.data = torch.add(wide, step, alpha=size).to(own)
                moves.append(widened(parameter.data) - wide)
        yield norm_of(moves)
    finally:
        for parameter, own in zip(parameters, memory, strict=True):
            parameter.data = own


def _difference(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first - second
