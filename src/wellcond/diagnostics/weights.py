"""Measures the means of weight rows, at initialisation and after training (thesis figure 4.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from wellcond.diagnostics.tables import axes_for
from wellcond.runtime.checks import Predicate, check_choice, checked
from wellcond.runtime.models import unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from wellcond.diagnostics.passes import centred_layers, sizes_of, widened
from wellcond.diagnostics.tables import deviation_of, mean_of, table

# Of |row mean|, in powers of ten: fixed, so that two histograms can be laid over each other.
_EXPONENTS = tuple(exponent / 4 for exponent in range(-48, 9))


@dataclass(frozen=True)
class LayerWeightMeans:
    """The row means of one weight.

    Attributes:
        units: Output units, the rows.
        inputs: D, the length of a row.
        means: The mean of each row, in the order of output units.
        norm: ‖W‖, for `mean_share`.
    """

    units: int
    inputs: int
    means: tuple[float, ...]
    norm: float

    @property
    def mean(self) -> float:
        """The average of the row means."""
        return mean_of(self.means)

    @property
    def std(self) -> float:
        """The standard deviation of the row means (divided by their number)."""
        return deviation_of(self.means)

    @property
    def largest(self) -> float:
        """The largest absolute row mean."""
        return max(abs(mean) for mean in self.means)

    @property
    def mean_share(self) -> float:
        """D Σ mean²/‖W‖²: what part of the squared weights the row means are; of independent entries 1/D on average."""
        # In this order nothing under- or overflows.
        part = math.sqrt(self.inputs) * math.hypot(*self.means)
        return (part / self.norm) ** 2 if self.norm else 0.0


@dataclass(frozen=True, repr=False)
class WeightMeans:
    """The result of `weight_means`; printed, it is a table.

    Attributes:
        layers: By the weight's qualified name, in the model's order.
    """

    layers: Mapping[str, LayerWeightMeans]

    def histogram(self, layer: str | None = None) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Count |row mean| by its power of ten, in bins that are always the same: from 10⁻¹² to 10², four to a decade.

        Args:
            layer: Of one layer, by name; of all together by default.

        Returns:
            The bins' edges, and the counts, one fewer. What is beyond the first or last edge is in the first or last
            bin; a mean of zero is in the first.

        Raises:
            ValueError: If there is no such layer.
        """
        if layer is not None:
            check_choice("layer", layer, list(self.layers))
        counts = [0] * (len(_EXPONENTS) - 1)
        for mean in self._means([layer] if layer is not None else list(self.layers)):
            place = math.floor(4 * (math.log10(abs(mean)) - _EXPONENTS[0])) if mean else 0
            counts[min(max(place, 0), len(counts) - 1)] += 1
        return tuple(10.0**exponent for exponent in _EXPONENTS), tuple(counts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, strings and numbers, for JSON."""
        layers = {
            name: {
                "units": layer.units,
                "inputs": layer.inputs,
                "means": list(layer.means),
                "norm": layer.norm,
                "mean": layer.mean,
                "std": layer.std,
                "largest": layer.largest,
                "mean_share": layer.mean_share,
                "counts": list(self.histogram(name)[1]),
            }
            for name, layer in self.layers.items()
        }
        edges, counts = self.histogram()
        return {"edges": list(edges), "counts": list(counts), "layers": layers}

    def plot(
        self, ax: Axes | None = None, *, kind: Literal["rows", "histogram"] = "rows", label: str | None = None
    ) -> Axes:
        """Plot |row mean|, row by row through the layers as figure 4.4 does, or as a histogram.

        Two states of a model are drawn over each other with
        ``after.plot(before.plot(label="before"), label="after")``.

        Args:
            ax: Where to; a new figure by default.
            kind: ``"rows"`` or ``"histogram"``, the counts of all layers together.
            label: For a legend.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such kind.
        """
        check_choice("kind", kind, ("rows", "histogram"))
        ax = axes_for(ax, "WeightMeans.plot")
        if kind == "rows":
            # Zeros have no logarithm, and are no point.
            points = [(i, abs(mean)) for i, mean in enumerate(self._means(list(self.layers))) if mean]
            ax.plot([i for i, _ in points], [mean for _, mean in points], ".", markersize=2, label=label)
            ax.set_yscale("log")
            ax.set_xlabel("output unit, from the first layer to the last")
            ax.set_ylabel("|mean of the weight vector|")
        else:
            edges, counts = self.histogram()
            ax.stairs(counts, edges, label=label)
            ax.set_xscale("log")
            ax.set_xlabel("|mean of the weight vector|")
            ax.set_ylabel("output units")
        if label is not None:
            ax.legend()
        return ax

    def __str__(self) -> str:
        header = ["weight", "units", "inputs", "mean", "std", "max |mean|", "mean's share", "1/inputs"]
        rows = []
        for name, layer in self.layers.items():
            numbers = [layer.mean, layer.std, layer.largest, layer.mean_share, 1 / layer.inputs]
            rows.append([name, str(layer.units), str(layer.inputs), *(f"{number:.3g}" for number in numbers)])
        return table("Means of weight vectors", header, rows)

    __repr__ = __str__

    def _means(self, names: Iterable[str]) -> list[float]:
        return [mean for name in names for mean in self.layers[name].means]


@checked
def weight_means(model: nn.Module, *, where: Predicate | None = None) -> WeightMeans:
    """Return the mean of each weight vector, which training with gradient centralization leaves as it is (figure 4.4).

    How far an output moves when all its inputs move by γ is γ 1ᵀw = γ D · mean(w) (4.7). Of the weights that
    `GradientCentralization` would centre, also of those that require no gradient.

    Args:
        model: Any model with linear maps or convolutions; may be wrapped for DDP or compiled.
        where: A predicate of (module name, module) that says which layers; all linear maps and convolutions by default.

    Returns:
        The row means of each weight.

    Raises:
        TypeError: If `where` is not callable.
        ValueError: If there is no such weight.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]))
        >>> weight_means(model).layers["weight"].means
        (2.0, 0.0)
    """
    found = {}
    for layer in centred_layers(unwrapped(model), where, trained=False):
        with torch.no_grad():
            weight = widened(layer.weight)
            # A mean stands once for its row, or repeated along it (grouped transposed convolutions).
            rows = layer.matrix(layer.unit_mean(weight).expand_as(weight))
            means = rows.flatten(2)[..., 0].flatten()
            norm = float(torch.linalg.vector_norm(weight))
        units, inputs = sizes_of(layer)
        found[layer.name] = LayerWeightMeans(units, inputs, tuple(means.tolist()), norm)
    return WeightMeans(found)
