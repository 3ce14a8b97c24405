"""The residuals of theorem 2, the cross-entropy penalty, BN's Jacobian and the parts of gamma decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from wellcond.theory import (
    batch_norm_jacobian,
    cross_entropy_noise_penalty,
    gamma_decay_coefficient,
    gamma_decay_parts,
    noise_residuals,
)


def numbers(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_residuals_of_a_square_are_as_computed_by_hand() -> None:
    """l = ½x²: R^add = 1/(2m), R^mul = x²/2 (m/(m−3) − 1), R = 1/(2m) (m/(m−3) − 1)."""
    m, x = 16, torch.tensor([[0.0], [1.5]], dtype=torch.float64)
    found = noise_residuals(lambda x: 0.5 * x.square().sum(1), x, m, draws=20_000, generator=numbers(0))
    growth = m / (m - 3) - 1
    expected = ([1 / (2 * m)] * 2, [0.0, 1.5**2 / 2 * growth], [growth / (2 * m)] * 2)
    for part, values in zip(found, expected, strict=True):
        for value, error, right in zip(part.value.tolist(), part.error.tolist(), values, strict=True):
            assert abs(value - right) <= 4 * error
            assert error < 0.01
    assert found.cross.error[0] > 0


def test_the_parts_add_up_to_what_both_noises_do() -> None:
    x = torch.randn(5, 3, generator=numbers(1), dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return torch.tanh(x).sum(1).exp()

    m, draws = 8, 50
    found = noise_residuals(loss, x, m, draws=draws, generator=numbers(2))
    again = numbers(2)
    total = torch.zeros(5, dtype=torch.float64)
    for _ in range(draws):
        mean = torch.randn(x.shape, dtype=x.dtype, generator=again) / math.sqrt(m)
        variance = torch._standard_gamma(torch.full_like(x, (m - 1) / 2), generator=again) * 2 / m
        total += loss((x + mean) / variance.sqrt()) - loss(x)
    assert torch.allclose(sum(part.value for part in found), total / draws)


def test_the_cross_residual_vanishes_faster_than_the_others() -> None:
    x = torch.tensor([[0.7]], dtype=torch.float64)
    shares = []
    for m in (8, 128):
        found = noise_residuals(lambda x: x.square().sum(1), x, m, draws=20_000, generator=numbers(3))
        shares.append(float(found.cross.value / found.additive.value))
    assert shares[1] < shares[0] / 8


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_the_cross_entropy_penalty_and_its_left_out_term_are_the_second_derivative(t: float) -> None:
    weight = torch.tensor([[0.8], [-1.1]], dtype=torch.float64)
    x = torch.randn(4, 2, generator=numbers(4), dtype=torch.float64).requires_grad_()
    targets = torch.full((4, 1), t, dtype=torch.float64)
    penalty = cross_entropy_noise_penalty(lambda x: torch.sigmoid(x @ weight), x, targets, 0.2)
    f = torch.sigmoid(x @ weight)
    laplacian = f * (1 - f) * weight.square().sum()
    left_out = (f - targets) * (1 - 2 * f) * weight.square().sum()
    assert torch.allclose(penalty, 0.1 * (laplacian - left_out).sum(1))
    # The penalty can be trained through.
    (slope,) = torch.autograd.grad(penalty.sum(), x)
    assert bool(slope.isfinite().all())
    with torch.no_grad():
        assert not cross_entropy_noise_penalty(lambda x: torch.sigmoid(x @ weight), x, targets, 0.2).requires_grad


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_the_jacobian_is_that_of_batch_norm(eps: float) -> None:
    h = torch.randn(7, 2, generator=numbers(5), dtype=torch.float64)

    def normalized(column: Tensor) -> Tensor:
        return 1.3 * (column - column.mean()) / (column.var(correction=0) + eps).sqrt()

    expected = torch.stack([torch.autograd.functional.jacobian(normalized, column) for column in h.unbind(1)])
    assert torch.allclose(batch_norm_jacobian(h, 1.3, eps), expected)
    assert torch.allclose(batch_norm_jacobian(h[:, 1], 1.3, eps), expected[1])


def test_the_parts_of_gamma_decay_add_up() -> None:
    fisher, curvature = torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.5])
    parts = gamma_decay_parts(8, fisher, curvature, 1.0)
    assert torch.equal(torch.as_tensor(parts.mean), curvature / 16)
    assert torch.equal(torch.as_tensor(parts.deviation), 3 / 64 * fisher)
    assert torch.equal(torch.as_tensor(parts.coefficient), gamma_decay_coefficient(8, fisher, curvature, 1.0))


def test_errors_name_the_argument() -> None:
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 2, got 1"):
        noise_residuals(lambda x: x.sum(1), x, 1)
    with pytest.raises(ValueError, match="draws must be an integer of at least 2, got 1"):
        noise_residuals(lambda x: x.sum(1), x, 4, draws=1)
    with pytest.raises(ValueError, match=r"loss must return one number for each sample, got shape \(2, 1\)"):
        noise_residuals(lambda x: x, x, 4)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, ...\)"):
        noise_residuals(lambda x: x.sum(1), x.long(), 4)
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        cross_entropy_noise_penalty(torch.sigmoid, x, torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="features must vary"):
        batch_norm_jacobian(torch.ones(4))
    with pytest.raises(ValueError, match="features must have shape"):
        batch_norm_jacobian(torch.ones(1))
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        batch_norm_jacobian(torch.arange(4.0), eps=-1)
