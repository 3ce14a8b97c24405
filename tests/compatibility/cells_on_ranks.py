"""One rank of the cells of several processes: ``python cells_on_ranks.py RANK FOLDER CHECK …``."""

from __future__ import annotations

import datetime
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from by_hand import STEPS, ByHand, assert_equal, batch, loss_of, net, whitening
from cells import RefusedError, attach, one_line
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import wellcond

Check = Callable[[int], "str | None"]
CHECKS: dict[str, Check] = {}
PARTS = ([0, 1, 2, 3, 4], [5, 6, 7])


def check(function: Check) -> Check:
    """List a check under its name."""
    CHECKS[function.__name__] = function
    return function


def part(rank: int, step: int) -> Tensor:
    """Return this rank's samples: five, or three."""
    return batch(step)[PARTS[rank]]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Return a plain optimizer."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def reference(first: int = 0) -> list[Tensor]:
    """Return the weights that one process with all samples has after the steps, changed by hand from one step on."""
    model = net()
    hand = ByHand(model)
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(batch(step))).backward()
        if step >= first:
            hand.change_gradients()
        hand.begin_step()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def full(tensor: Tensor) -> Tensor:
    """Return a whole tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def train(model: nn.Module, optimizer: Any, rank: int, pieces: int = 1) -> None:
    """Do the steps; ranks' gradients are averaged, so each rank's loss counts twice."""
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = part(rank, step).tensor_split(pieces)
        for index, x in enumerate(parts):
            if index + 1 < len(parts):
                with model.no_sync():
                    (2 * loss_of(model(x))).backward()
            else:
                (2 * loss_of(model(x))).backward()
        optimizer.step()


def against_reference(model: nn.Module, first: int = 0) -> None:
    """Compare the whole weights."""
    assert_equal([full(parameter) for parameter in model.parameters()], reference(first), 1e-7, "ranks")


def ddp_training(rank: int, pieces: int = 1, **options: Any) -> None:
    model = DistributedDataParallel(net(), **options)
    optimizer = sgd(model.parameters())
    attach(optimizer, model, whitening())
    train(model, optimizer, rank, pieces)
    against_reference(model)


@check
def ddp(rank: int) -> str | None:
    ddp_training(rank)
    return None


@check
def ddp_no_sync(rank: int) -> str | None:
    ddp_training(rank, 2)
    return None


@check
def ddp_static_graph(rank: int) -> str | None:
    ddp_training(rank, static_graph=True)
    return None


@check
def fsdp2(rank: int) -> str | None:
    model = net()
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = sgd(model.parameters())
    attach(optimizer, model, whitening())
    train(model, optimizer, rank)
    against_reference(model)
    return None


@check
def fsdp2_wrapped_after(rank: int) -> str | None:
    """The parameters are swapped for shards after attaching, as some launchers do: the optimizer is made anew."""
    model = net()
    optimizer = sgd(model.parameters())
    attach(optimizer, model, whitening())
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    for group in optimizer.param_groups:
        group["params"] = list(model.parameters())
    train(model, optimizer, rank)
    against_reference(model, first=1)
    return None


@check
def zero(rank: int) -> str | None:
    model = DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    attach(optimizer, model, whitening())
    train(model, optimizer, rank)
    against_reference(model)
    return None


@check
def zero_inner(rank: int) -> str | None:
    model = DistributedDataParallel(net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    attach(optimizer.optim, model, whitening())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        train(model, optimizer, rank)
    except ValueError as error:
        assert_equal(model.parameters(), before, 0.0, "a step that was refused")
        raise RefusedError(str(error)) from error
    return None


@check
def tensor_parallel(rank: int) -> str | None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (2,))
    model = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = sgd(model.parameters())
    handle = attach(optimizer, model, whitening(), synchronize=False)
    optimizer.zero_grad()
    loss_of(model(batch(0))).backward()
    plain = [full(p.grad).clone() for p in model.parameters()]
    optimizer.step()
    other = net()
    hand = ByHand(other)
    loss_of(other(batch(0))).backward()
    hand.change_gradients()
    reasons = []
    rows = {row.name: row for row in handle.coverage()["whitening"]}
    for (name, ours), theirs, before in zip(model.named_parameters(), other.parameters(), plain, strict=True):
        if rows[name].state_bytes is None and "together with" not in rows[name].how:
            reasons.append(f"{name}: {rows[name].how}")
            assert_equal([full(ours.grad)], [before], 0.0, name)
        else:
            assert_equal([full(ours.grad)], [theirs.grad], 1e-7, name)
    return reasons[0] if reasons else None


def fsdp1(original: bool) -> str | None:
    model = FullyShardedDataParallel(net(), use_orig_params=original, device_id=torch.device("cpu"))
    optimizer = sgd(model.parameters())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FeatureWhitening covers none of the weights", wellcond.WellcondWarning)
            handle = attach(optimizer, model, whitening())
    except RefusedError as refusal:
        if "shard" not in str(refusal).lower() and "fsdp" not in str(refusal).lower():
            raise AssertionError(f"the refusal does not say that it is about sharding: {refusal}") from refusal
        raise
    rows = [row for row in handle.coverage()["whitening"] if not row.name.endswith("bias")]
    assert rows
    assert all("shard" in row.how.lower() or "fsdp" in row.how.lower() for row in rows), rows
    assert all(row.state_bytes is None for row in rows)
    loss_of(model(batch(0))).backward()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad.clone() for p in held if p.grad is not None]
    optimizer.step()
    assert_equal([p.grad for p in held if p.grad is not None], before, 0.0, "FSDP1")
    return rows[0].how


@check
def fsdp1_original(rank: int) -> str | None:
    return fsdp1(True)


@check
def fsdp1_flat(rank: int) -> str | None:
    return fsdp1(False)


@check
def join(rank: int) -> str | None:
    model = DistributedDataParallel(net())
    optimizer = sgd(model.parameters())
    said: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", wellcond.WellcondWarning)
        attach(optimizer, model, whitening())
        try:
            with model.join():
                for step in range(2 if rank == 0 else 4):
                    optimizer.zero_grad()
                    loss_of(model(part(rank, step))).backward()
                    optimizer.step()
        except (ValueError, wellcond.WellcondWarning) as error:
            raise RefusedError(str(error)) from error
    said = [str(w.message) for w in record if issubclass(w.category, wellcond.WellcondWarning)]
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return said[0] if said else None


def stage_training(rank: int, **options: Any) -> None:
    """Rank 0 trains one model and rank 1 another; each must equal its model trained alone."""
    widths = ((4, 6), (4, 3))[rank]

    def make() -> nn.Module:
        torch.manual_seed(rank)
        return nn.Sequential(nn.Linear(widths[0], widths[1], dtype=torch.float64))

    def steps(model: nn.Module, optimizer: Any, change: Callable[[], None]) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model(batch(step + 10 * rank))).backward()
            change()
            optimizer.step()

    model, other = make(), make()
    optimizer = sgd(model.parameters())
    attach(optimizer, model, whitening(), **options)
    try:
        steps(model, optimizer, lambda: None)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    steps(other, sgd(other.parameters()), ByHand(other).change_gradients)
    assert_equal(model.parameters(), other.parameters(), 1e-7, "a stage")


@check
def stages(rank: int) -> str | None:
    stage_training(rank)
    return None


@check
def stages_own_group(rank: int) -> str | None:
    stage_training(rank, synchronize=False)
    return None


def main() -> None:
    """Run the checks, and save what each found."""
    rank, folder, names = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", wellcond.WellcondWarning)
                reason = CHECKS[name](rank)
            found[name] = ("works", "") if reason is None else ("plain gradient", one_line(reason))
        except RefusedError as refusal:
            found[name] = ("refused", one_line(str(refusal)))
        except Exception as error:
            found[name] = ("fails", one_line(f"{type(error).__name__}: {error}")[:400])
        torch.save(found, folder / f"rank{rank}.pt")
    if len(names) > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
