"""Damped matrix powers against spectra worked out by hand and an eigenvector-by-eigenvector reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairs import parametrize_pairs
from wellcond.numerics import linalg
from wellcond.numerics.linalg import choose_solver, largest_eigenvalue, symmetric_power, try_symmetric_power
from wellcond.numerics.low_rank import low_rank_power, nystrom, try_low_rank_power

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


def test_the_norm_of_millions_of_numbers_keeps_the_last_of_them() -> None:
    numbers = 1e-3 * torch.randn(1000, 13_000, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.vector_norm(numbers.double())
    torch.testing.assert_close(linalg.frobenius_norm(numbers).double(), expected, rtol=1e-5, atol=0.0)
    # One after another they are not all counted.
    assert abs(torch.linalg.vector_norm(numbers.flatten()) / expected - 1) > 1e-4


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4), (0, 3)])
def test_the_norm_of_any_shape_and_in_any_precision(shape: tuple[int, ...]) -> None:
    numbers = torch.randn(shape, dtype=torch.float16)
    found = linalg.frobenius_norm(numbers, torch.float64)
    torch.testing.assert_close(found, torch.linalg.vector_norm(numbers.double()))


def test_without_damping_the_plain_power_of_hand_computed_matrices() -> None:
    # Eigenvalues 1 and 9 with eigenvectors (1, -1)/√2 and (1, 1)/√2.
    matrix = torch.tensor([[5.0, 4.0], [4.0, 5.0]], dtype=torch.float64)
    inverse_root = torch.tensor([[2.0, -1.0], [-1.0, 2.0]], dtype=torch.float64) / 3
    torch.testing.assert_close(symmetric_power(matrix, -0.5), inverse_root, rtol=0, atol=1e-14)
    inverse = torch.tensor([[5.0, -4.0], [-4.0, 5.0]], dtype=torch.float64) / 9
    torch.testing.assert_close(symmetric_power(matrix, -1.0), inverse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("solver", ["auto", "eigh", "newton_schulz", "cholesky"])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_all_solvers_invert_damped_singular_matrices(solver: str, rank: int) -> None:
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


@pytest.mark.parametrize(
    ("exponent", "solver"), [(-0.5, "eigh"), (-0.5, "newton_schulz"), (-1.0, "newton_schulz"), (-1.0, "cholesky")]
)
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_zero_matrix_with_relative_damping_is_the_identity(exponent: float, solver: str, damping: float) -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert torch.equal(symmetric_power(zero, exponent, damping, solver=solver), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "cholesky"])
def test_zero_matrix_with_absolute_damping_is_a_multiple_of_the_identity(solver: str) -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    result = symmetric_power(zero, -1.0, 0.1, damping_mode="absolute", solver=solver)
    torch.testing.assert_close(result, 10 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("damping_mode", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("exponent", "solver"),
    [(-0.5, "auto"), (-1.0, "auto"), (-0.5, "newton_schulz"), (-1.0, "newton_schulz"), (-1.0, "cholesky")],
)
def test_a_batch_gives_each_matrix_its_own_power(damping_mode: str, exponent: float, solver: str) -> None:
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
    result = symmetric_power(batched, exponent, 0.01, damping_mode=damping_mode, solver=solver)
    assert result.shape == (2, 2, 3, 3)
    for i in range(4):
        alone = symmetric_power(matrices[i], exponent, 0.01, damping_mode=damping_mode, solver="eigh")
        error = (result.reshape(4, 3, 3)[i] - alone).norm() / alone.norm()
        assert float(error) < (1e-6 if i == 2 and damping_mode == "absolute" else 1e-12)


def test_only_the_lower_triangle_is_read() -> None:
    matrix, _ = with_spectrum([0.5, 1.0, 2.0])
    spoiled = matrix.tril() + 7 * torch.ones(3, 3, dtype=torch.float64).triu(1)
    assert float(largest_eigenvalue(spoiled)) == pytest.approx(2.0, rel=1e-12)
    for exponent, mode, solver in (
        (-0.5, "relative", "eigh"),
        (-0.5, "relative", "newton_schulz"),
        (-1.0, "relative", "cholesky"),
        (-1.0, "absolute", "cholesky"),
    ):
        torch.testing.assert_close(
            symmetric_power(spoiled, exponent, 0.1, damping_mode=mode, solver=solver),
            symmetric_power(matrix, exponent, 0.1, damping_mode=mode),
            rtol=1e-12,
            atol=1e-12,
        )


def test_the_argument_is_left_alone_and_the_dtype_kept() -> None:
    matrix = with_spectrum([0.5, 1.0, 2.0])[0].float()
    before = matrix.clone()
    for solver in ("eigh", "newton_schulz", "cholesky"):
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
        (-1.0, "relative", "cholesky", "cholesky"),
        (-0.5, "relative", "auto", "eigh"),
        (-0.5, "absolute", "auto", "eigh"),
        (-0.5, "absolute", "eigh", "eigh"),
        (-0.5, "relative", "newton_schulz", "newton_schulz"),
        (-1.0, "absolute", "newton_schulz", "newton_schulz"),
    ],
)
def test_auto_on_the_cpu_is_cholesky_for_absolutely_damped_inverses(
    exponent: float, mode: str, solver: str, chosen: str
) -> None:
    assert choose_solver(exponent, mode, solver) == chosen
    assert choose_solver(exponent, mode, solver, device_type="cpu", width=8192) == chosen


@pytest.mark.parametrize("device_type", ["cuda", "xpu"])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_auto_on_a_gpu_avoids_eigh_for_wide_inverse_roots(device_type: str, mode: str) -> None:
    for exponent, width, chosen in (
        (-0.5, 1024, "newton_schulz"),
        (-0.5, 1023, "eigh"),
        (-0.25, 4096, "eigh"),
        (-1.0, 4096, "cholesky" if mode == "absolute" else "eigh"),
    ):
        assert choose_solver(exponent, mode, "auto", device_type=device_type, width=width) == chosen
    assert choose_solver(-0.5, mode, "eigh", device_type=device_type, width=4096) == "eigh"


@pytest.mark.parametrize(
    ("solver", "exponent"),
    [("cholesky", -0.5), ("cholesky", 1.0), ("newton_schulz", -0.25), ("newton_schulz", 0.5), ("newton_schulz", 1.0)],
)
@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize("power", [symmetric_power, try_symmetric_power])
def test_a_solver_is_refused_for_exponents_that_it_has_no_method_for(
    power: Callable[..., Tensor | None], mode: str, solver: str, exponent: float
) -> None:
    with pytest.raises(ValueError, match=rf"{solver}.*exponent") as caught:
        power(torch.eye(2), exponent, 0.1, damping_mode=mode, solver=solver)
    assert f"{exponent:g}" in str(caught.value)


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


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "cholesky"])
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
@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "cholesky"])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_non_finite_matrices_give_none(bad: float, solver: str, mode: str) -> None:
    matrix = torch.eye(4)
    matrix[2, 1] = matrix[1, 2] = bad
    assert try_symmetric_power(matrix, -1.0, 0.1, damping_mode=mode, solver=solver) is None


@pytest.mark.parametrize("solver", ["newton_schulz", "cholesky"])
def test_an_indefinite_matrix_is_no_success(solver: str) -> None:
    matrix = torch.diag(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert try_symmetric_power(matrix, -1.0, 0.1, damping_mode="absolute", solver=solver) is None


def test_a_result_that_overflows_counts_as_a_failure() -> None:
    assert try_symmetric_power(torch.zeros(2, 2), -1.0, 0.0, damping_mode="absolute", solver="eigh") is None


def decaying(size: int, condition: float, seed: int = 0) -> Tensor:
    """Return a matrix whose eigenvalues fall geometrically from 1 to 1 / condition."""
    return with_spectrum(torch.logspace(0, -math.log10(condition), size, dtype=torch.float64).tolist(), seed)[0]


def relative_error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("exponent", [-0.5, -1.0])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_newton_schulz_agrees_with_eigh(exponent: float, condition: float, scale: float) -> None:
    matrix = scale * decaying(48, condition)
    expected = symmetric_power(matrix, exponent, solver="eigh")
    result = symmetric_power(matrix, exponent, solver="newton_schulz")
    assert relative_error(result, expected) < 1e-8
    assert torch.equal(result, result.mT)
    rounded = symmetric_power(matrix.float(), exponent, solver="newton_schulz")
    assert rounded.dtype == torch.float32
    if 1e-38 < float(expected.abs().max()) < 1e38:  # inside the range of float32
        assert relative_error(rounded, expected) < 1e-3


@pytest.mark.parametrize(("exponent", "solver"), [(-0.5, "newton_schulz"), (-1.0, "newton_schulz"), (-1.0, "cholesky")])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_relative_damping_without_an_eigendecomposition(exponent: float, solver: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(rank, 40, generator=generator, dtype=torch.float64)
    matrix = x.mT @ x / rank
    expected = symmetric_power(matrix, exponent, 1e-3, solver="eigh")
    assert relative_error(symmetric_power(matrix, exponent, 1e-3, solver=solver), expected) < 1e-8
    assert relative_error(symmetric_power(matrix.float(), exponent, 1e-3, solver=solver), expected) < 1e-3


def test_newton_schulz_retries_in_float64_what_float32_does_not_resolve() -> None:
    matrix, _ = with_spectrum([1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0])
    with pytest.raises(torch.linalg.LinAlgError, match="Newton-Schulz"):
        symmetric_power(matrix.float(), -0.5, 1e-8, solver="newton_schulz")
    power = try_symmetric_power(matrix.float(), -0.5, 1e-8, solver="newton_schulz")
    assert power is not None
    assert power.dtype == torch.float32
    exact = symmetric_power(matrix.float().double(), -0.5, 1e-8)
    assert relative_error(power, exact) < 1e-5


def test_one_matrix_that_does_not_converge_fails_its_batch() -> None:
    singular = torch.diag(torch.tensor([0.0] + [1.0] * 299))
    batch = torch.stack([torch.eye(300), singular])
    with pytest.raises(torch.linalg.LinAlgError, match="Newton-Schulz"):
        symmetric_power(batch, -0.5, solver="newton_schulz")


@pytest.mark.parametrize("rows", [60, 120, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_eigenvalue_of_second_moments(rows: int, dtype: torch.dtype) -> None:
    """Also where the leading eigenvalues lie close together, as those of independent features do."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, 120, generator=generator, dtype=torch.float64)
    x[1] = x[1].relu()
    matrices = x.mT @ x / rows
    exact = torch.linalg.matrix_norm(matrices, ord=2)
    result = largest_eigenvalue(matrices.to(dtype))
    assert result.shape == (2,)
    assert result.dtype == dtype
    assert bool(((result.double() / exact - 1).abs() < 1e-3).all())
    assert bool((result.double() <= exact * (1 + 10 * torch.finfo(dtype).eps)).all())


