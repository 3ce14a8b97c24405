"""Optimizers: torch's, pytorch_optimizer's, timm's, and those that use torch's hooks in their own way."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytorch_optimizer
import torch
from by_hand import assert_equal, batch, check_training, closure_step, loss_of, net, plain_step, whitening
from cells import attach, cell, reason_of
from torch import Tensor, nn

import wellcond

TORCH = "Optimizers of torch"
OTHERS = "Other optimizers"
SAME = (
    "weights after 3 steps, under FeatureWhitening and under GradientCentralization, against the plain optimizer on "
    "gradients changed by hand"
)


def of(optimizer_type: Any, **options: Any) -> Callable[[nn.Module], Any]:
    """Return what makes an optimizer of all parameters of a model."""
    return lambda model: optimizer_type(model.parameters(), **options)


for name, options in {
    "ASGD": {"lr": 1e-2},
    "Adadelta": {},
    "Adafactor": {"lr": 1e-2},
    "Adagrad": {"lr": 1e-2},
    "Adam": {"lr": 1e-2},
    "AdamW": {"lr": 1e-2},
    "Adamax": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2},
    "RAdam": {"lr": 1e-2},
    "RMSprop": {"lr": 1e-2},
    "Rprop": {"lr": 1e-2},
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "SGD(fused=True)": {"lr": 0.05, "momentum": 0.9, "fused": True},
    "AdamW(fused=True)": {"lr": 1e-2, "fused": True},
    "AdamW(foreach=True)": {"lr": 1e-2, "foreach": True},
}.items():
    make = of(getattr(torch.optim, name.partition("(")[0]), **options)
    cell(TORCH, name, verified=SAME)(lambda make=make: check_training(make))

cell(TORCH, "Muon", verified=SAME)(lambda: check_training(of(torch.optim.Muon, lr=0.05), bias=False))
cell(TORCH, "LBFGS", verified=SAME + "; M is of the closure's first pass")(
    lambda: check_training(of(torch.optim.LBFGS, lr=0.1, max_iter=3), closure_step, tolerance=1e-6)
)


@cell(TORCH, "SparseAdam", "plain gradient", verified="weights after 3 steps against SparseAdam without transforms")
def sparse_adam() -> str:
    results, reason = [], ""
    for attached in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(7, 4, sparse=True, dtype=torch.float64)
        optimizer = torch.optim.SparseAdam(table.parameters())
        if attached:
            # Beside it there is something to do, else attaching warns that there is nothing.
            other = nn.Linear(4, 4, dtype=torch.float64)
            both = nn.ModuleDict({"table": table, "other": other})
            handle = attach(torch.optim.SGD(both.parameters(), lr=0.0), both, whitening())
            reason = reason_of(handle, "table.weight")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(table(torch.arange(step, step + 4))).backward()
            optimizer.step()
        results.append([table.weight.detach().clone()])
    assert_equal(*results, 0.0, "SparseAdam")
    return reason


# Not tried: they take a gradient's gradient, a model, a group or a step of their own kind, compute in float32 alone, or
# in a basis that is not unique (SOAP), or change a random part of the weights (SaRA).
OF_THEIR_OWN = frozenset(
    [
        "adahessian",
        "adalomo",
        "lomo",
        "sophiah",
        "muonclip",
        "alig",
        "bsam",
        "distributedmuon",
        "demo",
        "adago",
        "adamuon",
        "normuon",
        "adammini",
        "fadam",
        "lorarite",
        "soap",
        "sara",
    ]
)
NEEDS: dict[str, dict[str, Any]] = {"ranger21": {"num_iterations": 100}}


def step_inside(model: nn.Module, optimizer: Any, step: int, change: Callable[[], None]) -> None:
    """Do one step of a wrapper that looks at gradients before its inner optimizer steps, where a transform acts."""
    optimizer.zero_grad()
    loss_of(model(batch(step))).backward()
    hook = optimizer.optimizer.register_step_pre_hook(lambda *_: change())
    optimizer.step()
    hook.remove()


# The first steps of some change nothing; others centralize gradients themselves.
TRIED: dict[str, dict[str, Any]] = {
    "adashift": {"steps": 12},
    "schedulefreeradam": {"steps": 8},
    "magma": {"step": step_inside},
    "ranger": {"techniques": ("whitening",)},
    "rose": {"techniques": ("whitening",)},
}


def check_other(name: str) -> None:
    """Compare an optimizer of pytorch_optimizer as the others; its own randomness is seeded."""
    optimizer_type = pytorch_optimizer.load_optimizer(name)

    def make(model: nn.Module) -> Any:
        return optimizer_type(model.parameters(), **NEEDS.get(name, {}))

    check_training(make, bias=False, **{"tolerance": 1e-5} | TRIED.get(name, {}))


for each in sorted(pytorch_optimizer.get_supported_optimizers()):
    if each not in OF_THEIR_OWN and not hasattr(torch.optim, pytorch_optimizer.load_optimizer(each).__name__):
        title = f"pytorch_optimizer {pytorch_optimizer.load_optimizer(each).__name__}"
        inner = "; the gradients are those of the optimizer inside it" if each == "magma" else ""
        cell(OTHERS, title, verified=SAME + inner)(lambda each=each: check_other(each))


class Twice(torch.optim.SGD):
    """Calls its base class's step inside its own: torch runs the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


