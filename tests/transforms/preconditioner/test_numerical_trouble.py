"""Preconditioning in low precision and with inputs that are not finite, all zero, or none."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from preconditioned_by_hand import (
    BOTH,
    IMMEDIATE,
    NAMES,
    attached,
    inverse_power,
    loss_of,
    moment_of,
    preconditioned,
    second_moment,
    small_net,
)
from torch import Tensor, nn

from wellcond import FeatureDescent, FeatureWhitening, WellcondWarning


@BOTH
def test_under_autocast_statistics_are_float32(transform_type: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
    optimizer, _ = attached(model, transform_type(**IMMEDIATE))
    x = torch.randn(5, 2, 4, 4)
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    optimizer.step()
    assert seen[0].dtype == torch.bfloat16
    for layer, inputs in ((model[0], x), (model[3], seen[0])):
        m = moment_of(optimizer, layer.weight)
        assert m.dtype == torch.float32
        np.testing.assert_allclose(m.double().numpy(), second_moment(layer, [inputs], True), rtol=1e-5, atol=1e-6)
        assert all(v.dtype != torch.bfloat16 for v in optimizer.state[layer.weight].values() if isinstance(v, Tensor))


@BOTH
def test_stepping_inside_autocast_multiplies_in_float32(transform_type: type) -> None:
    grads = []
    for enabled in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(6, 3)
        optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
        layer(torch.randn(9, 6)).sin().sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        grads.append(layer.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@BOTH
def test_statistics_of_bfloat16_parameters_are_float32(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).bfloat16()
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    x = torch.randn(30, 4).bfloat16()
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    m = moment_of(optimizer, layer.weight)
    expected = second_moment(layer, [x], True)
    assert m.dtype == torch.float32
    np.testing.assert_allclose(m.double().numpy(), expected, rtol=1e-5, atol=1e-6)
    weight_grad, bias_grad = preconditioned(layer, inverse_power(expected, transform_type, 0.05), *before)
    assert layer.weight.grad.dtype == torch.bfloat16
    scale = float(weight_grad.abs().max())
    torch.testing.assert_close(layer.weight.grad.double(), weight_grad, rtol=2**-8, atol=1e-4 * scale)
    torch.testing.assert_close(layer.bias.grad.double(), bias_grad, rtol=2**-8, atol=1e-4 * scale)


# numerical trouble --------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_inputs_never_enter_the_second_moment(transform_type: type, bad: float) -> None:
    """The step is one that a loss scaler would make with finite gradients, or that clipping repaired."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer, handle = attached(layer, transform_type(stats_every=1, solve_every=1))
    before: Tensor | None = None
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(6, 4)
        if step == 2:
            before = moment_of(optimizer, layer.weight)
            x[3, 1] = bad
        layer(x).sum().backward()
        for p in layer.parameters():
            p.grad.nan_to_num_(1.0, 1.0, 1.0)
        optimizer.step()
        if step == 2:
            assert before is not None
            assert torch.equal(moment_of(optimizer, layer.weight), before)
            assert handle.stats()[NAMES[transform_type]]["skipped_updates"] == 1
    assert handle.stats()[NAMES[transform_type]] == {"weights": 1, "failed_solves": 0, "skipped_updates": 1}
    assert before is not None
    assert not torch.equal(moment_of(optimizer, layer.weight), before)
    assert all(bool(torch.isfinite(p).all()) for p in layer.parameters())


@BOTH
def test_a_non_finite_first_batch_leaves_the_plain_gradient_until_a_finite_one(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, stats_every=1, solve_every=1), lr=0.0)
    for step in range(2):
        x = torch.randn(6, 4, dtype=torch.float64)
        if step == 0:
            x[0, 0] = math.nan
        layer(x).sum().backward()
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        before = layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.step()
        if step == 0:
            torch.testing.assert_close(layer.weight.grad, before[0])
        else:
            t = inverse_power(second_moment(layer, [x], True), transform_type, 0.05)
            expected, _ = preconditioned(layer, t, *before)
            torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)


