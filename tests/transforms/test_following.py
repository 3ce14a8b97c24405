"""A model that is cast or moved after attaching: the state follows each weight, statistics stay float32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond
from pairs import parametrize_pairs
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization

FORMS: dict[str, Any] = {
    "centralization": GradientCentralization(),
    "dense": FeatureWhitening(stats_every=1, solve_every=1, second_moment="dense", norm_layers=True),
    "kronecker": FeatureDescent(stats_every=1, solve_every=2, second_moment="kronecker", damping_mode="relative"),
    "sketched": FeatureWhitening(stats_every=1, solve_every=2, second_moment="kronecker", max_dim=64, rank=4),
    "averaged": FeatureWhitening(stats_every=2, solve_every=2, gradient_momentum=0.5),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 70, 3)
        self.norm = nn.LayerNorm(70)
        self.fc = nn.Linear(70, 66)
        self.out = nn.Linear(66, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.fc(self.norm(self.conv(self.embed(tokens).mT).mean(dim=2))).tanh())


def materialize(model: nn.Module) -> None:
    model.to_empty(device="cpu")
    initialize(model)


def initialize(model: nn.Module) -> None:
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(9, (6, 5), generator=torch.Generator("cpu").manual_seed(step), device="cpu")
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), tokens.sum(dim=1) % 3).backward()
        optimizer.step()


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "double": ("cpu", lambda m: m.double()),
    "bfloat16": ("cpu", lambda m: m.bfloat16()),
    "meta to cpu": ("meta", materialize),
    "twice": ("cpu", lambda m: m.bfloat16().double()),
    "one layer": ("cpu", lambda m: [m.fc.double(), m.fc.float()]),
}


def built(start: str, change: Callable[[nn.Module], Any] | None) -> nn.Module:
    with torch.device(start):
        model = Net()
    if start == "meta" and change is None:
        return model
    initialize(model) if start != "meta" else None
    if change is not None:
        change(model)
    return model


@parametrize_pairs(
    ("change", list(CHANGES)),
    ("swap", [True, False]),
    ("form", list(FORMS)),
)
def test_attaching_before_a_change_equals_attaching_after_it(change: str, form: str, swap: bool) -> None:
    start, act = CHANGES[change]
    if start == "meta" and not swap:
        pytest.skip("to_empty() then makes other parameters, which no optimizer that was made before trains")
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        trained = []
        for attach_first in (True, False):
            model = built(start, None if attach_first else act)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            handle = wellcond.attach(optimizer, model, FORMS[form])
            if attach_first:
                act(model)
            train(model, optimizer, range(5))
            trained.append((model, optimizer, handle))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    (ours, optimizer, handle), (theirs, other, its) = trained
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        for key, value in other.state[b].items():
            mine = optimizer.state[a][key]
            assert not isinstance(value, Tensor) or (mine.dtype, mine.device) == (value.dtype, value.device), key
            if isinstance(value, Tensor) and "wellcond" in key and value.is_floating_point():
                assert value.dtype.itemsize >= 4, key
    assert handle.report() == its.report()


def test_a_cast_between_steps_keeps_what_was_learnt() -> None:
    model = built("cpu", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    handle = wellcond.attach(optimizer, model, FORMS["dense"])
    train(model, optimizer, range(4))
    model.double()
    handle.report()
    train(model, optimizer, range(4, 6))
    entry = optimizer.state[model.fc.weight]
    assert entry["wellcond_whitening_second_moment"].dtype == torch.float64
    assert entry["wellcond_whitening_step"] == 6
    assert float(entry["wellcond_whitening_mass"]) == pytest.approx(1 - 0.95**6, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("within", ["attach", "training", "both"])
def test_a_default_device_says_nothing_of_where_a_weight_is(form: str, within: str) -> None:
    """Whatever were made on the default device, "meta" here, would be of no use to the weights, on the CPU."""
    trained = []
    for default in ("meta", "cpu"):
        model = built("cpu", None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        try:
            torch.set_default_device(default if within in ("attach", "both") else "cpu")
            handle = wellcond.attach(optimizer, model, FORMS[form])
            torch.set_default_device(default if within in ("training", "both") else "cpu")
            train(model, optimizer, range(4))
            handle.stats()
        finally:
            torch.set_default_device(None)
        trained.append(model)
    for a, b in zip(*(model.parameters() for model in trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_goes_to_the_gpu_after_attaching(form: str) -> None:
    model = built("cpu", None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wellcond.attach(optimizer, model, FORMS[form])
    model.cuda()
    for step in range(4):
        tokens = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(step)).cuda()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), tokens.sum(dim=1) % 3).backward()
        optimizer.step()
    for entry in optimizer.state.values():
        assert all(value.is_cuda for value in entry.values() if isinstance(value, Tensor))
