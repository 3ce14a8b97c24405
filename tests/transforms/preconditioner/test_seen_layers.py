"""The layers whose gradients are preconditioned: the others get the plain gradient, and are reported."""

from __future__ import annotations

import torch
from preconditioned_by_hand import (
    BOTH,
    IMMEDIATE,
    NAMES,
    attached,
    inverse_power,
    loss_of,
    preconditioned,
    second_moment,
    small_net,
)
from torch import nn


@BOTH
def test_where_chooses_layers_and_the_others_get_the_plain_gradient(transform_type: type) -> None:
    model, plain = small_net(), small_net()
    chosen = transform_type(where=lambda name, module: name == "2" or isinstance(module, nn.Linear), **IMMEDIATE)
    optimizer, handle = attached(model, chosen, lr=0.0)
    loss_of(model, 0).backward()
    loss_of(plain, 0).backward()
    optimizer.step()
    changed = {
        name
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True)
        if not torch.equal(p.grad, q.grad)
    }
    assert changed == {"2.weight", "5.weight", "5.bias", "7.weight"}
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    assert "plain gradient" in lines["0.weight"]
    assert "precondition" in lines["2.weight"]
    assert handle.stats()[NAMES[transform_type]]["weights"] == 3


@BOTH
def test_layers_without_rows_are_reported_and_get_the_plain_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.EmbeddingBag(7, 4),
        nn.Unflatten(1, (1, 4)),
        nn.BatchNorm1d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 2),
    )
    optimizer, handle = attached(model, transform_type(**IMMEDIATE), lr=0.0)
    model(torch.randint(7, (6, 3))).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    same = [torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True)]
    assert same == [True] * 5 + [False, False]
    lines = {line.split()[0]: line for line in handle.report().splitlines()[1:]}
    assert "plain gradient: a bag mixes its tokens" in lines["0.weight"]
    assert "plain gradient: a norm layer (norm_layers=False)" in lines["2.weight"]
    assert "plain gradient: a norm layer (norm_layers=False)" in lines["4.weight"]


@BOTH
def test_with_a_frozen_bias_the_weight_alone_is_preconditioned(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    bias = layer.bias.clone()
    x = torch.randn(6, 4, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE))
    layer(x).sin().sum().backward()
    before = layer.weight.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], False), transform_type, 0.05)
    torch.testing.assert_close(layer.weight.grad, preconditioned(layer, t, before, None)[0], rtol=1e-9, atol=1e-11)
    assert layer.bias.grad is None
    assert torch.equal(layer.bias, bias)


@BOTH
def test_a_bias_outside_the_optimizer_keeps_its_own_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    optimizer, handle = attached(layer, transform_type(damping=0.05, **IMMEDIATE), params=[layer.weight])
    layer(x).sin().sum().backward()
    before, bias_grad = layer.weight.grad.clone(), layer.bias.grad.clone()
    optimizer.step()
    t = inverse_power(second_moment(layer, [x], False), transform_type, 0.05)
    torch.testing.assert_close(layer.weight.grad, preconditioned(layer, t, before, None)[0], rtol=1e-9, atol=1e-11)
    assert torch.equal(layer.bias.grad, bias_grad)
    assert "not held" in next(line for line in handle.report().splitlines() if line.startswith("bias"))


@BOTH
def test_a_frozen_weight_stays_and_its_bias_trains_on_the_plain_gradient(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    weight, bias = layer.weight.clone(), layer.bias.detach().clone()
    optimizer, _ = attached(layer, transform_type(**IMMEDIATE), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(6, 4)).sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer.bias.detach(), bias - 3 * 0.1 * 6, rtol=1e-6, atol=1e-6)


@BOTH
def test_a_weight_frozen_and_thawed_during_training_is_preconditioned_again(transform_type: type) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer, _ = attached(layer, transform_type(damping=0.05, **IMMEDIATE), lr=0.0)
    for step in range(6):
        layer.weight.requires_grad_(step not in (2, 3))
        optimizer.zero_grad()
        x = torch.randn(6, 4, dtype=torch.float64)
        layer(x).sin().sum().backward()
        before = None if layer.weight.grad is None else layer.weight.grad.clone(), layer.bias.grad.clone()
        optimizer.step()
        if before[0] is None:
            assert torch.equal(layer.bias.grad, before[1])
        else:
            t = inverse_power(second_moment(layer, [x], True), transform_type, 0.05)
            expected, _ = preconditioned(layer, t, before[0], before[1])
            torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-9, atol=1e-11)
