"""Measures the eigenvalues of layers' input and output second moments over data (thesis figure 5.1)."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wellcond.diagnostics.passes import batches_on_device, calls_shown, check_where, layers_of, left_as_found
from wellcond.diagnostics.spectra import FeatureSpectrum, LayerSpectrum, Spectrum
from wellcond.layouts import Layer, Layout, UnknownInputError
from wellcond.layouts.rows import input_pieces, row_pieces
from wellcond.numerics.row_moments import SecondMoment, SketchedMoment, WholeMoment
from wellcond.runtime.checks import Predicate, WellcondWarning, check_choice, check_positive_integer, checked
from wellcond.runtime.models import Call, run_on, unwrapped

SumPrecision = Literal["float32", "float64"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@torch.no_grad()
@checked
def feature_spectrum(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    call: Call | None = None,
    where: Predicate | None = None,
    centred: bool = False,
    max_dim: int = 2048,
    sketch: int = 256,
    precision: SumPrecision = "float64",
    max_batches: int | None = None,
) -> FeatureSpectrum:
    """Find the eigenvalues of each layer's input and output second moment, over data (thesis 5.1, figure 5.1).

        M = 1/n Σ x xᵀ,   or with ``centred``   1/n Σ (x − x̄)(x − x̄)ᵀ

    x runs over samples and positions. For the input these are the rows that the layer's weight multiplies, by the same
    rules (`wellcond.layouts`) as for `FeatureWhitening`: a convolution's patches. For the output they are all of a
    layer's outputs together; those of attention's projections, which no call returns, follow from weight and rows.

    Batches are taken in one after another: the result is that of one large batch, up to rounding. Memory is 8 d² bytes
    for each M, and 8 · 2 d · ``sketch`` where d is more than ``max_dim``. Such wide moments are sketched: leading
    eigenvalues from below with a bound on their error, and an exact trace; see `Spectrum`, whose ``exact`` is then
    False, and the table's ``~``.

    Modules run in the modes that they are in: `model.eval()` for the features of evaluation. The model is left as it is
    found, as by `gradient_statistics`. With several processes, each measures its own data.

    Args:
        model: Any model with linear maps or convolutions; may be wrapped for DDP or compiled.
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        call: ``call(model, batch)``, for a model that is run otherwise.
        where: A predicate of (module name, module) that says which layers; all linear maps and convolutions by default.
            Embedding tables, which have no features for an input, are never among them.
        centred: Whether to take out the mean of the rows.
        max_dim: The largest d whose M is kept whole.
        sketch: How many directions a wider one is multiplied with, at most ``max_dim``.
        precision: Of products within a batch; sums over batches are in float64. ``"float32"`` is faster and resolves
            condition numbers up to 10⁷/d. Eigenvalues are always taken in float64 (in float32 where there is none).
        max_batches: Stop after so many of the loader's batches.

    Returns:
        The spectra of each layer.

    Raises:
        TypeError: If `where` is not callable.
        ValueError: If an argument is out of its range, there is no such layer, the loader is empty, or a feature is not
            finite.

    Warns:
        WellcondWarning: About layers that no batch reached, by name; they are left out.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = feature_spectrum(model, [torch.randn(50, 3) * torch.tensor([10.0, 1.0, 1.0]) for _ in range(4)])
        >>> list(found.layers), found.layers["2"].output.width
        (['0', '2'], 2)
        >>> found.layers["0"].input.directions(0.9), 50 < found.layers["0"].input.condition < 200
        (1, True)
    """
    check_positive_integer("max_dim", max_dim)
    check_positive_integer("sketch", sketch)
    check_choice("precision", precision, tuple(_DTYPES))
    if sketch > max_dim:
        raise ValueError(f"sketch must be at most max_dim={max_dim}, got {sketch}")
    if max_batches is not None:
        check_positive_integer("max_batches", max_batches)
    inner = unwrapped(model)
    moments = {name: _Moments(layer, max_dim, sketch, precision) for name, layer in _measured(inner, where).items()}
    batches = 0
    with left_as_found(inner), torch.no_grad(), calls_shown(own.watch() for own in moments.values()):
        for batch in batches_on_device(inner, loader, max_batches):
            batches += 1
            run_on(inner, batch, call)
    found = {name: own.result(name, centred) for name, own in moments.items() if own.seen}
    missed = ", ".join(
        f"{name!r}{f' (of whose inputs nothing is known: {own.unknown})' if own.unknown else ''}"
        for name, own in moments.items()
        if name not in found
    )
    if not found:
        raise ValueError(f"no batch reached any of the layers {missed}")
    if missed:
        warnings.warn(f"feature_spectrum: no batch reached {missed}", WellcondWarning, stacklevel=3)
    return FeatureSpectrum(centred, inner.training, batches, max_dim, found)


def _measured(model: nn.Module, where: Predicate | None) -> dict[str, Layer]:
    """Return the layers whose rows are defined, by the module's name, or the weight's where a module has several."""
    check_where(where)
    possible = [
        layer
        for layer in layers_of(model)
        if layer.layout.kind in ("linear", "conv") and type(layer.layout).rows is not Layout.rows
    ]
    if not possible:
        raise ValueError(f"{type(model).__name__} has no linear map or convolution whose features could be measured")
    chosen = [layer for layer in possible if where is None or where(layer.module_name, layer.module)]
    if not chosen:
        raise ValueError(f"where selects none of the linear maps and convolutions of {type(model).__name__}")
    weights = Counter(layer.module_name for layer in possible)
    return {layer.module_name if weights[layer.module_name] == 1 else layer.name: layer for layer in chosen}


class _Moments:
    """The second moments of one layer's input and output, gathered by hooks.

    Args:
        layer: The layer.
        max_dim: The largest order that is kept whole.
        sketch: Directions for wider ones.
        precision: Of products.
    """

    def __init__(self, layer: Layer, max_dim: int, sketch: int, precision: SumPrecision) -> None:
        self.layer = layer
        self._max_dim, self._sketch = max_dim, sketch
        self._dtype = _DTYPES[precision]
        # Where calls do not show the products of a weight, they are made from its rows.
        self._by_product = type(layer.layout).output_rows is Layout.output_rows
        self._input: SecondMoment | None = None
        self._output: SecondMoment | None = None
        self._rounding = 0.0
        self.unknown: str | None = None

    @property
    def seen(self) -> bool:
        """Whether there was a row for each matrix."""
        return self.unknown is None and all(
            own is not None and min(own.counts) > 0 for own in (self._input, self._output)
        )

    def watch(self) -> tuple[nn.Module, Callable[..., None], Callable[..., None]]:
        """Say whose calls are to be shown to whom."""
        return self.layer.called, self.before, self.after

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in the input of a call."""
        try:
            seen = self.layer.seen(args, kwargs)
        except UnknownInputError as error:
            self.unknown = str(error)
            return
        if seen is None:
            return
        inputs, weight = seen
        for first, rows in input_pieces(self.layer, inputs):
            if self._input is None:
                self._input = self._moment(self.layer.groups, rows)
            self._input.add(rows, first)
            if self._by_product:
                products = self._products(first, rows, weight)
                if self._output is None:
                    self._output = self._moment(self.layer.groups, products)
                self._output.add(products, first)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take in the output of a call."""
        rows = None if self._by_product else self.layer.layout.output_rows(self.layer.module, output)
        if rows is None:
            return
        if self._output is None:
            self._output = self._moment(1, rows)
        for piece in row_pieces(rows):
            self._output.add(piece)

    def result(self, name: str, centred: bool) -> LayerSpectrum:
        """Return the spectra.

        Raises:
            ValueError: If a row was not finite.
        """
        assert self._input is not None
        assert self._output is not None
        if not (self._input.finite and self._output.finite):
            raise ValueError(f"features that are not finite reached {name!r}")
        return LayerSpectrum(self._spectrum(self._input, centred), self._spectrum(self._output, centred))

    def _products(self, first: int, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply rows [g, n, d] with the weights of their groups, and add the biases."""
        layer, groups = self.layer, slice(first, first + len(rows))
        matrix = layer.matrix(weight).flatten(2)[groups]
        products = rows.to(matrix.dtype) @ matrix.mT
        return products if layer.bias is None else products + layer.bias_matrix(layer.bias)[groups].unsqueeze(1)

    def _moment(self, groups: int, rows: Tensor) -> SecondMoment:
        width = rows.shape[-1]
        # Features that are rounded to ε have eigenvalues of about ε² λ₁ in directions in which they should have none.
        self._rounding = max(self._rounding, torch.finfo(rows.dtype).eps ** 2)
        dtype = torch.float32 if rows.device.type == "mps" else self._dtype
        if width <= self._max_dim:
            return WholeMoment(groups, width, dtype, rows.device)
        return SketchedMoment(groups, width, dtype, rows.device, self._sketch)

    def _spectrum(self, moment: SecondMoment, centred: bool) -> Spectrum:
        found = [moment.eigenvalues(group, centred=centred) for group in range(len(moment.counts))]
        return Spectrum(
            groups=len(found),
            width=moment.width,
            rows=min(moment.counts),
            eigenvalues=tuple(own.values for own in found),
            traces=tuple(own.trace for own in found),
            exact=isinstance(moment, WholeMoment),
            resolution=max(moment.width * torch.finfo(self._dtype).eps, self._rounding),
        )
