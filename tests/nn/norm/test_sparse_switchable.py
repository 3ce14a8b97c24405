"""Sparse Switchable Normalization: the authors' numbers and checkpoints, the choice and how it lasts, the schedule."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.nn import (
    SparseSwitchableNorm1d,
    SparseSwitchableNorm2d,
    SparseSwitchableNorm3d,
    SparsityScheduler,
    SwitchableNorm2d,
    fold_switchable,
    switch_logits,
)

FLOAT64 = torch.float64
GOLDEN = Path(__file__).parents[2] / "golden" / "ssn2d_r03.npz"
ALL = ("in", "ln", "bn")


def close(actual: object, expected: object, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def batch(step: int = 0, samples: int = 5, channels: int = 3, positions: tuple[int, ...] = (4, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    shift = torch.randn(samples, channels, *(1 for _ in positions), generator=generator, dtype=FLOAT64)
    return 1.5 * torch.randn(samples, channels, *positions, generator=generator, dtype=FLOAT64) + shift + 1


def made(
    mean: tuple[float, ...] = (0.2, 0.5, 0.3), var: tuple[float, ...] | None = (0.4, 0.1, 0.5), **options: Any
) -> SparseSwitchableNorm2d:
    layer = SparseSwitchableNorm2d(3, shared_logits=var is None, **options).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
        layer.mean_logits.copy_(torch.tensor(mean))
        if layer.var_logits is not None:
            layer.var_logits.copy_(torch.tensor(var))
    return layer


def closed(mean: str = "ln", var: str | None = "bn", **options: Any) -> SparseSwitchableNorm2d:
    """A layer that has chosen."""
    layer = made(
        tuple(float(name == mean) for name in ALL),
        None if var is None else tuple(float(name == var) for name in ALL),
        **options,
    )
    layer.radius = 1.0
    layer(batch())
    return layer


# the authors' numbers -----------------------------------------------------------------------------------------------


def test_the_authors_numbers() -> None:
    """To 1e-7: they have the circle's centre in float32."""
    golden = {key: value for key, value in np.load(GOLDEN).items() if key != "hyper"}
    hyper = json.loads(str(np.load(GOLDEN)["hyper"]))
    unused = set(golden)

    def take(key: str) -> Tensor:
        unused.discard(key)
        return torch.from_numpy(golden[key])

    momentum = 1 - hyper["momentum"]
    layer = SparseSwitchableNorm2d(hyper["num_features"], hyper["eps"], momentum, unbiased=True).double()
    layer.load_state_dict({key.removeprefix("state0_"): take(key) for key in golden if key.startswith("state0_")})
    assert layer.radius == pytest.approx(hyper["radius"])
    up = take("up")
    for step, data in enumerate(take("x_train")):
        x = data.clone().requires_grad_(step == 0)
        y = layer(x)
        close(y.detach(), take("train_y")[step], 1e-6)
        for name in ("running_mean", "running_var"):
            close(layer.get_buffer(name), take(f"buf_{name}")[step].flatten())
        assert layer.radius == pytest.approx(float(take("buf_radius")[step]))
        assert int(take("buf_mean_fixed")[step]) == int(take("buf_var_fixed")[step]) == 0
        assert layer.chosen == (None, None)
        if step == 0:
            close(y.detach(), take("train0_y"), 1e-6)
            y.backward(up)
            close(x.grad, take("train0_dx"), 1e-6)
            names = {"mean_weight": "mean_logits", "var_weight": "var_logits"}
            for theirs in ("weight", "bias", "mean_weight", "var_weight"):
                expected = take(f"train0_d_{theirs}").flatten()
                close(layer.get_parameter(names.get(theirs, theirs)).grad, expected, 1e-5)
    close(layer.eval()(take("x_eval")), take("eval_y"), 1e-6)
    assert unused == set()


# checkpoints --------------------------------------------------------------------------------------------------------


def authors_state(
    mean: list[float], var: list[float], mean_fixed: int, var_fixed: int, radius: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(1, 3, 1, 1, generator=generator),
        "bias": torch.randn(1, 3, 1, 1, generator=generator),
        "mean_weight": torch.tensor(mean),
        "var_weight": torch.tensor(var),
        "running_mean": torch.randn(1, 3, 1, generator=generator),
        "running_var": torch.rand(1, 3, 1, generator=generator),
        "mean_fixed": torch.tensor([mean_fixed], dtype=torch.int32),
        "var_fixed": torch.tensor([var_fixed], dtype=torch.int32),
        "radius": torch.tensor([radius]),
    }