def test_largest_eigenvalue_where_simple_starts_fail() -> None:
    zero_row_sums = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(largest_eigenvalue(zero_row_sums)) == pytest.approx(2.0, rel=1e-6)
    blocks = torch.zeros(11, 11)
    blocks[0, 0] = 1.0  # the column with the largest norm, and an eigenvector of its own
    blocks[1:, 1:] = 0.3
    assert float(largest_eigenvalue(blocks)) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_largest_eigenvalue_of_multiples_of_the_identity_and_of_rank_one(size: int) -> None:
    """The directions run out at once; rounding may not add to the result."""
    matrices = torch.stack([torch.zeros(size, size), 1e-30 * torch.eye(size), torch.full((size, size), 2.0)])
    result = largest_eigenvalue(matrices)
    torch.testing.assert_close(result, torch.tensor([0.0, 1e-30, 2.0 * size]), rtol=1e-5, atol=0)


def orthonormal(size: int, rank: int, seed: int = 7) -> Tensor:
    return rotation(size, seed)[:, :rank].clone()


def nystrom_of(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return nystrom(matrix @ basis, basis, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))


def assembled(eigenvectors: Tensor, eigenvalues: Tensor, tail: Tensor) -> Tensor:
    """Return U diag(s) Uᵀ + τ (I − U Uᵀ)."""
    identity = torch.eye(eigenvectors.shape[-2], dtype=eigenvectors.dtype)
    low_rank = (eigenvectors * eigenvalues.unsqueeze(-2)) @ eigenvectors.mT
    return low_rank + tail[..., None, None] * (identity - eigenvectors @ eigenvectors.mT)


