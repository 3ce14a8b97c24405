"""Measures the part of gradients that centralization removes, by batch or by iteration (thesis figure 4.5)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from wellcond.diagnostics.tables import axes_for
from wellcond.layouts import Layer
from wellcond.runtime.checks import Predicate, WellcondWarning, check_choice, check_positive_integer, checked
from wellcond.runtime.models import Call, unwrapped
from wellcond.runtime.texts import quoted_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

from wellcond.diagnostics.passes import (
    Loss,
    batches_on_device,
    centred_layers,
    left_as_found,
    loss_of,
    sizes_of,
    widened,
)
from wellcond.diagnostics.tables import deviation_of, mean_of, table

GradientQuantity = Literal["norm", "centred_norm", "largest", "centred_largest", "mean_share"]


_QUANTITIES: tuple[GradientQuantity, ...] = ("norm", "centred_norm", "largest", "centred_largest", "mean_share")


_CENTRED: dict[str, GradientQuantity] = {"norm": "centred_norm", "largest": "centred_largest"}


@dataclass(frozen=True)
class LayerGradients:
    """The gradient of one weight, batch by batch. G is the gradient as a matrix, a row per output unit.

    Attributes:
        units: Output units, the rows of G.
        inputs: D, the length of a row.
        batches: Which batches, or iterations, gave the weight a gradient, counted from 0.
        norm: ‖G‖ in each of them.
        centred_norm: ‖Φ(G)‖, with the mean of each row taken out.
        largest: max |G|.
        centred_largest: max |Φ(G)|; unlike the norm, it can be the larger one.
        mean_share: ‖G − Φ(G)‖²/‖G‖², what part of the squared gradient the row means are; 0 of a zero gradient. Of
            independent entries it is 1/D on average.
    """

    units: int
    inputs: int
    batches: tuple[int, ...]
    norm: tuple[float, ...]
    centred_norm: tuple[float, ...]
    largest: tuple[float, ...]
    centred_largest: tuple[float, ...]
    mean_share: tuple[float, ...]

    @property
    def mean(self) -> dict[str, float]:
        """The average of each quantity over the batches."""
        return {quantity: mean_of(self.of(quantity)) for quantity in _QUANTITIES}

    @property
    def std(self) -> dict[str, float]:
        """The standard deviation of each quantity over the batches (divided by their number)."""
        return {quantity: deviation_of(self.of(quantity)) for quantity in _QUANTITIES}

    def of(self, quantity: GradientQuantity) -> tuple[float, ...]:
        """Return a quantity's values by its name."""
        values: tuple[float, ...] = getattr(self, quantity)
        return values


