"""Forms of a layer's second moment: what is summed over its inputs, how it is factorized, how it meets the gradient.

Every form is a reading of one formula, Ĝ = G · (E[x xᵀ] + damping)^p with x the layer's input rows (and a constant 1
for its bias): `RowsForm` as it stands, `KroneckerForm` with its two margins, `TapBlocksForm` with one matrix for each
frequency of a kernel's taps, `TiedForm` for a table that is also read as a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.numerics.patches import patch_moment
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import (
    DiagonalFactor,
    Factor,
    MatrixFactor,
    Power,
    SketchedFactor,
    TruncatedFactor,
    WholeFactor,
)
from wellcond.transforms.preconditioner.form import Form, Scratch, keyed, sum_rows, tap_sums, with_border
from wellcond.transforms.preconditioner.kronecker import KroneckerForm
from wellcond.transforms.preconditioner.tap_blocks import TapBlocksForm
from wellcond.transforms.preconditioner.tied import TiedForm

MomentForm = Literal["auto", "dense", "kronecker", "blocks", "low_rank"]

# By default, a wider matrix is sketched where it may be.
DEFAULT_MAX_DIM = 1024
# A narrower matrix is kept whole in every form: there is nothing to save.
SMALLEST_LOW_RANK = 64
# Up to this width "auto" keeps the whole matrix: it costs next to nothing.
DENSE_UP_TO = 128
# From this width on, "auto" truncates.
TRUNCATED_FROM = 256


class RowsForm(Form):
    """One factor over whole rows (x, 1): the formula as it stands, or its low-rank form."""

    def __init__(self, layer: Layer, bias: bool, make: Callable[[int, int], Factor]) -> None:
        super().__init__(layer, bias)
        self.factor = make(self.groups, self.channels * self.taps + bias)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The one factor."""
        return (self.factor,)

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum x xᵀ, of convolutions without laying out their patches where that is cheaper."""
        if layer.layout.one_hot and isinstance(self.factor, DiagonalFactor):
            counts = layer.layout.counts(layer.module, inputs[0]).to(dtype)
            return [counts.unsqueeze(0), torch.full((1,), float(inputs[0].numel()), dtype=dtype, device=counts.device)]
        window = layer.layout.window(layer.module)
        if window is None or isinstance(self.factor, SketchedFactor):
            return sum_rows(self.factor, state, layer, inputs, self.bias, dtype)
        padded = layer.layout.padded(layer.module, *inputs).to(dtype)
        moment = patch_moment(padded, window)
        count = float(len(padded) * math.prod(window.positions(padded.shape[2:])))
        counts = torch.full((self.groups,), count, dtype=dtype, device=moment.device)
        if self.bias:
            moment = with_border(moment, tap_sums(padded, window), counts)
        return [moment, counts]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the factor."""
        return keyed(self.factor, self.factor.solve(state, mass, power))

    def whole_power(self, state: State, like: Tensor, *, scaled: bool) -> Tensor | None:
        """Return the factor's matrix where it is whole."""
        if isinstance(self.factor, WholeFactor):
            return self.factor.tensor(state, "preconditioner")
        return super().whole_power(state, like, scaled=scaled) if isinstance(self.factor, MatrixFactor) else None

    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Ĝ = (G_w, g_b) T."""
        groups, units = weight.shape[:2]
        width = self.channels * self.taps
        if bias is None and weight.is_contiguous():
            matrix = weight.view(groups, units, width)
        else:
            matrix = scratch.take("matrix", (groups, units, width + (bias is not None)), weight)
            matrix[..., :width].unflatten(2, weight.shape[2:]).copy_(weight)
            if bias is not None:
                matrix[..., width] = bias
        product = self.factor.multiply(state, matrix, scratch.take("product", matrix.shape, matrix), scaled=scaled)
        return product[..., :width].unflatten(2, weight.shape[2:]), None if bias is None else product[..., width]

    def describe(self) -> str:
        """Name the factor."""
        kind = "dense " if isinstance(self.factor, WholeFactor) else ""
        return f"{kind}{self.factor.describe()}"


def choose_form(
    uses: Sequence[Layer], bias: bool, kind: MomentForm, max_dim: int | None, rank: int | None, exponent: float
) -> Form:
    """Choose the form of a weight's second moment.

    Args:
        uses: The layers that use the weight; the first stands for all.
        bias: Whether the bias is preconditioned together with it.
        kind: ``"dense"``: whole matrices; ``"kronecker"``: convolutions by their margins; ``"blocks"``: by one matrix
            for each frequency of their taps; ``"low_rank"``: the leading directions of the whole matrix and a flat
            tail; ``"auto"``: dense up to a width of 128, Kronecker factors beyond, truncated from a width of 256 on.
        max_dim: The widest matrix that is kept; a wider one is sketched. None: unbounded, under "auto" 1024.
        rank: Of low-rank forms; None: an eighth of the width, at most an eighth of ``max_dim`` (or 1024).
        exponent: Of the power that will be taken.

    Returns:
        The form.
    """
    layer = uses[0]
    if len({use.layout.one_hot for use in uses}) > 1:
        return TiedForm(layer, exponent)
    if layer.layout.one_hot:
        return RowsForm(layer, bias, DiagonalFactor)
    limit = max_dim if max_dim is not None else (DEFAULT_MAX_DIM if kind == "auto" else None)

    def make(groups: int, width: int) -> MatrixFactor:
        few = rank if rank is not None else max(1, min(width, limit or DEFAULT_MAX_DIM) // 8)
        if few >= width:
            return WholeFactor(groups, width)
        if limit is not None and width > limit:
            return SketchedFactor(groups, width, few)
        if kind == "low_rank" and (rank is not None or width >= SMALLEST_LOW_RANK):
            return SketchedFactor(groups, width, few)
        if (kind == "auto" and (rank is not None or width >= TRUNCATED_FROM)) or (
            kind == "blocks" and rank is not None
        ):
            return TruncatedFactor(groups, width, few)
        return WholeFactor(groups, width)

    _, _, channels, *kernel = layer.matrix_shape
    separable = layer.layout.window(layer.module) is not None and channels > 1 and math.prod(kernel) > 1
    if separable and kind == "blocks":
        return TapBlocksForm(layer, bias, make)
    wide = channels * math.prod(kernel) + bias > DENSE_UP_TO
    if separable and (kind == "kronecker" or (kind == "auto" and wide)):
        return KroneckerForm(layer, bias, make)
    return RowsForm(layer, bias, make)
