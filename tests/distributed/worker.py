"""One rank of the distributed tests: ``python worker.py RANK WORLD FOLDER`` runs every check and saves what it found.

A check is a function of (rank, world) that returns tensors; run without a process group, with world 1, it is the
one-process result that the test compares with. A check that raises is recorded and the next one runs.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from launch_ranks import serve
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import wellcond
from wellcond.transforms.preconditioner import forms, solves

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


# What is wrong with whose batch, by (step, rank).
TROUBLE = {(1, 1): "nan", (2, 0): "inf", (3, 1): "empty", (4, 0): "empty", (4, 1): "nan"}


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


# every kind of layer, every form ------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Convolutions (grouped, transposed, ordinary), an embedding, attention, norm layers, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.mix = nn.Conv2d(3, 5, 2, bias=False)
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.wide = nn.Linear(72, 5)
        self.out = nn.Linear(50, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        images = self.mix(self.up(self.conv(x).tanh())).flatten(1)
        tokens = self.embed((3 * x[..., 0]).nan_to_num().long().remainder(9).flatten(1))
        attended = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.out(torch.cat([images, self.wide(attended.flatten(1)).tanh()], dim=1))


FORMS: dict[str, dict[str, Any]] = {
    "dense": {"second_moment": "dense"},
    "kronecker": {"second_moment": "kronecker"},
    "low_rank": {"second_moment": "low_rank", "rank": 6},
    "momentum": {"gradient_momentum": 0.5},
    "blocks": {"second_moment": "blocks", "norm": "fixed"},
    "both sides": {"outputs": True, "norm": "fixed", "gradient_momentum": 0.5},
}
SPREAD = [("whitening", "dense"), ("whitening", "kronecker"), ("descent", "dense")]
MAKERS: dict[str, Callable[..., Any]] = {
    "dense": sgd,
    "kronecker": adamw,
    "low_rank": sgd,
    "blocks": sgd,
    "both sides": lambda params: torch.optim.SGD(params, lr=0.01),
    # The moving average before the product is for an optimizer without one.
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05),
}


def transform_of(name: str, form: str) -> Any:
    return TRANSFORMS[name](norm_layers=True, **SCHEDULE, **FORMS[form])


def rank_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, world: int) -> None:
    optimizer.zero_grad()
    (model(samples(step, rank, world, 2, 6, 6)).sin().sum() * world / 6).backward()
    optimizer.step()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def everything_under_ddp(rank: int, world: int, transform: Any, make: Callable[..., Any], spread: bool) -> Result:
    model = Everything()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = make(model.parameters())
    wellcond.attach(optimizer, wrapped, transform)
    solved_at = []
    with replaced(solves, "SOLVED_AT_ONCE", 1.0 if spread else solves.SOLVED_AT_ONCE):
        for step in range(STEPS):
            rank_step(wrapped, optimizer, step, rank, world)
            solved_at.append([v for k, v in snapshot(wrapped, optimizer).items() if k.endswith("solved_at")])
    return {**snapshot(wrapped, optimizer), "solves of each step": solved_at}


def nothing_seen_at_first(rank: int, world: int) -> Result:
    """Hand every rank an empty batch at the first step; statistics are due again in fifty."""
    model = convnet()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = sgd(model.parameters())
    wellcond.attach(optimizer, wrapped, wellcond.FeatureWhitening(stats_every=50, solve_every=500))
    for step in range(3):
        optimizer.zero_grad()
        x = samples(step, rank, world, 2, 6, 6)
        (wrapped(x if step else x[:0]).sin().sum() * world / 6).backward()
        optimizer.step()
    return snapshot(wrapped, optimizer)


def counted_solves(rank: int, world: int) -> Result:
    """Note which layers this rank factorizes at which step, and how often it calls eigh."""
    model = Everything()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = sgd(model.parameters())
    transform = transform_of("whitening", "dense")
    handle = wellcond.attach(optimizer, wrapped, transform)
    covered = {slot.layer.name.removeprefix("module."): slot.coverage.plan for slot in handle._covered(transform)}
    names = {id(form): name for name, form in covered.items()}
    costs = {name: form.cost for name, form in covered.items()}
    solved: list[tuple[int, str]] = []
    decompositions = 0
    real_solve, real_eigh = forms.RowsForm.solve, torch.linalg.eigh

    def solve(self: Any, *args: Any, **kwargs: Any) -> Any:
        solved.append((step, names[id(self)]))
        return real_solve(self, *args, **kwargs)

    def eigh(*args: Any, **kwargs: Any) -> Any:
        nonlocal decompositions
        decompositions += 1
        return real_eigh(*args, **kwargs)

    with replaced(forms.RowsForm, "solve", solve), replaced(torch.linalg, "eigh", eigh):
        for step in range(STEPS):
            rank_step(wrapped, optimizer, step, rank, world)
    mine = {"solved": solved, "decompositions": decompositions}
    return {"mine": mine, "costs": costs, "state": snapshot(wrapped, optimizer)}


def everything_in_trouble(rank: int, world: int, form: str) -> Result:
    """Watch all statistics, with lr = 0, while batches are empty or not finite; alone: both batches, one by one."""
    model = Everything()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    transform = wellcond.FeatureWhitening(
        stats_decay=0.8, stats_every=1, solve_every=1, norm_layers=True, **FORMS[form]
    )
    handle = wellcond.attach(optimizer, wrapped, transform)
    for step in range(6):
        optimizer.zero_grad()
        for part in [rank] if world > 1 else [0, 1]:
            x = samples(step, part, 2, 2, 6, 6).clone()
            trouble = TROUBLE.get((step, part))
            if trouble == "empty":
                x = x[:0]
            elif trouble is not None:
                x[0, 1, 2, 3] = float(trouble)
            wrapped(x).sin().sum().backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(1.0, 1.0, 1.0)
        optimizer.step()
    return {**snapshot(wrapped, optimizer), "stats": handle.stats()["whitening"]}


def failing_owner(rank: int, world: int) -> Result:
    """Let every factorization of rank 0 fail in the second round of two."""
    model = Everything()
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model.parameters())
    transform = transform_of("whitening", "dense")
    handle = wellcond.attach(optimizer, wrapped, transform)
    mine: list[str] = []
    covered = handle._covered(transform)
    names = {id(slot.coverage.plan): slot.layer.name.removeprefix("module.") for slot in covered}
    real_solve = forms.RowsForm.solve

    def solve(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine.append(names[id(self)])
        return None if rank == 0 and step == 2 else real_solve(self, *args, **kwargs)

    before: Result = {}
    with replaced(forms.RowsForm, "solve", solve):
        for step in range(4):
            if step == 2:
                before, mine[:] = snapshot(wrapped, optimizer), []
            rank_step(wrapped, optimizer, step, rank, world)
    return {"before": before, "after": snapshot(wrapped, optimizer), "stats": handle.stats(), "mine": mine}


def everything_under_fsdp(
    rank: int, world: int, transform: Any, make: Callable[..., Any], units: tuple[str, ...] = ()
) -> Result:
    model = sharded_everything(world, units)
    optimizer = make(model.parameters())
    handle = wellcond.attach(optimizer, model, transform)
    for step in range(6):
        rank_step(model, optimizer, step, rank, world)
    return {**snapshot(model, optimizer), "report": handle.report(), "stats": handle.stats()}


def sharded_everything(world: int, units: tuple[str, ...] = ()) -> nn.Module:
    """Shard the whole, and before it the named children as units of their own."""
    model = Everything()
    if world > 1:
        for name in units:
            fully_shard(model.get_submodule(name))
        fully_shard(model)
    return model


def checkpointed(rank: int, world: int, form: str, sharded: bool, whole: bool = False) -> Result:
    """Save between two refreshes through torch.distributed.checkpoint, load into a fresh job, go on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    def job() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded_everything(world) if sharded else DistributedDataParallel(Everything())
        optimizer = adamw(model.parameters())
        wellcond.attach(optimizer, model, transform_of("whitening", form))
        return model, optimizer

    options = StateDictOptions(full_state_dict=whole)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    model, optimizer = job()
    for step in range(5):
        rank_step(model, optimizer, step, rank, world)
    state, optimizer_state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
    for step in range(5, 10):
        rank_step(model, optimizer, step, rank, world)

    resumed, theirs = job()
    state, optimizer_state = get_state_dict(resumed, theirs, options=options)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder[0])
    set_state_dict(resumed, theirs, model_state_dict=state, optim_state_dict=optimizer_state, options=options)
    for step in range(5, 10):
        rank_step(resumed, theirs, step, rank, world)
    return {"uninterrupted": snapshot(model, optimizer), "resumed": snapshot(resumed, theirs)}


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
CONSTRAINTS: dict[str, Any] = {
    "orthogonal": wellcond.Orthogonalize(),
    "z-score": wellcond.ZScore(),
    "clipping": wellcond.NormClipping(0.05),
}
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