@dataclass(frozen=True, repr=False)
class GradientStatistics:
    """The result of `gradient_statistics` or of a `GradientRecorder`; printed, it is a table.

    Attributes:
        over: What a layer's values are over: ``"batch"`` of a model that stays, or ``"iteration"`` of its training.
        training: Whether the model was in training mode.
        layers: By the weight's qualified name, in the model's order.
    """

    over: Literal["batch", "iteration"]
    training: bool
    layers: Mapping[str, LayerGradients]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dictionaries, lists, strings and numbers, for JSON."""
        layers = {
            name: {
                "units": layer.units,
                "inputs": layer.inputs,
                "batches": list(layer.batches),
                **{quantity: list(layer.of(quantity)) for quantity in _QUANTITIES},
                "mean": layer.mean,
                "std": layer.std,
            }
            for name, layer in self.layers.items()
        }
        return {"over": self.over, "training": self.training, "layers": layers}

    def plot(
        self, ax: Axes | None = None, *, quantity: GradientQuantity = "norm", layers: Sequence[str] | None = None
    ) -> Axes:
        """Plot a quantity over the batches, as figure 4.5 does: solid as it is, dashed with centralization.

        Args:
            ax: Where to; a new figure by default.
            quantity: ``"norm"`` and ``"largest"`` come with their centred counterparts; ``"centred_norm"``,
                ``"centred_largest"`` and ``"mean_share"`` come alone.
            layers: Which, by name; the first and the last by default, as in the figure.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such quantity or layer.
        """
        check_choice("quantity", quantity, _QUANTITIES)
        names = list(self.layers)
        chosen = dict.fromkeys([names[0], names[-1]] if layers is None else layers)
        for name in chosen:
            check_choice("layers", name, names)
        ax = axes_for(ax, "GradientStatistics.plot")
        for name in chosen:
            layer = self.layers[name]
            [line] = ax.plot(layer.batches, layer.of(quantity), marker=".", label=name)
            if quantity in _CENTRED:
                centred = layer.of(_CENTRED[quantity])
                ax.plot(layer.batches, centred, "--", marker=".", color=line.get_color(), label=f"{name}, centred")
        ax.set_yscale("log")
        ax.set_xlabel(self.over)
        labels = {"norm": "‖gradient‖", "largest": "max |gradient|", "mean_share": "row means' share of ‖gradient‖²"}
        labels |= {"centred_norm": "‖centred gradient‖", "centred_largest": "max |centred gradient|"}
        ax.set_ylabel(labels[quantity])
        ax.legend()
        return ax

    def __str__(self) -> str:
        header = ["weight", "inputs", "norm", "centred norm", "max", "centred max", "mean's share", "1/inputs"]
        rows = []
        for name, layer in self.layers.items():
            mean, std = layer.mean, layer.std
            cells = [f"{mean[quantity]:.3g} ± {std[quantity]:.1g}" for quantity in _QUANTITIES]
            rows.append([name, str(layer.inputs), *cells, f"{1 / layer.inputs:.3g}"])
        count = 1 + max(layer.batches[-1] for layer in self.layers.values())
        plural = {"batch": "batches", "iteration": "iterations"}[self.over] if count > 1 else self.over
        mode = "training" if self.training else "evaluation"
        title = f"Gradients with and without their row means, over {count} {plural} in {mode} mode (mean ± std)"
        return table(title, header, rows)

    __repr__ = __str__


@checked
def gradient_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    *,
    call: Call | None = None,
    where: Predicate | None = None,
    max_batches: int | None = None,
) -> GradientStatistics:
    """Measure what gradient centralization would take out of each weight's gradient, batch by batch (figure 4.5).

        Φ(G) = G P,  P = I − e eᵀ,  e = 1/√D · 1        (4.1, 4.2)

    Of those weights that `GradientCentralization` would centre and that require a gradient; of a parametrized layer the
    parameter that its parametrization starts from. Norms are taken in float64 (float32 where there is none).

    Modules run in the modes that they are in: `model.train()` for the gradients of training. The model is left as it is
    found: parameters, `.grad`, buffers, modes, attributes, torch's random state, and what attached transforms have
    seen. With several processes, each measures its own data.

    Args:
        model: Any model with linear maps or convolutions; may be wrapped for DDP or compiled.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        loss: ``loss(output, batch)`` gives the scalar, of the model's output and the whole batch.
        call: ``call(model, batch)`` gives the output of a model that is run otherwise.
        where: A predicate of (module name, module) that says which layers; all linear maps and convolutions by default,
            embedding tables only if it asks for them.
        max_batches: Stop after so many of the loader's batches.

    Returns:
        Norm, largest entry and the row means' share, with and without centralization, of each weight and batch.

    Raises:
        TypeError: If `where` is not callable or `loss` gives no tensor.
        ValueError: If there is no such weight, the loader is empty, or the loss is no scalar with a gradient.

    Warns:
        WellcondWarning: About weights that no batch gave a gradient, by name; they are left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> loader = [(torch.rand(16, 4), torch.randint(2, (16,))) for _ in range(3)]
        >>> def loss(output, batch):
        ...     return nn.functional.cross_entropy(output, batch[1])
        >>> found = gradient_statistics(model, loader, loss)
        >>> list(found.layers), len(found.layers["0.weight"].norm)
        (['0.weight', '2.weight'], 3)
        >>> all(a <= b for a, b in zip(found.layers["0.weight"].centred_norm, found.layers["0.weight"].norm))
        True
    """
    if max_batches is not None:
        check_positive_integer("max_batches", max_batches)
    inner = unwrapped(model)
    layers = centred_layers(inner, where)
    weights = [layer.weight for layer in layers]
    series = _Series(layers)
    with left_as_found(inner):
        for batch in batches_on_device(inner, loader, max_batches):
            value = loss_of(inner, batch, loss, call)
            series.add(torch.autograd.grad(value, weights, allow_unused=True))
    found = series.layers()
    missed = quoted_names(layer.name for layer in layers if layer.name not in found)
    if not found:
        raise ValueError(f"the loss does not depend on any of the weights {missed}")
    if missed:
        warnings.warn(f"gradient_statistics: no batch gave {missed} a gradient", WellcondWarning, stacklevel=3)
    return GradientStatistics("batch", inner.training, found)


class GradientRecorder:
    """Records, in real training, what `gradient_statistics` measures; iteration by iteration (figure 4.5).

    It reads `.grad` and changes nothing, and waits for the device once in 256 iterations.

    Args:
        model: The model that is trained; may be wrapped for DDP or compiled.
        where: A predicate of (module name, module) that says which layers, as of `gradient_statistics`.

    Raises:
        TypeError: If `where` is not callable.
        ValueError: If there is no such weight.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> recorder = GradientRecorder(model)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.rand(8, 4)).square().mean().backward()
        ...     recorder.record()
        ...     optimizer.step()
        >>> recorder.result().layers["weight"].batches
        (0, 1, 2, 3, 4)
    """

    @checked
    def __init__(self, model: nn.Module, *, where: Predicate | None = None) -> None:
        self._model = unwrapped(model)
        self._series = _Series(centred_layers(self._model, where))
        self._training = True

    def record(self) -> None:
        """Take in the present gradients: after `backward`, before `step`, which may centre or clip them.

        With a `GradScaler`, after its `unscale_`; with accumulated gradients, after the last `backward`.

        Raises:
            ValueError: If no weight has a gradient.
        """
        gradients = [layer.weight.grad for layer in self._series.selected]
        if all(gradient is None for gradient in gradients):
            raise ValueError("no weight has a gradient: record() goes after backward() and before zero_grad()")
        if self._series.count == 0:
            self._training = self._model.training
        self._series.add(gradients)

    def result(self) -> GradientStatistics:
        """Return what was recorded so far; recording can go on.

        Returns:
            The statistics of the weights that had a gradient in some iteration.

        Raises:
            ValueError: If nothing was recorded.
        """
        if self._series.count == 0:
            raise ValueError("nothing is recorded: call record() after each backward()")
        return GradientStatistics("iteration", self._training, self._series.layers())


class _Series:
    """The gradients' quantities over batches, kept on their device until there are many.

    Args:
        selected: The layers.
    """

    _PENDING = 256

    def __init__(self, selected: Sequence[Layer]) -> None:
        self.selected = selected
        self.count = 0
        self._pending: list[tuple[int, list[int], Tensor]] = []
        self._read: dict[int, list[tuple[int, list[float]]]] = {}

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Take in one batch: a gradient for each layer, or None."""
        with torch.no_grad():
            measured = {
                index: _quantities(layer, gradient)
                for index, (layer, gradient) in enumerate(zip(self.selected, gradients, strict=True))
                if gradient is not None
            }
        if measured:
            device = next(iter(measured.values())).device
            stacked = torch.stack([values.to(device) for values in measured.values()])
            self._pending.append((self.count, list(measured), stacked))
        self.count += 1
        if len(self._pending) == self._PENDING:
            self._read_pending()

    def layers(self) -> dict[str, LayerGradients]:
        """Return the quantities of the layers that had a gradient."""
        self._read_pending()
        found = {}
        for index, layer in enumerate(self.selected):
            if own := self._read.get(index):
                units, inputs = sizes_of(layer)
                columns = zip(*(values for _, values in own), strict=True)
                found[layer.name] = LayerGradients(units, inputs, tuple(batch for batch, _ in own), *columns)
        return found

    def _read_pending(self) -> None:
        if not self._pending:
            return
        rows = iter(torch.cat([values for _, _, values in self._pending]).tolist())
        for batch, indices, _ in self._pending:
            for index in indices:
                self._read.setdefault(index, []).append((batch, next(rows)))
        self._pending = []


def _quantities(layer: Layer, gradient: Tensor) -> Tensor:
    """Return the quantities of one gradient, in the order of `_QUANTITIES`."""
    gradient = widened(gradient)
    means = layer.unit_mean(gradient)
    centred = gradient - means
    norm = torch.linalg.vector_norm(gradient)
    part = torch.linalg.vector_norm(means.expand_as(gradient))
    share = torch.where(norm > 0, (part / norm).square(), torch.zeros_like(norm))
    share = torch.where(norm.isnan(), norm, share)
    largest, centred_largest = (torch.linalg.vector_norm(own, torch.inf) for own in (gradient, centred))
    return torch.stack([norm, torch.linalg.vector_norm(centred), largest, centred_largest, share])
