"""Random layers of every kind: what is observed of their inputs, and what becomes of their gradients.

The oracle is the layer itself. Its output is linear in its weight, so that the derivative of one output value by its
unit's weights is the row that this unit multiplied at that position, whatever the layer's stride, padding or groups.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
SEEDS = 30
DAMPING = 0.05

Case = tuple[nn.Module, tuple[Tensor, ...]]


def linear(pick: random.Random) -> Case:
    layer = nn.Linear(pick.randint(1, 7), pick.randint(1, 5), bias=pick.random() < 0.6)
    leading = [pick.randint(1, 4) for _ in range(pick.randint(0, 3))]
    return layer, (torch.randn(*leading, layer.in_features),)


def conv(axes: int) -> Callable[[random.Random], Case]:
    def make(pick: random.Random) -> Case:
        while True:
            groups = pick.choice([1, 1, 2, 3])
            inputs, outputs = groups * pick.randint(1, 2), groups * pick.randint(1, 2)
            kernel = [pick.randint(1, (4, 3, 2)[axes - 1]) for _ in range(axes)]
            dilation = [pick.randint(1, 2) for _ in range(axes)]
            padding: Any = pick.choice(["same", "valid", tuple(pick.randint(0, 2) for _ in range(axes))])
            stride = [1 if padding == "same" else pick.randint(1, 3) for _ in range(axes)]
            space = [pick.randint(2, (9, 5, 4)[axes - 1]) for _ in range(axes)]
            mode = pick.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
            layer = CONVS[axes](
                inputs, outputs, tuple(kernel), tuple(stride), padding, tuple(dilation), groups,
                bias=pick.random() < 0.6, padding_mode=mode,
            )  # fmt: skip
            batch = pick.choice([(), (1,), (2,), (3,)])
            x = torch.randn(*batch, inputs, *space)
            try:
                layer(x)
            except RuntimeError:
                continue  # a kernel that does not fit, or a padding wider than the input
            return layer, (x,)

    return make


def transposed(axes: int) -> Callable[[random.Random], Case]:
    def make(pick: random.Random) -> Case:
        while True:
            groups = pick.choice([1, 1, 2, 3])
            inputs, outputs = groups * pick.randint(1, 2), groups * pick.randint(1, 2)
            stride = [pick.randint(1, 3) for _ in range(axes)]
            dilation = [pick.randint(1, 2) for _ in range(axes)]
            layer = TRANSPOSED[axes](
                inputs,
                outputs,
                tuple(pick.randint(1, (4, 3, 2)[axes - 1]) for _ in range(axes)),
                tuple(stride),
                tuple(pick.randint(0, 2) for _ in range(axes)),
                tuple(pick.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)),
                groups,
                pick.random() < 0.6,
                tuple(dilation),
            )
            batch = pick.choice([(), (1,), (2,)])
            x = torch.randn(*batch, inputs, *(pick.randint(1, (6, 3, 2)[axes - 1]) for _ in range(axes)))
            try:
                if layer(x).numel() == 0:
                    continue
            except RuntimeError:
                continue  # nothing is left of the output
            return layer, (x,)

    return make


def embedding(pick: random.Random) -> Case:
    tokens = pick.randint(2, 9)
    layer = nn.Embedding(tokens, pick.randint(1, 5), padding_idx=pick.choice([None, None, 0, tokens - 1]))
    shape = [pick.randint(1, 5) for _ in range(pick.randint(0, 3))]
    return layer, (torch.randint(tokens, shape),)


def bilinear(pick: random.Random) -> Case:
    layer = nn.Bilinear(pick.randint(1, 4), pick.randint(1, 4), pick.randint(1, 4), bias=pick.random() < 0.6)
    leading = [pick.randint(1, 4) for _ in range(pick.randint(0, 2))]
    return layer, (torch.randn(*leading, layer.in1_features), torch.randn(*leading, layer.in2_features))


def norm(pick: random.Random) -> Case:
    shape = [pick.randint(2, 4) for _ in range(pick.randint(1, 2))]
    leading = [pick.randint(1, 4) for _ in range(pick.randint(0, 3))]
    eps = pick.choice([1e-5, 1e-2, 1.0])
    layer: nn.Module
    if pick.random() < 0.5:
        layer = nn.LayerNorm(shape, eps=eps, bias=pick.random() < 0.7)
    else:
        layer = nn.RMSNorm(shape, eps=pick.choice([None, eps]))
    return layer, (torch.randn(*leading, *shape) * 2 + 0.5,)


def group_norm(pick: random.Random) -> Case:
    groups, each = pick.randint(1, 3), pick.randint(1, 3)
    space = [pick.randint(1, 4) for _ in range(pick.randint(0, 3))]
    layer = nn.GroupNorm(groups, groups * each, eps=pick.choice([1e-5, 1e-2, 1.0]))
    # One value per group has no variance, and nothing to normalize.
    return layer, (torch.randn(pick.randint(1, 4), groups * each, 2, *space) * 2 + 0.5,)


KINDS: dict[str, Callable[[random.Random], Case]] = {
    "linear": linear,
    **{f"conv{axes}d": conv(axes) for axes in CONVS},
    **{f"conv_transpose{axes}d": transposed(axes) for axes in TRANSPOSED},
    "embedding": embedding,
    "bilinear": bilinear,
    "layer or rms norm": norm,
    "group norm": group_norm,
}


def units_of(layer: Any) -> list[tuple[Any, int]]:
    """Return for every group its first unit: where its weights are in the weight, and its place among the outputs."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        places = itertools.product(*map(range, layer.weight.shape))
        return [(place, index) for index, place in enumerate(places)]
    if isinstance(layer, nn.Embedding):
        return [((slice(None), 0), 0)]
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
        return [((slice(g * inputs, (g + 1) * inputs), 0), g * outputs) for g in range(groups)]
    outputs = len(layer.weight) // groups
    return [(g * outputs, g * outputs) for g in range(groups)]