@parametrize_pairs(
    ("rank", [0, 1, 3, 6]),
    ("dtype", [torch.float32, torch.float64]),
    ("scale", [1e-20, 1.0, 1e20]),
)
def test_nystrom_is_exact_up_to_its_rank(rank: int, scale: float, dtype: torch.dtype) -> None:
    spectrum = [0.0] * (20 - rank) + [0.5 * (i + 1) for i in range(rank)]
    matrix = scale * with_spectrum(spectrum)[0]
    basis = orthonormal(20, 10)
    eigenvectors, eigenvalues, tail = nystrom_of(matrix.to(dtype), basis.to(dtype))
    assert {eigenvectors.dtype, eigenvalues.dtype, tail.dtype} == {dtype}
    precision = 1e-11 if dtype == torch.float64 else 1e-4
    identity = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(eigenvectors.double().mT @ eigenvectors.double(), identity, rtol=0, atol=precision)
    expected = torch.tensor(sorted(spectrum, reverse=True)[:10], dtype=torch.float64)
    torch.testing.assert_close(eigenvalues.double() / scale, expected, rtol=0, atol=precision)
    assert 0 <= float(tail) / scale < precision
    full = assembled(eigenvectors.double(), eigenvalues.double(), tail.double())
    torch.testing.assert_close(full / scale, matrix / scale, rtol=0, atol=precision)


