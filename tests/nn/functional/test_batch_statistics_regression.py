"""The regressions of BSR against numpy's and scipy's least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from wellcond.nn.functional.batch_statistics_regression import NormalEquations, normal_equations, solve_mean, solve_var
from wellcond.numerics.moments import Moments

Array = NDArray[np.float64]


def solve(features: Array, targets: Array, nonneg: str | None = None) -> Array:
    """One channel's weights, from the sums alone."""
    gram, target = torch.from_numpy(features.T @ features)[None], torch.from_numpy(features.T @ targets)[None]
    if nonneg is None:
        return solve_mean(gram, target, torch.full((1,), -77.0).double())[0].numpy()
    return solve_var(gram, target, torch.full((1,), 77.0).double(), nonneg)[0].numpy()


def loss(features: Array, targets: Array, weights: Array) -> float:
    return float(((features @ weights - targets) ** 2).sum())


def variance_problem(rng: np.random.Generator, rows: int, weights: Array, noise: float) -> tuple[Array, Array]:
    features = np.stack([rng.gamma(2, 1, rows), rng.gamma(0.5, 1, rows), np.ones(rows)], 1)
    return features, features @ weights + noise * rng.standard_normal(rows)


def test_mean_is_least_squares() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        features = np.stack([rng.standard_normal(9) * 3 + 2, np.ones(9)], 1)
        targets = rng.standard_normal(9)
        expected = np.linalg.lstsq(features, targets, rcond=None)[0]
        np.testing.assert_allclose(solve(features, targets), expected, 1e-9, 1e-9, err_msg=f"seed {seed}")


@pytest.mark.parametrize("true", [(0.4, 0.2, 0.5), (0.5, -0.3, 1.0), (-0.2, 0.1, 0.3), (0.7, 0.1, -0.5)], ids=str)
def test_variance_is_clamped_least_squares(true: tuple[float, ...]) -> None:
    for seed in range(20):
        features, targets = variance_problem(np.random.default_rng(seed), 12, np.array(true), 0.3)
        expected = np.maximum(np.linalg.lstsq(features, targets, rcond=None)[0], 0)
        np.testing.assert_allclose(solve(features, targets, "clamp"), expected, 1e-8, 1e-8, err_msg=f"seed {seed}")