CHECKPOINTS = {
    "open": (authors_state([0.2, 0.5, 0.3], [0.4, 0.1, 0.5], 0, 0, 0.25), (None, None)),
    "half frozen": (authors_state([0.2, 0.5, 0.3], [-1.0, 0.1, 1.5], 0, 1, 0.5), (None, "bn")),
    "frozen": (authors_state([2.0, 0.5, 0.3], [0.4, 3.0, 0.5], 1, 1, 0.875), ("in", "ln")),
    "frozen, one-hot": (authors_state([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], 1, 1, 1.0), ("ln", "in")),
}


@pytest.mark.parametrize(("theirs", "chosen"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_takes_the_authors_checkpoints(theirs: dict[str, Any], chosen: tuple[str | None, str | None]) -> None:
    before = {name: value.clone() for name, value in theirs.items()}
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ModuleDict({"norm": SparseSwitchableNorm2d(3)}))
    whole = {f"1.norm.{name}": value for name, value in theirs.items()}
    whole |= {name: value for name, value in model.state_dict().items() if name.startswith("0.")}
    missing, unexpected = model.load_state_dict(whole)
    assert (missing, unexpected) == ([], [])
    layer = model[1]["norm"]
    assert layer.chosen == chosen
    assert layer.radius == float(theirs["radius"])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(layer.state_dict()[name], theirs[name].flatten())
    assert torch.equal(layer.mean_logits, theirs["mean_weight"])
    assert torch.equal(layer.var_logits, theirs["var_weight"])
    for name, value in before.items():
        assert torch.equal(theirs[name], value)
    # The choice is not made anew for a smaller radius.
    layer.radius = 0.0
    for name, ratios in zip(chosen, (layer.mean_ratios, layer.var_ratios), strict=True):
        assert name is None or ratios[name] == 1.0


def test_takes_checkpoints_of_switchable_normalization() -> None:
    """The authors' and this library's, and a plain one: the radius and the choice stay."""
    theirs = {name: CHECKPOINTS["open"][0][name] for name in ("weight", "bias", "mean_weight", "var_weight")}
    theirs |= {name: CHECKPOINTS["open"][0][name] for name in ("running_mean", "running_var")}
    for state in (theirs, SwitchableNorm2d(3).state_dict(), nn.BatchNorm2d(3).state_dict()):
        layer = SparseSwitchableNorm2d(3)
        layer.radius = 0.5
        assert layer.load_state_dict(state) == ([], [])
        assert layer.radius == 0.5
        assert layer.chosen == (None, None)


# shares -------------------------------------------------------------------------------------------------------------


def test_the_shares_are_on_the_circle() -> None:
    layer = made()
    mean = torch.tensor([0.2, 0.5, 0.3], dtype=FLOAT64)  # on the simplex already, √(.14/3) off the centre
    assert layer.radius == 0.0
    close(layer.ratios()[0].detach(), mean, 1e-7)
    layer.radius = 0.2
    close(layer.ratios()[0].detach(), mean, 1e-7)
    layer.radius = 0.3
    away = mean - 1 / 3
    close(layer.ratios()[0].detach(), 1 / 3 + 0.3 * away / (away**2).sum() ** 0.5, 1e-6)
    layer.radius = 1.0
    assert layer.mean_ratios == {"in": 0.0, "ln": 1.0, "bn": 0.0}
    assert layer.var_ratios == {"in": 0.0, "ln": 0.0, "bn": 1.0}


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, [0.5]])
def test_the_radius_is_checked(value: Any) -> None:
    layer = made()
    layer.radius = 0.5
    with pytest.raises(ValueError, match=r"radius must lie in \[0, 1\], got"):
        layer.radius = value
    assert layer.radius == 0.5


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("radius", [step / 20 for step in range(21)])
def test_equal_logits_at_every_radius(radius: float, shared: bool) -> None:
    """Those a layer begins with: the authors' shares do not sum to 1, or are NaN."""
    layer = SparseSwitchableNorm2d(3, shared_logits=shared).double()
    layer.radius = radius
    x = batch().requires_grad_()
    y = layer(x)
    assert torch.isfinite(y).all()
    assert sum(layer.mean_ratios.values()) == pytest.approx(1)
    y.square().sin().sum().backward()
    for each in [x, *layer.parameters()]:
        assert torch.isfinite(each.grad).all()


