"""Numbers worth logging: against what is computed by hand, and at no cost where nobody asks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import wellcond


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    """Make a step; return the weights' gradients before it."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    before = [layer.weight.grad.clone() for layer in model if isinstance(layer, nn.Linear)]
    optimizer.step()
    return before


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()


def test_gradients_are_compared_in_the_step_after_the_call() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, wellcond.GradientCentralization())
    step(model, optimizer, 0)
    assert handle.metrics() == {}
    before = step(model, optimizer, 1)
    after = [layer.weight.grad for layer in model]
    step(model, optimizer, 2)  # not this one
    dot = sum(float((g * h).sum()) for g, h in zip(before, after, strict=True))
    norms = [math.sqrt(sum(float(g.square().sum()) for g in some)) for some in (before, after)]
    found = handle.metrics(by_layer=True)
    assert found["gradient/cosine"] == pytest.approx(dot / (norms[0] * norms[1]))
    assert found["gradient/norm_ratio"] == pytest.approx(norms[1] / norms[0])
    assert found["gradient/norm_ratio/1.weight"] == pytest.approx(float(after[1].norm() / before[1].norm()))
    assert {type(value) for value in found.values()} == {float}


@pytest.mark.parametrize(
    ("transform", "damping"),
    [
        (wellcond.FeatureWhitening(stats_every=1, solve_every=4), lambda values: 1e-3 * values.max()),
        (wellcond.FeatureDescent(stats_every=1, solve_every=4), lambda values: 0.1),
        (
            wellcond.FeatureWhitening(stats_every=1, solve_every=4, damping_mode="mean", damping=0.5),
            lambda values: 0.5 * values.mean(),
        ),
    ],
)
def test_second_moments_are_described(transform: wellcond.GradientTransform, damping: object) -> None:
    model = nn.Sequential(net()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, transform)
    assert f"{transform.name}/effective_rank" not in handle.metrics()  # nothing was seen yet
    moment, mass = torch.zeros(5, 5, dtype=torch.float64), 0.0
    for seed in range(7):
        step(model, optimizer, seed)
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = torch.cat([x, torch.ones(32, 1, dtype=torch.float64)], 1)
        moment, mass = 0.95 * moment + 0.05 * rows.T @ rows / 32, 0.95 * mass + 0.05
    values = torch.linalg.eigvalsh(moment / mass)
    added = damping(values)  # type: ignore[operator]
    found = handle.metrics(spectra=True)
    assert found[f"{transform.name}/effective_rank"] == pytest.approx(float(values.sum() ** 2 / values.square().sum()))
    assert found[f"{transform.name}/condition"] == pytest.approx(float((values[-1] + added) / (values[0] + added)))
    assert found[f"{transform.name}/age"] == 2.0  # solved in steps 0, 1, 2 and 4, and this was step 6
    assert f"{transform.name}/condition" not in handle.metrics()


@pytest.mark.parametrize("form", ["dense", "kronecker", "low_rank", "blocks"])
def test_every_form_says_something(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    optimizer = wellcond.optim.WSGDM(model, lr=0.1, stats_every=1, second_moment=form)
    optimizer.attachment.metrics()
    model(torch.randn(16, 3, 4, 4)).square().mean().backward()
    optimizer.step()
    found = optimizer.attachment.metrics(spectra=True)
    assert found["whitening/age"] == 0.0
    assert all(math.isfinite(value) for value in found.values())
    assert found["gradient/cosine"] <= 1 + 1e-6


def test_a_step_costs_nothing_where_nobody_asks() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, "centralization")
    step(model, optimizer, 0)
    assert handle._metrics.before(handle._standing.pairs) == {}
    handle.metrics()
    assert len(handle._metrics.before(handle._standing.pairs)) == 2
