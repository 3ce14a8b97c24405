"""Factors of a preconditioner: a symmetric matrix per group, kept whole, truncated, sketched, or diagonal.

A factor averages one second moment, takes its damped power, and multiplies gradients with that. Its tensors live in
the slot's state, under keys that begin with the factor's prefix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wellcond.numerics.linalg import DampingMode, Solver, damped_eigenvalues, try_eigh, try_symmetric_power
from wellcond.numerics.low_rank import try_low_rank_power, try_truncated_power
from wellcond.transforms.base import State


@dataclass(frozen=True)
class Power:
    """The wanted power of a second moment, and its solver: see `wellcond.numerics.linalg.symmetric_power`."""

    exponent: float
    damping: float
    damping_mode: DampingMode
    solver: Solver = "auto"


@dataclass(frozen=True)
class Eigendecomposition:
    """The known eigenvalues of a factor's moment, with their directions.

    Attributes:
        directions: Eigenvectors, shape [groups, width, r].
        eigenvalues: Theirs, at least 0, shape [groups, r].
        tail: The eigenvalue of all other directions, shape [groups]; None where there are no others.
        kept: Further tensors by name to replace in the state.
    """

    directions: Tensor
    eigenvalues: Tensor
    tail: Tensor | None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def largest(self) -> Tensor:
        """Return the largest eigenvalue, shape [groups]."""
        largest = self.eigenvalues.amax(dim=-1)
        return largest if self.tail is None else torch.maximum(largest, self.tail)

    def trace(self) -> Tensor:
        """Return the sum of all eigenvalues, shape [groups]."""
        total = self.eigenvalues.sum(dim=-1)
        width, known = self.directions.shape[-2:]
        return total if self.tail is None else total + (width - known) * self.tail


class Factor(ABC):
    """One symmetric matrix per group.

    Args:
        groups: How many matrices.
        width: Their order.
        prefix: What its keys in the state begin with.
    """

    def __init__(self, groups: int, width: int, prefix: str = "") -> None:
        self.groups, self.width, self.prefix = groups, width, prefix

    # The names of the moving averages, in the order in which `from_rows` returns their sums; of what `solve` replaces;
    # and of those of them that `multiply` uses.
    averaged: tuple[str, ...]
    solved: tuple[str, ...]
    products: tuple[str, ...]

    def key(self, name: str) -> str:
        """Return the key of one of the factor's tensors in the slot's state."""
        return self.prefix + name

    def tensor(self, state: State, name: str) -> Tensor:
        """Return one of the factor's tensors from the slot's state."""
        value = state[self.key(name)]
        assert isinstance(value, Tensor)
        return value

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name: the moving averages, then what `solve` makes of them."""

    @abstractmethod
    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make one tensor of `shapes` as it is before anything was seen."""

    @abstractmethod
    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum over rows what the moving averages average.

        Args:
            state: The slot's state; read only.
            rows: Shape [groups, n, width].

        Returns:
            One tensor per name in `averaged`.
        """

    @abstractmethod
    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take the power of the moving average.

        Args:
            state: The slot's state; read only.
            mass: By which the moving averages are divided, shape [].
            power: Which power.

        Returns:
            Tensors by name to replace in the state; None if the factorization failed.
        """

    @abstractmethod
    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """Multiply rows with the power of the second moment, from the right.

        Args:
            state: The slot's state.
            matrix: Shape [groups, n, width]; may be overwritten.
            out: Scratch of the same shape.
            scaled: Whether a common positive factor of the power matters.

        Returns:
            The product: ``matrix`` or ``out``.
        """

    @property
    @abstractmethod
    def cost(self) -> float:
        """Roughly the operations of one `solve`."""

    @abstractmethod
    def describe(self) -> str:
        """Say what is kept, for reports."""

    def numbers(self) -> int:
        """Count the numbers that the factor keeps."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def _size(self) -> str:
        return f"{self.groups} × {self.width} × {self.width}" if self.groups > 1 else f"{self.width} × {self.width}"


class MatrixFactor(Factor):
    """A symmetric matrix per group whose leading eigenvectors can be told, and whose power can be written by them."""

    @abstractmethod
    def spectrum(self, state: State, mass: Tensor) -> Eigendecomposition | None:
        """Diagonalize the moving average, as far as it is kept; None if that fails."""

    @abstractmethod
    def assembled(self, spectrum: Eigendecomposition, gains: Tensor, tail_gain: Tensor | None) -> dict[str, Tensor]:
        """Write a power as it is kept.

        Args:
            spectrum: As `spectrum` returned it.
            gains: The power's eigenvalues in its directions, shape [groups, r].
            tail_gain: That in all others, shape [groups]; None where there are no others.

        Returns:
            Tensors by name.
        """


