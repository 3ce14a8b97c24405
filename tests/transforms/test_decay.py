"""Centralization over optimizers whose weight decay is their own: what the step did is measured, not predicted."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond
from wellcond import GradientCentralization

STRENGTH = 0.05
# Some of those that say of which kind their decay is, and are not torch's.
MEASURED = {"Prodigy", "DAdaptAdam", "SPlus", "Lion", "AdamP", "AdaBelief"}


def layer() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        made.weight.add_(0.5)
    return made


@cache
def classes() -> dict[str, type[Optimizer]]:
    return {
        name: kind
        for name, kind in vars(pytorch_optimizer).items()
        if inspect.isclass(kind)
        and issubclass(kind, Optimizer)
        and kind.__module__.startswith("pytorch_optimizer.")
        and "weight_decay" in inspect.signature(kind).parameters
        and next(iter(inspect.signature(kind).parameters), "") == "params"
    }


def make(kind: type[Optimizer], made: nn.Module, decouple: bool) -> Optimizer | None:
    """Construct an optimizer with weight decay, or return None if it wants what a test cannot guess."""
    parameters = inspect.signature(kind).parameters
    if decouple and "weight_decouple" not in parameters:
        return None
    options: dict[str, Any] = {"weight_decay": STRENGTH}
    if "weight_decouple" in parameters:
        options["weight_decouple"] = decouple
    try:
        optimizer = kind(made.parameters(), **options)
    except Exception:  # its own demands: num_iterations, a model, a process group, …
        return None
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return optimizer


def run(kind: type[Optimizer], decouple: bool, transform: Any, gradients: str, steps: int) -> Tensor | str:
    """Train on given gradients; return the weight, or why this optimizer cannot be trained so."""
    made = layer()
    optimizer = make(kind, made, decouple)
    if optimizer is None:
        return "not constructed"
    if transform is not None:
        try:
            wellcond.attach(optimizer, made, transform)
        except (TypeError, ValueError) as error:
            return f"refused: {error}"
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(made.weight.shape, generator=generator)
        made.weight.grad = torch.zeros_like(made.weight) if gradients == "zero" else noise
        try:
            optimizer.step()
        except Exception as error:
            if transform is None:
                return f"cannot: {error}"
            raise
    return made.weight.detach().clone()


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("name", classes())
def test_row_means_stay_under_decay_whatever_the_optimizer_does_with_it(name: str, decouple: bool) -> None:
    """With gradients of zero decay alone acts; with random ones nothing may run away from the plain optimizer."""
    kind = classes()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        plain = run(kind, decouple, None, "zero", 20)
        if isinstance(plain, str) or not bool(torch.isfinite(plain).all()):
            pytest.skip(str(plain))
        torch.manual_seed(1)
        ours = run(kind, decouple, GradientCentralization(), "zero", 20)
        if isinstance(ours, str):
            assert "changes weights in" in ours or "must know how the optimizer applies weight decay" in ours
            return
        before, after = layer().weight.mean(dim=1), ours.mean(dim=1)
        assert bool((after.abs() <= before.abs() * (1 + 1e-3) + 1e-4).all())
        if name in MEASURED:
            torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        plain, ours = (run(kind, decouple, t, "random", 20) for t in (None, GradientCentralization()))
        assert isinstance(plain, Tensor)
        assert isinstance(ours, Tensor)
        start = layer().weight.norm()
        assert float(ours.norm()) <= 2 * max(float(plain.norm()), float(start))


def test_the_sweep_is_over_many_optimizers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [name for name, kind in classes().items() if make(kind, layer(), False) is not None]
    assert len(made) > 60
    assert MEASURED | {"ScheduleFreeAdamW"} <= set(made)


class Adapting(Optimizer):
    """In the manner of Prodigy: steps and decay are scaled by an estimate d."""

    def __init__(self, params: Any, d: float = 1e-3, **defaults: Any) -> None:
        super().__init__(params, {"lr": 1.0, "weight_decay": 0.01, "d": d, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["d"] * group["lr"] * group["weight_decay"]).sub_(group["d"] * group["lr"] * p.grad)


@pytest.mark.parametrize("d", [1e-6, 1.0, 20.0])
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({}, "decoupled"),
        ({"weight_decouple": True}, "auto"),
        ({"weight_decouple": True}, "decoupled"),
        ({"decoupled_weight_decay": True}, "auto"),
    ],
)
def test_sgd_with_any_decay_equals_the_projection_of_gradient_and_decay(
    key: dict[str, bool], said: Any, d: float
) -> None:
    """w ← w − d·lr·P(g + λw), from the formula, whatever is said of decay."""
    made = layer().double()
    expected = made.weight.detach().clone()
    wellcond.attach(
        optimizer := Adapting(made.parameters(), d, **key), made, GradientCentralization(), weight_decay=said
    )
    for step in range(10):
        g = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step)) + 1
        made.weight.grad = g.clone()
        optimizer.step()
        whole = g + 0.01 * expected
        expected = expected - d * (whole - whole.mean(dim=1, keepdim=True))
    torch.testing.assert_close(made.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_schedule_free_keeps_the_row_means_of_its_averages_too() -> None:
    """eval() mixes the weight with z, which decays as well."""
    made = layer()
    optimizer = pytorch_optimizer.ScheduleFreeAdamW(made.parameters(), lr=0.1, weight_decay=0.1)
    wellcond.attach(optimizer, made, GradientCentralization(), weight_decay="decoupled")
    start = made.weight.mean(dim=1).clone()
    for step in range(30):
        optimizer.train()
        made.weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        optimizer.eval()
        torch.testing.assert_close(made.weight.mean(dim=1), start, rtol=1e-4, atol=1e-5)


def test_centred_updates_with_decay_outside_need_an_optimizer_whose_decay_is_known() -> None:
    made = layer()
    transform = GradientCentralization(where="update", decay="outside")
    with pytest.raises(ValueError, match="must know how the optimizer applies weight decay"):
        wellcond.attach(Adapting(made.parameters(), weight_decouple=True), made, transform)
    wellcond.attach(Adapting(made.parameters()), made, transform, weight_decay="decoupled")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, type("Mine", (torch.optim.AdamW,), {})])
def test_torchs_own_decay_is_given_back_as_it_is_known_to_be(kind: Any) -> None:
    """The update itself stays uncentred: Adam's denominator moves row means, and where='gradient' lets it."""
    made, plain = layer(), layer()
    optimizer, other = (kind(m.parameters(), lr=0.1, weight_decay=w) for m, w in ((made, 0.3), (plain, 0.0)))
    for m, o in ((made, optimizer), (plain, other)):
        wellcond.attach(o, m, GradientCentralization())
        for step in range(5):
            m.weight.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).exp()
            o.step()
    torch.testing.assert_close(made.weight.mean(dim=1), plain.weight.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain.weight.mean(dim=1), layer().weight.mean(dim=1), atol=1e-3)
