"""SparsestMax against a recursion in numpy, written from the formula, and the authors' numbers; ties; gradients."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairs import parametrize_pairs
from wellcond.nn.functional.sparse_simplex import sparsemax, sparsestmax

FLOAT64 = torch.float64
Array = npt.NDArray[np.float64]
GOLDEN = Path(__file__).parents[2] / "golden" / "ssn_sparsestmax.npz"

logits_of = st.integers(2, 4).flatmap(
    lambda count: st.lists(st.floats(-2, 2, width=32), min_size=count, max_size=count)
)
# Few values, so that ties are common.
tied_logits = st.integers(2, 4).flatmap(
    lambda count: st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=count, max_size=count)
)
radii = st.floats(0, 1)


def close(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def nearest_on_simplex(v: Array) -> Array:
    """The nearest of the points that leave out some coordinates and shift the others so that they sum to 1."""
    candidates = []
    for size in range(1, len(v) + 1):
        for kept in itertools.combinations(range(len(v)), size):
            p = np.zeros(len(v))
            p[list(kept)] = v[list(kept)] - (v[list(kept)].sum() - 1) / size
            if (p >= 0).all():
                candidates.append(p)
    return min(candidates, key=lambda p: float(((p - v) ** 2).sum()))


def recursion(v: Array, radius: float, previous: Array | None = None) -> tuple[Array, float]:
    """Return SparsestMax, and how far the nearest point is at which another branch would have been taken."""
    p = nearest_on_simplex(v)
    support = p > 0
    u = support / support.sum()
    if previous is not None:
        radius = max(radius**2 - ((u - previous) ** 2).sum(), 0.0) ** 0.5
    # A coordinate at zero is as far below the threshold as v − p of one that is kept says.
    threshold = (v - p)[support][0]
    margin = min([p[support].min(), *(threshold - v[~support])])
    distance = ((p - u) ** 2).sum() ** 0.5
    if support.sum() == 1:
        return p, margin
    margin = min(margin, distance, abs(distance - radius))
    if distance >= radius:
        return p, margin
    away = p - u
    if distance < 1e-12:  # a tie: the first is taken to be larger
        away = np.eye(len(v))[support.argmax()] - u
    q = u + radius * away / (away**2).sum() ** 0.5
    margin = min(margin, np.abs(q[support]).min())
    if q.min() >= 0:
        return q, margin
    deeper, below = recursion(np.where(support, q, -9.0), radius, u)
    return deeper, min(margin, below)


def jacobian(v: Tensor, radius: float) -> Tensor:
    return torch.autograd.functional.jacobian(lambda each: sparsestmax(each, radius), v)


# the authors' numbers -----------------------------------------------------------------------------------------------


def test_the_authors_values_and_jacobians() -> None:
    """To 2e-6: they have their centre in float32."""
    golden = np.load(GOLDEN)
    assert "ssn_utils" in json.loads(str(golden["hyper"]))["source"]
    assert len(golden["v"]) == 132
    for v, radius, p, jac in zip(golden["v"], golden["radius"], golden["p"], golden["jac"], strict=True):
        ours = torch.from_numpy(v)
        close(sparsestmax(ours, float(radius)), torch.from_numpy(p), 2e-6)
        close(jacobian(ours, float(radius)), torch.from_numpy(jac), 2e-5)


def test_the_reference_is_the_authors() -> None:
    golden = np.load(GOLDEN)
    for v, radius, p in zip(golden["v"], golden["radius"], golden["p"], strict=True):
        np.testing.assert_allclose(recursion(v, float(radius))[0], p, rtol=0, atol=2e-6)


# against the reference ----------------------------------------------------------------------------------------------


@given(logits_of)
def test_sparsemax_is_the_nearest_point_of_the_simplex(values: list[float]) -> None:
    close(sparsemax(torch.tensor(values, dtype=FLOAT64)), torch.from_numpy(nearest_on_simplex(np.array(values))))


@settings(max_examples=300)
@given(logits_of, radii)
def test_equals_the_recursion(values: list[float], radius: float) -> None:
    expected, margin = recursion(np.array(values), radius)
    assume(margin > 1e-6)  # There the result jumps, or its rounding decides.
    close(sparsestmax(torch.tensor(values, dtype=FLOAT64), radius), torch.from_numpy(expected), 1e-9)


@given(logits_of, radii)
def test_equals_the_recursion_in_float32(values: list[float], radius: float) -> None:
    expected, margin = recursion(np.array(values), radius)
    assume(margin > 1e-3)
    weights = sparsestmax(torch.tensor(values), radius)
    assert weights.dtype == torch.float32
    close(weights, torch.from_numpy(expected).float(), 1e-4)


@settings(max_examples=25)
@given(st.lists(st.floats(-0.2, 0.9), min_size=3, max_size=3), st.floats(0.05, 0.8))
def test_is_the_nearest_point_outside_of_the_circle(values: list[float], radius: float) -> None:
    """Of logits whose sparsemax has no zero; the nearest by trying all points of a grid."""
    v = np.array(values)
    p = nearest_on_simplex(v)
    assume(p.min() > 0.01)
    assume(((p - 1 / 3) ** 2).sum() > 1e-3)
    found = sparsestmax(torch.from_numpy(v), radius).numpy()
    steps = 400
    first, second = (part.ravel() for part in np.meshgrid(np.arange(steps + 1), np.arange(steps + 1)))
    points = np.stack([first, second, steps - first - second], 1)[first + second <= steps] / steps
    allowed = points[((points - 1 / 3) ** 2).sum(1) >= radius**2]
    distances = ((allowed - v) ** 2).sum(1) ** 0.5
    assert ((found - v) ** 2).sum() ** 0.5 <= distances.min() + 1e-9
    assert ((found - v) ** 2).sum() ** 0.5 >= distances.min() - 2 / steps


# properties, ties included ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@settings(max_examples=200)
@given(values=st.one_of(logits_of, tied_logits), radius=radii)
def test_a_point_of_the_simplex_outside_of_the_circle(values: list[float], radius: float, dtype: torch.dtype) -> None:
    weights = sparsestmax(torch.tensor(values, dtype=dtype), radius)
    count, tolerance = len(values), 1e-5 if dtype == torch.float32 else 1e-9
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert abs(float(weights.sum()) - 1) < tolerance
    distance = float((weights.double() - 1 / count).square().sum().sqrt())
    assert distance >= radius - tolerance or int((weights > 0).sum()) == 1


@given(st.one_of(logits_of, tied_logits))
def test_radius_0_is_sparsemax(values: list[float]) -> None:
    v = torch.tensor(values, dtype=FLOAT64)
    close(sparsestmax(v, 0.0), sparsemax(v))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@given(values=st.one_of(logits_of, tied_logits), share=st.floats(0.001, 1))
def test_beyond_the_corners_the_largest_is_alone(values: list[float], share: float, dtype: torch.dtype) -> None:
    """The corners are √((K−1)/K) off; of equal largest ones the first, also where they differ by rounding alone."""
    corner = (1 - 1 / len(values)) ** 0.5
    v = torch.tensor(values, dtype=dtype)
    for radius in (1.0, corner + share * (1 - corner)):
        weights = sparsestmax(v, radius)
        assert int((weights > 0).sum()) == 1
        assert float(weights.max()) == 1.0
        first = int(v.argmax())
        assert int(weights.argmax()) == first or float(v[first] - v[weights.argmax()]) < 1e-5


@given(logits_of, radii, st.randoms(use_true_random=False))
def test_permuted_logits_give_permuted_weights(values: list[float], radius: float, random: Random) -> None:
    _, margin = recursion(np.array(values), radius)
    assume(margin > 1e-6)
    order = list(range(len(values)))
    random.shuffle(order)
    v = torch.tensor(values, dtype=FLOAT64)
    close(sparsestmax(v[order], radius), sparsestmax(v, radius)[order], 1e-9)


@given(logits_of, radii, st.floats(-50, 50))
def test_a_shift_of_all_logits_changes_nothing(values: list[float], radius: float, shift: float) -> None:
    _, margin = recursion(np.array(values), radius)
    assume(margin > 1e-6)
    v = torch.tensor(values, dtype=FLOAT64)
    close(sparsestmax(v + shift, radius), sparsestmax(v, radius), 1e-7)


def test_a_radius_that_grows_ends_at_the_largest() -> None:
    """Followed step by step: the largest weight never falls, zeros stay."""
    v = torch.tensor([0.35, 0.5, 0.42, 0.2], dtype=FLOAT64)
    path = torch.stack([sparsestmax(v, radius) for radius in torch.linspace(0, 1, 201, dtype=FLOAT64)])
    assert (path[1:, 1] >= path[:-1, 1] - 1e-12).all()
    assert ((path[1:] == 0) | (path[:-1] > 0)).all()
    close(path[-1], torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=FLOAT64))


def test_one_logit() -> None:
    for radius in (0.0, 0.5, 1.0):
        assert sparsestmax(torch.tensor([0.3]), radius).tolist() == [1.0]


def test_the_radius_may_be_a_tensor() -> None:
    v = torch.tensor([0.6, 0.4, 0.3], dtype=FLOAT64)
    for radius in (0.0, 0.25, 0.5, 1.0):
        close(sparsestmax(v, torch.tensor(radius)), sparsestmax(v, radius))


# ties: the authors' code is 0/0 there -------------------------------------------------------------------------------


@parametrize_pairs(
    (
        "values",
        [
            [1.0, 1.0, 1.0],
            [0.1, 0.1, 0.1],
            [1.0, 1.0],
            [0.7, 0.7, 0.7, 0.7],
            [1.0, 1.0, 0.0],
            [0.0, 1.0, 1.0],
            [0.5, 0.5, 0.4],
            [0.6, 0.3, 0.3],
            [0.4, 0.4, 0.4, 0.1],
            [0.3, 0.6, 0.6, 0.3],
            [1 / 3, 1 / 3, 1 / 3 + 1e-9],
        ],
    ),
    ("radius", [*(step / 20 for step in range(21)), 2 / 6**0.5, 0.5**0.5]),
    ("dtype", [torch.float32, FLOAT64]),
)
def test_ties(values: list[float], radius: float, dtype: torch.dtype) -> None:
    v = torch.tensor(values, dtype=dtype, requires_grad=True)
    weights = sparsestmax(v, radius)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert (weights >= 0).all()
    assert abs(float(weights.detach().sum()) - 1) < tolerance
    distance = float((weights.detach() - 1 / len(values)).square().sum().sqrt())
    assert distance >= radius - tolerance or int((weights > 0).sum()) == 1
    for cotangent in torch.eye(len(values), dtype=dtype):
        (gradient,) = torch.autograd.grad(weights, v, cotangent, retain_graph=True)
        assert torch.isfinite(gradient).all()
        # The authors' are of the order of 1e6 where the logits are exactly equal.
        assert len(set(values)) > 1 or float(gradient.abs().max()) <= 1


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.3, 0.4, 0.6, 0.75])
def test_of_equal_logits_the_first_is_taken_to_be_larger(count: int, radius: float) -> None:
    weights = sparsestmax(torch.ones(count, dtype=FLOAT64), radius)
    towards = -torch.ones(count, dtype=FLOAT64) / count
    towards[0] += 1
    corner = (1 - 1 / count) ** 0.5
    close(weights, 1 / count + min(radius, corner) * towards / corner, 1e-9)


@pytest.mark.parametrize(("count", "radius"), [(2, 0.3), (2, 0.6), (3, 0.1), (3, 0.3), (3, 0.44), (4, 0.1), (4, 0.3)])
def test_the_gradient_of_equal_logits_is_that_of_sparsemax(count: int, radius: float) -> None:
    """I − 1/K, whatever the rounding of the point on the circle."""
    expected = torch.eye(count, dtype=FLOAT64) - 1 / count
    close(jacobian(torch.ones(count, dtype=FLOAT64), radius), expected, 1e-9)


def test_a_tie_of_the_two_largest() -> None:
    """Where the authors have NaN: the direction is straight to the edge, from whose middle the first wins."""
    v = torch.tensor([0.5, 0.5, 0.44], dtype=FLOAT64)
    close(sparsestmax(v, 0.3), 1 / 3 + 0.3 * torch.tensor([1.0, 1.0, -2.0], dtype=FLOAT64) / 6**0.5)
    weights = sparsestmax(v, 0.75)
    assert weights[2] == 0
    # The circle of .75 cuts the edge's line √(.75² − 1/6) off its middle.
    off = (0.75**2 - 1 / 6) ** 0.5 / 2**0.5
    close(weights, torch.tensor([0.5 + off, 0.5 - off, 0.0], dtype=FLOAT64), 1e-9)


# gradients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
@settings(max_examples=150)
@given(values=st.one_of(logits_of, tied_logits), radius=radii)
def test_gradients_are_finite(values: list[float], radius: float, dtype: torch.dtype) -> None:
    v = torch.tensor(values, dtype=dtype, requires_grad=True)
    weights = sparsestmax(v, radius)
    for cotangent in torch.eye(len(values), dtype=dtype):
        (gradient,) = torch.autograd.grad(weights, v, cotangent, retain_graph=True)
        assert torch.isfinite(gradient).all()


@settings(max_examples=80, deadline=None)
@given(logits_of, radii)
def test_gradcheck_away_from_kinks(values: list[float], radius: float) -> None:
    _, margin = recursion(np.array(values), radius)
    assume(margin > 1e-2)
    v = torch.tensor(values, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda each: sparsestmax(each, radius), (v,), atol=1e-4, rtol=1e-3)