# the choice ---------------------------------------------------------------------------------------------------------


def test_nothing_is_chosen_before_a_share_is_all() -> None:
    layer = made()
    for radius in (0.0, 0.3, 0.6):
        layer.radius = radius
        layer(batch())
        assert layer.chosen == (None, None)


def test_the_choice_is_for_good() -> None:
    layer = made()
    layer.radius = 1.0
    assert layer.chosen == (None, None)  # not before a training batch
    layer.eval()(batch())
    assert layer.chosen == (None, None)
    layer.train()(batch())
    assert layer.chosen == ("ln", "bn")
    layer.radius = 0.0
    with torch.no_grad():
        layer.mean_logits.copy_(torch.tensor([9.0, 0.0, 0.0]))
        layer.var_logits.copy_(torch.tensor([9.0, 0.0, 0.0]))
    for training in (True, False, True):
        layer.train(training)
        layer(batch(1))
        assert layer.chosen == ("ln", "bn")
        assert layer.mean_ratios == {"in": 0.0, "ln": 1.0, "bn": 0.0}
        assert layer.var_ratios == {"in": 0.0, "ln": 0.0, "bn": 1.0}


def test_the_means_may_choose_before_the_variances() -> None:
    layer = made((5.0, 0.0, 0.0), (0.4, 0.3, 0.3))
    layer(batch())
    assert layer.chosen == ("in", None)
    with torch.no_grad():
        layer.mean_logits.zero_()
    layer(batch())
    assert layer.chosen == ("in", None)
    layer.radius = 1.0
    layer(batch())
    assert layer.chosen == ("in", "in")


def test_the_choice_normalizes() -> None:
    """LN's mean, BN's variance, in training and in evaluation."""
    layer = closed("ln", "bn")
    x = batch(3)
    mean = x.mean((1, 2, 3), keepdim=True)
    weight, bias = layer.weight.view(-1, 1, 1), layer.bias.view(-1, 1, 1)
    var = x.var((0, 2, 3), correction=0, keepdim=True)
    close(layer(x), (x - mean) / (var + layer.eps).sqrt() * weight + bias)
    layer.eval()
    var = layer.running_var.view(1, -1, 1, 1)
    close(layer(x), (x - mean) / (var + layer.eps).sqrt() * weight + bias)


