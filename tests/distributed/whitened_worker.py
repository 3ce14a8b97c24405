"""One rank of the whitened layers' distributed tests: ``python whitened_worker.py RANK WORLD FOLDER``.

A check is a function of (rank, world); run without a process group, with world 1, it is the one-process result.
"""

from __future__ import annotations

from typing import Any

import torch
from launch_ranks import Check, serve
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wellcond.nn.whitened.amortized import AmortizedLayer
from wellcond.nn.whitened.eigen import EigenConv2d, EigenLinear
from wellcond.nn.whitened.gwnn import GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear
from wellcond.nn.whitened.wnn import WhitenedConv2d, WhitenedLinear

Result = dict[str, Any]
KINDS: dict[str, tuple[Any, Any]] = {
    "whitened": (WhitenedConv2d, WhitenedLinear),
    "generalized": (GeneralizedWhitenedConv2d, GeneralizedWhitenedLinear),
    "eigen": (EigenConv2d, EigenLinear),
}
# Samples of each rank: uneven, and in the last case none for one of them.
SIZES = {1: [6], 2: [4, 2]}
NONE = {1: [6], 2: [6, 0]}
STEPS = 7


def samples(step: int, rank: int, sizes: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64) * (1 + 0.2 * step) + 0.3
    return x.split(sizes)[rank]


def model_of(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    conv, linear = KINDS[kind]
    options = {"stats_every": 1, "refresh_every": 2, "stats_decay": 0.5, "damping": 0.01} | options
    return nn.Sequential(
        conv(2, 4, 3, padding=1, groups=2, **options), nn.Tanh(), nn.Flatten(), linear(64, 3, **options)
    ).double()


def trained(rank: int, world: int, kind: str, sizes: dict[int, list[int]] = SIZES, parts: int = 1) -> Result:
    """Train on the mean over all ranks' samples: DDP averages gradients, so each rank's sum counts ``world`` times."""
    model = model_of(kind)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in samples(step, rank, sizes[world]).chunk(parts):
            ((wrapped(part) - 0.5).square().sum() * world / 6).backward()
        optimizer.step()
    for layer in model.modules():
        if isinstance(layer, AmortizedLayer):
            layer.refresh()
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def alone(rank: int, world: int) -> Result:
    """Statistics of one's own: no communication, and other constants on each rank."""
    layer = model_of("whitened", synchronize=False)[0]
    layer(samples(0, rank, SIZES[world]))
    assert layer.refresh()
    return {"transform": layer.transform.clone(), "number": float(layer.inputs.count)}


def checks() -> dict[str, Check]:
    """Name all checks."""
    found: dict[str, Check] = {"alone": alone}
    for kind in KINDS:
        found[kind] = lambda rank, world, kind=kind: trained(rank, world, kind)
        found[f"{kind} accumulated"] = lambda rank, world, kind=kind: trained(rank, world, kind, parts=2)
        found[f"{kind} without samples"] = lambda rank, world, kind=kind: trained(rank, world, kind, NONE)
    return found


if __name__ == "__main__":
    serve(checks())
