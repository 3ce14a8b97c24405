"""Forms of a layer's second moment: what is summed over its inputs, how it is factorized, how it meets the gradient.

Every form is a reading of one formula, Ĝ = G · (E[x xᵀ] + damping)^p with x the layer's input rows (and a constant 1
for its bias): `RowsForm` as it stands, `KroneckerForm` with its two margins, `TiedForm` for a table that is also read
as a linear layer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.layouts.layout import Rows
from wellcond.numerics.patches import patch_margins, patch_moment
from wellcond.numerics.windows import Window, patch_rows
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import (
    DiagonalFactor,
    Factor,
    Power,
    SketchedFactor,
    TiedFactor,
    TruncatedFactor,
    WholeFactor,
)

SecondMoment = Literal["auto", "dense", "kronecker", "low_rank"]

# Rows are laid out in pieces of about this many numbers: a large batch's patches need not fit in memory at once.
ROWS_CHUNK = 1 << 24
# By default, a wider matrix is sketched where it may be.
DEFAULT_MAX_DIM = 1024
# A narrower matrix is kept whole in every form: there is nothing to save.
SMALLEST_LOW_RANK = 64
# Up to this width "auto" keeps the whole matrix: it costs next to nothing.
DENSE_UP_TO = 128
# From this width on, "auto" truncates.
TRUNCATED_FROM = 256


class Scratch:
    """Memory for intermediate results that is used again at every step: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a contiguous tensor of arbitrary content, valid until the next call with this name."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(tuple(shape))


