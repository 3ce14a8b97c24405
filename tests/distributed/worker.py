"""One rank of the distributed tests: ``python worker.py RANK WORLD FOLDER`` runs every check and saves what it found.

A check is a function of (rank, world) that returns tensors; run without a process group, with world 1, it is the
one-process result that the test compares with. A check that raises is recorded and the next one runs.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import wellcond

Result = dict[str, Any]
STEPS = 8
SIZES = {1: [6], 2: [5, 1], 3: [2, 1, 3]}  # samples per rank: unequal, together always six
TRANSFORMS: dict[str, type] = {"whitening": wellcond.FeatureWhitening, "descent": wellcond.FeatureDescent}
SCHEDULE: dict[str, Any] = {"stats_decay": 0.8, "stats_every": 2, "solve_every": 4}


def samples(step: int, rank: int, world: int, *shape: int) -> Tensor:
    """Return this rank's part of the step's six samples."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, *shape, generator=generator, dtype=torch.float64) * (1 + 0.2 * step) + 0.3
    return x.split(SIZES[world])[rank]


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    ).double()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Result:
    """Return copies of all weights and of all that the transforms remember."""
    found: Result = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.")
        found[name] = full(parameter)
        for key, value in optimizer.state[parameter].items():
            if key.startswith("wellcond_"):
                found[f"{name} {key}"] = full(value) if isinstance(value, Tensor) else value
    return found


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def ddp_training(rank: int, world: int, transform: Any, make: Callable[..., Any], accumulate: bool = False) -> Result:
    """Train on the mean over all ranks' samples: DDP averages gradients, so each rank's sum counts ``world`` times."""
    model = convnet()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = make(model.parameters())
    wellcond.attach(optimizer, wrapped, transform)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = samples(step, rank, world, 2, 6, 6)
        parts = [x[:1], x[1:]] if accumulate else [x]
        for part in parts:
            last = part is parts[-1]
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                (wrapped(part).sin().sum() * world / 6).backward()
        optimizer.step()
    return snapshot(wrapped, optimizer)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)


