"""Gradient projection: outputs for protected data stay, whatever the optimizer; growth, resume, reports, errors."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond
from wellcond import GradientProjection, SecondMoments, second_moments

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


class Net(nn.Module):
    """Layers of every kind with rows: convolutions, grouped and transposed, an embedding, recurrence, a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 6, 3, groups=2, padding=1)
        self.mix = nn.Bilinear(6, 6, 12)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():  # so that the outputs differ between inputs
            for layer in (self.conv, self.up, self.mix):
                layer.weight.mul_(5)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rnn(self.norm(self.embed(tokens)))[0].mT
        x = torch.tanh(self.up(torch.tanh(self.conv(x)))).mean(2)
        return self.head(torch.tanh(self.mix(x, x)))


def tokens(first: int, last: int, count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(first, last, (count, 3), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data), (data.sum(1) + step) % 4).backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outputs_for_protected_data_stay_exactly_as_they_were(name: str) -> None:
    """With momentum, weight decay and per-element scaling from before; the new task is learned meanwhile."""
    model, old, new = Net(), tokens(0, 5, count=2), tokens(8, 20)
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = wellcond.attach(optimizer, model, GradientProjection(energy=1.0))
    train(model, optimizer, old, 10)
    handle.protect(second_moments(model, [old]))
    before, of_new = model(old).detach(), model(new).detach()
    train(model, optimizer, new, 30)
    assert (model(old) - before).abs().max() < 1e-10
    assert (model(new) - of_new).abs().max() > 1e-3
    stats = handle.stats()["projection"]
    assert stats["weights"] == stats["protected"] == 8


def test_without_the_projection_of_updates_momentum_and_weight_decay_lead_into_the_span() -> None:
    model, old = Net(), tokens(0, 5, count=2)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    handle = wellcond.attach(optimizer, model, GradientProjection(energy=1.0, where="gradient"))
    train(model, optimizer, old, 5)
    handle.protect(second_moments(model, [old]))
    before = model(old).detach()
    train(model, optimizer, tokens(8, 20), 10)
    assert (model(old) - before).abs().max() > 1e-3

    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    wellcond.attach(optimizer, plain, GradientProjection(second_moments(plain, [old]), 1.0, "gradient"))
    before = plain(old).detach()
    train(plain, optimizer, tokens(8, 20), 10)
    assert (plain(old) - before).abs().max() < 1e-10


def test_it_grows_task_by_task_and_equals_protecting_all_at_once() -> None:
    model = Net()
    parts = [tokens(4 * i, 4 * i + 4, count=1, seed=i) for i in range(3)]
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    handle = wellcond.attach(optimizer, model, GradientProjection(energy=1.0))
    directions, outputs = [], []
    for part in parts:
        train(model, optimizer, part, 5)
        handle.protect(second_moments(model, [part]))
        directions.append(handle.stats()["projection"]["directions"])
        outputs.append(model(part).detach())
    assert directions == sorted(set(directions))
    for part, output in zip(parts, outputs, strict=True):
        assert (model(part) - output).abs().max() < 1e-10
    together = wellcond.GradientProjection(sum_of([second_moments(model, [part]) for part in parts]), energy=1.0)
    handle.remove()
    again = wellcond.attach(optimizer, model, together)
    assert again.stats()["projection"]["directions"] == directions[-1]


def sum_of(moments: list[SecondMoments]) -> SecondMoments:
    total = moments[0]
    for further in moments[1:]:
        total = total + further
    return total


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_directions_hold_the_energy_asked_for_and_no_more_than_they_need(energy: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(12, 3).double()
    x = torch.randn(200, 12).double() @ torch.diag(0.5 ** torch.arange(12.0)).double()
    moments = second_moments(model, [x])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, GradientProjection(moments, energy=energy))
    model(x).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    count = int(state["wellcond_projection_rank"])
    basis = state["wellcond_projection_directions"][0]
    held = (x @ basis).square().sum() / x.square().sum()
    assert held >= energy - 1e-12
    assert (x @ basis[:, : count - 1]).square().sum() / x.square().sum() < energy
    assert not basis[:, count:].any()
    torch.testing.assert_close(basis[:, :count].T @ basis[:, :count], torch.eye(count).double())


