"""One rank of `test_sync_norms.py`: ``python sync_norm_worker.py RANK WORLD FOLDER`` trains each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from launch_ranks import serve
from torch import Tensor, nn

import wellcond.nn as wnn
from wellcond.nn.norm.outline import PrecedingLayer

CHANNELS, STEPS = 3, 4
SIZES = {1: [7], 2: [5, 2]}  # samples of each rank, unequal
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mbn": lambda **options: momentum_layer(**options),
    "mbn1d": lambda **options: wnn.MomentumBatchNorm1d(CHANNELS, **options),
    "bsr": lambda **options: wnn.BSRBatchNorm2d(CHANNELS, **options),
    "brn": lambda **options: wnn.BatchRenorm2d(CHANNELS, r_max=1.5, d_max=0.5, **options),
    "evalnorm": lambda **options: wnn.EvalNorm2d(CHANNELS, **options),
    "evalnorm_fixed": lambda **options: wnn.EvalNorm2d(CHANNELS, learn=False, **options),
    "pn": lambda **options: wnn.PopulationNorm2d(CHANNELS, **options),
    "mabn": lambda **options: wnn.MovingAverageBatchNorm2d(CHANNELS, window=2, warmup_steps=0, **options),
    "cbn": lambda **options: Compensating(**options),
    "ibn": lambda **options: wnn.InstanceBatchNorm2d(CHANNELS, **options),
    "dbn": lambda **options: wnn.DecorrelatedBatchNorm2d(CHANNELS, **options),
    "iternorm": lambda **options: wnn.IterNorm2d(CHANNELS, **options),
}


IMAGES = [name for name in LAYERS if not name.endswith("1d")]


def momentum_layer(**options: Any) -> nn.Module:
    layer = wnn.MomentumBatchNorm2d(CHANNELS, **options)
    layer.stat_momentum = 0.6
    return layer


class Compensating(wnn.CrossIterationBatchNorm2d):
    """With the layer before it inside, whose weights stay."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CHANNELS, window=2, **options)
        torch.manual_seed(0)
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, dtype=torch.float64).requires_grad_(False)
        self.before = (conv,)  # no part of it, or its gradients would be compared
        self.connect("norm", PrecedingLayer("conv", conv))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.before[0](input))


def part(step: int, seed: int, rank: int, world: int, *positions: int) -> Tensor:
    """Return this rank's samples of a step."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    whole = torch.randn(7, CHANNELS, *positions, generator=generator, dtype=torch.float64) * (1 + step) + 2
    return whole.split(SIZES[world])[rank]


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Return outputs, gradients and buffers of some steps, and an evaluation."""
    layer = LAYERS[name](synchronize=world > 1).double()
    positions = () if name.endswith("1d") else (4, 5)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = part(step, 0, rank, world, *positions).requires_grad_()
        layer.zero_grad()
        output = layer(x)
        output.backward(part(step, 1, rank, world, *positions))
        assert x.grad is not None
        found |= {f"out{step}": output.detach(), f"grad{step}": x.grad}
        found |= {f"{key}_grad{step}": parameter.grad for key, parameter in layer.named_parameters()}
    found |= {f"state.{key}": value for key, value in layer.state_dict().items()}
    layer.eval()
    found["eval"] = layer(part(9, 0, rank, world, *positions)).detach()
    return found


def empty_rank(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Normalize a joined batch of which the second rank has nothing."""
    layer = LAYERS[name](synchronize=world > 1).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 if rank == 0 else 0, CHANNELS, 3, 3, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    output = layer(x)
    output.square().sum().backward()
    assert x.grad is not None
    return {"out": output.detach(), "grad": x.grad} | {
        f"state.{key}": value for key, value in layer.state_dict().items()
    }


def checks() -> dict[str, Callable[[int, int], dict[str, Tensor]]]:
    """Return every check by name."""
    return {name: partial(train, name) for name in LAYERS} | {
        f"empty {name}": partial(empty_rank, name) for name in IMAGES
    }


if __name__ == "__main__":
    serve(checks())
