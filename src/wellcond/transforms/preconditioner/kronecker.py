"""A convolution's second moment by its two margins, over channels and over kernel taps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.numerics.linalg import damped_eigenvalues, try_eigh
from wellcond.numerics.patches import patch_margins
from wellcond.numerics.pieces import samples_in_pieces
from wellcond.numerics.windows import Window, patch_rows
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import (
    Factor,
    MatrixFactor,
    Power,
    SketchedFactor,
    WholeFactor,
    leading,
)
from wellcond.transforms.preconditioner.form import Form, Scratch, keyed, sums_of_pieces, with_border


class KroneckerFactor(Factor):
    """Both margins R_C = V Λ Vᵀ and R_K = W M Wᵀ, and the damped power of their product in its eigenvectors V ⊗ W.

    The second moment is R_C ⊗ R_K / m, where m, the mean of either diagonal, is the mean energy of an input. Its power
    p acts on a matrix G over taps and channels as W ((Wᵀ G V) ∘ (μ_k λ_i / m + damping)^p) Vᵀ. Where only some of V are
    kept, all others share one eigenvalue.

    Args:
        over_channels: What is kept of the channels' margin.
        taps: Of the kernel.
    """

    def __init__(self, over_channels: MatrixFactor, taps: int) -> None:
        super().__init__(over_channels.groups, over_channels.width)
        self.taps, self.over_channels = taps, over_channels
        self.over_channels.prefix = "channel_"
        self.over_taps = WholeFactor(self.groups, taps, "tap_")
        self.flat_tail = not isinstance(over_channels, WholeFactor)
        self.rank: int = getattr(over_channels, "rank", self.width)
        tail = ("tail",) if self.flat_tail else ()
        kept = tuple(f"channel_{name}" for name in ("sketch", "basis") if name in over_channels.solved)
        self.averaged = (*(f"channel_{name}" for name in over_channels.averaged), "tap_second_moment")
        self.products = ("channel_directions", "tap_directions", "excess", *tail)
        self.solved = (*kept, *self.products)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Both margins; their eigenvectors, and the power's eigenvalues by taps and channels."""
        channels = self.over_channels.shapes()
        names = (*self.over_channels.averaged, *(name for name in ("basis",) if name in channels))
        shapes: dict[str, tuple[int, ...]] = {f"channel_{name}": channels[name] for name in names}
        shapes["tap_second_moment"] = shapes["tap_directions"] = (self.groups, self.taps, self.taps)
        shapes["channel_directions"] = (self.groups, self.width, self.rank)
        shapes["excess"] = (self.groups, self.taps, self.rank)
        if self.flat_tail:
            shapes["tail"] = (self.groups, self.taps)
        return shapes

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Start with zero moments and the identity."""
        if name == "tap_directions" or (name == "channel_directions" and not self.flat_tail):
            _, width, _ = self.shapes()[name]
            return torch.eye(width, dtype=dtype, device=device).repeat(self.groups, 1, 1)
        if name == "channel_basis":
            return self.over_channels.first("basis", dtype, device)
        ones = name == "tail" or (name == "excess" and not self.flat_tail)
        return (torch.ones if ones else torch.zeros)(self.shapes()[name], dtype=dtype, device=device)

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum over the channels' rows; the taps' margin is not one of rows."""
        return self.over_channels.from_rows(state, rows)

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Diagonalize both margins; damp and raise the eigenvalues of their product."""
        taps = self.tensor(state, "tap_second_moment") / mass
        by_tap, over_channels = try_eigh(taps), self.over_channels.spectrum(state, mass)
        if by_tap is None or over_channels is None:
            return None
        energy = taps.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        energy = torch.where(energy > 0, energy, 1.0).view(-1, 1, 1)
        frequencies = by_tap[0].unsqueeze(-1) / energy
        if power.damping_mode == "mean":
            # Either margin's mean eigenvalue is m, and so is their product's.
            reference = over_channels.trace().view(-1, 1, 1) / self.width
        else:
            reference = frequencies.amax(dim=1, keepdim=True) * over_channels.largest().view(-1, 1, 1)

        def gains(eigenvalues: Tensor) -> Tensor:
            damped = damped_eigenvalues(
                frequencies * eigenvalues.unsqueeze(1), power.damping, power.damping_mode, reference=reference
            )
            return damped.pow(power.exponent)

        excess = gains(over_channels.eigenvalues)
        found = {
            **{f"channel_{name}": value for name, value in over_channels.kept.items()},
            "channel_directions": over_channels.directions,
            "tap_directions": by_tap[1].contiguous(),
        }
        if over_channels.tail is not None:
            tail = gains(over_channels.tail.unsqueeze(-1))
            found["tail"], excess = tail.squeeze(-1), excess - tail
        found["excess"] = excess
        return found if all(bool(torch.isfinite(value).all()) for value in found.values()) else None

    def first_turn(self, state: State) -> Tensor:
        """Return by what a kernel's taps are multiplied before `multiply`, shape [groups, taps, taps].

        Where all of V are kept: Wᵀ. Where some are: W diag(tail) Wᵀ, which is all of the power outside of V.
        """
        directions = self.tensor(state, "tap_directions")
        if not self.flat_tail:
            return directions.mT
        return (directions * self.tensor(state, "tail").unsqueeze(1)) @ directions.mT

    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """Multiply rows over channels, one for each unit and tap, turned by `first_turn`; returns ``matrix``."""
        directions, excess = self.tensor(state, "channel_directions"), self.tensor(state, "excess")
        over_taps = self.tensor(state, "tap_directions")
        inner = torch.bmm(matrix, directions, out=leading(out, (*matrix.shape[:2], self.rank)))
        each = inner.view(-1, self.taps, self.rank)
        turn = over_taps.unsqueeze(1).expand(-1, len(each) // self.groups, -1, -1).reshape(len(each), *[self.taps] * 2)
        if self.flat_tail:
            excess = excess / self.tensor(state, "tail").unsqueeze(-1)
            each = torch.bmm(turn.mT, each)
        each.view(self.groups, -1, self.taps, self.rank).mul_(excess.unsqueeze(1))
        inner = torch.bmm(turn, each).view(inner.shape)
        if not self.flat_tail:
            return torch.bmm(inner, directions.mT, out=matrix)
        return matrix.baddbmm_(inner, directions.mT)

    @property
    def cost(self) -> float:
        """Both factors'."""
        return self.over_channels.cost + self.over_taps.cost

    def describe(self) -> str:
        """Name both factors."""
        times = f"{self.groups} × " if self.groups > 1 else ""
        rank = f" of rank {self.rank}" if self.flat_tail else ""
        return f"channels {times}{self.width}{rank} ⊗ taps {times}{self.taps}"