def test_a_run_stopped_between_two_tasks_resumes_exactly() -> None:
    def job() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = Net()
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        first = second_moments(Net(), [tokens(0, 4, count=1)])
        return model, optimizer, wellcond.attach(optimizer, model, GradientProjection(first, energy=0.9))

    model, optimizer, handle = job()
    train(model, optimizer, tokens(4, 8), 3)
    handle.protect(second_moments(model, [tokens(4, 8)]))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, tokens(8, 20), 5)

    resumed, theirs, other = job()
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved["model"])
    theirs.load_state_dict(saved["optimizer"])
    assert other.stats() == handle.stats()
    train(resumed, theirs, tokens(8, 20), 5)
    for ours, wanted in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_moments_of_every_kind_are_taken() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4, 6, 6).double()
    for kind in ("dense", "kronecker", "blocks", "sketch"):
        model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)).double()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        moments = second_moments(model, [x], kind=kind, rank=9)  # type: ignore[arg-type]
        handle = wellcond.attach(optimizer, model, GradientProjection(moments, energy=0.8))
        assert handle.stats()["projection"]["protected"] == 2


def test_the_report_says_what_is_done_with_each_parameter_and_what_it_costs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.norm, self.fc = nn.EmbeddingBag(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientProjection(layers=lambda name, module: name != "other"))
    lines = handle.report().splitlines()
    assert "not projected: a bag mixes its tokens" in lines[1]
    assert "held as soon as something is protected" in lines[2]
    assert lines[3].split(maxsplit=2)[2] == "together with norm.weight"
    assert "projected, update, 3 × 3" in lines[4]
    rows = {row.name: row for row in handle.coverage()["projection"]}
    assert rows["fc.weight"].state_bytes == 4 * 9 + 8
    assert "4 of 5 parameters" in lines[-1]


def test_half_precision_weights_and_frozen_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).bfloat16()
    x = torch.randn(2, 6).bfloat16()
    moments = second_moments(model, [x])
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, GradientProjection(moments, energy=1.0))
    before = model(x).detach()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 6).bfloat16()).square().sum().backward()
        optimizer.step()
    assert (model(x) - before).abs().max() < 0.05
    assert handle.stats()["projection"] == {"weights": 1, "protected": 1, "directions": 2}


def test_errors_name_what_is_wrong() -> None:
    model = nn.Linear(4, 2)
    moments = second_moments(model, [torch.randn(3, 4)])
    for energy in (0.0, -1.0, 1.5):
        with pytest.raises(ValueError, match=r"energy must be in \(0, 1\], got"):
            GradientProjection(moments, energy=energy)
    with pytest.raises(TypeError, match="moments must be SecondMoments or None, got dict"):
        GradientProjection({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="where must be one of"):
        GradientProjection(where="weights")  # type: ignore[arg-type]
    other = nn.Linear(5, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="moments of 'weight' are of 1 × 4 features, the layer has 1 × 5"):
        wellcond.attach(optimizer, other, GradientProjection(moments))
    handle = wellcond.attach(optimizer, other, wellcond.GradientCentralization())
    with pytest.raises(ValueError, match="protect needs GradientProjection, attached are centralization"):
        handle.protect(moments)


def test_a_wrapped_model_is_protected_by_moments_of_the_model_inside() -> None:
    model = nn.Linear(4, 2).double()
    moments = second_moments(model, [torch.randn(2, 4).double()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, nn.DataParallel(model), GradientProjection(moments, energy=1.0))
    assert handle.stats()["projection"]["directions"] == 2
