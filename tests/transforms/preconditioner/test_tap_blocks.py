"""Tap blocks against their definition; the norms that products get; damping relative to the mean eigenvalue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.numerics.tap_blocks import cosine_basis

BOTH = pytest.mark.parametrize("transform_type", [FeatureWhitening, FeatureDescent])
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
IMMEDIATE: dict[str, Any] = {"stats_every": 1, "solve_every": 1}
CASES: list[tuple[int, dict[str, Any], list[int]]] = [
    (1, {"kernel_size": 3}, [3, 4, 7]),
    (1, {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2, "bias": False}, [3, 4, 9]),
    (2, {"kernel_size": 3, "padding": 1}, [2, 4, 5, 4]),
    (2, {"kernel_size": (3, 2), "stride": 2, "padding": (2, 0), "dilation": (2, 1), "groups": 2}, [2, 4, 6, 4]),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 3}, [2, 4, 6, 6]),
    (3, {"kernel_size": (1, 2, 2), "stride": (2, 1, 1), "groups": 2, "bias": False}, [2, 4, 3, 3, 3]),
]


def step(layer: nn.Module, x: Tensor, transform: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, layer, transform)
    optimizer.zero_grad()
    output = layer(x)
    (output.sin() * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    before = {name: p.grad.clone() for name, p in layer.named_parameters()}
    optimizer.step()
    handle.remove()
    return before, {name: p.grad.clone() for name, p in layer.named_parameters()}


def joint(gradients: dict[str, Tensor], groups: int) -> Tensor:
    matrix = gradients["weight"].flatten(1).unflatten(0, (groups, -1))
    return torch.cat([matrix, gradients["bias"].view(groups, -1, 1)], 2) if "bias" in gradients else matrix


def patches(layer: Any, x: Tensor) -> list[Tensor]:
    """Of each group the patches [n, channels, taps], as the derivatives of an output by its unit's weight."""
    output, found = layer(x), []
    for group in range(layer.groups):
        unit = group * (layer.out_channels // layer.groups)
        values = output[:, unit].flatten()
        rows = [torch.autograd.grad(value, layer.weight, retain_graph=True)[0][unit] for value in values]
        found.append(torch.stack(rows).flatten(2))
    return found


def by_definition(layer: Any, x: Tensor, before: Tensor, exponent: float, damping: float, mode: str) -> Tensor:
    """The whole second moment, without what it says of two different frequencies, damped and raised as a matrix."""
    basis, bias = cosine_basis(layer.kernel_size), layer.bias is not None
    taps, changed = len(basis), []
    for rows, gradient in zip(patches(layer, x), before, strict=True):
        channels = rows.shape[1]
        # Rows and gradients by (frequency, channel); then the bias.
        turn = torch.einsum("fk,cd->fckd", basis, torch.eye(channels).double())
        turn = turn.permute(0, 1, 3, 2).reshape(taps * channels, channels * taps)
        whole = rows.flatten(1) @ turn.T
        if bias:
            whole = torch.cat([whole, torch.ones(len(rows), 1).double()], 1)
            turn = torch.block_diag(turn, torch.ones(1, 1).double())
        moment = whole.T @ whole / len(rows)
        frequency = torch.tensor([f for f in range(taps) for _ in range(channels)] + [0] * bias)
        moment = moment * (frequency.unsqueeze(0) == frequency.unsqueeze(1))
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0)
        damped = values + damping * {"relative": values[-1], "mean": values.mean(), "absolute": 1.0}[mode]
        power = vectors @ torch.diag(damped**-exponent) @ vectors.T
        changed.append(gradient @ turn.T @ power @ turn)
    return torch.stack(changed)


@parametrize_pairs(
    ("axes, options, shape", CASES),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("mode", ["relative", "mean", "absolute"]),
)
def test_tap_blocks_are_their_definition(
    transform_type: type, mode: str, axes: int, options: dict[str, Any], shape: list[int]
) -> None:
    torch.manual_seed(0)
    layer = CONVS[axes](4, 6, dtype=torch.float64, **options)
    x = torch.randn(*shape, dtype=torch.float64) + 0.3
    chosen = transform_type(damping=0.05, damping_mode=mode, second_moment="blocks", norm="none", **IMMEDIATE)
    before, after = step(layer, x, chosen)
    packed = joint(before, layer.groups)
    wanted = by_definition(layer, x, packed, transform_type.exponent, 0.05, mode)
    found = joint(after, layer.groups)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


@BOTH
def test_sketched_blocks_lose_nothing_where_channels_have_few_directions(transform_type: type) -> None:
    torch.manual_seed(0)
    x = torch.einsum("cr,nrl->ncl", torch.randn(20, 2).double(), torch.randn(4, 2, 9).double())
    results = []
    for options in ({}, {"max_dim": 8, "rank": 4}):
        torch.manual_seed(1)
        layer = nn.Conv1d(20, 3, 3, dtype=torch.float64)
        chosen = transform_type(damping=0.05, damping_mode="mean", second_moment="blocks", **options, **IMMEDIATE)
        results.append(joint(step(layer, x, chosen)[1], 1))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6 * float(results[0].abs().max()))


@parametrize_pairs(
    ("form", ["dense", "kronecker", "blocks", "low_rank"]),
    ("transform_type", [FeatureWhitening, FeatureDescent]),
    ("scale", [1.0, 1e-12, 1e12]),
)
def test_a_fixed_norm_is_that_of_an_orthogonal_matrix_whatever_the_gradients(
    transform_type: type, form: Any, scale: float
) -> None:
    for make, wanted in (
        (lambda: nn.Conv2d(4, 6, 3, padding=1), math.sqrt(6)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), math.sqrt(2 * 3)),
        (lambda: nn.Conv2d(4, 80, 3, padding=1), math.sqrt(36)),
    ):
        torch.manual_seed(0)
        layer = make()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        wellcond.attach(optimizer, layer, transform_type(second_moment=form, norm="fixed", **IMMEDIATE))
        (layer(torch.randn(3, 4, 5, 5)).sin().sum() * scale).backward()
        optimizer.step()
        norm = torch.cat([p.grad.flatten() for p in layer.parameters()]).double().norm()
        assert float(norm) == pytest.approx(wanted, rel=1e-4)


def test_a_zero_gradient_stays_zero_under_a_fixed_norm() -> None:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    wellcond.attach(optimizer, layer, FeatureWhitening(norm="fixed", **IMMEDIATE))
    (layer(torch.randn(5, 4)) * 0).sum().backward()
    optimizer.step()
    assert all(bool((p.grad == 0).all()) for p in layer.parameters())


def test_norm_and_its_older_name() -> None:
    assert FeatureWhitening(restore_norm=True).norm == "restore"
    assert FeatureWhitening(restore_norm=False).norm == "none"
    assert FeatureWhitening(norm="none", restore_norm=False).norm == "none"
    for norm, restore in (("fixed", True), ("fixed", False), ("none", True), ("restore", False)):
        with pytest.raises(ValueError, match="norm=.*restore_norm=.*contradict"):
            FeatureDescent(norm=norm, restore_norm=restore)
