"""Gradient clipping as part of a method: torch's own, on all ways in which the lab takes a step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from wellcond.lab.errors import LabError
from wellcond.lab.methods.clipping import Clipping
from wellcond.lab.methods.method import method
from wellcond.lab.methods.optimizers import take_step
from wellcond.lab.methods.spec import Refresh
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.runner import Runner


@pytest.mark.parametrize("clipping", [Clipping(), Clipping(norm=0.1), Clipping(value=0.02), Clipping(0.05, 0.02)])
def test_gradients_are_clipped_as_by_torch(clipping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    other, x = copy.deepcopy(model), torch.randn(5, 4)
    take_step(torch.optim.SGD(model.parameters(), 0.1), lambda: model(x).square().sum(), clipping=clipping)
    other(x).square().sum().backward()
    if clipping.value is not None:
        nn.utils.clip_grad_value_(other.parameters(), clipping.value)
    if clipping.norm is not None:
        nn.utils.clip_grad_norm_(other.parameters(), clipping.norm)
    torch.optim.SGD(other.parameters(), 0.1).step()
    for one, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)


def test_a_run_is_clipped():
    """Gradients of a norm of 1e-9 train nothing; without weight decay and momentum the weights stay."""
    plan = make_plan(Settings(epochs=1, train_images=64, seeds=1))
    runner = Runner(plan.task, torch.device("cpu"))
    losses = {
        text: runner.run(plan.spec(method(text, "mine"), 0.1, seed=0)).epochs[-1].test_loss
        for text in ("SGD(momentum=0.0)", "SGD(momentum=0.0) + clip_norm=1e-9", "SGD(momentum=0.0) + clip_value=1e-11")
    }
    free, *held = losses.values()
    assert held[0] == pytest.approx(held[1], rel=1e-5)
    assert abs(free - held[0]) > 1e-3


def test_transforms_see_clipped_gradients():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    clipped = method("SGD(momentum=0.0) + GradientCentralization + clip_norm=0.5")
    optimizer, _ = clipped.build(model, 1.0, Refresh(1, 1))
    before = model.weight.detach().clone()
    take_step(optimizer, lambda: 100 * model(x).square().sum(), clipping=clipped.clipping)
    step = before - model.weight
    assert 0 < step.norm() < 0.5
    torch.testing.assert_close(step.mean(1), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", ["0", "-1.0", "True", "'a'", "None", "[1.0]"])
@pytest.mark.parametrize("name", ["clip_norm", "clip_value"])
def test_a_limit_must_be_positive(name, value):
    with pytest.raises(LabError, match=rf"character \d+: {name} must be a positive number"):
        method(f"SGD() + {name}={value}")
    with pytest.raises(LabError, match=f"{name}= is given twice"):
        method(f"SGD() + {name}=1 + {name}=2")


def test_it_is_a_part_of_the_method():
    clipped = method("SGDM + clip_value=0.5 + clip_norm=1")
    assert clipped.text().endswith("+ clip_norm=1.0 + clip_value=0.5")
    assert not clipped.is_plain
    assert clipped.description == "SGD with gradients of a norm up to 1, gradients of a value up to 0.5"
