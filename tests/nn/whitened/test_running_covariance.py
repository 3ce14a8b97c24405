"""Moving averages of covariances against weighted sums over rows, written out."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

from wellcond.nn.whitened.running_covariance import RunningCovariance
from wellcond.numerics.row_moments import Covariance

FLOAT64 = torch.float64


def rows_of(step: int, count: int, groups: int = 2, width: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(groups, count, width, generator=generator, dtype=FLOAT64) + step


def weighted(rows: list[Tensor], weights: list[float], centered: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and covariance over all rows, each weighted as its update, by loops."""
    groups, _, width = rows[0].shape
    total = sum(weight * part.shape[1] for part, weight in zip(rows, weights, strict=True))
    mean, covariance = torch.zeros(groups, width, dtype=FLOAT64), torch.zeros(groups, width, width, dtype=FLOAT64)
    for group in range(groups):
        for part, weight in zip(rows, weights, strict=True):
            for row in part[group]:
                mean[group] += weight * row / total
        mean[group] *= centered
        for part, weight in zip(rows, weights, strict=True):
            for row in part[group]:
                covariance[group] += weight * torch.outer(row - mean[group], row - mean[group]) / total
    return mean, covariance


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_moving_average(decay: float, centered: bool) -> None:
    """A row of k updates ago weighs decay^k; what one update takes in may come in pieces."""
    running = RunningCovariance(2, 3, centered, decay, dtype=FLOAT64)
    seen: list[Tensor] = []
    for step, counts in enumerate([[4], [1, 5], [7, 2, 3]]):
        pieces = [rows_of(10 * step + index, count) for index, count in enumerate(counts)]
        for piece in pieces:
            running.observe(piece)
        running.update(False)
        seen.append(torch.cat(pieces, dim=1))
        weights = [decay**age for age in reversed(range(len(seen)))]
        mean, covariance = weighted(seen, weights, centered)
        torch.testing.assert_close(running.mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(running.covariance, covariance, rtol=1e-12, atol=1e-12)


def test_without_new_rows_nothing_ages() -> None:
    running = RunningCovariance(2, 3, True, 0.5, dtype=FLOAT64)
    running.update(False)
    assert float(running.count) == 0
    assert torch.isfinite(running.covariance).all()
    running.observe(rows_of(0, 4))
    running.update(False)
    before = copy.deepcopy(running.state_dict())
    running.observe(rows_of(0, 0))
    running.update(False)
    assert all(torch.equal(before[name], getattr(running, name)) for name in ("count", "mean", "covariance"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_skipped_and_counted(value: float) -> None:
    running, clean = (RunningCovariance(2, 3, True, 0.5, dtype=FLOAT64) for _ in range(2))
    bad = rows_of(1, 4)
    bad[1, 2, 0] = value
    for rows in (rows_of(0, 4), bad, rows_of(2, 3)):
        running.observe(rows)
        if rows is not bad:
            clean.observe(rows)
    running.update(False)
    clean.update(False)
    assert int(running.skipped) == 1
    torch.testing.assert_close(running.covariance, clean.covariance)
    running.observe(bad)
    running.update(False)
    torch.testing.assert_close(running.covariance, clean.covariance)


def test_scale_free_updates_count_alike() -> None:
    running = RunningCovariance(2, 3, False, 0.5, scale_free=True, dtype=FLOAT64)
    other = copy.deepcopy(running)
    for step, scale in enumerate([1.0, 1e4, 1e-6]):
        running.observe(rows_of(step, 5))
        other.observe(scale * rows_of(step, 5))
        running.update(False)
        other.update(False)
    torch.testing.assert_close(running.covariance, other.covariance)
    before = running.covariance.clone()
    running.observe(0 * rows_of(0, 5))
    running.update(False)
    torch.testing.assert_close(running.covariance, before)


def test_far_from_zero_float32_keeps_its_digits() -> None:
    rows = rows_of(0, 200)
    far, near = RunningCovariance(2, 3, True, 0.9), RunningCovariance(2, 3, True, 0.9, dtype=FLOAT64)
    for part in rows.split(50, dim=1):
        far.observe((part + 3000).float())
        near.observe((part + 3000).float().double())
        far.update(False)
        near.update(False)
    torch.testing.assert_close(far.covariance.double(), near.covariance, rtol=1e-3, atol=1e-3)


def test_half_precision_casts_leave_statistics_alone() -> None:
    running = RunningCovariance(2, 3, True, 0.5)
    running.observe(rows_of(0, 4).float())
    running.update(False)
    running.observe(rows_of(1, 4).float())
    before = copy.deepcopy(running)
    running.half().bfloat16()
    assert running.covariance.dtype == torch.float32
    assert torch.equal(running.covariance, before.covariance)
    assert running.pending is not None
    assert before.pending is not None
    assert torch.equal(running.pending.covariance, before.pending.covariance)
    assert running.double().pending is not None
    assert running.pending.mean.dtype == FLOAT64 == running.mean.dtype


def test_what_waits_is_saved() -> None:
    running, other = (RunningCovariance(2, 3, True, 0.5) for _ in range(2))
    running.observe(rows_of(0, 4).float())
    file = io.BytesIO()
    torch.save(running.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    running.update(False)
    other.update(False)
    assert torch.equal(running.covariance, other.covariance)


def test_merging_with_nothing() -> None:
    nothing = Covariance(torch.zeros(()), torch.zeros(1, 2), torch.zeros(1, 2, 2))
    something = Covariance(torch.tensor(3.0), torch.ones(1, 2), torch.eye(2).unsqueeze(0))
    for merged in (nothing.merged(something), something.merged(nothing)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(merged, something, strict=True))
    assert not any(part.isnan().any() for part in nothing.merged(nothing))
