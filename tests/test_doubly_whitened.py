"""DW-SGDM: SGD with momentum over both-sided whitening in a fixed norm, and decay that is decoupled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureWhitening, GradientCentralization
from wellcond.optim import DWSGDM, create

FAST: dict[str, Any] = {"stats_every": 2, "solve_every": 4}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return model(x).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(7)) -> Tensor:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return weights_of(model)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_is_sgd_over_the_transform_with_weights_shrunk_before_each_step() -> None:
    model, reference = net(), net()
    optimizer = DWSGDM(model, lr=0.05, weight_decay=0.3, **FAST)
    plain = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    wellcond.attach(plain, reference, FeatureWhitening(norm="fixed", outputs=True, **FAST))
    for step in range(9):
        plain.zero_grad()
        loss_of(reference, step).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(1 - 0.05 * 0.3)
        plain.step()
    torch.testing.assert_close(train(model, optimizer, range(9)), weights_of(reference), rtol=1e-12, atol=1e-12)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3]


def test_a_closure_is_as_good_as_gradients_that_are_there() -> None:
    model, other = net(), net()
    train(model, DWSGDM(model, **FAST))
    optimizer = DWSGDM(other, **FAST)
    for step in range(7):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(other, step)
            loss.backward()
            return loss

        assert isinstance(optimizer.step(closure), Tensor)
    assert torch.equal(weights_of(model), weights_of(other))


def test_resumes_exactly_and_keeps_to_groups_and_schedules() -> None:
    model, resumed = net(), net()

    def groups(of: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": of[0].parameters(), "lr": 0.01}, {"params": of[2].parameters(), "weight_decay": 0.0}]

    optimizer, theirs = (DWSGDM(each, params=groups(each), **FAST) for each in (model, resumed))
    train(model, optimizer, range(3))
    resumed.load_state_dict(model.state_dict())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, range(3, 9)), train(resumed, theirs, range(3, 9)))
    assert [group["weight_decay"] for group in theirs.param_groups] == [0.1, 0.0]
    theirs.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert theirs.param_groups[-1]["decoupled_weight_decay"] is True


def test_attachments_know_that_its_decay_is_decoupled() -> None:
    """Centred decay takes the row means out of what decay does: they stay where they were."""
    model = net()
    optimizer = DWSGDM(model, weight_decay=1.0, lr=0.1, norm="restore", outputs=False, **FAST)
    optimizer.attachment.remove()
    wellcond.attach(optimizer, model, GradientCentralization(), weight_decay="decoupled")
    before = [model[index].weight.detach().mean(dim=1) for index in (0, 2)]
    train(model, optimizer)
    for index, mean in zip((0, 2), before, strict=True):
        torch.testing.assert_close(model[index].weight.detach().mean(dim=1), mean)


def test_an_overflow_under_a_fused_optimizer_skips_decay_too() -> None:
    model = net().float()
    optimizer = DWSGDM(model, fused=True, weight_decay=1.0, lr=0.5, **FAST)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.ones(2, 4)).square().mean()).backward()
    model[0].weight.grad[0, 0] = torch.inf
    before = weights_of(model)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights_of(model), before)


def test_it_is_known_by_name_and_its_options_are_shown() -> None:
    optimizer = create("DW-SGDM", net(), lr=0.3, second_moment="dense")
    assert isinstance(optimizer, DWSGDM)
    (transform,) = optimizer.attachment.transforms
    assert transform == FeatureWhitening(norm="fixed", outputs=True, second_moment="dense")
    with pytest.raises(ValueError, match="outputs must be True or False"):
        DWSGDM(net(), outputs="both")
    with pytest.raises(TypeError, match="DWSGDM has no option 'dampling': did you mean 'damping'"):
        DWSGDM(net(), dampling=0.1)
