"""Schedules of λ (2.12) and of the bounds of Batch Renormalization."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from wellcond import theory
from wellcond.nn import (
    BatchRenorm1d,
    BatchRenormScheduler,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumScheduler,
)


def curve(scheduler: MomentumScheduler, layer: MomentumBatchNorm1d, steps: int) -> list[float]:
    """λ in each epoch: as it is at the start, and after each step."""
    values = [layer.stat_momentum]
    for _ in range(steps - 1):
        scheduler.step()
        values.append(layer.stat_momentum)
    return values


@pytest.mark.parametrize(("m", "base", "total"), [(2, 32, 180), (4, 32, 10), (8, 16, 3), (31, 32, 5), (2, 32, 2)])
@pytest.mark.parametrize("target", ["thesis", "derived"])
def test_the_formula(m: int, base: int, total: int, target: str) -> None:
    """(2.12) as printed; the derived end value has 2m/(m₀ + m) in place of m/m₀."""
    layer = MomentumBatchNorm1d(3, base_batch_size=base)
    scheduler = MomentumScheduler(layer, total, m, target=target)
    ratio = min(m / base, 1) if target == "thesis" else min(2 * m / (base + m), 1)
    rho = ratio ** (1 / total)
    expected = [rho ** (total / (total - 1) * max(total - t, 0)) - rho**total for t in range(1, total + 5)]
    assert curve(scheduler, layer, total + 4) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(0.0, abs=1e-12)
    end = 1 - m / base if target == "thesis" else (base - m) / (base + m)
    assert layer.stat_momentum == pytest.approx(end, abs=1e-6)


def test_by_hand() -> None:
    """m/m₀ = 1/16, T = 3: ρ^(T/(T−1)) = 1/4 from epoch to epoch."""
    layer = MomentumBatchNorm1d(3)
    assert curve(MomentumScheduler(layer, 3, 2), layer, 5) == pytest.approx([0, 3 / 16, 15 / 16, 15 / 16, 15 / 16])


@pytest.mark.parametrize("m", [32, 33, 256])
def test_large_batches_are_left_alone(m: int) -> None:
    layer = MomentumBatchNorm1d(3)
    assert curve(MomentumScheduler(layer, 4, m), layer, 8) == [0.0] * 8


def test_one_epoch_jumps() -> None:
    layer = MomentumBatchNorm1d(3)
    assert curve(MomentumScheduler(layer, 1, 8), layer, 3) == [0.75, 0.75, 0.75]


def test_epochs_before_the_first_count_as_the_first() -> None:
    assert theory.stat_momentum(0, 10, 4) == theory.stat_momentum(-3.5, 10, 4) == theory.stat_momentum(1, 10, 4) == 0


def test_every_layer_by_its_own_base() -> None:
    model = nn.Sequential(
        MomentumBatchNorm2d(3, base_batch_size=16),
        nn.BatchNorm2d(3),
        nn.Sequential(MomentumBatchNorm2d(3, base_batch_size=4)),
    )
    scheduler = MomentumScheduler(model, 2, 4)
    scheduler.step()
    assert model[0].stat_momentum == pytest.approx(0.75)
    assert model[2][0].stat_momentum == 0.0


def test_per_step() -> None:
    """λ rises with every step; at whole epochs it is that of the schedule per epoch."""
    layer, other = MomentumBatchNorm1d(3), MomentumBatchNorm1d(3)
    fine, coarse = MomentumScheduler(layer, 4, 8, steps_per_epoch=5), MomentumScheduler(other, 4, 8)
    values = curve(fine, layer, 26)
    assert values[::5] == pytest.approx(curve(coarse, other, 6), abs=1e-6)
    assert all(b > a for a, b in itertools.pairwise(values[:16]))
    # Between epochs: t = 1 + steps/5 in (2.12).
    rho = 0.25 ** (1 / 4)
    assert values[7] == pytest.approx(rho ** (4 / 3 * (4 - 2.4)) - rho**4, abs=1e-6)


@pytest.mark.parametrize("given", [None, 4])
def test_batch_size_is_that_of_the_data(given: int | None) -> None:
    """Also where a last batch is smaller, where the layer evaluates larger ones, and with accumulated gradients."""
    layer = MomentumBatchNorm1d(3)
    scheduler = MomentumScheduler(layer, 2, given)
    for samples in (4, 4, 3):  # micro-batches; the optimizer steps after all of them
        layer(torch.randn(samples, 3, 5)).sum().backward()
    layer.eval()
    layer(torch.randn(64, 3, 5))
    layer.train()
    scheduler.step()
    assert layer.stat_momentum == pytest.approx(1 - 4 / 32)


def test_batch_size_of_ghost_groups() -> None:
    layer = MomentumBatchNorm1d(3, group_size=2)
    scheduler = MomentumScheduler(layer, 2)
    layer(torch.randn(8, 3, 5))
    scheduler.step()
    assert layer.stat_momentum == pytest.approx(1 - 2 / 32)


def test_batch_size_may_change() -> None:
    """Each epoch is scheduled by what it saw."""
    layer = MomentumBatchNorm1d(3)
    scheduler = MomentumScheduler(layer, 2)
    layer(torch.randn(16, 3, 5))
    scheduler.step()
    assert layer.stat_momentum == pytest.approx(0.5)
    layer(torch.randn(8, 3, 5))
    scheduler.step()
    assert layer.stat_momentum == pytest.approx(0.75)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("steps_per_epoch", [None, 3])
@pytest.mark.parametrize("target", ["thesis", "derived"])
def test_resume(batch_size: int | None, steps_per_epoch: int | None, target: str) -> None:
    """A run that is stopped at any step goes on as if it had not been, also in the middle of an epoch."""

    def make() -> tuple[nn.Module, MomentumScheduler]:
        torch.manual_seed(0)
        model = nn.Sequential(MomentumBatchNorm1d(3), MomentumBatchNorm1d(3))
        return model, MomentumScheduler(model, 4, batch_size, steps_per_epoch=steps_per_epoch, target=target)

    def run(model: nn.Module, scheduler: MomentumScheduler, steps: range) -> list[float]:
        values = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4 if step % 2 else 2, 3, 5, generator=generator))
            values.append(model[0].stat_momentum)
            if step % 2:
                scheduler.step()
        return values

    model, scheduler = make()
    expected = run(model, scheduler, range(14))
    for stop in (0, 1, 5, 8):
        first, schedule = make()
        values = run(first, schedule, range(stop))
        second, resumed = make()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
        assert values + run(second, resumed, range(stop, 14)) == expected
        for name, value in second.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])


def test_loading_sets_the_layers() -> None:
    layer = MomentumBatchNorm1d(3)
    scheduler = MomentumScheduler(layer, 3, 2)
    scheduler.step()
    other = MomentumBatchNorm1d(3)
    resumed = MomentumScheduler(other, 3, 2)
    resumed.load_state_dict(scheduler.state_dict())
    assert other.stat_momentum == layer.stat_momentum > 0
    scheduler.step()
    resumed.step()
    assert other.stat_momentum == layer.stat_momentum


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"total_epochs": 0}, "total_epochs"),
        ({"total_epochs": 2.5}, "total_epochs"),
        ({"total_epochs": 3, "batch_size": 0}, "batch_size"),
        ({"total_epochs": 3, "steps_per_epoch": 0}, "steps_per_epoch"),
        ({"total_epochs": 3, "target": "paper"}, "target"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MomentumScheduler(MomentumBatchNorm1d(3), **options)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="MomentumBatchNorm"):
        MomentumScheduler(nn.Sequential(nn.BatchNorm2d(3)), 3)
    with pytest.raises(ValueError, match="BatchRenorm"):
        BatchRenormScheduler(nn.Sequential(nn.BatchNorm2d(3)))


def test_another_models_state_is_refused() -> None:
    scheduler = MomentumScheduler(MomentumBatchNorm1d(3), 3)
    model = nn.Sequential(MomentumBatchNorm1d(3), MomentumBatchNorm1d(3))
    with pytest.raises(ValueError, match="1 Momentum Batch Norms, the model has 2"):
        MomentumScheduler(model, 3).load_state_dict(scheduler.state_dict())
    with pytest.raises(KeyError):
        scheduler.load_state_dict({})


def test_bounds_of_batch_renormalization() -> None:
    """Batch normalization while it warms up, then linear to the layer's own bounds."""
    layer = BatchRenorm1d(3, r_max=5.0, d_max=2.0)
    scheduler = BatchRenormScheduler(layer, warmup_steps=10, r_steps=50, d_steps=20)
    for step in range(60):
        r_max = 1 + 4 * min(max(step - 10, 0) / 40, 1)
        d_max = 2 * min(max(step - 10, 0) / 10, 1)
        assert (layer.r_max, layer.d_max) == (pytest.approx(r_max), pytest.approx(d_max)), step
        scheduler.step()


