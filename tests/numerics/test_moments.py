"""Moments against explicit loops in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wellcond.numerics import moments
from wellcond.numerics.moments import Moments

FLOAT64 = torch.float64
formats = st.sampled_from(["contiguous", "channels last", "transposed", "sliced", "flipped", "expanded"])


def loop(values: Tensor) -> tuple[float, float]:
    """Mean and biased variance, exactly rounded sums."""
    numbers = values.double().flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((number - mean) ** 2 for number in numbers) / len(numbers)


def by_loops(blocks: list[list[Tensor]]) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor([[loop(block) for block in row] for row in blocks], dtype=FLOAT64)
    return pairs[..., 0], pairs[..., 1]


def check(actual: Moments, blocks: list[list[Tensor]], rounding: float) -> None:
    """The mean to within rounding of the largest value; the variance as if from deviations from a rounded mean."""
    mean, var = by_loops(blocks)
    assert actual.mean.shape == mean.shape
    largest = torch.tensor([[float(block.double().abs().max()) for block in row] for row in blocks], dtype=FLOAT64)
    assert ((actual.mean.double() - mean).abs() <= 16 * rounding * largest).all()
    allowed = 300 * rounding * var + 20 * rounding * largest * var.sqrt() + (16 * rounding * largest) ** 2
    assert ((actual.var.double() - var).abs() <= allowed).all()
    assert (actual.var >= 0).all()
    counts = torch.as_tensor(actual.elements, dtype=FLOAT64).expand_as(mean)
    assert torch.equal(counts, torch.tensor([[float(b.numel()) for b in row] for row in blocks], dtype=FLOAT64))


def arrange(x: Tensor, memory: str) -> Tensor:
    if memory == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if memory == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "sliced":
        return torch.cat([x, x], -1)[..., ::2]
    if memory == "flipped":
        return x.flip(1).contiguous().flip(1)
    if memory == "expanded":
        return x[:1].expand_as(x)
    return x


@st.composite
def features(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, FLOAT64)) -> Tensor:
    dims = draw(st.integers(0, 3))
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 4)), *(draw(st.integers(1, 4)) for _ in range(dims)))
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(shape, dtype=FLOAT64)
    x = x + draw(st.sampled_from([0.0, 1.0, 1e2, 1e4])) * torch.randn(1, shape[1], *(1 for _ in range(dims)))
    return arrange(x.to(draw(st.sampled_from(dtypes))), draw(formats))


def unit(x: Tensor) -> float:
    return torch.finfo(moments.statistics_dtype(x.dtype)).eps


@settings(max_examples=100, deadline=None)
@given(x=features())
def test_of_instances_and_batches(x: Tensor) -> None:
    channels = range(x.shape[1])
    instances = [[row[c] for c in channels] for row in x]
    check(moments.instance_moments(x), instances, unit(x))
    batch = moments.batch_moments(x)
    check(Moments(batch.mean[None], batch.var[None], batch.elements), [[x[:, c] for c in channels]], unit(x))
    layer = moments.layer_moments(x)
    check(layer, [[row] for row in x], 4 * unit(x))


@settings(max_examples=60, deadline=None)
@given(x=features(), size=st.integers(1, 8), with_instances=st.booleans())
def test_of_ghost_groups(x: Tensor, size: int, with_instances: bool) -> None:
    sizes = moments.ghost_sizes(len(x), size)
    found = moments.instance_and_ghost_moments(x, sizes)[1] if with_instances else moments.ghost_moments(x, sizes)
    if sizes is None:
        found = Moments(found.mean[None], found.var[None], found.elements)
    bounds = np.cumsum([0, *(sizes or (len(x),))])
    blocks = [[x[a:b, c] for c in range(x.shape[1])] for a, b in itertools.pairwise(bounds.tolist())]
    check(found, blocks, unit(x))


@settings(max_examples=30, deadline=None)
@given(x=features((FLOAT64,)), groups=st.integers(1, 4))
def test_of_channel_groups(x: Tensor, groups: int) -> None:
    if x.shape[1] % groups:
        with pytest.raises(ValueError, match=f"groups must divide the {x.shape[1]} channels, got {groups}"):
            moments.group_moments(x, groups)
        return
    check(moments.group_moments(x, groups), [list(row.chunk(groups)) for row in x], 4 * unit(x))


@pytest.mark.parametrize("memory", ["contiguous", "channels last", "sliced"])
@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_instances_far_apart(memory: str, offset: float) -> None:
    """Each instance has its own mean, far from zero; the batch's mean is near zero, its variance huge."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 6, 6) + offset * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)
    x = arrange(x, memory)
    check(moments.instance_moments(x), [[x[n, c] for c in range(2)] for n in range(4)], unit(x))
    groups = moments.ghost_moments(x[[0, 2, 1, 3]], (2, 2))
    check(groups, [[x[[0, 2], c] for c in range(2)], [x[[1, 3], c] for c in range(2)]], unit(x))