def oracle(layer: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    """Average x xᵀ over all samples and positions, one at a time, shape [groups, d, d]; a constant 1 for the bias."""
    output = layer(*inputs)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        values = output.reshape(-1, layer.weight.numel()).mT
    elif isinstance(layer, nn.GroupNorm):
        values = output.movedim(1, 0).flatten(1)
    else:
        axes = len(getattr(layer, "kernel_size", ()))
        values = output.movedim(-1 - axes, 0).flatten(1) if output.dim() > 1 else output.unsqueeze(1)
    moments = []
    for place, unit in units_of(layer):
        total: Tensor | float = 0.0
        for value in values[unit]:
            row = torch.autograd.grad(value, layer.weight, retain_graph=True)[0][place].flatten()
            if getattr(layer, "bias", None) is not None:
                row = torch.cat([row, torch.ones(1, dtype=row.dtype)])
            total = total + torch.outer(row, row)
        moments.append(total / len(values[unit]))
    return torch.stack(moments)


def packed(layer: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Lay out gradients as [groups, out, d]."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        matrix = weight.reshape(-1, 1, 1)
    elif isinstance(layer, nn.Embedding):
        matrix = weight.mT.unsqueeze(0)
    elif isinstance(layer, nn.modules.conv._ConvTransposeNd):
        matrix = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)
    else:
        matrix = weight.flatten(1).unflatten(0, (groups, -1))
    return matrix if bias is None else torch.cat([matrix, bias.reshape(*matrix.shape[:2], 1)], 2)


def dense_formula(transform: Any, moments: Tensor, gradient: Tensor) -> Tensor:
    changed = []
    for moment, matrix in zip(moments, gradient, strict=True):
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp_min(0)
        damped = values + DAMPING * (values[-1] if transform.damping_mode == "relative" else 1.0)
        damped = damped if float(damped.max()) > 0 else torch.ones_like(damped)
        changed.append(matrix @ vectors @ torch.diag(damped**-transform.exponent) @ vectors.mT)
    result = torch.stack(changed)
    return result * gradient.norm() / result.norm().clamp_min(1e-300)


def gradients(layer: Any) -> tuple[Tensor, Tensor | None]:
    bias = getattr(layer, "bias", None)
    return layer.weight.grad.clone().double(), None if bias is None else bias.grad.clone().double()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_random_layer(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    pick = random.Random(f"{kind} {seed}")
    layer, inputs = KINDS[kind](pick)
    dtype = pick.choice(DTYPES)
    transform_type = pick.choice([FeatureWhitening, FeatureDescent])
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    layer.to(dtype)
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)

    mode = pick.choice(["relative", "absolute"])
    transform = transform_type(
        damping=DAMPING, damping_mode=mode, second_moment="dense", norm_layers=True,
        stats_decay=0.9, stats_every=1, solve_every=1,
    )  # fmt: skip
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, layer, transform)
    output = layer(*inputs)
    (output.float() * torch.randn(output.shape)).sum().backward()
    before = packed(layer, *gradients(layer))
    optimizer.step()
    after = packed(layer, *gradients(layer))
    (found,) = [
        value.double() / optimizer.state[layer.weight][name.replace("second_moment", "mass")].double()
        for name, value in optimizer.state[layer.weight].items()
        if name.endswith("second_moment")
    ]
    handle.remove()

    # The inputs are what they are in their own precision; from there on the oracle is exact.
    exact = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    moments = oracle(layer.double(), exact).detach()
    if isinstance(layer, nn.Embedding):
        assert torch.equal(moments, torch.diag_embed(moments.diagonal(dim1=-2, dim2=-1)))
        found = torch.diag_embed(found)
    # Statistics are float32 or wider, whatever the inputs are.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, moments, rtol=tolerance, atol=tolerance * float(moments.abs().max()))

    wanted = dense_formula(transform, moments, before)
    error = float((after - wanted).norm()) / max(float(wanted.norm()), 1e-300)
    assert error < {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    assert float(after.norm()) == pytest.approx(float(before.norm()), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