class Form(ABC):
    """How one weight's second moment is observed, factorized and applied.

    Args:
        layer: The layer that stands for all uses of the weight.
        bias: Whether the bias is preconditioned together with the weight.
    """

    def __init__(self, layer: Layer, bias: bool) -> None:
        self.bias = bias
        self.groups, self.units, *inputs = layer.matrix_shape
        self.channels, self.taps = inputs[0], math.prod(inputs[1:])

    @property
    @abstractmethod
    def factors(self) -> tuple[Factor, ...]:
        """The factors whose tensors are the form's state."""

    @abstractmethod
    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum over the rows of one forward pass what the factors average.

        Args:
            state: The slot's state; read only.
            layer: Which use of the weight is called.
            inputs: What its layout picked from the call.
            dtype: Precision of the sums.

        Returns:
            The factors' sums in order, then the number of rows of each group, shape [groups].
        """

    @abstractmethod
    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take the power of the moving averages: tensors by key to replace in the state, or None on failure."""

    @abstractmethod
    def apply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply a gradient with the power of the second moment.

        Args:
            state: The slot's state.
            weight: Shape [groups, out, *inputs], in the precision of the statistics; may be overwritten.
            bias: Shape [groups, out], or None.
            scratch: Memory for the result.
            scaled: Whether a common positive factor matters.

        Returns:
            Both, of the same shapes; valid until the next call with this scratch.
        """

    @abstractmethod
    def describe(self) -> str:
        """Say what is kept, for reports."""

    @property
    def cost(self) -> float:
        """Roughly the operations of one `solve`."""
        return sum(factor.cost for factor in self.factors)

    def state_bytes(self, dtype: torch.dtype, product_dtype: torch.dtype) -> int:
        """Count the bytes of `start`'s tensors."""
        return sum(
            math.prod(shape) * (product_dtype if name in factor.products else dtype).itemsize
            for factor in self.factors
            for name, shape in factor.shapes().items()
        )

    def start(self, dtype: torch.dtype, product_dtype: torch.dtype, device: torch.device) -> State:
        """Make the state of a weight of which nothing was seen.

        Args:
            dtype: Precision of the statistics.
            product_dtype: Precision of what gradients are multiplied with.
            device: Where the weight lives.

        Returns:
            Tensors by key.
        """
        return {
            factor.key(name): factor.first(name, dtype, device).to(product_dtype if name in factor.products else dtype)
            for factor in self.factors
            for name in factor.shapes()
        }

    def averaged_keys(self) -> list[str]:
        """Return the keys of the moving averages, in the order of `observe`."""
        return [factor.key(name) for factor in self.factors for name in factor.averaged]

    def solved_keys(self) -> list[str]:
        """Return the keys of what `solve` replaces."""
        return [factor.key(name) for factor in self.factors for name in factor.solved]

    def means(self, sums: Sequence[Tensor], counts: Tensor) -> list[Tensor]:
        """Divide sums by the numbers of rows, group by group; no rows give zero."""
        least = counts.clamp_min(1)
        return [total / least.view(-1, *[1] * (total.dim() - 1)) for total in sums]

    def count_shape(self) -> tuple[int, ...]:
        """Return the shape of the numbers of rows."""
        return (self.groups,)


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
            return _sum_rows(self.factor, state, layer, inputs, self.bias, dtype)
        padded = layer.layout.padded(layer.module, *inputs).to(dtype)
        moment = patch_moment(padded, window)
        count = float(len(padded) * math.prod(window.positions(padded.shape[2:])))
        if self.bias:
            sums = _tap_sums(padded, window)
            corner = torch.full((self.groups, 1, 1), count, dtype=dtype, device=moment.device)
            moment = torch.cat(
                [torch.cat([moment, sums.unsqueeze(-1)], dim=2), torch.cat([sums.unsqueeze(1), corner], dim=2)], dim=1
            )
        return [moment, torch.full((self.groups,), count, dtype=dtype, device=moment.device)]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the factor."""
        return _keyed(self.factor, self.factor.solve(state, mass, power))

    def apply(
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


class KroneckerForm(Form):
    """A convolution's second moment by its margins, over channels and over kernel taps: T = T_C ⊗ T_K.

    With Q[c, k, c', k'] the second moment of the rows, R_C = mean over k of Q[:, k, :, k] and R_K = mean over c of
    Q[c, :, c, :]. A bias is one more channel: the constant 1, spread evenly over the taps as 1/√K, which is the joint
    row (x, 1) seen through an isometry. Damping is each factor's own: ε λ_max relative to its largest eigenvalue, or,
    where absolute, ε shared between the factors in proportion to their mean eigenvalues (Martens & Grosse 2015, 6.3).
    """

    def __init__(self, layer: Layer, bias: bool, make: Callable[[int, int], Factor]) -> None:
        super().__init__(layer, bias)
        self.over_channels = make(self.groups, self.channels + bias)
        self.over_channels.prefix = "channel_"
        self.over_taps = WholeFactor(self.groups, self.taps, "tap_")

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Channels, then taps."""
        return self.over_channels, self.over_taps

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum both margins, without laying out patches."""
        window = layer.layout.window(layer.module)
        assert window is not None
        padded = layer.layout.padded(layer.module, *inputs).to(dtype)
        margins = patch_margins(padded, window)
        count, spread = float(margins.positions), 1 / math.sqrt(self.taps)
        taps, channels = margins.taps, margins.channels
        if self.bias:
            cross = (margins.sums * spread).unsqueeze(-1)
            corner = torch.full((self.groups, 1, 1), count, dtype=dtype, device=cross.device)
            channels = torch.cat([torch.cat([channels, cross], 2), torch.cat([cross.mT, corner], 2)], 1)
            taps = taps + count / self.taps
        if isinstance(self.over_channels, SketchedFactor):
            sums = _sum_taps_as_rows(self.over_channels, state, layer, padded, self.taps, self.bias)
        else:
            sums = [channels]
        counts = torch.full((self.groups,), count, dtype=dtype, device=taps.device)
        return [*(part / self.taps for part in sums), taps / (self.channels + self.bias), counts]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take both factors' powers."""
        # The second moment is R_C ⊗ R_K / m, where m, the mean of either diagonal, is the mean energy of an input.
        taps = self.over_taps.tensor(state, "second_moment") / mass
        energy = taps.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        scale = torch.where(energy > 0, energy, 1.0)
        # Both factors are scaled to a mean diagonal of √m: absolute damping then is √ε in either.
        balance = scale.sqrt()
        scaled = {**state, **self._divided(state, balance)}
        if power.damping_mode == "absolute":
            power = dataclasses.replace(power, damping=math.sqrt(power.damping))
        first = self.over_channels.solve(scaled, mass, power)
        second = self.over_taps.solve(scaled, mass, power)
        if first is None or second is None:
            return None
        if "sketch" in first:
            first["sketch"] = first["sketch"] * balance.view(-1, 1, 1)
        return (_keyed(self.over_channels, first) or {}) | (_keyed(self.over_taps, second) or {})

    def _divided(self, state: State, balance: Tensor) -> dict[str, Tensor]:
        """Return the moving averages divided by √m, group by group."""
        divided = {}
        for factor in self.factors:
            for name in factor.averaged:
                value = factor.tensor(state, name)
                divided[factor.key(name)] = value / balance.view(-1, *[1] * (value.dim() - 1))
        return divided

    def apply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Ĝ = T_K G T_C for each output unit's matrix G over taps and channels."""
        groups, units = weight.shape[:2]
        width = self.channels + (bias is not None)
        power = self.over_taps.tensor(state, "preconditioner")
        rows = groups * units
        # [groups · out, taps, channels]: channels last, so that one product serves all units and taps.
        matrix = scratch.take("matrix", (rows, self.taps, width), weight)
        each = power.unsqueeze(1).expand(groups, units, self.taps, self.taps).reshape(rows, self.taps, self.taps)
        torch.bmm(each, weight.reshape(rows, self.channels, self.taps).mT, out=matrix[..., : self.channels])
        if bias is not None:
            constant = power.sum(dim=-1) / math.sqrt(self.taps)  # T_K (1, …, 1)ᵀ/√K, shape [groups, taps]
            matrix[..., -1] = (bias.unsqueeze(-1) * constant.unsqueeze(1)).reshape(rows, self.taps)
        flat = matrix.view(groups, units * self.taps, width)
        product = self.over_channels.multiply(state, flat, scratch.take("product", flat.shape, flat), scaled=scaled)
        product = product.view(groups, units, self.taps, width)
        changed = product[..., : self.channels].transpose(2, 3).unflatten(3, weight.shape[3:])
        return changed, None if bias is None else product[..., -1].sum(dim=-1) / math.sqrt(self.taps)

    def describe(self) -> str:
        """Name both factors."""
        times = f"{self.groups} × " if self.groups > 1 else ""
        rank = f" of rank {rank}" if (rank := getattr(self.over_channels, "rank", None)) else ""
        return f"channels {times}{self.over_channels.width}{rank} ⊗ taps {times}{self.taps}"