@BOTH
def test_a_non_finite_micro_batch_does_not_take_the_finite_one_with_it(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.0)
    good, bad = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    bad[2, 2] = math.inf
    for x in (bad, good):
        layer(x).sum().backward()
    for p in layer.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    expected = second_moment(layer, [good], True)
    torch.testing.assert_close(moment_of(optimizer, layer.weight).numpy(), expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_are_all_zero_give_no_nan(transform_type: type, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=bias)
    optimizer, handle = attached(layer, transform_type(**IMMEDIATE))
    for step in range(3):
        optimizer.zero_grad()
        layer(torch.zeros(5, 4) if step < 2 else torch.randn(5, 4)).sum().backward()
        optimizer.step()
        assert all(bool(torch.isfinite(p).all()) and bool(torch.isfinite(p.grad).all()) for p in layer.parameters())
    assert handle.stats()[NAMES[transform_type]]["failed_solves"] == 0


@BOTH
def test_a_zero_element_batch_changes_no_statistics_and_no_nan_appears(transform_type: type) -> None:
    model = small_net()
    optimizer, _ = attached(model, transform_type(stats_every=1, solve_every=1))
    for step in range(4):
        optimizer.zero_grad()
        if step == 2:
            before = moment_of(optimizer, model[0].weight)
            model(torch.zeros(0, 2, 6, 6, dtype=torch.float64)).sum().backward()
        else:
            loss_of(model, step).backward()
        optimizer.step()
        if step == 2:
            assert torch.equal(moment_of(optimizer, model[0].weight), before)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_an_empty_batch_is_not_counted_as_a_non_finite_one() -> None:
    layer = nn.Linear(4, 3)
    optimizer, handle = attached(layer, FeatureWhitening(**IMMEDIATE))
    for size in (5, 0, 5):
        optimizer.zero_grad()
        layer(torch.randn(size, 4)).sum().backward()
        optimizer.step()
    assert handle.stats()["whitening"]["skipped_updates"] == 0


def test_an_empty_batch_does_not_use_up_the_turn_of_a_full_one() -> None:
    """Statistics are due every 50 steps: after an empty batch at step 0 the next batch is the first observation."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, FeatureWhitening(stats_every=50, solve_every=500, solve_warmup=False), lr=0.0)
    for size in (0, 5):
        optimizer.zero_grad()
        layer(torch.randn(size, 4, dtype=torch.float64)).sin().sum().backward()
        before = layer.weight.grad.clone()
        optimizer.step()
    assert float(moment_of(optimizer, layer.weight).abs().sum()) > 0
    assert not torch.allclose(layer.weight.grad, before)


@pytest.mark.parametrize(("transform_type", "function"), [(FeatureWhitening, "eigh"), (FeatureDescent, "cholesky")])
def test_after_a_failed_factorization_the_last_good_one_stays(
    transform_type: type, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    options: dict[str, Any] = {"stats_decay": 0.0, "stats_every": 1, "solve_every": 1}
    optimizer, handle = attached(layer, transform_type(damping=0.05, **options), lr=0.0)
    good_inputs: Tensor | None = None
    real = getattr(torch.linalg, function)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    caught: list[list[Any]] = []
    for step in range(6):
        monkeypatch.setattr(torch.linalg, function, fails if step in (2, 3) else real)
        optimizer.zero_grad()
        x = torch.randn(6, 4, dtype=torch.float64) * (1 + step)
        layer(x).sin().sum().backward()
        before = layer.weight.grad.clone(), layer.bias.grad.clone()
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            optimizer.step()
        caught.append([w for w in record if issubclass(w.category, WellcondWarning)])
        if step not in (2, 3):
            good_inputs = x
        assert good_inputs is not None
        t = inverse_power(second_moment(layer, [good_inputs], True), transform_type, 0.05)
        expected, _ = preconditioned(layer, t, *before)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)
    assert [len(found) for found in caught] == [0, 0, 1, 0, 0, 0]
    assert handle.stats()[NAMES[transform_type]]["failed_solves"] == 2


def test_inputs_never_seen_are_reported_once() -> None:
    """A layer whose weight is used without calling it cannot be preconditioned: say so, and step as the plain one."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
    optimizer, _ = attached(model, FeatureWhitening(stats_every=1, solve_every=1), lr=0.0)
    grads = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(4):
            optimizer.zero_grad()
            hidden = nn.functional.linear(torch.randn(5, 4), model["a"].weight, model["a"].bias)
            model["b"](hidden).sum().backward()
            grads.append(model["a"].weight.grad.clone())
            optimizer.step()
            torch.testing.assert_close(model["a"].weight.grad, grads[-1])
    found = [w for w in record if issubclass(w.category, WellcondWarning)]
    assert len(found) == 1
    assert "a" in str(found[0].message)
