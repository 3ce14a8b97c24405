"""One rank of `test_switchable.py`: ``python switchable_worker.py RANK WORLD FOLDER`` trains each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from launch_ranks import serve
from torch import Tensor, nn

import wellcond.nn as wnn

CHANNELS, STEPS = 3, 4
SIZES = {1: [7], 2: [5, 2]}  # samples of each rank, unequal
POSITIONS: dict[int, tuple[int, ...]] = {0: (), 1: (5,), 2: (4, 5), 3: (2, 3, 2)}
# Each layer, with the dimensions of its positions.
LAYERS: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    "sn": (2, partial(wnn.SwitchableNorm2d, CHANNELS)),
    "sn1d": (1, partial(wnn.SwitchableNorm1d, CHANNELS)),
    "sn [N, C]": (0, partial(wnn.SwitchableNorm1d, CHANNELS)),
    "sn3d": (3, partial(wnn.SwitchableNorm3d, CHANNELS)),
    "sn of two": (2, partial(wnn.SwitchableNorm2d, CHANNELS, normalizers=("ln", "bn"), shared_logits=True)),
    "sn unbiased": (2, partial(wnn.SwitchableNorm2d, CHANNELS, unbiased=True)),
    "sn averaging": (2, partial(wnn.SwitchableNorm2d, CHANNELS, momentum=None)),
    "sn group": (2, lambda **options: wnn.SwitchableNorm2d(CHANNELS, **with_group(options))),
    "ssn": (2, lambda **options: sparse(0.3, **options)),
    "ssn closing": (2, lambda **options: sparse(0.6, **options)),
    "ssn closed": (2, lambda **options: sparse(1.0, **options)),
}
EMPTY = ["sn", "sn unbiased", "sn of two", "ssn", "ssn closed"]


def with_group(options: dict[str, Any]) -> dict[str, Any]:
    """Name the ranks that share the batch by their process group."""
    return {"synchronize": dist.group.WORLD} if options["synchronize"] else options


def sparse(radius: float, **options: Any) -> nn.Module:
    layer = wnn.SparseSwitchableNorm2d(CHANNELS, **options)
    layer.radius = radius
    return layer


def made(name: str, world: int) -> nn.Module:
    layer = LAYERS[name][1](synchronize=world > 1).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def part(step: int, seed: int, rank: int, world: int, *positions: int) -> Tensor:
    """Return this rank's samples of a step, each sample with a shift of its own."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    whole = torch.randn(7, CHANNELS, *positions, generator=generator, dtype=torch.float64) * (1 + step) + 2
    shift = torch.randn(7, CHANNELS, *(1 for _ in positions), generator=generator, dtype=torch.float64)
    return (whole + shift).split(SIZES[world])[rank]


def train(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Return outputs, gradients and buffers of some steps, and an evaluation."""
    layer, positions = made(name, world), POSITIONS[LAYERS[name][0]]
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        x = part(step, 0, rank, world, *positions).requires_grad_()
        layer.zero_grad()
        output = layer(x)
        output.backward(part(step, 1, rank, world, *positions))
        assert x.grad is not None
        found |= {f"out{step}": output.detach(), f"grad{step}": x.grad}
        for key, parameter in layer.named_parameters():
            found[f"parameter {key} {step}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found |= {f"state.{key}{step}": value.clone() for key, value in layer.state_dict().items()}
    layer.eval()
    found["eval"] = layer(part(9, 0, rank, world, *positions)).detach()
    return found


def empty_rank(name: str, empty: int, rank: int, world: int) -> dict[str, Tensor]:
    """Normalize a joined batch of which one rank has nothing."""
    layer = made(name, world)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, CHANNELS, 3, 3, dtype=torch.float64, generator=generator)
    upstream = torch.randn(4, CHANNELS, 3, 3, dtype=torch.float64, generator=generator)
    if world > 1 and rank == empty:
        x, upstream = x[:0], upstream[:0]
    x = x.clone().requires_grad_()
    output = layer(x)
    output.backward(upstream)
    assert x.grad is not None
    found = {"out": output.detach(), "grad": x.grad}
    for key, parameter in layer.named_parameters():
        found[f"parameter {key}"] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return found | {f"state.{key}": value for key, value in layer.state_dict().items()}


def checks() -> dict[str, Callable[[int, int], dict[str, Tensor]]]:
    """Return every check by name."""
    return {name: partial(train, name) for name in LAYERS} | {
        f"empty {empty} {name}": partial(empty_rank, name, empty) for name in EMPTY for empty in (0, 1)
    }


if __name__ == "__main__":
    serve(checks())