def test_nystrom_of_a_zero_matrix_keeps_the_basis() -> None:
    basis = orthonormal(9, 4)
    eigenvectors, eigenvalues, tail = nystrom_of(torch.zeros(9, 9, dtype=torch.float64), basis)
    assert torch.equal(eigenvectors, basis)
    assert not bool(eigenvalues.any())
    assert float(tail) == 0.0


def test_nystrom_completes_a_low_rank_with_directions_of_the_basis() -> None:
    """As far as rounding allows: only the shift, which is little more than rounding, tells them apart."""
    basis = orthonormal(20, 5)
    direction = basis[:, 0]
    eigenvectors, eigenvalues, _ = nystrom_of(3.0 * torch.outer(direction, direction), basis)
    assert float(eigenvalues[0]) == pytest.approx(3.0, rel=1e-12)
    torch.testing.assert_close(eigenvectors @ eigenvectors.mT, basis @ basis.mT, rtol=0, atol=0.05)


def test_nystrom_finds_a_flat_tail_outside_the_eigenvectors_given() -> None:
    matrix, q = with_spectrum([9.0, 4.0, 2.0] + [0.25] * 17)
    eigenvectors, eigenvalues, tail = nystrom_of(matrix, q[:, :3].clone())
    torch.testing.assert_close(eigenvalues, torch.tensor([9.0, 4.0, 2.0], dtype=torch.float64))
    assert float(tail) == pytest.approx(0.25, rel=1e-10)
    torch.testing.assert_close(assembled(eigenvectors, eigenvalues, tail), matrix, rtol=0, atol=1e-12)


