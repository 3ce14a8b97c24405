"""Functional training, `torch.func`: forwards inside its transforms are left alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import wellcond


def test_forwards_inside_func_transforms_do_not_count_and_leave_nothing_behind() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1, solve_every=1))
    inputs = torch.randn(8, 4)

    def loss(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row.unsqueeze(0),)).square().sum()

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    assert per_sample["0.weight"].shape == (8, 3, 4)

    model(inputs).square().sum().backward()  # this one counts
    optimizer.step()
    rows = torch.cat([inputs, torch.ones(8, 1)], dim=1)
    moment = optimizer.state[model[0].weight]["wellcond_whitening_second_moment"]
    torch.testing.assert_close(moment[0], 0.05 * rows.T @ rows / 8)
    assert handle.stats()["whitening"]["skipped_updates"] == 0