class WholeFactor(MatrixFactor):
    """The matrix and its power, as they are."""

    averaged: tuple[str, ...] = ("second_moment",)

    solved: tuple[str, ...] = ("preconditioner",)
    products: tuple[str, ...] = ("preconditioner",)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Two matrices."""
        shape = (self.groups, self.width, self.width)
        return {"second_moment": shape, "preconditioner": shape}

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero moment, identity power."""
        if name == "second_moment":
            return torch.zeros(self.shapes()[name], dtype=dtype, device=device)
        return torch.eye(self.width, dtype=dtype, device=device).repeat(self.groups, 1, 1)

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum x xᵀ."""
        return [rows.mT @ rows]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """T ← (M + damping)^p."""
        moment = self.tensor(state, "second_moment") / mass
        result = try_symmetric_power(
            moment, power.exponent, power.damping, damping_mode=power.damping_mode, solver=power.solver
        )
        # In one memory layout, whatever the solver returned: products after a resume then agree bit for bit.
        return None if result is None else {"preconditioner": result.contiguous()}

    def spectrum(self, state: State, mass: Tensor) -> Eigendecomposition | None:
        """Diagonalize it."""
        found = try_eigh(self.tensor(state, "second_moment") / mass)
        return None if found is None else Eigendecomposition(found[1].contiguous(), found[0], None)

    def assembled(self, spectrum: Eigendecomposition, gains: Tensor, tail_gain: Tensor | None) -> dict[str, Tensor]:
        """Multiply it out."""
        return {"preconditioner": (spectrum.directions * gains.unsqueeze(-2)) @ spectrum.directions.mT}

    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """One product."""
        return torch.bmm(matrix, self.tensor(state, "preconditioner"), out=out)

    @property
    def cost(self) -> float:
        """Cubic in the width."""
        return float(self.groups) * self.width**3

    def describe(self) -> str:
        """Give the size."""
        return self._size()


class _LowRankFactor(MatrixFactor):
    """T = tail · (I + U diag(excess) Uᵀ): the leading directions, and one gain for all others."""

    solved: tuple[str, ...] = ("directions", "excess", "tail")
    products: tuple[str, ...] = ("directions", "excess", "tail")

    def __init__(self, groups: int, width: int, rank: int, prefix: str = "") -> None:
        super().__init__(groups, width, prefix)
        self.rank = rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the power's three tensors."""
        return {
            "directions": (self.groups, self.width, self.rank),
            "excess": (self.groups, self.rank),
            "tail": (self.groups,),
        }

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Start with the identity."""
        start = torch.ones if name == "tail" else torch.zeros
        return start(self.shapes()[name], dtype=dtype, device=device)

    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """Two thin products."""
        directions = self.tensor(state, "directions")
        inner = torch.bmm(matrix, directions, out=leading(out, (*matrix.shape[:2], self.rank)))
        inner.mul_(self.tensor(state, "excess").unsqueeze(1))
        matrix.baddbmm_(inner, directions.mT)
        return matrix.mul_(self.tensor(state, "tail").view(-1, 1, 1)) if scaled else matrix

    def assembled(self, spectrum: Eigendecomposition, gains: Tensor, tail_gain: Tensor | None) -> dict[str, Tensor]:
        """Keep the directions."""
        assert tail_gain is not None
        return spectrum.kept | self.power_tensors(spectrum.directions, gains, tail_gain)

    def power_tensors(self, directions: Tensor, gains: Tensor, tail: Tensor) -> dict[str, Tensor]:
        """Write T = U diag(gains) Uᵀ + tail · (I − U Uᵀ) as it is kept."""
        return {
            "directions": directions.contiguous(),
            "excess": (gains / tail.unsqueeze(-1) - 1).contiguous(),
            "tail": tail.contiguous(),
        }


class TruncatedFactor(_LowRankFactor):
    """The matrix whole, its power by the leading eigenvectors: cheaper products, the same statistics."""

    averaged: tuple[str, ...] = ("second_moment",)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The moment and the power's tensors."""
        return {"second_moment": (self.groups, self.width, self.width), **super().shapes()}

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum x xᵀ."""
        return [rows.mT @ rows]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Keep the leading eigenvectors; all other eigenvalues become their mean."""
        found = try_truncated_power(
            self.tensor(state, "second_moment") / mass,
            self.rank,
            power.exponent,
            power.damping,
            damping_mode=power.damping_mode,
        )
        return None if found is None else self.power_tensors(*found)

    def spectrum(self, state: State, mass: Tensor) -> Eigendecomposition | None:
        """Diagonalize the moment; all eigenvalues but the leading ones become their mean."""
        found = try_eigh(self.tensor(state, "second_moment") / mass)
        if found is None:
            return None
        eigenvalues, directions = found
        tail = eigenvalues[..., : -self.rank].mean(dim=-1)
        return Eigendecomposition(directions[..., -self.rank :].contiguous(), eigenvalues[..., -self.rank :], tail)

    @property
    def cost(self) -> float:
        """Cubic in the width."""
        return float(self.groups) * self.width**3

    def describe(self) -> str:
        """Give the size and the rank."""
        return f"{self._size()} of rank {self.rank}"


