"""The named optimizers: a torch optimizer plus an attachment, nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.optim import FSGD, WSGDM, FAdam, WAdam

FAST: dict[str, Any] = {"stats_every": 2, "solve_every": 4}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> Tensor:
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(
    ("named", "base", "transform"),
    [
        (FSGD, torch.optim.SGD, FeatureDescent),
        (WSGDM, torch.optim.SGD, FeatureWhitening),
        (FAdam, torch.optim.AdamW, FeatureDescent),
        (WAdam, torch.optim.AdamW, FeatureWhitening),
    ],
)
class TestEveryNamedOptimizer:
    def test_is_its_base_plus_its_transform(self, named: Any, base: Any, transform: Any) -> None:
        model, reference = net(), net()
        optimizer = named(model, lr=0.05, weight_decay=0.01, **FAST)
        options = {"momentum": 0.9} if base is torch.optim.SGD else {}
        plain = base(reference.parameters(), lr=0.05, weight_decay=0.01, **options)
        wellcond.attach(plain, reference, transform(**FAST))
        assert isinstance(optimizer, base)
        assert torch.equal(train(model, optimizer), train(reference, plain))

    def test_takes_parameter_groups_and_a_scheduler(self, named: Any, base: Any, transform: Any) -> None:
        model = net()
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters()}]
        optimizer = named(model, lr=0.05, params=groups, **FAST)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
        train(model, optimizer)
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.005])

    def test_resumes_exactly(self, named: Any, base: Any, transform: Any) -> None:
        model, resumed = net(), net()
        optimizer, theirs = named(model, lr=0.05, **FAST), named(resumed, lr=0.05, **FAST)
        train(model, optimizer, steps=3)
        resumed.load_state_dict(model.state_dict())
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert torch.equal(train(model, optimizer), train(resumed, theirs))

    @pytest.mark.parametrize("form", ["auto", "dense", "kronecker", "low_rank"])
    def test_hands_the_transforms_options_on(self, named: Any, base: Any, transform: Any, form: str) -> None:
        options = {"second_moment": form, "max_dim": 64, "rank": 3, "norm_layers": True, "gradient_momentum": 0.5}
        optimizer = named(net(), lr=0.05, **FAST, **options)
        assert optimizer.attachment.transforms == (transform(**FAST, **options),)

    def test_takes_a_switch_per_parameter_group(self, named: Any, base: Any, transform: Any) -> None:
        model = net()
        off = {"params": model[2].parameters(), f"wellcond_{transform.name}": False}
        optimizer = named(model, lr=0.05, params=[{"params": model[0].parameters()}, off], **FAST)
        assert optimizer.attachment.stats()[transform.name]["weights"] == 1
        train(model, optimizer)
        assert not any(str(key).startswith("wellcond_") for key in optimizer.state[model[2].weight])

    def test_names_a_wrong_option(self, named: Any, base: Any, transform: Any) -> None:
        with pytest.raises(ValueError, match="stats_every must be a positive integer, got 0"):
            named(net(), lr=0.1, stats_every=0)
        with pytest.raises(TypeError, match=f"{named.__name__} has no option 'dampling': did you mean 'damping'"):
            named(net(), lr=0.1, dampling=0.1)
        with pytest.raises(TypeError, match="has no option 'quux'$"):
            named(net(), lr=0.1, quux=1)
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got generator: parameters .* params="):
            named(net().parameters(), lr=0.1)

    def test_is_not_copied_without_its_model(self, named: Any, base: Any, transform: Any) -> None:
        with pytest.raises(TypeError, match=r"save and load state_dict\(\)"):
            copy.deepcopy(named(net(), lr=0.1))


def test_options_of_torchs_optimizer_reach_it() -> None:
    assert FSGD(net(), lr=0.1, nesterov=True).param_groups[0]["nesterov"] is True
    assert WAdam(net(), lr=0.1, amsgrad=True).param_groups[0]["amsgrad"] is True


def written_out(base: str, model: nn.Sequential, steps: int, every: int, solve_every: int) -> Tensor:
    """Algorithms 5 and 6 (p = 1), and 8 (p = 1/2), on the two linear layers, in float64 and one step at a time.

    X Xᵀ is taken per row, the bias is a further input that is 1, and steps count from 0, so that the first matrix is
    that of the first batch. The base's own step is torch's.
    """
    layers = [model[0], model[2]]
    optimizer: torch.optim.Optimizer
    if base in ("FSGD", "WSGDM"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.01)
    moments = [torch.zeros(layer.in_features + 1, layer.in_features + 1, dtype=torch.float64) for layer in layers]
    matrices = list(moments)
    weight = 0.0
    for step in range(steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        hidden = model[0](x).relu()
        model[2](hidden).square().mean().backward()
        if step % every == 0:
            weight = 0.95 * weight + 0.05
        for place, (layer, rows) in enumerate(zip(layers, (x, hidden.detach()), strict=True)):
            rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            if step % every == 0:
                moments[place] = 0.95 * moments[place] + 0.05 * rows.T @ rows / len(rows)
            if step % solve_every == 0:
                values, vectors = torch.linalg.eigh(moments[place] / weight)
                powers = 1 / (values + 0.1) if base.startswith("F") else (values + 1e-3 * values.max()).rsqrt()
                matrices[place] = vectors @ torch.diag(powers) @ vectors.T
            assert layer.weight.grad is not None
            assert layer.bias.grad is not None
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            changed = gradient @ matrices[place]
            changed = changed * gradient.norm() / changed.norm()
            layer.weight.grad.copy_(changed[:, :-1])
            layer.bias.grad.copy_(changed[:, -1])
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("named", [FSGD, WSGDM, FAdam, WAdam])
def test_as_published_is_the_printed_algorithm(named: Any) -> None:
    """The intervals are given, so that 9 steps have them; they go before the published 50 and 500."""
    model, reference = net(), net()
    optimizer = named(model, lr=0.05, weight_decay=0.01, as_published=True, stats_every=2, solve_every=6)
    found = train(model, optimizer, steps=9)
    expected = written_out(named.__name__, reference, 9, 2, 6)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("named", [FSGD, WSGDM, FAdam, WAdam])
def test_as_published_has_the_sources_intervals_and_whole_second_moments(named: Any) -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8, 2000))
    published, ours = named(model, lr=0.1, as_published=True), named(copy.deepcopy(model), lr=0.1)
    (transform,) = published.attachment.transforms
    assert (transform.stats_every, transform.solve_every, transform.solve_warmup) == (50, 500, False)
    assert "dense 145 × 145" in str(published.attachment.report())
    assert "channels 17 ⊗ taps 9" in str(ours.attachment.report())
    with pytest.raises(TypeError, match="as_published must be True or False, got 1"):
        named(net(), lr=0.1, as_published=1)
