"""Decay in the gradient: what transforms behind it see, and that norm layers and biases are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import wellcond
from wellcond.lab.methods.gradient_decay import GradientDecay


def grads_after(*transforms, decay=0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=decay)
    if transforms:
        wellcond.attach(optimizer, model, *transforms)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(4, 2, 6, 6).double()).square().sum().backward()
    optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    return {n: b - p.detach() for n, b, p in zip(names, before, model.parameters(), strict=True)}, dict(
        zip(names, before, strict=True)
    )


def test_alone_it_is_coupled_decay_of_weights():
    ours, before = grads_after(GradientDecay(weight_decay=0.1))
    plain, _ = grads_after()
    for name, step in ours.items():
        decayed = 0.1 * before[name] if name in ("0.weight", "3.weight") else 0.0
        torch.testing.assert_close(step, plain[name] + decayed)


def test_a_projection_behind_it_takes_the_decay_too():
    """P(g + λw): what Gradient Centralization's decay inside the projection is."""
    options = {"layers": "all"}
    ours, _ = grads_after(GradientDecay(weight_decay=0.1), wellcond.GradientCentralization(decay="inside", **options))
    theirs, before = grads_after(wellcond.GradientCentralization(decay="inside", **options), decay=0.1)
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(ours[name], theirs[name])
    assert before.keys() == ours.keys()


@pytest.mark.parametrize("wrong", [-0.1, float("nan")])
def test_a_decay_below_zero_is_refused(wrong):
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got"):
        GradientDecay(weight_decay=wrong)
