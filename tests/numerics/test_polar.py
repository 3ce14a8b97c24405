"""Polar factors by Newton-Schulz steps, against singular value decompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wellcond.numerics.polar import QUINTIC, newton_schulz_polar

CONVERGING = (1.875, -1.25, 0.375)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), steps=st.integers(1, 6), seed=st.integers(0, 50))
def test_each_step_is_the_polynomial_of_the_singular_values(rows: int, columns: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = QUINTIC
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(newton_schulz_polar(matrix, steps), left @ torch.diag(values) @ right)


def test_it_converges_to_the_polar_factor_of_every_matrix_of_a_batch() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(newton_schulz_polar(matrices, 40, CONVERGING), left @ right)
    torch.testing.assert_close(newton_schulz_polar(matrices.mT, 40, CONVERGING), (left @ right).mT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_five_steps_bring_singular_values_near_one_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factor = newton_schulz_polar(torch.randn(20, 50).to(dtype)).float()
    values = torch.linalg.svdvals(factor)
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_zero_stays_zero() -> None:
    assert torch.equal(newton_schulz_polar(torch.zeros(3, 2)), torch.zeros(3, 2))
