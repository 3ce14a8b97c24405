"""Damped matrix powers against spectra worked out by hand and an eigenvector-by-eigenvector reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wellcond import linalg
from wellcond.linalg import choose_solver, symmetric_power, try_symmetric_power

EXPONENTS = (-1.0, -0.5, -0.25, 0.5, 1.0, 2.0)


def rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(eigenvalues: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix Σ λ_i q_i q_iᵀ, and its eigenvectors q_i as columns."""
    q = rotation(len(eigenvalues), seed)
    matrix = torch.zeros(len(eigenvalues), len(eigenvalues), dtype=torch.float64)
    for i, value in enumerate(eigenvalues):
        matrix += value * torch.outer(q[:, i], q[:, i])
    return matrix, q


def power_by_hand(eigenvalues: list[float], q: Tensor, exponent: float, added: float) -> Tensor:
    result = torch.zeros_like(q)
    for i, value in enumerate(eigenvalues):
        result += (value + added) ** exponent * torch.outer(q[:, i], q[:, i])
    return result


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_relative_damping_adds_a_share_of_the_largest_eigenvalue(exponent: float, damping: float) -> None:
    spectrum = [0.02, 0.5, 1.5, 8.0]
    matrix, q = with_spectrum(spectrum)
    expected = power_by_hand(spectrum, q, exponent, damping * 8.0)
    torch.testing.assert_close(symmetric_power(matrix, exponent, damping), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_absolute_damping_adds_the_number_itself(exponent: float, damping: float) -> None:
    spectrum = [0.02, 0.5, 1.5, 8.0]
    matrix, q = with_spectrum(spectrum)
    expected = power_by_hand(spectrum, q, exponent, damping)
    result = symmetric_power(matrix, exponent, damping, damping_mode="absolute")
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


def test_without_damping_the_plain_power_of_hand_computed_matrices() -> None:
    # Eigenvalues 1 and 9 with eigenvectors (1, -1)/√2 and (1, 1)/√2.
    matrix = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64)
    inverse_root = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(symmetric_power(matrix, -0.5), inverse_root, rtol=0, atol=1e-14)
    inverse = torch.tensor([[5.0, -4.0], [-4.0, 5.0]], dtype=torch.float64) / 9
    torch.testing.assert_close(symmetric_power(matrix, -1.0), inverse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["auto", "eigh", "cholesky"])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_both_solvers_invert_damped_singular_matrices(solver: str, rank: int) -> None:
    spectrum = [0.0] * (6 - rank) + [0.3 * (i + 1) for i in range(rank)]
    matrix, q = with_spectrum(spectrum, seed=rank)
    result = symmetric_power(matrix, -1.0, 0.1, damping_mode="absolute", solver=solver)
    torch.testing.assert_close(result, power_by_hand(spectrum, q, -1.0, 0.1), rtol=1e-10, atol=1e-11)