class KroneckerForm(Form):
    """A convolution's second moment by its margins, over channels and over kernel taps: R_C ⊗ R_K / m.

    With Q[c, k, c', k'] the second moment of the rows, R_C = mean over k of Q[:, k, :, k] and R_K = mean over c of
    Q[c, :, c, :]. A bias is one more channel: the constant 1, spread evenly over the taps as 1/√K, which is the joint
    row (x, 1) seen through an isometry. The damping is added to the product's eigenvalues.
    """

    def __init__(self, layer: Layer, bias: bool, make: Callable[[int, int], MatrixFactor]) -> None:
        super().__init__(layer, bias)
        self.factor = KroneckerFactor(make(self.groups, self.channels + bias), self.taps)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The one factor."""
        return (self.factor,)

    def observe(self, state: State, layer: Layer, inputs: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
        """Sum both margins, without laying out patches."""
        window = layer.layout.window(layer.module)
        assert window is not None
        padded = layer.layout.padded(layer.module, *inputs).to(dtype)
        margins = patch_margins(padded, window)
        count, taps = float(margins.positions), margins.taps
        counts = torch.full((self.groups,), count, dtype=dtype, device=taps.device)
        if self.bias:
            taps = taps + count / self.taps
        if isinstance(self.factor.over_channels, SketchedFactor):
            pieces = self._tap_rows(padded, window)
            sums = sums_of_pieces(self.factor.from_rows(state, rows) for rows in pieces)
        elif self.bias:
            sums = [with_border(margins.channels, margins.sums / math.sqrt(self.taps), counts)]
        else:
            sums = [margins.channels]
        return [*(part / self.taps for part in sums), taps / (self.channels + self.bias), counts]

    def _tap_rows(self, padded: Tensor, window: Window) -> Any:
        """Lay out rows over channels in pieces, every tap of every patch being one."""
        for piece in samples_in_pieces(padded, padded[:1].numel() * self.taps) or (padded,):
            rows = patch_rows(piece, window).unflatten(2, (-1, self.taps)).transpose(2, 3).flatten(1, 2)
            yield F.pad(rows, (0, 1), value=1 / math.sqrt(self.taps)) if self.bias else rows

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the factor."""
        return keyed(self.factor, self.factor.solve(state, mass, power))

    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Turn taps on the way to channels last, multiply over channels, and turn back what is few there."""
        groups, units = weight.shape[:2]
        width = self.channels + (bias is not None)
        turn = self.factor.first_turn(state)
        rows = groups * units
        each = turn.unsqueeze(1).expand(groups, units, self.taps, self.taps).reshape(rows, self.taps, self.taps)
        # [groups · out, taps, channels]: channels last, so that one product serves all units and taps.
        matrix = scratch.take("matrix", (rows, self.taps, width), weight)
        torch.bmm(each, weight.reshape(rows, self.channels, self.taps).mT, out=matrix[..., : self.channels])
        if bias is not None:
            constant = turn.sum(dim=-1) / math.sqrt(self.taps)  # the turned (1, …, 1)ᵀ/√K, shape [groups, taps]
            matrix[..., -1] = (bias.unsqueeze(-1) * constant.unsqueeze(1)).reshape(rows, self.taps)
        flat = matrix.view(groups, units * self.taps, width)
        product = self.factor.multiply(state, flat, scratch.take("product", flat.shape, flat), scaled=scaled)
        product = product.view(groups, units, self.taps, width)
        back = product[..., : self.channels].transpose(2, 3).unflatten(3, weight.shape[3:])
        return back, None if bias is None else product[..., -1].sum(dim=-1) / math.sqrt(self.taps)

    def describe(self) -> str:
        """Name both factors."""
        return self.factor.describe()