class SketchedFactor(_LowRankFactor):
    """A matrix too wide to keep: its products with a basis, which follows its leading eigenvectors.

    The moving average is that of M·Q and of the trace. Each solve makes of them the Nyström approximation of M
    (Tropp, Yurtsever, Udell & Cevher 2017) and takes its eigenvectors as the next basis: a subspace iteration.
    """

    averaged: tuple[str, ...] = ("sketch", "trace")

    solved: tuple[str, ...] = ("sketch", "basis", "directions", "excess", "tail")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The sketch, its basis, the trace, and the power's tensors."""
        thin = (self.groups, self.width, self.rank)
        return {"sketch": thin, "trace": (self.groups,), "basis": thin, **super().shapes()}

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Start from a random orthonormal basis, the same on every rank and in every run."""
        if name != "basis":
            return super().first(name, dtype, device)
        generator = torch.Generator("cpu").manual_seed(self.width)
        start = torch.randn(self.width, self.rank, dtype=torch.float64, generator=generator, device="cpu")
        basis: Tensor = torch.linalg.qr(start)[0]
        return basis.to(dtype).to(device).repeat(self.groups, 1, 1)

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum x (xᵀ Q) and xᵀ x."""
        return [rows.mT @ (rows @ self.tensor(state, "basis")), rows.square().sum(dim=(1, 2))]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take the power of the Nyström approximation, and its eigenvectors as the next basis."""
        found = try_low_rank_power(
            self.tensor(state, "sketch") / mass,
            self.tensor(state, "basis"),
            self.tensor(state, "trace") / mass,
            power.exponent,
            power.damping,
            damping_mode=power.damping_mode,
        )
        if found is None:
            return None
        directions, eigenvalues, _, gains, tail = found
        return self._next(directions, eigenvalues, mass) | self.power_tensors(directions, gains, tail)

    def spectrum(self, state: State, mass: Tensor) -> Eigendecomposition | None:
        """Take the eigenvectors of the Nyström approximation."""
        sketch, basis = self.tensor(state, "sketch") / mass, self.tensor(state, "basis")
        found = try_low_rank_power(sketch, basis, self.tensor(state, "trace") / mass, 1.0, damping_mode="absolute")
        if found is None:
            return None
        directions, eigenvalues, tail, _, _ = found
        return Eigendecomposition(directions.contiguous(), eigenvalues, tail, self._next(directions, eigenvalues, mass))

    def _next(self, directions: Tensor, eigenvalues: Tensor, mass: Tensor) -> dict[str, Tensor]:
        """Return what M times the new basis is, as far as M is known: the average goes on from there."""
        sketch = directions * (eigenvalues * mass).unsqueeze(-2)
        return {"sketch": sketch, "basis": directions.contiguous()}

    @property
    def cost(self) -> float:
        """Linear in the width."""
        return float(self.groups) * self.width * self.rank**2 * 4

    def describe(self) -> str:
        """Give the size and the rank."""
        return f"{self._size()} sketched at rank {self.rank}"


class DiagonalFactor(Factor):
    """A diagonal matrix: the frequencies of one-hot inputs."""

    averaged: tuple[str, ...] = ("second_moment",)

    solved: tuple[str, ...] = ("preconditioner",)
    products: tuple[str, ...] = ("preconditioner",)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Two diagonals."""
        return {"second_moment": (self.groups, self.width), "preconditioner": (self.groups, self.width)}

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero moment, identity power."""
        start = torch.zeros if name == "second_moment" else torch.ones
        return start(self.shapes()[name], dtype=dtype, device=device)

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum the squares."""
        return [rows.square().sum(dim=1)]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Take the power of every element."""
        moment = self.tensor(state, "second_moment") / mass
        result = damped_eigenvalues(moment, power.damping, power.damping_mode).pow(power.exponent)
        return {"preconditioner": result} if bool(torch.isfinite(result).all()) else None

    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """Scale the columns."""
        return torch.mul(matrix, self.tensor(state, "preconditioner").unsqueeze(1), out=out)

    @property
    def cost(self) -> float:
        """Linear in the width."""
        return float(self.groups * self.width)

    def describe(self) -> str:
        """Give the length."""
        return f"diagonal of {self.width}"


def leading(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View the first elements of a contiguous buffer in another shape."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)