cell(OTHERS, "a subclass whose step calls super().step()", verified=SAME)(lambda: check_training(of(Twice, lr=0.05)))


class WithoutHooks(torch.optim.SGD):
    """Loads a state dict in its own way, as bitsandbytes' optimizers do: torch's hooks do not run."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = list(itertools.chain.from_iterable(group["params"] for group in self.param_groups))
        for index, values in state_dict["state"].items():
            self.state[parameters[index]] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()
            }


@cell(
    OTHERS,
    "a load_state_dict of its own (as bitsandbytes')",
    verified="weights after a resumed run against one that was not stopped",
)
def own_load_state_dict() -> None:
    def parts(state: Any = None) -> tuple[nn.Module, Any]:
        model = net()
        optimizer = WithoutHooks(model.parameters(), lr=0.05, momentum=0.9)
        attach(optimizer, model, whitening(stats_every=2, solve_every=2, stats_decay=0.5))
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        return model, optimizer

    model, optimizer = parts()
    for step in range(3):
        plain_step(model, optimizer, step, lambda: None)
    other, other_optimizer = parts(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    for step in range(3, 6):
        plain_step(model, optimizer, step, lambda: None)
        plain_step(other, other_optimizer, step, lambda: None)
    assert_equal(other.parameters(), model.parameters(), 1e-12, "resumed")


def sam_step(model: nn.Module, optimizer: Any, step: int, change: Callable[[], None]) -> None:
    """Do both halves of a step of a sharpness-aware optimizer; the second gradient is the one that is used."""
    model.zero_grad()
    loss_of(model(batch(step))).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model(batch(step))).backward()
    change()
    optimizer.second_step(zero_grad=True)


cell(
    OTHERS,
    "SAM (first_step, second_step)",
    verified="weights after 3 steps, under GradientCentralization, against SAM on gradients changed by hand",
)(
    lambda: check_training(
        of(pytorch_optimizer.SAM, base_optimizer=torch.optim.SGD, lr=0.05), sam_step, techniques=("centralization",)
    )
)


def row_means(make: Callable[[nn.Module], Any]) -> None:
    """Under weight decay alone, GC with decay inside leaves the mean of each row where it is."""
    layer = nn.Linear(16, 8, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.add_(0.5)
    optimizer = make(layer)
    attach(optimizer, layer, wellcond.GradientCentralization())
    before = layer.weight.detach().mean(1)
    for _ in range(30):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    off = float((layer.weight.detach().mean(1) / before - 1).abs().max())
    assert off < 1e-6, f"row means are off by a factor of {1 + off:.6g} after 30 steps"


KEPT = "row means after 30 steps of weight decay alone, with GradientCentralization(decay='inside')"
for title, make in (
    ("weight decay of torch's AdamW", of(torch.optim.AdamW, lr=0.01, weight_decay=0.1)),
    *(
        (
            f"weight decay of pytorch_optimizer {name}",
            of(getattr(pytorch_optimizer, name), weight_decay=0.01, weight_decouple=True),
        )
        for name in ("Prodigy", "DAdaptAdam", "AdamP", "SPlus", "ScheduleFreeAdamW")
    ),
):
    # Schedule-free optimizers decay a second copy of the weights, by a share of their own.
    outcome = "refused" if "ScheduleFree" in title else "works"
    cell(OTHERS, title, outcome, verified=KEPT)(lambda make=make: row_means(make))
