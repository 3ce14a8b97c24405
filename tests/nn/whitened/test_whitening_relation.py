"""What whitened layers do by their coordinates, gradient transforms do by a product: the same steps, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.nn.whitened.eigen import EigenLinear
from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear

FLOAT64 = torch.float64
LR = 0.05


def plain_layer(kind: str, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(4, 3, bias=bias, dtype=FLOAT64)
    return nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=bias, dtype=FLOAT64)


def data(kind: str, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(4, 4, generator=generator, dtype=FLOAT64)
    rows = torch.randn(480, 4, generator=generator, dtype=FLOAT64) @ mixing + 1
    return rows if kind == "linear" else rows.view(16, 6, 5, 4).movedim(3, 1)


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.sin(torch.arange(output.numel(), dtype=FLOAT64)).view(output.shape)).square().mean()


def train(layer: nn.Module, kind: str, *transforms: Any, steps: int = 3) -> nn.Module:
    """Plain SGD, each gradient multiplied by T of its own batch."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    if transforms:
        wellcond.attach(optimizer, layer, *transforms)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(layer(data(kind, step))).backward()
        optimizer.step()
    return layer


def train_whitened(layer: Any, kind: str, steps: int = 3) -> Any:
    """Plain SGD on V, with P of each batch."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    for step in range(steps):
        x = data(kind, step)
        layer(x)
        assert layer.refresh()
        optimizer.zero_grad()
        loss_of(layer(x)).backward()
        optimizer.step()
        assert layer.refresh()  # takes in what the pass just made observed: the next one begins afresh
    return layer


def whitened(kind: str, bias: bool = False, **options: Any) -> Any:
    cls: Any = WhitenedLinear if kind == "linear" else WhitenedConv2d
    return cls.from_layer(plain_layer(kind, bias), stats_every=1, stats_decay=0.0, refresh_every=None, **options)


def transform_of(cls: Any, mode: str, damping: float) -> Any:
    return cls(
        damping=damping,
        damping_mode=mode,
        stats_decay=0.0,
        stats_every=1,
        solve_every=1,
        restore_norm=False,
        second_moment="dense",
    )


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("whitening", ["zca", "pca"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_feature_descent_is_a_whitened_network(kind: str, whitening: Any, mode: Any) -> None:
    """SGD on V = W P⁻¹ moves W by −η G PᵀP = −η G (Σ + ε)⁻¹: FSGD's step, for any P with this PᵀP."""
    ours = train_whitened(whitened(kind, whitening=whitening, damping=0.1, damping_mode=mode), kind)
    theirs = train(plain_layer(kind), kind, transform_of(FeatureDescent, mode, 0.1))
    start = plain_layer(kind)
    assert (theirs.weight - start.weight).abs().max() > 5e-3
    torch.testing.assert_close(ours.to_plain().weight, theirs.weight, rtol=0, atol=1e-10)
    # Other steps than those of SGD.
    assert not torch.allclose(train(plain_layer(kind), kind).weight, theirs.weight, atol=1e-3)


def test_with_a_bias_it_is_feature_descent_on_both() -> None:
    """(õ, 1) is (o, 1) whitened, so V and d together are FSGD with the constant-one column, as damping vanishes."""
    ours = train_whitened(whitened("linear", bias=True, damping=0.0), "linear").to_plain()
    theirs = train(plain_layer("linear", bias=True), "linear", transform_of(FeatureDescent, "absolute", 1e-12))
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-8)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_feature_whitening_is_the_root_of_a_whitened_network(kind: str) -> None:
    """EFW multiplies by (Σ + ε)^(−1/2) once: SGD on V = W P⁻¹ with P = (Σ + ε)^(−1/4), the root of a whitener."""
    theirs = train(plain_layer(kind), kind, transform_of(FeatureWhitening, "relative", 1e-3), steps=1)
    whitening = whitened(kind, damping=1e-3)
    whitening(data(kind, 0))
    assert whitening.refresh()

    layer = whitened(kind)
    values, vectors = torch.linalg.eigh(whitening.transform)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    with torch.no_grad():
        layer.transform.copy_(root)
        matrix = layer.weight.flatten(1).unflatten(0, (len(root), -1))
        layer.weight.copy_((matrix @ torch.linalg.inv(root)).reshape(layer.weight.shape))
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    loss_of(layer(data(kind, 0))).backward()
    optimizer.step()
    torch.testing.assert_close(layer.to_plain().weight, theirs.weight, rtol=0, atol=1e-10)
    # Not the whitened network itself, which multiplies by (Σ + ε)⁻¹.
    optimizer = torch.optim.SGD(whitening.parameters(), lr=LR)
    loss_of(whitening(data(kind, 0))).backward()
    optimizer.step()
    assert not torch.allclose(whitening.to_plain().weight, theirs.weight, atol=1e-3)


def test_eigennet_preconditions_on_both_sides() -> None:
    """SGD on V with W = Q V P moves W by −η QQᵀ G PᵀP."""
    plain, x = plain_layer("linear"), data("linear", 0)
    start = plain.weight.detach().clone()
    layer = EigenLinear.from_layer(plain_layer("linear"), stats_every=1, refresh_every=None)
    loss_of(layer(x)).backward()
    assert layer.refresh()
    layer.zero_grad()
    loss_of(plain(x)).backward()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    loss_of(layer(x)).backward()
    optimizer.step()
    outer, inner = layer.error_transform[0], layer.transform[0]
    expected = start - LR * outer @ outer.T @ plain.weight.grad @ inner.T @ inner
    torch.testing.assert_close(layer.to_plain().weight, expected, rtol=0, atol=1e-10)