def test_papers_bounds_of_batch_renormalization() -> None:
    """r_max: 1 → 3 from 5,000 to 40,000 steps; d_max: 0 → 5 from 5,000 to 25,000."""
    layer = BatchRenorm1d(3)
    scheduler = BatchRenormScheduler(layer)
    found = {}
    for step in range(40_001):
        if step in (0, 5000, 15_000, 22_500, 25_000, 40_000):
            found[step] = (round(layer.r_max, 4), round(layer.d_max, 4))
        scheduler.step()
    assert found == {
        0: (1.0, 0.0),
        5000: (1.0, 0.0),
        15_000: (1.5714, 2.5),
        22_500: (2.0, 4.375),
        25_000: (2.1429, 5.0),
        40_000: (3.0, 5.0),
    }


def test_batch_renormalization_resumes() -> None:
    layer, other = BatchRenorm1d(3, r_max=4.0), BatchRenorm1d(3, r_max=4.0)
    scheduler = BatchRenormScheduler(layer, warmup_steps=1, r_steps=8, d_steps=5)
    for _ in range(4):
        scheduler.step()
    resumed = BatchRenormScheduler(other, warmup_steps=1, r_steps=8, d_steps=5)
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(6):
        assert (other.r_max, other.d_max) == (layer.r_max, layer.d_max)
        scheduler.step()
        resumed.step()
    assert (other.r_max, other.d_max) == (4.0, 5.0)