def protecting(layer: str | None = None) -> wellcond.GradientProjection:
    """Protect what a layer, or the convolutional network, is given in two samples, the same on every rank."""
    if layer is None:
        model, x = convnet(), samples(7, 0, 1, 2, 6, 6)
    else:
        build, shape = LAYERS[layer]
        model, x = nn.Sequential(build()).double(), samples(7, 0, 1, *shape)
    return wellcond.GradientProjection(wellcond.second_moments(model, [x[:1]], synchronize=False), energy=0.9)


def moments_of_everything(rank: int, world: int, kind: Any) -> Result:
    """Take second moments, each rank of its own samples, in batches of unequal size."""
    batches = [x for step in range(3) if len(x := samples(step, rank, world, 2, 6, 6)) > 0]
    moments = wellcond.second_moments(Everything(), batches, kind=kind, rank=80)
    found = {f"{name} {key}": moments[name].tensors[key] for name in moments for key in moments[name].tensors}
    return {**found, **{f"{name} mean": moments.mean(name) for name in moments}, "samples": moments.samples}


def moments_of_a_sharded_model(rank: int, world: int) -> Result:
    model = sharded_everything(world, ("conv", "attention"))
    moments = wellcond.second_moments(model, [samples(step, rank, world, 2, 6, 6) for step in range(2)])
    return {name: moments.matrix(name) for name in moments}


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
        for layer in LAYERS:
            found[f"fsdp {name} {layer}"] = lambda rank, world, t=transform_type, li=layer: fsdp_training(
                rank, world, li, sgd, t(**SCHEDULE)
            )
    for name, constraint in CONSTRAINTS.items():
        for layer in LAYERS:
            found[f"fsdp {name} {layer}"] = lambda rank, world, t=constraint, li=layer: fsdp_training(
                rank, world, li, sgd, t
            )
    found["ddp accumulate"] = lambda rank, world: ddp_training(
        rank, world, wellcond.FeatureWhitening(**SCHEDULE), sgd, accumulate=True
    )
    found["ddp centralization"] = lambda rank, world: ddp_training(
        rank, world, wellcond.GradientCentralization(where="update"), adamw
    )
    for name in TRANSFORMS:
        for form in FORMS:
            for spread in (False, True) if (name, form) in SPREAD else (False,):
                found[f"ddp everything {name} {form}{' spread' if spread else ''}"] = (
                    lambda rank, world, n=name, f=form, s=spread: everything_under_ddp(
                        rank, world, transform_of(n, f), MAKERS[f], s
                    )
                )
            found[f"sharded everything {name} {form}"] = lambda rank, world, n=name, f=form: everything_under_fsdp(
                rank, world, transform_of(n, f), MAKERS[f], ("conv", "wide") if n == "descent" else ()
            )
    found["sharded everything, attention by itself"] = lambda rank, world: everything_under_fsdp(
        rank, world, transform_of("whitening", "dense"), sgd, ("attention",)
    )
    for form in ("dense", "kronecker", "low_rank"):
        found[f"everything in trouble {form}"] = lambda rank, world, f=form: everything_in_trouble(rank, world, f)
    for form in FORMS:
        found[f"checkpoint ddp {form}"] = lambda rank, world, f=form: checkpointed(rank, world, f, False)
        found[f"checkpoint fsdp {form}"] = lambda rank, world, f=form: checkpointed(rank, world, f, True)
    for form in ("kronecker", "momentum"):
        found[f"checkpoint fsdp whole {form}"] = lambda rank, world, f=form: checkpointed(rank, world, f, True, True)
    for layer in LAYERS:
        for make in (sgd, adamw):
            found[f"fsdp projection {layer} {make.__name__}"] = lambda rank, world, li=layer, m=make: fsdp_training(
                rank, world, li, m, protecting(li)
            )
    found["ddp projection"] = lambda rank, world: ddp_training(rank, world, protecting(), adamw)
    for kind in ("dense", "kronecker", "blocks", "sketch"):
        found[f"moments {kind}"] = lambda rank, world, k=kind: moments_of_everything(rank, world, k)
    found["moments under fsdp"] = moments_of_a_sharded_model
    found["ddp nothing seen at first"] = nothing_seen_at_first
    found["failing owner"] = failing_owner
    found["counted solves"] = counted_solves
    found["trouble"] = lambda rank, world: one_linear(rank, world, TROUBLE)
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


def runs_on_three_ranks(name: str) -> bool:
    """Say whether a check is repeated with three ranks: those of DDP, of every form at one power."""
    return name == "counted solves" or (name.startswith("ddp") and "everything descent" not in name)


if __name__ == "__main__":
    world_size = int(sys.argv[2])
    serve({name: check for name, check in checks().items() if world_size == 2 or runs_on_three_ranks(name)})
