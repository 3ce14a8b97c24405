"""The form of a second moment: what it must say and do, and what several forms need."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.layouts.layout import Rows
from wellcond.numerics.pieces import in_pieces
from wellcond.numerics.windows import Window
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import Factor, Power

# Up to this width (32 channels of nine taps) a power of several factors is multiplied out.
MULTIPLIED_OUT = 289


class Scratch:
    """Memory for intermediate results that is used again at every step: fresh pages cost more than the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.moves = 0
        """How often a buffer was replaced by a larger one: views of the memory before are then out of use."""

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return a contiguous tensor of arbitrary content, valid until the next call with this name."""
        size, key = math.prod(shape), (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
            self.moves += 1
        return buffer[:size].view(tuple(shape))

    def zero(self, like: Tensor) -> Tensor:
        """Return a scalar 0 of a tensor's kind, always the same one: not to be written to."""
        key = like.dtype, like.device
        if key not in self._zeros:
            self._zeros[key] = like.new_zeros(())
        return self._zeros[key]


class Form(ABC):
    """Observes, factorizes and applies one weight's second moment.

    Args:
        layer: The layer that stands for all uses of the weight.
        bias: Whether the bias is preconditioned together with the weight.
    """

    def __init__(self, layer: Layer, bias: bool) -> None:
        self.bias = bias
        self.groups, self.units, *inputs = layer.matrix_shape
        self.channels, self.taps = inputs[0], math.prod(inputs[1:])
        self.width = self.channels * self.taps + bias
        self._views: tuple[Any, tuple[Tensor, ...]] = (None, ())
        self._power: tuple[Any, Tensor] | None = None
        # That of an orthogonal matrix of the weight's shape, of all groups together.
        self.fixed_norm = math.sqrt(self.groups * min(self.units, self.channels * self.taps))

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
        power = self.whole_power(state, weight, scaled=scaled)
        if power is None:
            return self.multiply(state, weight, bias, scratch, scaled=scaled)
        joint, body, column, product, changed, changed_bias = self.views(scratch, weight, self._dense_views)
        if bias is not None:
            body.copy_(weight)
            column.copy_(bias)
        elif weight.is_contiguous():
            joint = weight.view(joint.shape)
        else:
            body.copy_(weight)
        torch.bmm(joint, power, out=product)
        return changed, None if bias is None else changed_bias

    def _dense_views(self, scratch: Scratch, weight: Tensor) -> tuple[Tensor, ...]:
        """View a matrix of a gradient and its product, each also as a weight's and a bias's gradient."""
        shape = (*weight.shape[:2], self.width)
        views = []
        for name in ("matrix", "product"):
            joint = scratch.take(name, shape, weight)
            inputs = joint[..., : self.channels * self.taps].unflatten(2, weight.shape[2:])
            views += [joint, inputs, joint[..., -1]]
        return tuple(views)

    def views(
        self, scratch: Scratch, weight: Tensor, make: Callable[[Scratch, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return views of the scratch memory: made once, and again where that, or the weight's kind, has changed.

        Args:
            scratch: The memory.
            weight: What is to be multiplied.
            make: Makes the views, the same function at every call.
        """
        key = (scratch, scratch.moves, weight.shape, weight.dtype, weight.device)
        if self._views[0] != key:
            views = make(scratch, weight)
            self._views = (scratch, scratch.moves, *key[2:]), views
        return self._views[1]

    def whole_power(self, state: State, like: Tensor, *, scaled: bool) -> Tensor | None:
        """Return the power over a weight's inputs and bias as one matrix a group, where products with it are cheap.

        What is kept in factors is multiplied out up to a width of 289, once for each `solve`: one product then takes
        the place of several that are too small to be worth their calls.

        Args:
            state: The slot's state.
            like: What it is to multiply.
            scaled: As for `apply`.

        Returns:
            Shape [groups, width, width], or None.
        """
        if self.width > MULTIPLIED_OUT or like.dtype not in (torch.float32, torch.float64):
            return None
        sources = [factor.tensor(state, name) for factor in self.factors for name in factor.products]
        # Other ranks' results are copied into the tensors that are there.
        key = [scaled, like.dtype, *((id(source), source._version) for source in sources)]
        if self._power is None or self._power[0][0] != key:
            self._power = (key, sources), self._multiplied_out(state, like, scaled)
        return self._power[1]

    def _multiplied_out(self, state: State, like: Tensor, scaled: bool) -> Tensor:
        """Return the power by its products with the unit vectors."""
        units = torch.eye(self.width, dtype=like.dtype, device=like.device).expand(self.groups, -1, -1)
        inputs = self.channels * self.taps
        weight = units[..., :inputs].unflatten(2, like.shape[2:])
        bias = units[..., -1] if self.bias else None
        rows, column = self.multiply(state, weight.contiguous(), bias, Scratch(), scaled=scaled)
        rows = rows.flatten(2)
        return (rows if column is None else torch.cat([rows, column.unsqueeze(2)], dim=2)).contiguous()

    @abstractmethod
    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Do what `apply` does, of the same arguments, with the factors as they are kept."""

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


def keyed(factor: Factor, tensors: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Turn a factor's names into keys of the slot's state."""
    return None if tensors is None else {factor.key(name): value for name, value in tensors.items()}


def sum_rows(
    factor: Factor, state: State, layer: Layer, inputs: tuple[Any, ...], bias: bool, dtype: torch.dtype
) -> list[Tensor]:
    """Sum a factor's averages over a layer's rows, and count these."""
    # Rows may be products or normalized values: those, too, are made in the precision of the sums.
    inputs = tuple(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)
    pieces = (_with_constant(rows, bias, dtype) for rows in _row_chunks(layer, inputs, factor.width))
    return sums_of_pieces([*factor.from_rows(state, matrix), counts] for matrix, counts in pieces)


def _row_chunks(layer: Layer, inputs: tuple[Any, ...], width: int) -> Iterator[Rows]:
    """Lay out a layer's rows, a convolution's in pieces along the batch."""
    window = layer.layout.window(layer.module)
    if window is None:
        yield layer.rows(*inputs)
        return
    first, *others = inputs
    batch = first if first.dim() == layer.weight.dim() else first.unsqueeze(0)
    # A convolution has at most about one patch per input position.
    for piece in in_pieces(batch, width * batch[0, 0].numel()):
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


def tap_sums(padded: Tensor, window: Window) -> Tensor:
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


def sums_of_pieces(pieces: Iterable[list[Tensor]]) -> list[Tensor]:
    """Add up lists of tensors, element by element, into those of the first."""
    sums: list[Tensor] = []
    for parts in pieces:
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
    return sums


def with_border(moment: Tensor, cross: Tensor, corner: Tensor) -> Tensor:
    """Add a row and a column to symmetric matrices: those of one more input.

    Args:
        moment: Shape [groups, d, d].
        cross: Its products with all others, shape [groups, d].
        corner: Its square, shape [groups].

    Returns:
        Shape [groups, d + 1, d + 1].
    """
    column, last = cross.unsqueeze(-1), corner.view(-1, 1, 1)
    return torch.cat([torch.cat([moment, column], 2), torch.cat([column.mT, last], 2)], 1)
