"""Means of many weights' output units at once, against each layout's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wellcond.layouts import find_layers
from wellcond.transforms.unit_means import UnitMeans, add


def gradients_of(net: nn.Module, memory: torch.memory_format) -> list[Tensor]:
    found = [torch.randn_like(layer.weight) for layer in find_layers(net)]
    return [g.contiguous(memory_format=memory) if g.dim() == 4 else g for g in found]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 0.3, torch.tensor(0.3)])
def test_they_are_the_layouts(memory: torch.memory_format, dtype: torch.dtype, factor: float | Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.Linear(7, 5),
        nn.Linear(600, 130),  # not small
        nn.Bilinear(3, 4, 2),
    ).to(dtype)
    gradients = gradients_of(net, memory)
    layers = list(find_layers(net))
    means = UnitMeans(layers).of(gradients, factor)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for layer, gradient, mean in zip(layers, gradients, means, strict=True):
        expected = layer.unit_mean(gradient.double() + factor * layer.weight.double())
        torch.testing.assert_close(
            mean.double().expand_as(gradient), expected.expand_as(gradient), rtol=0, atol=tolerance
        )
    centred = [gradient.clone() for gradient in gradients]
    add(centred, means, -1)
    for gradient, mean, result in zip(gradients, means, centred, strict=True):
        assert torch.equal(result, gradient - mean)