def test_a_resumed_schedule_made_from_loaded_layers_ends_where_it_should() -> None:
    """Layers whose state was loaded in the middle of the schedule have the bounds of then."""
    layer = BatchRenorm1d(3)
    scheduler = BatchRenormScheduler(layer, warmup_steps=1, r_steps=8, d_steps=5)
    for _ in range(3):
        scheduler.step()
    other = BatchRenorm1d(3)
    other.load_state_dict(layer.state_dict())
    resumed = BatchRenormScheduler(other, warmup_steps=1, r_steps=8, d_steps=5)
    resumed.load_state_dict(scheduler.state_dict())
    for _ in range(8):
        resumed.step()
    assert (other.r_max, other.d_max) == (3.0, 5.0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 10, "r_steps": 5, "d_steps": 20}, "r_steps"),
        ({"warmup_steps": 10, "r_steps": 20, "d_steps": 5}, "d_steps"),
    ],
    ids=str,
)
def test_options_of_batch_renormalization_are_checked(options: dict[str, int], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        BatchRenormScheduler(BatchRenorm1d(3), **options)


def test_a_state_saved_before_the_step_still_knows_the_batch_of_the_epoch_so_far() -> None:
    def job() -> tuple[nn.Module, MomentumScheduler]:
        layer = MomentumBatchNorm1d(3)
        return layer, MomentumScheduler(layer, total_epochs=2)

    layer, scheduler = job()
    layer(torch.randn(8, 3))
    saved = layer.state_dict(), scheduler.state_dict()
    resumed, theirs = job()
    resumed.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    scheduler.step()
    theirs.step()
    assert resumed.stat_momentum == layer.stat_momentum == 0.75