class TiedForm(Form):
    """A table (tokens, features) that embeds tokens and is also read as a linear layer, whose inputs are features."""

    def __init__(self, layer: Layer, exponent: float) -> None:
        super().__init__(layer, False)
        tokens, features = layer.weight.shape
        self.turned = layer.layout.one_hot  # its matrix then is [1, features, tokens]
        self.factor = TiedFactor(tokens, features, exponent)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The one factor."""
        return (self.factor,)

    def count_shape(self) -> tuple[int, ...]:
        """One number of rows for each of the two kinds of use."""
        return (2,)

    def means(self, sums: Sequence[Tensor], counts: Tensor) -> list[Tensor]:
        """Divide each use's sum by its own number of rows."""
        return [total / count for total, count in zip(sums, counts.clamp_min(1), strict=True)]

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Count tokens, or sum x xᵀ; what the other use would add is zero."""
        device = layer.weight.device
        if layer.layout.one_hot:
            counts = layer.layout.counts(layer.module, inputs[0]).to(dtype).unsqueeze(0)
            moment = torch.zeros(1, self.factor.width, self.factor.width, dtype=dtype, device=device)
            rows = torch.full((1,), float(inputs[0].numel()), dtype=dtype, device=device)
            return [counts, moment, F.pad(rows, (0, 1))]
        moment, count = _sum_rows(self.factor, state, layer, inputs, False, dtype)
        return [torch.zeros(1, self.factor.tokens, dtype=dtype, device=device), moment, F.pad(count, (1, 0))]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the factor."""
        return _keyed(self.factor, self.factor.solve(state, mass, power))

    def apply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply from both sides, whichever use the weight is viewed as."""
        table = weight.mT if self.turned else weight
        product = self.factor.multiply(state, table, scratch.take("product", table.shape, table), scaled=scaled)
        return product.mT if self.turned else product, None

    def describe(self) -> str:
        """Name both sides."""
        return self.factor.describe()


def choose_form(
    uses: Sequence[Layer], bias: bool, kind: SecondMoment, max_dim: int | None, rank: int | None, exponent: float
) -> Form:
    """Choose the form of a weight's second moment.

    Args:
        uses: The layers that use the weight; the first stands for all.
        bias: Whether the bias is preconditioned together with it.
        kind: ``"dense"``: whole matrices; ``"kronecker"``: convolutions by their margins; ``"low_rank"``: the leading
            directions of the whole matrix and a flat tail; ``"auto"``: dense up to a width of 128, Kronecker factors
            beyond, truncated from a width of 256 on.
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

    def make(groups: int, width: int) -> Factor:
        few = rank if rank is not None else max(1, min(width, limit or DEFAULT_MAX_DIM) // 8)
        if few >= width:
            return WholeFactor(groups, width)
        if limit is not None and width > limit:
            return SketchedFactor(groups, width, few)
        if kind == "low_rank" and (rank is not None or width >= SMALLEST_LOW_RANK):
            return SketchedFactor(groups, width, few)
        if kind == "auto" and (rank is not None or width >= TRUNCATED_FROM):
            return TruncatedFactor(groups, width, few)
        return WholeFactor(groups, width)

    _, _, channels, *kernel = layer.matrix_shape
    separable = layer.layout.window(layer.module) is not None and channels > 1 and math.prod(kernel) > 1
    wide = channels * math.prod(kernel) + bias > DENSE_UP_TO
    if separable and (kind == "kronecker" or (kind == "auto" and wide)):
        return KroneckerForm(layer, bias, make)
    return RowsForm(layer, bias, make)


def _keyed(factor: Factor, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Turn a factor's names into keys of the slot's state."""
    return None if tensors is None else {factor.key(name): value for name, value in tensors.items()}


def _sum_rows(
    factor: Factor, state: State, layer: Layer, inputs: tuple[Any, ...], bias: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Sum a factor's averages over a layer's rows, and count these."""
    sums: list[Tensor] = []
    # Rows may be products or normalized values: those, too, are made in the precision of the sums.
    inputs = tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)
    for rows in _row_chunks(layer, inputs, factor.width):
        matrix, counts = _with_constant(rows, bias, dtype)
        parts = [*factor.from_rows(state, matrix), counts]
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
    return sums


def _row_chunks(layer: Layer, inputs: tuple[Any, ...], width: int) -> Iterator[Rows]:
    """Lay out a layer's rows, a convolution's in pieces along the batch."""
    window = layer.layout.window(layer.module)
    if window is None:
        yield layer.rows(*inputs)
        return
    first, *others = inputs
    batch = first if first.dim() == layer.weight.dim() else first.unsqueeze(0)
    # A convolution has at most about one patch per input position.
    per_sample = max(1, width * batch[0, 0].numel())
    for piece in torch.split(batch, max(1, ROWS_CHUNK // per_sample)):
        yield layer.rows(piece, *others)


def _with_constant(rows: Rows, bias: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Join rows to [groups, n, d], append the constant 1, and count them; missing rows are zeros."""
    if isinstance(rows, Tensor):
        counts = torch.full((len(rows),), float(rows.shape[1]), dtype=dtype, device=rows.device)
        matrix = rows.to(dtype)
        return (F.pad(matrix, (0, 1), value=1.0) if bias else matrix), counts
    longest = max(len(part) for part in rows)
    padded = [F.pad(part.to(dtype), (0, 1), value=1.0) if bias else part.to(dtype) for part in rows]
    counts = torch.cat([torch.full((1,), float(len(part)), dtype=dtype, device=part.device) for part in rows])
    return torch.stack([F.pad(part, (0, 0, 0, longest - len(part))) for part in padded]), counts


def _tap_sums(padded: Tensor, window: Window) -> Tensor:
    """Sum a convolution's rows, shape [groups, channels/groups · taps], tap by tap."""
    positions = window.positions(padded.shape[2:])
    axes = tuple(range(2, padded.dim()))
    sums = []
    for tap in itertools.product(*(range(size) for size in window.size)):
        seen: tuple[Any, ...] = (
            ...,
            *(
                slice(dilation * k, dilation * k + stride * (count - 1) + 1, stride)
                for k, dilation, stride, count in zip(tap, window.dilation, window.stride, positions, strict=True)
            ),
        )
        sums.append(padded[seen].sum(dim=(0, *axes)))
    return torch.stack(sums, dim=-1).reshape(window.groups, -1)


def _sum_taps_as_rows(
    factor: Factor, state: State, layer: Layer, padded: Tensor, taps: int, bias: bool
) -> list[Tensor]:
    """Sum a factor's averages over channels, every tap of every patch being a row."""
    window = layer.layout.window(layer.module)
    assert window is not None
    sums: list[Tensor] = []
    per_sample = max(1, padded[0].numel() * taps)
    for piece in torch.split(padded, max(1, ROWS_CHUNK // per_sample)):
        rows = patch_rows(piece, window).unflatten(2, (-1, taps)).transpose(2, 3).flatten(1, 2)
        if bias:
            rows = F.pad(rows, (0, 1), value=1 / math.sqrt(taps))
        parts = factor.from_rows(state, rows)
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
    return sums
