"""Generalized whitened networks: E[h hᵀ] = I after a refresh, in the leading directions, with the least change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wellcond.nn.whitened.gwnn import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear

FLOAT64 = torch.float64
every_choice = pytest.mark.parametrize("directions", ["nearest", "pca"])


def batch(step: int = 0, samples: int = 60, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    mixing = torch.randn(width, width, generator=generator, dtype=FLOAT64)
    return torch.randn(samples, width, generator=generator, dtype=FLOAT64) @ mixing + 3


def images(step: int = 0, samples: int = 8) -> Tensor:
    return batch(step, samples * 30).view(samples, 6, 5, 6).movedim(3, 1)


def linear(outputs: int = 3, hidden: int = 5, **options: Any) -> GeneralizedWhitenedLinear:
    torch.manual_seed(0)
    options = {"stats_every": 1, "refresh_every": None, "damping": 0.0} | options
    return GeneralizedWhitenedLinear(6, outputs, hidden, dtype=FLOAT64, **options)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    mean = sum(rows) / len(rows)
    return mean, sum(torch.outer(row - mean, row - mean) for row in rows) / len(rows)


@every_choice
@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_output_is_white_after_a_refresh(outputs: int, directions: Any) -> None:
    layer, x = linear(outputs, directions=directions), batch()
    assert layer(x).shape == (60, outputs)
    assert layer.refresh()
    mean, covariance = moments(layer(x))
    torch.testing.assert_close(mean, torch.zeros(outputs, dtype=FLOAT64), rtol=0, atol=1e-10)
    torch.testing.assert_close(covariance, torch.eye(outputs, dtype=FLOAT64), rtol=0, atol=1e-10)


@every_choice
def test_output_is_the_formula(directions: Any) -> None:
    """h = P (W o + b − m) with m, Σ of h̃ = W o + b; P spans the d' leading directions, scaled by (λ + ε)^(−1/2)."""
    layer, x = linear(directions=directions, damping=0.1), batch()
    layer(x)
    assert layer.refresh()
    hidden = (x @ layer.weight.T + layer.bias).detach()
    mean, covariance = moments(hidden)
    P = layer.transform[0]
    torch.testing.assert_close(layer.center[0], mean, rtol=0, atol=1e-11)
    expected = torch.stack([P @ (row - mean) for row in hidden])
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)
    values, vectors = torch.linalg.eigh(covariance)
    damped = values + 0.1 * values[-1]
    leading = vectors[:, -3:]
    torch.testing.assert_close(P.T @ P, leading @ damped[-3:].reciprocal().diag() @ leading.T, rtol=0, atol=1e-11)
    if directions == "pca":
        torch.testing.assert_close(P.abs(), (leading / damped[-3:].sqrt()).T.flip(0).abs(), rtol=0, atol=1e-11)


def test_the_first_refresh_of_all_directions_is_zca() -> None:
    layer, x = linear(5), batch()
    layer(x)
    assert layer.refresh()
    values, vectors = torch.linalg.eigh(moments((x @ layer.weight.T).detach())[1])
    torch.testing.assert_close(layer.transform[0], vectors @ values.rsqrt().diag() @ vectors.T, rtol=1e-9, atol=1e-9)


def test_nearest_directions_change_the_output_least() -> None:
    """No rotation of P, neither a random one nor a small one, comes closer to the output before."""
    layer, x = linear(3, stats_decay=0.0), batch()
    for step in range(2):
        layer(x)
        before = layer(x).detach()
        assert layer.refresh()
        after = layer(x).detach()
        centered = before - before.mean(0)
        change = (after - centered).square().sum()
        generator = torch.Generator().manual_seed(step)
        for size in (1e-3, 1e-1, 1.0, 1.0, 1.0):
            skew = size * torch.randn(3, 3, generator=generator, dtype=FLOAT64)
            rotation = torch.linalg.matrix_exp(skew - skew.T)
            assert (after @ rotation.T - centered).square().sum() > change
        with torch.no_grad():
            layer.weight.add_(0.1 * torch.randn(5, 6, generator=generator, dtype=FLOAT64))


