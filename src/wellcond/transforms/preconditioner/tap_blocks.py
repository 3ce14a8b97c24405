"""A convolution's second moment by the frequencies of its kernel's taps: one matrix over channels for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.numerics.linalg import damped_eigenvalues
from wellcond.numerics.tap_blocks import cosine_basis_like, frequency_rows, patch_blocks
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import Factor, MatrixFactor, Power, SketchedFactor
from wellcond.transforms.preconditioner.form import Form, Scratch, keyed, sums_of_pieces, tap_sums, with_border


class TapBlocksForm(Form):
    """The second moment at each frequency of the taps, T = Σ_f (u_f u_fᵀ) ⊗ (M_f + damping)^(−p).

    With Q[c, k, d, l] the second moment of the rows and u_f the rows of the taps' cosine transform U,
    M_f = Σ_kl U_fk U_fl Q[:, k, :, l]. A bias is one more channel at frequency 0, where the constant 1, spread evenly
    over the taps as 1/√K, is 1 again; at all others it is 0. One damping serves all blocks.
    """

    def __init__(self, layer: Layer, bias: bool, make: Callable[[int, int], MatrixFactor]) -> None:
        super().__init__(layer, bias)
        window = layer.layout.window(layer.module)
        assert window is not None
        self.size = window.size
        self.factor = make(self.groups * self.taps, self.channels + bias)
        self.factor.prefix = "block_"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The one factor, of a matrix for each group and frequency."""
        return (self.factor,)

    def count_shape(self) -> tuple[int, ...]:
        """One number of rows for each matrix."""
        return (self.groups * self.taps,)

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum over channels at each frequency."""
        window = layer.layout.window(layer.module)
        assert window is not None
        padded = layer.layout.padded(layer.module, *inputs).to(dtype)
        count = float(len(padded) * math.prod(window.positions(padded.shape[2:])))
        counts = torch.full(self.count_shape(), count, dtype=dtype, device=padded.device)
        if isinstance(self.factor, SketchedFactor):
            pieces = map(self._with_constant, frequency_rows(padded, window))
            return [*sums_of_pieces(self.factor.from_rows(state, rows) for rows in pieces), counts]
        moment = patch_blocks(padded, window).flatten(0, 1)
        if self.bias:
            first = self._at_frequency_0(torch.ones_like(counts))
            sums = tap_sums(padded, window).unflatten(1, (-1, self.taps)).sum(dim=2) / math.sqrt(self.taps)
            sums = sums.repeat_interleave(self.taps, dim=0) * first.unsqueeze(1)
            moment = with_border(moment, sums, first * count)
        return [moment, counts]

    def _with_constant(self, rows: Tensor) -> Tensor:
        """Append the bias's channel to rows at each frequency."""
        if not self.bias:
            return rows
        constant = self._at_frequency_0(rows.new_ones(len(rows)))
        return torch.cat([rows, constant.view(-1, 1, 1).expand(-1, rows.shape[1], 1)], dim=2)

    def _at_frequency_0(self, values: Tensor) -> Tensor:
        """Return values by group and frequency with zeros at all frequencies but the first."""
        first = values.view(self.groups, self.taps)[:, :1]
        return F.pad(first, (0, self.taps - 1)).flatten()

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take all blocks' powers, with one damping for the blocks of a group."""
        spectrum = self.factor.spectrum(state, mass)
        if spectrum is None:
            return None
        if power.damping_mode == "mean":
            total = spectrum.trace().view(self.groups, self.taps).sum(dim=1)
            reference = total / (self.channels * self.taps + self.bias)
        else:
            reference = spectrum.largest().view(self.groups, self.taps).amax(dim=1)
        reference = reference.repeat_interleave(self.taps).unsqueeze(-1)

        def gains(eigenvalues: Tensor) -> Tensor:
            damped = damped_eigenvalues(eigenvalues, power.damping, power.damping_mode, reference=reference)
            return damped.pow(power.exponent)

        tail = None if spectrum.tail is None else gains(spectrum.tail.unsqueeze(-1)).squeeze(-1)
        found = self.factor.assembled(spectrum, gains(spectrum.eigenvalues), tail)
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            return None
        return keyed(self.factor, found)

    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Turn taps to frequencies, multiply over channels at each of them, turn back."""
        groups, units = weight.shape[:2]
        basis = cosine_basis_like(self.size, weight)
        turned = scratch.take("turned", (groups * units * self.channels, self.taps), weight)
        torch.mm(weight.reshape(turned.shape), basis.mT, out=turned)
        width = self.channels + (bias is not None)
        matrix = scratch.take("matrix", (groups, self.taps, units, width), weight)
        matrix[..., : self.channels] = turned.view(groups, units, self.channels, self.taps).permute(0, 3, 1, 2)
        if bias is not None:
            matrix[..., -1].zero_()
            matrix[:, 0, :, -1] = bias
        flat = matrix.flatten(0, 1)
        # Blocks differ in their tails: no factor is common to them.
        product = self.factor.multiply(state, flat, scratch.take("product", flat.shape, flat), scaled=True)
        product = product.view(matrix.shape)
        turned.view(groups, units, self.channels, self.taps).copy_(product[..., : self.channels].permute(0, 2, 3, 1))
        back = torch.mm(turned, basis, out=scratch.take("back", turned.shape, weight)).view(weight.shape)
        return back, None if bias is None else product[:, 0, :, -1]

    def describe(self) -> str:
        """Name the factor."""
        return f"tap blocks {self.factor.describe()}"
