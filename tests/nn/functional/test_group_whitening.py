"""Covariances of groups of channels, maps of groups, and inverse square roots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wellcond.nn.functional.group_whitening import group_covariance, group_width, map_groups
from wellcond.numerics.differentiable_root import zca
from wellcond.numerics.newton_schulz import newton_whitening

FLOAT64 = torch.float64
IDENTITY = torch.eye(4, dtype=FLOAT64)
# With more positions than channels of a group, and with fewer: each is computed in a way of its own.
CASES = [((3, 6, 3, 2), 3), ((3, 6, 2, 2), 6), ((4, 6, 1, 1), 2), ((7, 4), 2), ((3, 4, 5), 4), ((2, 4, 2, 3, 2), 4)]
cases = pytest.mark.parametrize(("shape", "width"), CASES, ids=str)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT64).to(dtype)


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {"contiguous": x, "channels last": last, "sliced": torch.stack([x, x], -1)[..., 0], "flipped": x.flip(0)}


def spectrum(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    vectors = torch.linalg.qr(draw((len(values), len(values)), seed))[0]
    return vectors @ torch.diag(torch.tensor(values, dtype=FLOAT64)) @ vectors.T


def covariance_by_loop(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    rows = x.movedim(1, -1).reshape(-1, channels)
    mean = torch.stack([sum(row[c] for row in rows) / len(rows) for c in range(channels)])
    groups = []
    for start in range(0, channels, width):
        entries = [
            sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / len(rows)
            for i in range(start, start + width)
            for j in range(start, start + width)
        ]
        groups.append(torch.stack(entries).view(width, width))
    return mean, torch.stack(groups)


@pytest.mark.parametrize(
    ("channels", "at_most", "width"), [(64, 16, 16), (64, 64, 64), (8, 64, 8), (24, 16, 12), (17, 16, 1), (1, 1, 1)]
)
def test_the_width_divides_the_channels(channels: int, at_most: int, width: int) -> None:
    assert group_width(channels, at_most) == width


@cases
def test_covariance(shape: tuple[int, ...], width: int) -> None:
    x = draw(shape) * 2 + 1
    expected = covariance_by_loop(x, width)
    for other in layouts(x).values():
        close(group_covariance(other, width), expected)


def test_covariance_does_not_cancel() -> None:
    """Squares of 10⁸ beside a variance of 1: E[xxᵀ] − μμᵀ would keep nothing in float32."""
    x = (draw((8, 4, 5, 5)) + 1e4).float()
    close(group_covariance(x, 4)[1], group_covariance(x.double(), 4)[1], 1e-5)


@cases
def test_covariance_is_differentiable_twice(shape: tuple[int, ...], width: int) -> None:
    for x in layouts(draw(shape)).values():
        assert torch.autograd.gradcheck(lambda x: group_covariance(x, width), (x.detach().requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda x: group_covariance(x, width), (draw(shape).requires_grad_(),))


@cases
def test_map_of_groups(shape: tuple[int, ...], width: int) -> None:
    x, matrices, offset = draw(shape), draw((shape[1] // width, width, width), 1), draw((shape[1],), 2)
    columns = []
    for channel in range(shape[1]):
        group, row = divmod(channel, width)
        terms = [matrices[group, row, i] * x[:, group * width + i] for i in range(width)]
        columns.append(sum(terms) + offset[channel])
    expected = torch.stack(columns, 1)
    for name, other in layouts(x).items():
        if name == "flipped":
            other = other.flip(0)
        close(map_groups(other, matrices, offset), expected)
        close(map_groups(other.float(), matrices.float(), offset.float()), expected, 1e-5)
        close(map_groups(other, matrices), expected - offset.view(-1, *(1 for _ in shape[2:])))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@pytest.mark.parametrize("size", [2, 5])
def test_map_keeps_the_memory_format(dtype: torch.dtype, size: int) -> None:
    matrices = draw((2, 4, 4), 1, dtype)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = draw((3, 8, size, size), 0, dtype).to(memory_format=memory_format).requires_grad_()
        y = map_groups(x, matrices)
        assert y.is_contiguous(memory_format=memory_format)
        for upstream_format in (torch.contiguous_format, torch.channels_last):
            (grad,) = torch.autograd.grad(
                y, x, torch.ones_like(y).contiguous(memory_format=upstream_format), retain_graph=True
            )
            assert grad.is_contiguous(memory_format=memory_format)


@cases
def test_map_is_differentiable_twice(shape: tuple[int, ...], width: int) -> None:
    matrices, offset = (
        draw((shape[1] // width, width, width), 1).requires_grad_(),
        draw((shape[1],), 2).requires_grad_(),
    )
    for x in layouts(draw(shape)).values():
        assert torch.autograd.gradcheck(map_groups, (x.detach().requires_grad_(), matrices, offset))
    assert torch.autograd.gradgradcheck(map_groups, (draw(shape).requires_grad_(), matrices, offset))


SPECTRA = {
    "distinct": [3.0, 1.0, 0.5, 0.1],
    "two pairs": [2.0, 2.0, 0.5, 0.5],
    "all equal": [0.7, 0.7, 0.7, 0.7],
    "singular": [1.0, 1.0, 0.0, 0.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_zca_is_the_inverse_root(values: list[float]) -> None:
    eps = 1e-2
    matrix = spectrum(values)
    close(zca(matrix, eps), spectrum([(value + eps) ** -0.5 for value in values]))
    whitening = zca(torch.stack([matrix, 2 * matrix]), eps)
    close(whitening @ (torch.stack([matrix, 2 * matrix]) + eps * IDENTITY) @ whitening, IDENTITY.expand(2, 4, 4))


@pytest.mark.parametrize("values", [SPECTRA[name] for name in ("distinct", "two pairs", "all equal")], ids=str)
def test_gradient_of_zca(values: list[float]) -> None:
    """Also where eigenvalues are equal: the inverse root is smooth there, its eigenvectors are not."""

    def function(matrix: Tensor) -> Tensor:
        return zca((matrix + matrix.mT) / 2, 1e-2)

    for matrix in (spectrum(values), torch.diag(torch.tensor(values, dtype=FLOAT64))):
        assert torch.autograd.gradcheck(function, (matrix.requires_grad_(),))


def test_the_gradient_of_torchs_eigh_is_not_finite_there() -> None:
    """What the analytic gradient is for."""
    matrix = torch.eye(3, dtype=FLOAT64).requires_grad_()
    values, vectors = torch.linalg.eigh(matrix)
    (grad,) = torch.autograd.grad(((vectors * values.rsqrt()) @ vectors.mT).sum(), matrix)
    assert not grad.isfinite().all()
    (grad,) = torch.autograd.grad(zca(matrix, 0.0).sum(), matrix)
    close(grad, torch.full((3, 3), -0.5))  # d(M^(−1/2)) = −dM/2 at M = I


@pytest.mark.parametrize("samples", [2, 3, 5])
def test_whitening_through_a_singular_covariance_to_forty_digits(samples: int) -> None:
    """ε = 10⁻⁵ alone keeps three channels of two or three samples finite; the gradient is exact all the same."""
    mpmath = pytest.importorskip("mpmath")
    x, upstream = 3 * draw((samples, 3)) - 1, draw((samples, 3), 1)

    def exact(shift: object) -> object:
        with mpmath.workdps(60):
            rows = mpmath.matrix(x.tolist())
            rows[0, 0] += shift
            means = [sum(rows[n, c] for n in range(samples)) / samples for c in range(3)]
            off = mpmath.matrix([[rows[n, c] - means[c] for c in range(3)] for n in range(samples)])
            values, vectors = mpmath.eigsy(off.T * off / samples + mpmath.mpf(1e-5) * mpmath.eye(3))
            white = off * vectors * mpmath.diag([1 / mpmath.sqrt(value) for value in values]) * vectors.T
            return sum(white[n, c] * upstream[n, c].item() for n in range(samples) for c in range(3))

    with mpmath.workdps(60):
        step = mpmath.mpf(10) ** -20
        expected = float((exact(step) - exact(-step)) / (2 * step))
    x.requires_grad_()
    mean, covariance = group_covariance(x, 3)
    whitening = zca(covariance, 1e-5)
    y = map_groups(x, whitening, -(whitening @ mean.view(1, 3, 1)).flatten())
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert abs(float(grad[0, 0]) - expected) < 1e-10


def test_what_is_not_finite_stays_in_its_group() -> None:
    """NaN, as batch normalization gives, where `torch.linalg.eigh` would raise."""
    matrices = torch.stack([spectrum([1.0, 2.0, 3.0])] * 3)
    matrices[0, 1, 2] = torch.nan
    matrices[2, 0, 0] = torch.inf
    whitening = zca(matrices, 1e-5)
    assert whitening[[0, 2]].isnan().all()
    close(whitening[1], zca(matrices[1], 1e-5))


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0], [0.5, 0.5, 3.0], [0.01, 4.0]], ids=str)
def test_second_derivatives_of_zca(values: list[float]) -> None:
    """Also where eigenvalues are equal, where those of eigenvectors are not finite; also of a constant gradient."""
    matrix = spectrum(values).requires_grad_()

    def whitening(given: Tensor) -> Tensor:
        return zca((given + given.mT) / 2, 1e-3)

    assert torch.autograd.gradgradcheck(whitening, (matrix,))
    (grad,) = torch.autograd.grad(whitening(matrix).sum(), matrix, create_graph=True)
    (plain,) = torch.autograd.grad(whitening(matrix).sum(), matrix)
    close(grad, plain)
    (second,) = torch.autograd.grad(grad.sum(), matrix)
    step, ones = 1e-6, torch.ones_like(matrix)
    moved = [torch.autograd.grad(whitening(m).sum(), m)[0] for m in (matrix + step * ones, matrix - step * ones)]
    close(second, (moved[0] - moved[1]) / (2 * step), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_newton_follows_the_formula(steps: int) -> None:
    matrix, eps = spectrum([3.0, 0.5, 0.5, 0.01]), 1e-3
    damped = matrix + eps * IDENTITY
    trace = sum(damped[i, i] for i in range(4))
    power = torch.eye(4, dtype=FLOAT64)
    for _ in range(steps):
        power = 1.5 * power - 0.5 * power @ power @ power @ (damped / trace)
    close(newton_whitening(matrix, eps, steps), power / trace**0.5)
    close(newton_whitening(torch.stack([matrix, 4 * matrix]), eps, steps)[0], power / trace**0.5)


def test_five_steps_of_newton_whiten_large_directions_first() -> None:
    matrix = spectrum([1.0, 0.1, 0.01, 0.001])
    whitening = newton_whitening(matrix, 1e-5, 5)
    variances = torch.linalg.eigvalsh(whitening @ matrix @ whitening)
    close(variances, torch.tensor([0.05, 0.40, 0.99, 1.0]), 5e-3)
    assert float(torch.linalg.matrix_norm(whitening, 2)) <= 1.5**5 / 1.111**0.5


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
def test_gradient_of_newton(values: list[float]) -> None:
    matrix = spectrum(values).requires_grad_()
    assert torch.autograd.gradcheck(lambda matrix: newton_whitening(matrix, 1e-2, 5), (matrix,))
    assert torch.autograd.gradgradcheck(lambda matrix: newton_whitening(matrix, 1e-2, 3), (matrix,))


@pytest.mark.parametrize("steps", [25, 100])
def test_many_steps_of_newton_are_zca_in_float32_too(steps: int) -> None:
    """The plain iteration has lost all digits after ten steps here, and is NaN after fifteen."""
    matrix = spectrum([10.0 ** (-i / 3) for i in range(13)])
    exact = spectrum([(10.0 ** (-i / 3) + 1e-5) ** -0.5 for i in range(13)])
    whitening = newton_whitening(matrix.float(), 1e-5, steps)
    assert float((whitening - exact).norm() / exact.norm()) < 5e-3
    close(newton_whitening(matrix, 1e-5, steps), exact, 1e-8)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True])
def test_steps_are_checked(steps: object) -> None:
    with pytest.raises(ValueError, match="steps must be a positive integer"):
        newton_whitening(torch.eye(2), 1e-5, steps)