def reloaded(layer: SparseSwitchableNorm2d) -> SparseSwitchableNorm2d:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = SparseSwitchableNorm2d(3, shared_logits=layer.shared_logits).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("copied", [reloaded, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("shared", [True, False])
def test_copies_keep_the_choice(copied: Any, shared: bool) -> None:
    layer = closed("ln", None if shared else "in")
    layer.radius = 0.25
    with torch.no_grad():
        layer.mean_logits.zero_()
    other = copied(layer)
    assert other.chosen == layer.chosen == ("ln", "ln" if shared else "in")
    assert other.radius == 0.25
    for training in (True, False):
        close(other.train(training)(batch(2)), layer.train(training)(batch(2)), 0)


def test_a_copy_chooses_for_itself() -> None:
    layer = made()
    other = copy.deepcopy(layer)
    other.radius = 1.0
    other(batch())
    assert layer.chosen == (None, None)
    assert layer.radius == 0.0


def test_reset() -> None:
    layer = closed()
    layer.reset_parameters()
    assert layer.chosen == (None, None)
    assert layer.radius == 0.0
    assert torch.equal(layer.mean_logits, torch.ones(3, dtype=FLOAT64))


def test_once_chosen_the_logits_are_still() -> None:
    layer = closed("ln", "in")
    layer(batch()).square().sin().sum().backward()
    for logits in (layer.mean_logits, layer.var_logits):
        assert logits.grad is None or torch.equal(logits.grad, torch.zeros(3, dtype=FLOAT64))
    assert float(layer.weight.grad.abs().sum()) > 0


def test_without_batch_normalization() -> None:
    layer = SparseSwitchableNorm2d(3, normalizers=("in", "ln"), shared_logits=True).double()
    with torch.no_grad():
        layer.mean_logits.copy_(torch.tensor([0.4, 0.6]))
    x = batch()
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)
    layer.radius = 0.75  # beyond the corner, √(1/2)
    layer(x)
    assert layer.chosen == (None, None)
    layer.train()(x)
    assert layer.chosen == ("ln", "ln")
    close(layer(x), F.layer_norm(x, x.shape[1:]))
    close(layer(x[1:2]), layer(x)[1:2])


def test_half_precision_keeps_the_radius_and_the_choice() -> None:
    layer = closed("bn", None)
    layer.radius = 0.3
    layer.bfloat16()
    assert layer.radius == pytest.approx(0.3, abs=1e-7)
    assert layer.chosen == ("bn", "bn")
    assert layer.mean_chosen.dtype == torch.int64
    assert layer.circle.dtype == torch.float32
    assert layer(batch().bfloat16()).dtype == torch.bfloat16


# the schedule -------------------------------------------------------------------------------------------------------


def test_the_radius_grows_to_1_and_stays() -> None:
    model = nn.Sequential(SparseSwitchableNorm1d(3), SwitchableNorm2d(3), nn.Sequential(SparseSwitchableNorm3d(3)))
    model[0].radius = 0.7
    scheduler = SparsityScheduler(model, total_steps=5)
    for step in range(9):
        assert model[0].radius == model[2][0].radius == pytest.approx(min(step / 5, 1.0))
        scheduler.step()
    assert model[0].radius == 1.0


def test_the_schedule_resumes() -> None:
    layer = made()
    scheduler = SparsityScheduler(layer, total_steps=8)
    for _ in range(3):
        scheduler.step()
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    other = made()
    other.load_state_dict(layer.state_dict())
    resumed = SparsityScheduler(other, total_steps=8)
    resumed.load_state_dict(state)
    assert other.radius == layer.radius == 0.375
    resumed.step()
    assert other.radius == 0.5
    # Over more steps than before: the radius is where those are.
    longer = SparsityScheduler(other, total_steps=12)
    longer.load_state_dict(state)
    assert other.radius == 0.25


@pytest.mark.parametrize("total_steps", [0, -1, 2.5, "10", True])
def test_total_steps_is_checked(total_steps: Any) -> None:
    with pytest.raises(ValueError, match="total_steps must be a positive integer"):
        SparsityScheduler(made(), total_steps)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="found no SparseSwitchableNorm1d, 2d or 3d"):
        SparsityScheduler(SwitchableNorm2d(3), 5)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_training_ends_with_one_normalizer_a_layer(shared: bool, seed: int) -> None:
    """As the authors train the logits: a tenth of the rate, no weight decay, their gradient's norm clipped."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        SparseSwitchableNorm2d(6, shared_logits=shared),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2),
        SparseSwitchableNorm2d(6, shared_logits=shared),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    labels = torch.arange(16) % 2
    # Vertical or horizontal stripes, of any brightness.
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    images = torch.where(labels.view(-1, 1, 1) == 0, stripes, stripes.view(-1, 1)).unsqueeze(1)
    logits = switch_logits(model)
    others = [each for each in model.parameters() if all(each is not logit for logit in logits)]
    groups = [{"params": others}, {"params": logits, "lr": 0.01, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = 30
    scheduler = SparsityScheduler(model, steps)
    layers = [model[1], model[4]]
    losses, learned = [], [0] * len(logits)
    for _ in range(steps + 3):
        x = images + 0.5 * torch.randn(16, 1, 1, 1) + 0.3 * torch.randn(images.shape)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        shares = [part for layer in layers for part in layer.ratios()[: 1 if shared else 2]]
        for number, (logit, part) in enumerate(zip(logits, shares, strict=True)):
            assert torch.isfinite(logit.grad).all()
            left, slope = int((part > 0).sum()), float(logit.grad.norm())
            if left == 3:
                assert slope > 0
            else:
                assert slope <= (1e-6 if left == 2 else 0.0)  # Of two, the circle says how much each has.
            learned[number] += left == 3
        nn.utils.clip_grad_norm_(logits, 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert min(learned) > 0.4 * steps  # The circle of √(1/6) reaches the edges' middles.
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] / 2
    for layer in layers:
        assert None not in layer.chosen
        assert sorted(layer.mean_ratios.values()) == sorted(layer.var_ratios.values()) == [0.0, 0.0, 1.0]
    if shared:
        x = images + 0.1
        model.eval()
        before = model(x)
        close(fold_switchable(model)(x), before, 1e-5)