@pytest.mark.parametrize("true", [(0.4, 0.2, 0.5), (0.5, -0.3, 1.0), (-0.2, 0.1, 0.3), (-1.0, -1.0, -1.0)], ids=str)
def test_variance_is_non_negative_least_squares(true: tuple[float, ...]) -> None:
    for seed in range(40):
        features, targets = variance_problem(np.random.default_rng(seed), 7, np.array(true), 0.5)
        expected, _ = nnls(features, targets)
        np.testing.assert_allclose(solve(features, targets, "nnls"), expected, 1e-7, 1e-7, err_msg=f"seed {seed}")


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    kinds=st.tuples(*[st.sampled_from(["random", "zero", "constant", "same", "one-hot"])] * 2),
    scales=st.tuples(*[st.sampled_from([1e-4, 1.0, 1e4])] * 2),
    sign=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_degenerate_problems(
    seed: int, rows: int, kinds: tuple[str, str], scales: tuple[float, float], sign: float
) -> None:
    """Whatever is singular: finite weights, not negative, and as good as scipy's."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(1, 1, rows)
    columns = []
    for kind, scale in zip(kinds, scales, strict=True):
        column = {
            "random": rng.gamma(1, 1, rows),
            "zero": np.zeros(rows),
            "constant": np.ones(rows),
            "same": base,
            "one-hot": np.eye(rows)[0],
        }[kind]
        columns.append(scale * column)
    features = np.stack([*columns, np.ones(rows)], 1)
    targets = sign * rng.gamma(1, 1, rows) + 0.3 * rng.standard_normal(rows)
    best = nnls(features, targets)[1] ** 2
    size = float((targets**2).sum())
    exact = solve(features, targets, "nnls")
    assert np.isfinite(exact).all()
    assert (exact >= 0).all()
    assert loss(features, targets, exact) <= best + 1e-6 * size
    clamped = solve(features, targets, "clamp")
    assert np.isfinite(clamped).all()
    assert (clamped >= 0).all()
    free = np.linalg.lstsq(features, targets, rcond=None)[0]
    if np.linalg.matrix_rank(features) == 3 and np.linalg.cond(features / np.linalg.norm(features, axis=0)) < 1e3:
        np.testing.assert_allclose(features * clamped, features * np.maximum(free, 0), rtol=1e-5, atol=1e-5)
    line = features[:, [0, 2]]
    found = solve(line, targets)
    least = loss(line, targets, np.linalg.lstsq(line, targets, rcond=None)[0])
    assert loss(line, targets, found) <= least + 1e-6 * size


def test_clamping_what_is_singular_keeps_what_is_not_negative() -> None:
    """Of two equal features one explains for both: no cancelling pair that clamping would tear apart."""
    rng = np.random.default_rng(0)
    column = rng.gamma(1, 1, 9)
    features = np.stack([column, 3 * column, np.ones(9)], 1)
    targets = 2 * column + 1
    for nonneg in ("clamp", "nnls"):
        np.testing.assert_allclose(features @ solve(features, targets, nonneg), targets, rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_scale_of_the_features(scale: float) -> None:
    """In units of the features: nothing is lost to an absolute threshold."""
    rng = np.random.default_rng(1)
    features, targets = variance_problem(rng, 20, np.array([0.5, 0.2, 0.3]), 0.1)
    for nonneg in ("clamp", "nnls"):
        expected = solve(features, targets, nonneg) * (1, 1, scale)
        np.testing.assert_allclose(
            solve(features * (scale, scale, 1), targets * scale, nonneg), expected, rtol=1e-6, atol=1e-9 * scale
        )
    means = np.stack([rng.standard_normal(20), np.ones(20)], 1)
    slope, intercept = solve(means, targets)
    np.testing.assert_allclose(solve(means * (scale, 1), targets * scale), [slope, scale * intercept], rtol=1e-6)


@pytest.mark.parametrize("shift", [10.0, 1e3, -1e4])
def test_means_far_from_zero(shift: float) -> None:
    rng = np.random.default_rng(2)
    means, targets = rng.standard_normal(30), rng.standard_normal(30)
    slope, intercept = np.linalg.lstsq(np.stack([means, np.ones(30)], 1), targets, rcond=None)[0]
    found = solve(np.stack([means + shift, np.ones(30)], 1), targets + shift)
    np.testing.assert_allclose(found[0], slope, atol=1e-5)
    np.testing.assert_allclose(found[0] * shift + found[1], intercept + shift, rtol=1e-6)


@pytest.mark.parametrize("nonneg", ["clamp", "nnls"])
def test_a_constant_basis_gives_the_average(nonneg: str) -> None:
    """(3.22): with features that say nothing, what is left is the average target, weighted as the sums are."""
    weights = np.sqrt(0.1 * 0.9 ** np.arange(6)[::-1])[:, None]
    targets = np.random.default_rng(3).gamma(2, 1, 6)
    average = (weights[:, 0] ** 2 * targets).sum() / (weights**2).sum()
    zero = np.array([0.0, 0.0, 1.0])
    np.testing.assert_allclose(
        solve(weights * zero, weights[:, 0] * targets, nonneg), [0, 0, average], rtol=1e-12, atol=0
    )
    np.testing.assert_allclose(solve(weights * zero[1:], weights[:, 0] * targets), [0, average], rtol=1e-12, atol=0)
    # A mean or a variance that is the same in all instances says nothing, either.
    same = np.array([0.7, 0.2, 1.0])
    found = solve(weights * same, weights[:, 0] * targets, nonneg)
    np.testing.assert_allclose(same @ found, average, rtol=1e-9)
    np.testing.assert_allclose(solve(weights * same[1:], weights[:, 0] * targets), [0, average], rtol=1e-9)


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf])
def test_nothing_known_falls_back(broken: float) -> None:
    """No instance yet, or sums that are not finite; a neighbour is not touched by it."""
    rng = np.random.default_rng(4)
    features, targets = variance_problem(rng, 9, np.array([0.5, 0.2, 0.3]), 0.1)
    gram = torch.from_numpy(np.stack([features.T @ features, np.full((3, 3), broken)]))
    target = torch.from_numpy(np.stack([features.T @ targets, np.full(3, broken)]))
    fallback = torch.tensor([5.0, 6.0]).double()
    for nonneg in ("clamp", "nnls"):
        found = solve_var(gram, target, fallback, nonneg)
        assert found[1].tolist() == [0, 0, 6]
        np.testing.assert_allclose(found[0].numpy(), solve(features, targets, nonneg))
    found = solve_mean(gram[:, 1:, 1:], target[:, 1:], fallback)
    assert found[1].tolist() == [0, 6]


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_nearly_equal_features_are_told_apart(apart: float) -> None:
    """A ridge that is too strong would blur them: their correlation is 1 − apart²/2, the weights are exact."""
    rng = np.random.default_rng(6)
    column = rng.gamma(1, 1, 50)
    features = np.stack([column, column + apart * rng.gamma(1, 1, 50), np.ones(50)], 1)
    weights = np.array([0.5, 0.2, 0.3])
    for nonneg in ("clamp", "nnls"):
        np.testing.assert_allclose(solve(features, features @ weights, nonneg), weights, rtol=1e-3)
    means = np.stack([5 + apart * rng.standard_normal(50), np.ones(50)], 1)
    np.testing.assert_allclose(solve(means, means @ [0.5, 2.0]), [0.5, 2.0], rtol=1e-3)


def test_rounding_is_not_a_feature() -> None:
    """Two features that differ by rounding only are one; the weights stay of the size of the problem."""
    rng = np.random.default_rng(5)
    column = rng.gamma(1, 1, 50)
    features = np.stack([column, column * (1 + 1e-9 * rng.standard_normal(50)), np.ones(50)], 1)
    targets = column + 0.1 * rng.standard_normal(50)
    nearly = 3 + 1e-12 * rng.standard_normal(50)
    for nonneg in ("clamp", "nnls"):
        found = solve(features, targets, nonneg)
        assert np.abs(found).max() < 10
        assert loss(features, targets, found) <= 1.01 * nnls(features, targets)[1] ** 2
    found = solve(np.stack([nearly, np.ones(50)], 1), targets)
    assert np.abs(found).max() < 10


def test_bad_word() -> None:
    with pytest.raises(ValueError, match="nonneg must be 'clamp' or 'nnls', got 'relu'"):
        solve_var(torch.eye(3)[None].double(), torch.ones(1, 3).double(), torch.ones(1).double(), "relu")


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (2, 2, 1), (4, 2)], ids=str)
def test_sums_of_a_batch(sizes: tuple[int, ...] | None) -> None:
    """(3.12) by loops: the features of every instance, the targets of its own group."""
    samples = sum(sizes) if sizes else 5
    x = torch.randn(samples, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    chunks = x.split(sizes) if sizes else [x]
    center = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    instances = Moments(x.mean(2), x.var(2, correction=0), 4)
    means = torch.stack([chunk.mean((0, 2)) for chunk in chunks])
    variances = torch.stack([chunk.transpose(0, 1).flatten(1).var(1, correction=0) for chunk in chunks])
    batch = Moments(means if sizes else means[0], variances if sizes else variances[0], 0)
    found = normal_equations(instances, batch, sizes, center, torch.float64)
    expected = [np.zeros((3, 2, 2)), np.zeros((3, 2)), np.zeros((3, 3, 3)), np.zeros((3, 3))]
    for c in range(3):
        start = 0
        for group, chunk in enumerate(chunks):
            for s in range(start, start + len(chunk)):
                mean, var = float(instances.mean[s, c]), float(instances.var[s, c])
                phi, psi = np.array([mean, 1]), np.array([var, (mean - float(center[c])) ** 2, 1])
                expected[0][c] += np.outer(phi, phi)
                expected[1][c] += phi * float(means[group, c])
                expected[2][c] += np.outer(psi, psi)
                expected[3][c] += psi * float(variances[group, c])
            start += len(chunk)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual.numpy(), wanted, rtol=1e-12)


def test_eighteen_numbers_a_channel() -> None:
    zeros = Moments(torch.zeros(2, 5), torch.zeros(2, 5), 4)
    found: NormalEquations = normal_equations(
        zeros, Moments(torch.zeros(5), torch.zeros(5), 8), None, torch.zeros(5), torch.float64
    )
    parts: list[Tensor] = list(found)
    assert sum(part.numel() for part in parts) == 18 * 5
    assert all(part.dtype == torch.float64 for part in parts)
