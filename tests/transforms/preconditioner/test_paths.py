"""Whichever way a product takes (scaled at once or together with others, multiplied out or not), its numbers agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.transforms.preconditioner import form, products

OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {},
    "dense": {"second_moment": "dense"},
    "kronecker": {"second_moment": "kronecker"},
    "kronecker, rank 3": {"second_moment": "kronecker", "max_dim": 4, "rank": 3},
    "blocks": {"second_moment": "blocks"},
    "low rank": {"second_moment": "low_rank", "rank": 3},
    "momentum": {"gradient_momentum": 0.5},
}


def trained(options: dict[str, Any], norm: Any, kind: Any, dtype: torch.dtype) -> list[Tensor]:
    """Return the weights after a few steps of a net with layers of every kind, some of one shape, some with a bias."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 6, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 24),
        nn.Linear(24, 24, bias=False),
        nn.Linear(24, 5),
    ).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    wellcond.attach(optimizer, net, kind(stats_every=2, solve_every=4, norm=norm, **options))
    for step in range(6):
        optimizer.zero_grad()
        if step == 3:
            for parameter in net[7].parameters():
                parameter.requires_grad_(False)
        net(torch.randn(4, 3, 6, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


@parametrize_pairs(
    ("name", list(OPTIONS)),
    ("kind", [FeatureWhitening, FeatureDescent]),
    ("norm", ["restore", "fixed", "none"]),
)
def test_all_ways_agree(name: str, norm: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(OPTIONS[name], norm, kind, torch.float64)
    for at_once, multiplied_out in ((1, 289), (1 << 18, 0), (1, 0)):
        monkeypatch.setattr(products, "SCALED_AT_ONCE", at_once)
        monkeypatch.setattr(form, "MULTIPLIED_OUT", multiplied_out)
        for weight, other in zip(expected, trained(OPTIONS[name], norm, kind, torch.float64), strict=True):
            torch.testing.assert_close(other, weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_low_precision_too(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained({"precision": precision}, "restore", FeatureWhitening, torch.bfloat16)
    monkeypatch.setattr(products, "SCALED_AT_ONCE", 1)
    for weight, other in zip(
        expected, trained({"precision": precision}, "restore", FeatureWhitening, torch.bfloat16), strict=True
    ):
        torch.testing.assert_close(other, weight, rtol=0.02, atol=2e-3)


def test_a_layer_that_is_really_large_and_multiplied_in_place() -> None:
    torch.manual_seed(0)
    net = nn.Linear(1100, 256, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    wellcond.attach(optimizer, net, FeatureWhitening(stats_every=1, solve_every=1))
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(8, 1100)).square().sum().backward()
        assert net.weight.grad is not None
        norm = net.weight.grad.double().norm()
        before = net.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close((net.weight - before).double().norm(), 0.1 * norm, rtol=1e-5, atol=0)


def test_memory_that_grew_is_viewed_anew() -> None:
    small, large = nn.Linear(3, 2, bias=False), nn.Linear(40, 30, bias=False)
    optimizer = torch.optim.SGD([*small.parameters(), *large.parameters()], lr=0.1)
    net = nn.ModuleList([small, large])
    wellcond.attach(optimizer, net, FeatureWhitening(stats_every=1, solve_every=1))
    for used in ([small], [large], [small, large], [small]):
        optimizer.zero_grad()
        for layer in used:
            layer(torch.randn(9, layer.in_features)).square().sum().backward()
        norms = [layer.weight.grad.norm() for layer in used]
        optimizer.step()
        for layer, norm in zip(used, norms, strict=True):
            torch.testing.assert_close(layer.weight.grad.norm(), norm)
