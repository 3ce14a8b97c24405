"""One rank of `test_replicas.py`: ``python replica_worker.py RANK WORLD FOLDER`` runs every check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from launch_ranks import serve
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import wellcond

Result = dict[str, Any]
BATCHES = [3, 5]  # of each rank


def net(seed: int = 0, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width, bias=False), nn.Tanh(), nn.Linear(width, 2, bias=False)).double()


def samples(step: int, rank: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def joined(rank: int, world: int, how: str) -> Result:
    """Train on uneven inputs, each rank's gradient counting for itself; note M of the first layer after each step."""
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    transform = wellcond.FeatureWhitening(stats_every=1, solve_every=1, stats_decay=0.5)
    handle = wellcond.attach(optimizer, model, transform)
    parts = 2 if how == "accumulate" else 1
    with Join([model]) if how == "Join" else model.join():
        for step in range(BATCHES[rank]):
            optimizer.zero_grad()
            for part in range(parts):
                last = part == parts - 1
                with contextlib.nullcontext() if last else model.no_sync():
                    model(samples(step, rank)[part::parts]).square().sum().backward()
            optimizer.step()
    moment, mass = torch.zeros(4, 4, dtype=torch.float64), 0.0
    for step in range(max(BATCHES)):
        rows = torch.cat([samples(step, other) for other in range(world) if step < BATCHES[other]])
        moment, mass = 0.5 * moment + 0.5 * rows.mT @ rows / len(rows), 0.5 * mass + 0.5
    state = handle._slots["whitening"][0].state
    handle.remove()
    return {"moment": state["second_moment"][0], "expected": moment, "step": state["step"]}


def refusal(optimizer: torch.optim.Optimizer, model: nn.Module) -> str | None:
    """Take one step; return the error, and check that no weight was changed if there was one."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return str(error)
    return None


def strangers(rank: int, world: int, kind: str) -> Result:
    """Let each rank train a model of its own, with the default group and then by itself."""
    found: Result = {}
    for synchronize in (True, False):
        model = net(width=4 + rank) if kind == "other shapes" else net(seed=rank)
        if kind == "a stage without weights" and rank:
            model = nn.Sequential(nn.PReLU(dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wellcond.attach(optimizer, model, wellcond.FeatureWhitening(), synchronize=synchronize)
        found[str(synchronize)] = refusal(optimizer, model)
    model = net(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, wellcond.GradientCentralization())  # shares nothing with other ranks
    found["centralization"] = refusal(optimizer, model)
    return found


def own_group(rank: int, world: int) -> Result:
    """Wrap each rank's model in a DDP of a group of one: its statistics are its own."""
    groups = [dist.new_group([other]) for other in range(world)]
    model = DistributedDataParallel(net(seed=rank), process_group=groups[rank])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1, stats_decay=0.0))
    x = samples(0, rank)
    model(x).square().sum().backward()
    optimizer.step()
    moment = handle._slots["whitening"][0].state["second_moment"][0]
    return {"moment": moment, "expected": x.mT @ x / len(x)}


def one_rank_fails(rank: int, world: int) -> Result:
    """Let the observation of one layer fail on one rank: all leave it alone, and go on."""
    model = DistributedDataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=1, solve_every=1))
    if rank == 1:

        def fail(*_: Any) -> None:
            raise RuntimeError("broken here")

        handle._slots["whitening"][0].coverage.plan.observe = fail
    for step in range(3):
        optimizer.zero_grad()
        model(samples(step, rank)).square().sum().backward()
        optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return {"weights": weights, "report": handle.report(), "stats": handle.stats()["whitening"]["weights"]}


def unused_weights(rank: int, world: int) -> Result:
    """Count the numbers that are summed over ranks, of statistics, in steps in which nothing is due."""
    numbers: list[int] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        numbers.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    model = nn.ModuleList([net(), net(1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = wellcond.attach(optimizer, model, wellcond.FeatureWhitening(stats_every=50))
    dist.all_reduce = counting
    try:
        for step in range(40):
            model[0](samples(step, rank)).square().sum().backward()
            optimizer.step()
    finally:
        dist.all_reduce = real
    return {"most": max(numbers), "all": sum(numbers), "open": handle._gate.open}


def checks() -> dict[str, Callable[[int, int], Result]]:
    """Return every check by name."""
    found: dict[str, Callable[[int, int], Result]] = {}
    for how in ("join", "Join", "accumulate"):
        found[f"joined {how}"] = lambda rank, world, h=how: joined(rank, world, h)
    for kind in ("other shapes", "other weights", "a stage without weights"):
        found[f"strangers {kind}"] = lambda rank, world, k=kind: strangers(rank, world, k)
    return {
        **found,
        "own group": own_group,
        "one rank fails": one_rank_fails,
        "unused weights": unused_weights,
    }


if __name__ == "__main__":
    serve(checks())