@pytest.mark.parametrize("shape", [(6, 2, 1), (6, 2, 1, 1), (6, 2, 3, 3)], ids=str)
def test_constant_instances_have_no_variance(shape: tuple[int, ...]) -> None:
    """Each instance is one number at all of its positions; the numbers differ."""
    torch.manual_seed(0)
    x = torch.randn(6, 2).view(6, 2, *(1 for _ in shape[2:])).expand(shape).contiguous()
    found = moments.instance_moments(x)
    torch.testing.assert_close(found.mean, x.flatten(2)[..., 0], rtol=1e-6, atol=0)
    assert (found.var <= 1e-12 * found.mean.square()).all()


@pytest.mark.parametrize("shape", [(4, 2, 6), (2, 2, 3, 3), (3, 2), (2, 2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 / 3, 1e-30])
def test_constants_have_no_variance(shape: tuple[int, ...], value: float) -> None:
    x = torch.full(shape, value)
    for found in (moments.instance_moments(x), moments.batch_moments(x), moments.layer_moments(x)):
        torch.testing.assert_close(found.mean, torch.full_like(found.mean, x.flatten()[0]), rtol=1e-6, atol=0)
        assert (found.var >= 0).all()
        assert (found.var <= (1e-6 * value) ** 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """Sums of many values, and squares beyond what the narrow format holds."""
    torch.manual_seed(0)
    x = (300 + 100 * torch.randn(8, 2, 40, 40)).to(dtype)
    batch = moments.batch_moments(x)
    assert batch.mean.dtype == batch.var.dtype == torch.float32
    expected = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(batch.mean.double(), expected.mean(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(batch.var.double(), expected.var(1, correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_its_channel_alone(bad: float) -> None:
    x = torch.randn(4, 3, 5)
    x[1, 2, 3] = bad
    for found in (moments.batch_moments(x), moments.ghost_moments(x, (2, 2))):
        assert not found.mean[..., 2].isfinite().all()
        assert found.var[..., 2].isnan().any()
        assert found.mean[..., :2].isfinite().all()
        assert found.var[..., :2].isfinite().all()


def test_no_graph_is_kept() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    instances, groups = moments.instance_and_ghost_moments(x, (2, 2))
    assert not any(t.requires_grad for t in (instances.mean, instances.var, groups.mean, groups.var))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 2, 2)], ids=str)
def test_no_samples(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    assert moments.instance_moments(x).mean.shape == (0, 3)
    batch = moments.batch_moments(x)
    assert batch.elements == 0
    assert torch.equal(batch.mean, torch.zeros(3))
    assert torch.equal(batch.var, torch.zeros(3))


def test_one_dimension_is_refused() -> None:
    for function in (moments.instance_moments, moments.batch_moments):
        with pytest.raises(ValueError, match=r"inputs must have the shape \[N, C, \*positions\], got \[3\]"):
            function(torch.zeros(3))


@given(samples=st.integers(1, 60), size=st.integers(1, 20))
def test_ghost_sizes(samples: int, size: int) -> None:
    sizes = moments.ghost_sizes(samples, size) or (samples,)
    assert sum(sizes) == samples
    whole, rest = divmod(samples, size)
    if samples <= size:
        assert sizes == (samples,)
    elif 2 * rest > size:
        assert sizes == (size,) * whole + (rest,)
    else:
        assert sizes == (size,) * (whole - 1) + (size + rest,)
    assert moments.ghost_sizes(samples, None) is None


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    offset=st.sampled_from([0.0, 1e4]),
)
def test_merging_parts(sizes: list[int], seed: int, offset: float) -> None:
    """Moments of a union from those of its parts, without what E[x²] − μ² would lose."""
    torch.manual_seed(seed)
    parts = [torch.randn(size, 2) + offset for size in sizes]
    mean = torch.stack([part.mean(0) for part in parts])
    var = torch.stack([part.var(0, correction=0) for part in parts])
    union = torch.cat(parts).double()
    counts = torch.tensor(sizes, dtype=torch.float32)[:, None]
    found = moments.merge_unequal(Moments(mean, var, counts))
    tolerance = {"rtol": 1e-3, "atol": 1e-5 if not offset else 1e-2}
    torch.testing.assert_close(found.var.double(), union.var(0, correction=0), **tolerance)
    torch.testing.assert_close(found.mean.double(), union.mean(0), rtol=1e-6, atol=1e-6)
    assert torch.as_tensor(found.elements).flatten()[0] == sum(sizes)
    if len(set(sizes)) == 1:
        equal = moments.merge_moments(Moments(mean, var, sizes[0]), dim=0)
        torch.testing.assert_close(equal.var.double(), union.var(0, correction=0), **tolerance)
        torch.testing.assert_close(equal.mean.double(), union.mean(0), rtol=1e-6, atol=1e-6)
        assert equal.elements == sum(sizes)


def test_merging_over_two_dimensions() -> None:
    x = torch.randn(4, 3, 5, dtype=FLOAT64)
    own = Moments(x.mean(2), x.var(2, correction=0), 5)
    found = moments.merge_moments(own, dim=(0, 1), keepdim=True)
    assert found.mean.shape == (1, 1)
    assert found.elements == 60
    torch.testing.assert_close(found.mean.squeeze(), x.mean())
    torch.testing.assert_close(found.var.squeeze(), x.var(correction=0))


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (2, 2, 1), (2, 2, 3)], ids=str)
def test_groups_of_samples(sizes: tuple[int, ...] | None) -> None:
    """Summed, merged, and spread again."""
    samples = sum(sizes) if sizes else 6
    x = torch.randn(samples, 2, 3, dtype=FLOAT64)
    chunks = x.split(sizes) if sizes else [x]
    instances = Moments(x.mean(2), x.var(2, correction=0), 3)
    expected = torch.stack([chunk.transpose(0, 1).flatten(1).mean(1) for chunk in chunks])
    variance = torch.stack([chunk.transpose(0, 1).flatten(1).var(1, correction=0) for chunk in chunks])
    sums = torch.stack([chunk.sum((0, 2)) for chunk in chunks])
    if sizes is None:
        expected, variance, sums = expected[0], variance[0], sums[0]
    merged = moments.merge_samples(instances, sizes)
    torch.testing.assert_close(merged.mean, expected)
    torch.testing.assert_close(merged.var, variance)
    torch.testing.assert_close(moments.sum_samples(x.sum(2), sizes), sums)
    spread = moments.spread_samples(expected, sizes).expand(samples, -1)
    rows = [
        row for row, chunk in zip(expected[None] if sizes is None else expected, chunks, strict=True) for _ in chunk
    ]
    torch.testing.assert_close(spread, torch.stack(rows))


def test_unbiased() -> None:
    x = torch.randn(3, 7, dtype=FLOAT64)
    torch.testing.assert_close(moments.unbiased(Moments(x.mean(1), x.var(1, correction=0), 7)), x.var(1))
    counts = torch.tensor([[2.0], [1.0]], dtype=FLOAT64)
    var = torch.tensor([[3.0], [0.0]], dtype=FLOAT64)
    assert moments.unbiased(Moments(var, var, counts)).tolist() == [[6.0], [0.0]]
    assert moments.unbiased(Moments(var, var * 0, 1)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (FLOAT64, FLOAT64),
    ],
    ids=str,
)
def test_statistics_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert moments.statistics_dtype(dtype) == expected
    assert moments.instance_moments(torch.zeros(2, 3, 4, dtype=dtype)).var.dtype == expected


def test_positions() -> None:
    assert [moments.positions(torch.zeros(2, 3, *rest)) for rest in ((), (4,), (4, 5), (4, 5, 2))] == [1, 4, 20, 40]