def test_nearest_directions_do_not_turn_from_refresh_to_refresh() -> None:
    """Small steps move the outputs a little; PCA's eigenvectors swap where variances cross."""
    turned = {}
    for directions in ("nearest", "pca"):
        layer, x = linear(4, 4, directions=directions, stats_decay=0.0), batch()
        worst, outputs = 1.0, []
        for step in range(40):
            layer(x)
            assert layer.refresh()
            outputs.append(layer(x).detach())
            worst = min(worst, float((outputs[-1] * outputs[max(0, step - 1)]).mean(0).min()))
            with torch.no_grad():
                angle = torch.tensor(0.08, dtype=FLOAT64) * step
                layer.weight[0] *= 1 + 0.02 * angle.sin()
                layer.weight[1] *= 1 - 0.02 * angle.sin()
        turned[directions] = worst
    assert turned["nearest"] > 0.95
    assert turned["pca"] < -0.9


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("outputs", [2, 4])
def test_convolution_whitens_its_channels(outputs: int, groups: int) -> None:
    torch.manual_seed(0)
    geometry = {"kernel_size": (3, 2), "stride": (1, 2), "padding": 1, "dilation": (1, 2), "groups": groups}
    options = {"stats_every": 1, "refresh_every": None, "damping": 0.0, "dtype": FLOAT64}
    layer = GeneralizedWhitenedConv2d(6, outputs, **geometry, hidden_channels=4, **options)
    x = images()
    hidden = nn.Conv2d(6, 4, **geometry, dtype=FLOAT64)
    hidden.weight, hidden.bias = layer.weight, layer.bias
    torch.testing.assert_close(layer(x), torch.cat([p[:, : outputs // groups] for p in hidden(x).chunk(groups, 1)], 1))
    assert layer.refresh()
    y = layer(x)
    for ours, theirs, P, m in zip(
        y.chunk(groups, 1), hidden(x).chunk(groups, 1), layer.transform, layer.center, strict=True
    ):
        rows = ours.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(rows, (theirs.movedim(1, -1).flatten(0, -2) - m) @ P.T, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            rows.T @ rows / len(rows), torch.eye(outputs // groups, dtype=FLOAT64), rtol=0, atol=1e-10
        )


def test_as_trained_the_output_stays_near_white() -> None:
    torch.manual_seed(0)
    layer = linear(3, 5, refresh_every=2, stats_decay=0.5, damping=1e-3)
    net = nn.Sequential(layer, nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    x = batch(0, 400)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (net(x).squeeze(1) - (x[:, 0] * 0.3).tanh()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    y = layer(x).detach()
    plain = (x @ layer.weight.T)[:, :3].detach()
    assert torch.linalg.norm(moments(y)[1] - torch.eye(3)) < 0.5  # W moves between refreshes
    assert torch.linalg.norm(moments(plain)[1] - torch.eye(3)) > 2
    assert losses[-1] < 0.5 * losses[0]


def test_from_a_plain_layer_with_fewer_outputs() -> None:
    plain = nn.Linear(6, 5, dtype=FLOAT64)
    layer = GeneralizedWhitenedLinear.from_layer(plain, out_features=2)
    assert (layer.out_features, layer.hidden_features) == (2, 5)
    torch.testing.assert_close(layer(batch()), plain(batch())[:, :2])
    assert layer.to_plain().weight.shape == (2, 6)
    conv = nn.Conv2d(6, 4, 3, groups=2, dtype=FLOAT64)
    other = GeneralizedWhitenedConv2d.from_layer(conv, out_channels=2)
    torch.testing.assert_close(other(images()), conv(images())[:, [0, 2]])
    torch.testing.assert_close(other.to_plain()(images()), other(images()))


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_features must be at least the 4 out_features, got 3"):
        GeneralizedWhitenedLinear(6, 4, 3)
    with pytest.raises(ValueError, match="out_features must be a positive integer, got 0"):
        GeneralizedWhitenedLinear(6, 0)
    with pytest.raises(ValueError, match="out_channels must be a multiple of the 2 groups, got 3"):
        GeneralizedWhitenedConv2d(6, 3, 3, groups=2, hidden_channels=4)
    with pytest.raises(ValueError, match="directions must be one of 'nearest', 'pca', got 'zca'"):
        linear(directions="zca")
