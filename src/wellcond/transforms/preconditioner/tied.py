"""A table that embeds tokens and is also read as a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wellcond.layouts import Layer, LinearLayout
from wellcond.numerics.linalg import damped_eigenvalues, try_eigh
from wellcond.transforms.base import State
from wellcond.transforms.preconditioner.factors import Factor, Power
from wellcond.transforms.preconditioner.form import Form, Scratch, keyed, sum_rows


def is_embedding_and_linear(uses: Sequence[Layer]) -> bool:
    """Say whether a table is embedded and also read as a linear layer, as language models tie input and output."""
    return all(use.layout.one_hot or isinstance(use.layout, LinearLayout) for use in uses)


class TiedFactor(Factor):
    """A table's two inputs, tokens on one side and features on the other.

    The second moment of both uses together is D ⊗ I + I ⊗ M: D the frequencies of the tokens that it embeds,
    M = E[x xᵀ] of the linear layer's inputs. With M = Q Λ Qᵀ, its power p acts on G as
    ((G Q) ∘ (d_i + λ_j + damping)^p) Qᵀ: for p = −1 the least-squares step on the outputs of both.

    Args:
        tokens: Rows of the table.
        width: Columns of the table.
        exponent: The power.
    """

    averaged: tuple[str, ...] = ("token_moment", "second_moment")

    solved: tuple[str, ...] = ("frequencies", "directions", "eigenvalues")
    products: tuple[str, ...] = ("frequencies", "directions", "eigenvalues")

    def __init__(self, tokens: int, width: int, exponent: float) -> None:
        super().__init__(1, width)
        self.tokens, self.exponent = tokens, exponent

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Both moments; the damped diagonal form of their sum."""
        square = (1, self.width, self.width)
        return {
            "token_moment": (1, self.tokens),
            "second_moment": square,
            "frequencies": (1, self.tokens),
            "directions": square,
            "eigenvalues": (1, self.width),
        }

    def first(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Start with zero moments and the identity."""
        if name == "directions":
            return torch.eye(self.width, dtype=dtype, device=device).unsqueeze(0)
        start = torch.ones if name == "eigenvalues" else torch.zeros
        return start(self.shapes()[name], dtype=dtype, device=device)

    def from_rows(self, state: State, rows: Tensor) -> list[Tensor]:
        """Sum x xᵀ of the linear layer's rows."""
        return [rows.mT @ rows]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Diagonalize M, and add the damping to its eigenvalues."""
        frequencies = self.tensor(state, "token_moment") / mass
        found = try_eigh(self.tensor(state, "second_moment") / mass)
        if found is None:
            return None
        eigenvalues, directions = found
        # What the eigenvalues of the sum, d_i + λ_j, are at most, or in the mean.
        of_all = torch.mean if power.damping_mode == "mean" else torch.amax
        reference = of_all(frequencies) + of_all(eigenvalues)
        damped = damped_eigenvalues(eigenvalues, power.damping, power.damping_mode, reference=reference)
        return {"frequencies": frequencies, "directions": directions.contiguous(), "eigenvalues": damped}

    def multiply(self, state: State, matrix: Tensor, out: Tensor, *, scaled: bool) -> Tensor:
        """Turn to M's eigenvectors, divide by the sum of both sides' eigenvalues, turn back."""
        directions = self.tensor(state, "directions")
        turned = torch.bmm(matrix, directions, out=out)
        sums = self.tensor(state, "frequencies").unsqueeze(-1) + self.tensor(state, "eigenvalues").unsqueeze(1)
        turned *= sums.pow_(self.exponent)
        return turned @ directions.mT

    @property
    def cost(self) -> float:
        """Cubic in the width."""
        return float(self.width) ** 3

    def describe(self) -> str:
        """Give both sizes."""
        return f"tokens (diagonal of {self.tokens}) ⊕ features {self._size()}"


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
        moment, count = sum_rows(self.factor, state, layer, inputs, False, dtype)
        return [torch.zeros(1, self.factor.tokens, dtype=dtype, device=device), moment, F.pad(count, (1, 0))]

    def solve(self, state: State, mass: Tensor, power: Power) -> dict[str, Tensor] | None:
        """Solve the factor."""
        return keyed(self.factor, self.factor.solve(state, mass, power))

    def whole_power(self, state: State, like: Tensor, *, scaled: bool) -> None:
        """Return none: tokens and features are two sides."""

    def multiply(
        self, state: State, weight: Tensor, bias: Tensor | None, scratch: Scratch, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Multiply from both sides, whichever use the weight is viewed as."""
        table = weight.mT if self.turned else weight
        product = self.factor.multiply(state, table, scratch.take("product", table.shape, table), scaled=scaled)
        return product.mT if self.turned else product, None

    def describe(self) -> str:
        """Name both sides."""
        return self.factor.describe()