@given(
    size=st.integers(1, 7),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 12),
    exponent=st.sampled_from([-1.0, -0.5]),
    damping=st.sampled_from([1e-4, 1e-2, 0.5]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_power_undoes_the_damped_matrix(
    size: int, seed: int, rows: int, exponent: float, damping: float, scale: float
) -> None:
    """T^(−1/p) = M + ε λ_max I: the power is checked by multiplying back, without any eigenvalue of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(rows, size, generator=generator, dtype=torch.float64)
    matrix = x.mT @ x / rows
    power = symmetric_power(matrix, exponent, damping)
    largest = torch.linalg.matrix_norm(matrix, ord=2)
    damped = matrix + damping * largest * torch.eye(size, dtype=torch.float64)
    product = damped @ power if exponent == -1 else damped @ power @ power
    torch.testing.assert_close(product, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(power, power.mT, rtol=1e-9, atol=1e-12 * float(power.abs().max()))


@pytest.mark.parametrize("damping", [1e-3, 0.1, 0.5])
@pytest.mark.parametrize("spectrum", [[0.0, 0.0, 5.0], [1e-9, 1.0, 1.0], [0.2, 3.0, 100.0], [4.0, 4.0, 4.0]])
def test_condition_number_is_bounded_by_one_plus_eps_over_eps(damping: float, spectrum: list[float]) -> None:
    matrix, _ = with_spectrum(spectrum)
    values = torch.linalg.eigvalsh(symmetric_power(matrix, -1.0, damping))
    condition = float(values[-1] / values[0])
    assert condition <= (1 + damping) / damping * (1 + 1e-9)
    if spectrum[0] == 0.0:  # the bound is reached
        assert condition == pytest.approx((1 + damping) / damping, rel=1e-9)


def test_zero_matrix_with_relative_damping_is_the_identity() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(symmetric_power(zero, -0.5, 1e-3), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_zero_matrix_with_absolute_damping_is_a_multiple_of_the_identity(solver: str) -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    result = symmetric_power(zero, -1.0, 0.1, damping_mode="absolute", solver=solver)
    torch.testing.assert_close(result, 10 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize("exponent", [-0.5, -1.0])
def test_a_batch_gives_each_matrix_its_own_power(damping_mode: str, exponent: float) -> None:
    """One matrix of the batch is zero and one 10⁶ times larger: neither may lend its λ_max to the others."""
    matrices = torch.stack(
        [
            with_spectrum([0.1, 1.0, 2.0], seed=1)[0],
            torch.zeros(3, 3, dtype=torch.float64),
            1e6 * with_spectrum([0.0, 1.0, 2.0], seed=2)[0],
            with_spectrum([3.0, 3.0, 3.0], seed=3)[0],
        ]
    )
    batched = matrices.reshape(2, 2, 3, 3)
    result = symmetric_power(batched, exponent, 0.01, damping_mode=damping_mode)
    assert result.shape == (2, 2, 3, 3)
    for i in range(4):
        alone = symmetric_power(matrices[i], exponent, 0.01, damping_mode=damping_mode)
        torch.testing.assert_close(result.reshape(4, 3, 3)[i], alone, rtol=1e-12, atol=1e-14)


def test_only_the_lower_triangle_is_read() -> None:
    matrix, _ = with_spectrum([0.5, 1.0, 2.0])
    spoiled = matrix.tril() + 7 * torch.ones(3, 3, dtype=torch.float64).triu(1)
    for exponent, mode in ((-0.5, "relative"), (-1.0, "absolute")):
        torch.testing.assert_close(
            symmetric_power(spoiled, exponent, 0.1, damping_mode=mode),
            symmetric_power(matrix, exponent, 0.1, damping_mode=mode),
            rtol=1e-12,
            atol=1e-12,
        )


def test_the_argument_is_left_alone_and_the_dtype_kept() -> None:
    matrix = with_spectrum([0.5, 1.0, 2.0])[0].float()
    before = matrix.clone()
    for solver in ("eigh", "cholesky"):
        result = symmetric_power(matrix, -1.0, 0.1, damping_mode="absolute", solver=solver)
        assert result.dtype == torch.float32
        assert torch.equal(matrix, before)


def test_float32_singular_matrix_stays_finite_and_accurate() -> None:
    """Rounding turns zero eigenvalues slightly negative; with ε λ_max = 1e-5 λ_max they may not spoil the power."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    matrix = x.mT @ x / 4
    exact = symmetric_power(matrix, -0.5, 1e-3)
    rounded = symmetric_power(matrix.float(), -0.5, 1e-3)
    assert bool(torch.isfinite(rounded).all())
    assert float((rounded.double() - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize(
    ("exponent", "mode", "solver", "chosen"),
    [
        (-1.0, "absolute", "auto", "cholesky"),
        (-1.0, "absolute", "eigh", "eigh"),
        (-1.0, "absolute", "cholesky", "cholesky"),
        (-1.0, "relative", "auto", "eigh"),
        (-0.5, "relative", "auto", "eigh"),
        (-0.5, "absolute", "auto", "eigh"),
        (-0.5, "absolute", "eigh", "eigh"),
    ],
)
def test_auto_takes_cholesky_exactly_where_it_applies(exponent: float, mode: str, solver: str, chosen: str) -> None:
    assert choose_solver(exponent, mode, solver) == chosen


@pytest.mark.parametrize("exponent_and_mode", [(-0.5, "absolute"), (-0.5, "relative"), (-1.0, "relative")])
@pytest.mark.parametrize("power", [symmetric_power, try_symmetric_power])
def test_cholesky_is_refused_where_it_does_not_apply(
    power: Callable[..., Tensor | None], exponent_and_mode: tuple[float, str]
) -> None:
    exponent, mode = exponent_and_mode
    with pytest.raises(ValueError, match=r"cholesky.*exponent") as caught:
        power(torch.eye(2), exponent, 0.1, damping_mode=mode, solver="cholesky")
    assert f"{exponent:g}" in str(caught.value)
    assert mode in str(caught.value)


@pytest.mark.parametrize("solver", ["newton", "", None])
def test_unknown_solver_is_named_with_what_is_allowed(solver: object) -> None:
    with pytest.raises(ValueError, match="solver") as caught:
        choose_solver(-1.0, "absolute", solver)
    assert repr(solver) in str(caught.value)
    assert "eigh" in str(caught.value)
    with pytest.raises(ValueError, match="solver"):
        symmetric_power(torch.eye(2), -1.0, 0.1, solver=solver)


def test_unknown_damping_mode_is_refused_not_taken_for_absolute() -> None:
    with pytest.raises(ValueError, match="damping_mode"):
        symmetric_power(torch.eye(2), -0.5, 0.1, damping_mode="relatve")


@pytest.mark.parametrize("damping", [-0.5, math.nan])
def test_damping_outside_its_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        symmetric_power(torch.eye(2), -1.0, damping, damping_mode="absolute")


@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_try_gives_what_symmetric_power_gives(solver: str) -> None:
    matrix, _ = with_spectrum([0.5, 1.0, 2.0])
    options = {"damping_mode": "absolute", "solver": solver}
    power = try_symmetric_power(matrix, -1.0, 0.1, **options)
    assert power is not None
    assert torch.equal(power, symmetric_power(matrix, -1.0, 0.1, **options))


@pytest.mark.parametrize("name", ["eigh", "cholesky"])
def test_a_failure_is_retried_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(torch.linalg, name)
    seen: list[torch.dtype] = []

    def fails_in_float32(matrix: Tensor) -> object:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(linalg.torch.linalg, name, fails_in_float32)
    matrix, q = with_spectrum([0.5, 1.0, 2.0])
    power = try_symmetric_power(matrix.float(), -1.0, 0.1, damping_mode="absolute", solver=name)
    assert seen == [torch.float32, torch.float64]
    assert power is not None
    assert power.dtype == torch.float32
    torch.testing.assert_close(power.double(), power_by_hand([0.5, 1.0, 2.0], q, -1.0, 0.1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["eigh", "cholesky"])
def test_failure_in_both_precisions_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(matrix: Tensor) -> object:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(linalg.torch.linalg, name, fails)
    assert try_symmetric_power(torch.eye(3), -1.0, 0.1, damping_mode="absolute", solver=name) is None
    with pytest.raises(torch.linalg.LinAlgError):
        symmetric_power(torch.eye(3), -1.0, 0.1, damping_mode="absolute", solver=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_non_finite_matrices_give_none(bad: float, solver: str) -> None:
    matrix = torch.eye(4)
    matrix[2, 1] = matrix[1, 2] = bad
    assert try_symmetric_power(matrix, -1.0, 0.1, damping_mode="absolute", solver=solver) is None


def test_an_indefinite_matrix_is_no_success_of_cholesky() -> None:
    matrix = torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert try_symmetric_power(matrix, -1.0, 0.1, damping_mode="absolute", solver="cholesky") is None


def test_a_result_that_overflows_counts_as_a_failure() -> None:
    assert try_symmetric_power(torch.zeros(2, 2), -1.0, 0.0, damping_mode="absolute", solver="eigh") is None
