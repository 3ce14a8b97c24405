"""One rank of the normalizations' distributed tests: ``python norm_worker.py RANK WORLD FOLDER`` runs every check.

A check is a function of (rank, world) that returns tensors; run without a process group, with world 1, it is the
one-process result that the test compares with. A check that raises is recorded and the next one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from launch_ranks import serve
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from wellcond.calibration.models import calibrate
from wellcond.nn import BSRBatchNorm2d, IterNorm2d, MomentumBatchNorm2d, SwitchableNorm2d, convert_norm

Result = dict[str, Any]
M = 2
DATA_PARALLEL = ("sn", "ssn", "ibn", "kn", "dbn", "iternorm")
# Samples of each of a rank's batches: different numbers of batches, of different sizes, some with something left over.
SIZES = {1: [[6, 4, 2, 3, 8]], 2: [[6, 4, 2], [3, 8]]}


class Net(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = norm(3)
        self.other = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)).relu().mean((2, 3)))


def model_of(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Net:
    torch.manual_seed(0)
    model = Net(norm).double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model


def batches(rank: int, world: int) -> list[Tensor]:
    """Return this rank's batches; those of all ranks, one after the other, are the one process's."""
    generator = torch.Generator().manual_seed(5)
    found = [
        [torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64) + size for size in sizes]
        for sizes in SIZES[world]
    ]
    return found[rank]


def state_of(model: nn.Module) -> Result:
    return {name.removeprefix("module."): value.clone() for name, value in model.state_dict().items()}


def wrapped(model: nn.Module, world: int) -> nn.Module:
    return DistributedDataParallel(model) if world > 1 else model


def calibrated(
    rank: int,
    world: int,
    what: str,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    loader: Callable[[int, int], Any] = batches,
    inside: bool = False,
    **options: Any,
) -> Result:
    """Calibrate a wrapped model, or one that has a wrapped part inside."""
    model = model_of(norm)
    outer = nn.Sequential(wrapped(model, world)) if inside else wrapped(model, world)
    result = calibrate(outer, loader(rank, world), M, what, **options)
    assert result is outer
    return state_of(model)


def only_on_rank_0(rank: int, world: int) -> list[Tensor]:
    return batches(0, 2) if rank == 0 else []


def failing_on_rank_1(rank: int, world: int) -> Any:
    for index, batch in enumerate(batches(rank, world)):
        if rank == 1 and index == 1:
            raise OSError("the disk is gone")
        yield batch


def after_failure(rank: int, world: int, norm: Callable[[int], nn.Module]) -> Result:
    """Let the loader of one rank fail; return what each rank said and what became of its model."""
    model = wrapped(model_of(norm), world)
    before, kinds = state_of(model), [type(module) for module in model.modules()]
    try:
        calibrate(model, failing_on_rank_1(rank, world), M, "bsr")
        said = "nothing"
    except (RuntimeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    after = state_of(model)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return {"said": said, "same": same and kinds == [type(module) for module in model.modules()]}


# Of two ranks, for which a sharded model runs in step: more batches here, more there, none here.
UNEQUAL = {"first": ([5, 2, 4], [3]), "second": ([3], [2, 2, 7]), "none": ([], [4, 3])}


def sized(sizes: list[int], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64) + size for size in sizes]


def whole(rank: int, world: int, case: str, sharded: bool, **options: Any) -> Result:
    """Take the statistics of all samples together, whatever ranks have of them."""
    parts = [sized(sizes, seed) for seed, sizes in enumerate(UNEQUAL[case])]
    model = model_of().eval()
    if world == 1:
        calibrate(model, [batch for part in parts for batch in part], **options)
    elif sharded:
        fully_shard(model.conv)
        fully_shard(model)
        calibrate(model, parts[rank], **options)
    else:
        calibrate(wrapped(model, world), parts[rank], **options)
    return {name: value for name, value in state_of(model).items() if "running" in name or "tracked" in name}


def sharded_failure(rank: int, world: int) -> Result:
    model = model_of().eval()
    fully_shard(model)
    before = {name: value.clone() for name, value in model.named_buffers()}
    try:
        calibrate(model, failing_on_rank_1(rank, world))
        said = "nothing"
    except (RuntimeError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "same": all(torch.equal(before[name], value) for name, value in model.named_buffers())}


def moving_averages(rank: int, world: int) -> Result:
    """Return the two ranks' moving averages, each found alone, next to what calibration makes of them."""
    alone = []
    for part in (batches(0, 2), batches(1, 2)):
        model = model_of().eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.2
                module.train()
        with torch.no_grad():
            for batch in part:
                for group in batch[: len(batch) // M * M].split(M):
                    model(group)
        alone.append(state_of(model))
    together = calibrated(rank, world, "bn", momentum=0.2)
    return {"alone": alone, "together": together}


def data_parallel(rank: int, world: int, kind: str) -> Result:
    """Train under DDP, each rank with statistics of its own; in one process, each half of the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    ).double()
    convert_norm(model, kind, **({} if world > 1 else {"group_size": 4}))
    outer = wrapped(model, world)
    optimizer = torch.optim.SGD(outer.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        images = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        images = images.chunk(world)[rank]
        optimizer.zero_grad()
        outer(images).square().mean().backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def checks() -> dict[str, Callable[[int, int], Result]]:
    """Return every check by name."""
    found: dict[str, Callable[[int, int], Result]] = {}
    for what in ("bsr", "evalnorm", "bn"):
        found[f"calibrate {what}"] = lambda rank, world, w=what: calibrated(rank, world, w)
    found["calibrate mbn"] = lambda rank, world: calibrated(rank, world, "bn", MomentumBatchNorm2d)
    found["calibrate sn"] = lambda rank, world: calibrated(rank, world, "bn", SwitchableNorm2d)
    found["calibrate iternorm"] = lambda rank, world: calibrated(rank, world, "bn", IterNorm2d)
    found["calibrate synchronized"] = lambda rank, world: calibrated(
        rank, world, "bsr", lambda c: BSRBatchNorm2d(c, synchronize=True)
    )
    found["calibrate inside"] = lambda rank, world: calibrated(rank, world, "bn", inside=True)
    found["one rank's data"] = lambda rank, world: calibrated(rank, world, "bsr", loader=only_on_rank_0)
    found["failure"] = lambda rank, world: after_failure(rank, world, nn.BatchNorm2d)
    found["failure bsr"] = lambda rank, world: after_failure(rank, world, BSRBatchNorm2d)
    found["nothing anywhere"] = lambda rank, world: calibrated(rank, world, "bn", loader=lambda rank, world: [])
    found["short everywhere"] = lambda rank, world: calibrated(
        rank, world, "bn", loader=lambda rank, world: [x[:1] for x in batches(rank, world)]
    )
    for case in UNEQUAL:
        for sharded in (False, True):
            name = f"whole, {case}, {'sharded' if sharded else 'replicated'}"
            found[name] = partial(whole, case=case, sharded=sharded)
    found["whole, limited, sharded"] = partial(whole, case="first", sharded=True, max_batches=2)
    found["failure sharded"] = sharded_failure
    for kind in DATA_PARALLEL:
        found[f"data parallel {kind}"] = partial(data_parallel, kind=kind)
    found["moving averages"] = moving_averages
    return found


if __name__ == "__main__":
    serve(checks())
