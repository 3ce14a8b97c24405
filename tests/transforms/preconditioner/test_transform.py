"""FeatureWhitening and FeatureDescent against the formulas of their source, summed patch by patch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preconditioned_by_hand import (
    BOTH,
    DAMPING,
    IMMEDIATE,
    OPTIMIZERS,
    Reference,
    assert_same_weights,
    attached,
    inverse_power,
    loss_of,
    preconditioned,
    run_both,
    second_moment,
    small_net,
)
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization


@parametrize_pairs(
    ("optimizer", list(OPTIMIZERS)),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("warmup", [False, True]),
)
def test_training_equals_the_plain_optimizer_on_preconditioned_gradients(
    transform_type: type, optimizer: str, warmup: bool
) -> None:
    ours, plain, reference = run_both(transform_type, OPTIMIZERS[optimizer], warmup=warmup)
    assert reference.solved_at == ([0, 2, 4, 8, 12] if warmup else [0, 4, 8, 12])
    assert_same_weights(ours, plain)


@BOTH
@pytest.mark.parametrize(
    ("stats_every", "solve_every", "solves"),
    [
        (1, 9, [0, 1, 2, 4, 8, 9, 18]),
        (2, 7, [0, 2, 4, 7, 14]),
        (3, 3, [0, 3, 6, 9, 12, 15, 18]),
        (5, 3, [0, 3, 6, 9, 12, 15, 18]),
    ],
)
def test_warmup_solves_at_doubling_steps_until_the_interval(
    transform_type: type, stats_every: int, solve_every: int, solves: list[int]
) -> None:
    """Also where the two intervals do not divide each other, or factorizations come more often than statistics."""
    ours, plain, reference = run_both(
        transform_type, OPTIMIZERS["SGD"], steps=19, stats_every=stats_every, solve_every=solve_every
    )
    assert reference.solved_at == solves
    assert_same_weights(ours, plain)


def test_sgd_by_hand_decay_enters_after_norm_recovery() -> None:
    """Algorithm 5 written out: m ← β m + (G̃ + λ W), W ← W − η m, without any torch optimizer."""
    ours, plain = small_net(), small_net()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    wellcond.attach(optimizer, ours, FeatureDescent(damping=0.1, stats_decay=0.9, stats_every=2, solve_every=4))
    reference = Reference(plain, FeatureDescent, 0.1, decay=0.9, stats_every=2, solve_every=4, warmup=True)
    momenta = [torch.zeros_like(p) for p in plain.parameters()]
    for step in range(8):
        optimizer.zero_grad()
        loss_of(ours, step).backward()
        optimizer.step()
        plain.zero_grad()
        loss_of(plain, step).backward()
        reference.change_gradients()
        with torch.no_grad():
            for p, m in zip(plain.parameters(), momenta, strict=True):
                m.mul_(0.9).add_(p.grad + 0.3 * p)
                p.sub_(0.1 * m)
    assert_same_weights(ours, plain)


@BOTH
def test_without_norm_recovery_the_raw_product_is_used(transform_type: type) -> None:
    ours, plain, _ = run_both(transform_type, lambda p: torch.optim.SGD(p, lr=0.02), restore=False)
    assert_same_weights(ours, plain)


@BOTH
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_learning_rate_and_decay_schedules_are_followed(transform_type: type, optimizer: str) -> None:
    def change(group: dict[str, Any], step: int) -> None:
        group["lr"] = 0.1 / (1 + step) ** 2
        group["weight_decay"] = 0.05 * step

    ours, plain, _ = run_both(transform_type, OPTIMIZERS[optimizer], change_groups=change)
    assert_same_weights(ours, plain)


def test_whitening_does_not_depend_on_the_scale_of_its_input_but_descent_does() -> None:
    """ε is relative to λ_max in one and absolute in the other."""
    directions: dict[type, list[Tensor]] = {}
    for transform_type in (FeatureWhitening, FeatureDescent):
        for scale in (1.0, 100.0):
            torch.manual_seed(0)
            layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
            wellcond.attach(optimizer, layer, transform_type())
            layer(scale * torch.randn(20, 5, dtype=torch.float64)).square().sum().backward()
            layer.weight.grad = torch.linspace(-1, 2, 15, dtype=torch.float64).reshape(3, 5)
            optimizer.step()
            directions.setdefault(transform_type, []).append(layer.weight.grad)
    torch.testing.assert_close(*directions[FeatureWhitening], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(*directions[FeatureDescent], rtol=1e-3, atol=1e-3)


# one step: the dense formula and the norm ---------------------------------------------------------------------------


@st.composite
def layer_cases(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    seed, bias, size = draw(st.integers(0, 10**6)), draw(st.booleans()), draw(st.integers(1, 4))
    torch.manual_seed(seed)
    if draw(st.booleans()):
        layer: nn.Module = nn.Linear(draw(st.integers(1, 6)), draw(st.integers(1, 5)), bias=bias)
        x = torch.randn(size, draw(st.integers(1, 3)), layer.in_features)
    else:
        groups, per_group, out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        layer = nn.Conv2d(
            groups * per_group,
            groups * out,
            (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
            stride=draw(st.integers(1, 2)),
            padding=draw(st.integers(0, 1)),
            dilation=draw(st.integers(1, 2)),
            groups=groups,
            bias=bias,
        )
        x = torch.randn(size, groups * per_group, 5, 5)
    return layer, x


@BOTH
@given(case=layer_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_gradient_becomes_the_dense_formulas_and_keeps_its_norm(
    transform_type: type, case: tuple[nn.Module, Tensor]
) -> None:
    layer, x = case
    layer.double()
    x = x.double()
    optimizer, _ = attached(layer, transform_type(damping=DAMPING[transform_type], **IMMEDIATE))
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone(), None if layer.bias is None else layer.bias.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], layer.bias is not None), transform_type, DAMPING[transform_type])
    weight_grad, bias_grad = preconditioned(layer, t, *before)
    torch.testing.assert_close(layer.weight.grad, weight_grad, rtol=1e-8, atol=1e-10)
    if bias_grad is not None:
        torch.testing.assert_close(layer.bias.grad, bias_grad, rtol=1e-8, atol=1e-10)


@BOTH
@given(case=layer_cases())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_norm_of_weight_and_bias_together_is_recovered_in_float32(
    transform_type: type, case: tuple[nn.Module, Tensor]
) -> None:
    layer, x = case
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE))

    def norm() -> float:
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in layer.parameters()))

    layer(3 * x).sin().sum().backward()
    before = norm()
    optimizer.step()
    assert norm() == pytest.approx(before, rel=1e-6)


@BOTH
def test_a_zero_gradient_stays_zero(transform_type: type) -> None:
    layer = nn.Linear(4, 3)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE))
    (0 * layer(torch.randn(5, 4)).sum()).backward()
    optimizer.step()
    assert torch.equal(layer.weight.grad, torch.zeros(3, 4))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


@BOTH
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e15])
def test_tiny_and_huge_gradients_keep_their_norm(transform_type: type, magnitude: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    layer(torch.randn(5, 4)).sum().backward()
    layer.weight.grad = magnitude * torch.randn(3, 4)
    before = float(layer.weight.grad.double().norm())
    optimizer.step()
    assert float(layer.weight.grad.double().norm()) == pytest.approx(before, rel=1e-5)


# together with centralization ---------------------------------------------------------------------------------------


def test_transforms_are_applied_left_to_right() -> None:
    """Precondition, then centre: rows sum to zero. The other way round they do not."""
    sums = []
    for order in (0, 1):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3, bias=False, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        transforms = [FeatureWhitening(**IMMEDIATE), GradientCentralization()]
        wellcond.attach(optimizer, layer, *(transforms if order == 0 else transforms[::-1]))
        x = torch.randn(8, 5, dtype=torch.float64)
        layer(x).sin().sum().backward()
        g = layer.weight.grad.clone()
        optimizer.step()
        t = inverse_power(second_moment(layer, [x], False), FeatureWhitening, 1e-3)
        if order == 0:
            expected, _ = preconditioned(layer, t, g, None)
            expected = expected - expected.mean(dim=1, keepdim=True)
        else:
            expected, _ = preconditioned(layer, t, g - g.mean(dim=1, keepdim=True), None)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)
        sums.append(float(layer.weight.grad.sum(dim=1).abs().max()))
    assert sums[0] < 1e-12 < 1e-3 < sums[1]


# arguments ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_sources() -> None:
    whitening, descent = FeatureWhitening(), FeatureDescent()
    assert (whitening.damping, whitening.damping_mode) == (1e-3, "relative")
    assert (descent.damping, descent.damping_mode) == (0.1, "absolute")
    for transform in (whitening, descent):
        assert (transform.stats_decay, transform.stats_every, transform.solve_every) == (0.95, 50, 500)
        assert (transform.norm, transform.restore_norm) == ("restore", None)
        assert transform.solve_warmup is True


@BOTH
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("damping", 0.0),
        ("damping", -1e-3),
        ("damping", math.nan),
        ("damping", math.inf),
        ("damping", "0.1"),
        ("damping", None),
        ("damping_mode", "adaptive"),
        ("stats_decay", 1.0),
        ("stats_decay", -0.1),
        ("stats_decay", math.nan),
        ("stats_decay", None),
        ("stats_every", 0),
        ("stats_every", -3),
        ("stats_every", 2.0),
        ("stats_every", True),
        ("solve_every", 0),
        ("solve_every", 1.5),
        ("solver", "svd"),
        ("second_moment", "sparse"),
        ("precision", "float16"),
        ("max_dim", 0),
        ("max_dim", 64.0),
        ("rank", 0),
        ("rank", -1),
        ("gradient_momentum", 1.0),
        ("gradient_momentum", -0.5),
        ("norm_layers", "no"),
        ("where", "linear"),
        ("restore_norm", "no"),
        ("norm", "keep"),
        ("solve_warmup", "no"),
    ],
)
def test_bad_arguments_are_named_with_their_value(transform_type: type, argument: str, value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=argument) as caught:
        transform_type(**{argument: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("damping_mode", ["relative", "mean", "absolute"])
def test_a_solver_that_does_not_apply_is_refused_at_construction(damping_mode: str) -> None:
    with pytest.raises(ValueError, match="cholesky"):
        FeatureWhitening(solver="cholesky", damping_mode=damping_mode)
    assert FeatureDescent(solver="cholesky", damping_mode=damping_mode).solver == "cholesky"


@pytest.mark.parametrize("damping_mode", ["relative", "mean", "absolute"])
@pytest.mark.parametrize("solver", ["eigh", "cholesky"])
def test_descent_gives_the_same_with_either_solver(solver: str, damping_mode: str) -> None:
    models = []
    for chosen in ("auto", solver):
        model = small_net()
        options = {"damping_mode": damping_mode, "stats_every": 2, "solve_every": 4}
        optimizer, _ = attached(model, FeatureDescent(solver=chosen, **options))
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        models.append(model)
    assert_same_weights(*models, 1e-10)