@given(
    size=st.integers(1, 12),
    rank=st.integers(1, 12),
    rows=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_nystrom_stays_below_the_matrix_and_keeps_its_trace(
    size: int, rank: int, rows: int, seed: int, scale: float
) -> None:
    rank = min(rank, size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    matrix = scale * x.mT @ x
    eigenvectors, eigenvalues, tail = nystrom_of(matrix, orthonormal(size, rank, seed))
    largest = float(torch.linalg.matrix_norm(matrix, ord=2))
    exact = torch.linalg.eigvalsh(matrix).flip(-1)[:rank]
    assert float((eigenvalues - exact).max()) < 1e-12 * largest
    low_rank = assembled(eigenvectors, eigenvalues, torch.zeros_like(tail))
    assert float(torch.linalg.eigvalsh(matrix - low_rank)[0]) > -1e-11 * largest
    assert float(tail) >= 0
    if rank == size:
        torch.testing.assert_close(low_rank, matrix, rtol=0, atol=1e-10 * largest)
        assert float(tail) == 0.0
    total = float(eigenvalues.sum() + (size - rank) * tail)
    assert total == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert bool((eigenvalues.diff() <= 1e-14 * largest).all())
    gram = eigenvectors.mT @ eigenvectors
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rounds_of_nystrom_approach_the_leading_eigenvalues() -> None:
    spectrum = [100.0, 30.0, *torch.logspace(0, -2, 62, dtype=torch.float64).tolist()]
    matrix, q = with_spectrum(spectrum)
    basis = orthonormal(64, 8)
    eigenvectors, eigenvalues, _ = nystrom_of(matrix, basis)
    assert float(eigenvalues[0]) == pytest.approx(100.0, rel=0.05)
    eigenvectors, eigenvalues, _ = nystrom_of(matrix, eigenvectors)
    assert eigenvalues[:2].tolist() == pytest.approx([100.0, 30.0], rel=1e-3)
    assert float((eigenvectors[:, 0] @ q[:, 0]).abs()) > 1 - 1e-6


def test_a_batch_of_nystrom_approximations() -> None:
    """A zero matrix, an indefinite one and very different scales do not touch the others."""
    matrices = torch.stack(
        [
            with_spectrum([0.1, 1.0, 2.0, 0.0], seed=1)[0],
            torch.zeros(4, 4, dtype=torch.float64),
            1e6 * with_spectrum([0.0, 1.0, 2.0, 3.0], seed=2)[0],
            with_spectrum([-3.0, -3.0, -3.0, 1.0], seed=3)[0],
        ]
    ).reshape(2, 2, 4, 4)
    basis = torch.stack([orthonormal(4, 2, seed) for seed in range(4, 8)]).reshape(2, 2, 4, 2)
    eigenvectors, eigenvalues, tail = nystrom_of(matrices, basis)
    assert eigenvectors.shape == (2, 2, 4, 2)
    assert eigenvalues.shape == (2, 2, 2)
    assert tail.shape == (2, 2)
    identity = torch.eye(2, dtype=torch.float64).expand(2, 2, 2, 2)
    torch.testing.assert_close(eigenvectors.mT @ eigenvectors, identity, rtol=0, atol=1e-12)
    for i in ((0, 0), (0, 1), (1, 0)):
        alone = nystrom_of(matrices[i], basis[i])
        torch.testing.assert_close(
            assembled(eigenvectors[i], eigenvalues[i], tail[i]), assembled(*alone), rtol=1e-10, atol=1e-12
        )
    assert bool((eigenvalues >= 0).all())
    assert bool((tail >= 0).all())


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize(("mode", "added"), [("relative", 0.8), ("absolute", 0.1)])
def test_low_rank_gains_are_the_powers_of_the_damped_eigenvalues(exponent: float, mode: str, added: float) -> None:
    eigenvalues = torch.tensor([8.0, 2.0, 0.0], dtype=torch.float64)
    gains, tail_gain = low_rank_power(
        eigenvalues, torch.tensor(0.5, dtype=torch.float64), exponent, 0.1, damping_mode=mode
    )
    assert gains.tolist() == pytest.approx([(value + added) ** exponent for value in (8.0, 2.0, 0.0)])
    assert float(tail_gain) == pytest.approx((0.5 + added) ** exponent)


def test_low_rank_gains_of_a_batch_with_a_zero_matrix_and_a_tail_above_the_rest() -> None:
    gains, tail_gain = low_rank_power(
        torch.tensor([[4.0, 1.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([0.0, 0.0, 3.0]), -1.0, 1.0
    )
    torch.testing.assert_close(gains, torch.tensor([[1 / 8, 1 / 5], [1.0, 1.0], [1 / 4, 1 / 3]]))
    torch.testing.assert_close(tail_gain, torch.tensor([1 / 4, 1.0, 1 / 6]))


@pytest.mark.parametrize("damping", [-0.5, math.nan])
def test_low_rank_damping_outside_its_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match="damping"):
        low_rank_power(torch.ones(2), torch.tensor(1.0), -0.5, damping)
    with pytest.raises(ValueError, match="damping"):
        try_low_rank_power(torch.ones(2, 1), torch.eye(2)[:, :1], torch.tensor(2.0), -0.5, damping)


@pytest.mark.parametrize("exponent", [-1.0, -0.5])
@pytest.mark.parametrize("mode", ["relative", "absolute"])
@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [([0.02, 0.5, 1.5, 8.0, 8.0], 5), ([0.0, 0.0, 0.0, 1.5, 8.0], 2), ([0.0, 0.0, 0.0, 1.5, 8.0], 4), ([0.0] * 5, 3)],
)
def test_low_rank_power_is_the_whole_power_where_nothing_is_left_out(
    exponent: float, mode: str, spectrum: list[float], rank: int
) -> None:
    matrix, _ = with_spectrum(spectrum)
    basis = orthonormal(5, rank)
    parts = try_low_rank_power(matrix @ basis, basis, matrix.trace(), exponent, 0.01, damping_mode=mode)
    assert parts is not None
    eigenvectors, _, _, gains, tail_gain = parts
    expected = symmetric_power(matrix, exponent, 0.01, damping_mode=mode, solver="eigh")
    torch.testing.assert_close(assembled(eigenvectors, gains, tail_gain), expected, rtol=1e-9, atol=1e-9)


def test_low_rank_power_of_a_whole_undamped_matrix_has_no_infinite_tail_gain() -> None:
    matrix, _ = with_spectrum([0.5, 1.0, 4.0])
    basis = torch.eye(3, dtype=torch.float64)
    parts = try_low_rank_power(matrix, basis, matrix.trace(), -0.5)
    assert parts is not None
    torch.testing.assert_close(assembled(parts[0], parts[3], parts[4]), symmetric_power(matrix, -0.5))


def test_a_low_rank_failure_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh
    seen: list[torch.dtype] = []

    def fails_in_float32(matrix: Tensor) -> object:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    monkeypatch.setattr(linalg.torch.linalg, "eigh", fails_in_float32)
    basis = torch.eye(3)[:, 1:]
    parts = try_low_rank_power(torch.diag(torch.tensor([1.0, 2.0, 4.0])) @ basis, basis, torch.tensor(7.0), -1.0, 0.5)
    assert seen == [torch.float32, torch.float64]
    assert parts is not None
    assert {part.dtype for part in parts} == {torch.float32}
    torch.testing.assert_close(parts[1], torch.tensor([4.0, 2.0]))
    torch.testing.assert_close(parts[2], torch.tensor(1.0))
    torch.testing.assert_close(parts[3], torch.tensor([1 / 6, 1 / 4]))
    torch.testing.assert_close(parts[4], torch.tensor(1 / 3))

    monkeypatch.setattr(linalg.torch.linalg, "eigh", lambda matrix: fails_in_float32(matrix.float()))
    assert try_low_rank_power(basis, basis, torch.tensor(2.0), -1.0, 0.5) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["product", "basis", "trace"])
def test_non_finite_low_rank_parts_give_none(bad: float, where: str) -> None:
    parts = {"product": torch.eye(4)[:, :2].clone(), "basis": torch.eye(4)[:, :2].clone(), "trace": torch.tensor(2.0)}
    if where == "trace":
        parts["trace"].fill_(bad)
    else:
        parts[where][1, 1] = bad
    assert try_low_rank_power(**parts, exponent=-0.5, damping=1e-3) is None


def test_gains_that_overflow_count_as_a_failure() -> None:
    basis = torch.eye(4)[:, :2]
    zero = torch.zeros(4, 2)
    assert try_low_rank_power(zero, basis, torch.tensor(0.0), -1.0, damping_mode="absolute") is None