def one_linear(rank: int, world: int, bad: dict[tuple[int, int], str], synchronize: bool = True) -> Result:
    """Watch the second moment of one Linear, with lr = 0, while some ranks' batches are empty or not finite."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    transform = wellcond.FeatureWhitening(stats_decay=0.8, stats_every=1, solve_every=1)
    handle = wellcond.attach(optimizer, wrapped, transform, synchronize=synchronize)
    found: Result = {"moments": [], "gradients": []}
    for step in range(5):
        optimizer.zero_grad()
        x = samples(step, rank, world, 3).clone()
        trouble = bad.get((step, rank))
        if trouble == "empty":
            x = x[:0]
        elif trouble is not None:
            x[0, 1] = float(trouble)
        wrapped(x).sum().backward()
        for parameter in model.parameters():  # as clipping or a loss scaler would
            parameter.grad.nan_to_num_(1.0, 1.0, 1.0)
        optimizer.step()
        found["moments"].append(optimizer.state[model.weight]["wellcond_whitening_second_moment"].clone())
        found["gradients"].append(model.weight.grad.clone())
    return {**found, "stats": handle.stats()["whitening"], **snapshot(wrapped, optimizer)}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 3, dtype=torch.float64)
        self.b = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor, with_b: bool) -> Tensor:
        return self.b(self.a(x).tanh()) if with_b else self.a(x)


def unused_layer(rank: int, world: int) -> Result:
    """Run layer b on rank 0 alone, in some of the steps."""
    model = Branches()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = sgd(model.parameters())
    wellcond.attach(optimizer, wrapped, wellcond.FeatureWhitening(stats_every=1, solve_every=1))
    for step in range(5):
        optimizer.zero_grad()
        wrapped(samples(step, rank, world, 3), with_b=rank == 0 and step != 1).sin().sum().backward()
        optimizer.step()
    return snapshot(wrapped, optimizer)


# FSDP2 --------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "conv2d": (lambda: nn.Conv2d(2, 5, 3), (2, 4, 4)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4)),
    "conv2d groups across ranks": (lambda: nn.Conv2d(6, 6, 3, groups=3), (6, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(5, 5, 2, groups=5), (5, 4, 4)),
    "conv2d fewer rows than ranks": (lambda: nn.Conv2d(3, 1, 2), (3, 4, 4)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (3, 4, 4)),
    "conv_transpose2d groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 4, 4)),
    "conv_transpose2d groups across ranks": (lambda: nn.ConvTranspose2d(6, 3, 2, groups=3), (6, 4, 4)),
}
AWKWARD = (
    "conv2d groups across ranks",
    "conv2d depthwise",
    "conv2d fewer rows than ranks",
    "conv_transpose2d groups across ranks",
)
CENTRALIZATIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "gradient, coupled decay inside": (sgd, {}),
    "gradient, coupled decay outside": (sgd, {"decay": "outside"}),
    "gradient, decoupled decay inside": (adamw, {}),
    "update, decay inside": (adamw, {"where": "update"}),
    "update, decay outside": (adamw, {"where": "update", "decay": "outside"}),
}


def fsdp_training(rank: int, world: int, layer: str, make: Callable[..., Any], transform: Any) -> Result:
    """Train one layer whose weight is sharded along its first axis, unevenly where that is odd."""
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    model = nn.Sequential(build()).double()
    if world > 1:
        fully_shard(model)
    optimizer = make(model.parameters())
    handle = wellcond.attach(optimizer, model, transform)
    for step in range(4):
        optimizer.zero_grad()
        # FSDP2 averages gradients over ranks, as DDP does.
        (model(samples(step, rank, world, *shape)).sin().sum() * world / 6).backward()
        optimizer.step()
    return {**snapshot(model, optimizer), "report": handle.report(), "stats": handle.stats()}


def plain_training(name: str) -> Result:
    """Run an FSDP2 check in one process with its transform applied to no layer."""
    layer = max((layer for layer in LAYERS if layer in name), key=len)
    make = adamw if "update" in name else sgd
    return fsdp_training(0, 1, layer, make, wellcond.GradientCentralization(layers=lambda *_: False))


def checks() -> dict[str, Callable[[int, int], Result]]:
    """Return every check by name."""
    found: dict[str, Callable[[int, int], Result]] = {}
    for name, transform_type in TRANSFORMS.items():
        for make in (sgd, adamw):
            found[f"ddp {name} {make.__name__}"] = lambda rank, world, t=transform_type, m=make: ddp_training(
                rank, world, t(**SCHEDULE), m
            )
        for layer in (layer for layer in LAYERS if "transpose" not in layer):
            found[f"fsdp {name} {layer}"] = lambda rank, world, t=transform_type, li=layer: fsdp_training(
                rank, world, li, sgd, t(**SCHEDULE)
            )
    found["ddp accumulate"] = lambda rank, world: ddp_training(
        rank, world, wellcond.FeatureWhitening(**SCHEDULE), sgd, accumulate=True
    )
    found["ddp centralization"] = lambda rank, world: ddp_training(
        rank, world, wellcond.GradientCentralization(where="update"), adamw
    )
    trouble = {(1, 1): "nan", (2, 0): "inf", (3, 1): "empty", (4, 0): "empty", (4, 1): "nan"}
    found["trouble"] = lambda rank, world: one_linear(rank, world, trouble)
    found["local statistics"] = lambda rank, world: one_linear(rank, world, {}, synchronize=False)
    found["unused layer"] = unused_layer
    for layer in LAYERS:
        for name, (make, options) in CENTRALIZATIONS.items():
            if layer in AWKWARD and name not in ("gradient, coupled decay inside", "update, decay inside"):
                continue
            found[f"fsdp centralization {layer}: {name}"] = lambda rank, world, li=layer, m=make, o=options: (
                fsdp_training(rank, world, li, m, wellcond.GradientCentralization(**o))
            )
    return found


def run_check(check: Callable[[int, int], Result], rank: int, world: int) -> Result:
    try:
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            result = check(rank, world)
        said = [str(w.message) for w in record if issubclass(w.category, wellcond.WellcondWarning)]
        return {"result": result, "error": None, "warnings": said}
    except Exception:
        return {"result": None, "error": traceback.format_exc(), "warnings": []}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=30),
    )
    names = [name for name in checks() if world == 2 or name.startswith("ddp")]
    torch.save({name: run_check(checks()[name], rank, world) for name in names}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
