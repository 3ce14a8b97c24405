"""Which parameters the optimizer holds now: random surgery on groups and modules, against an attachment made afresh."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization
from wellcond.transforms import WellcondWarning

OBSERVING: dict[str, Any] = {"stats_every": 1, "solve_every": 1, "stats_decay": 0.0, "damping": 0.05}


def transforms() -> tuple[Any, ...]:
    """With stats_decay=0 nothing but the last batch matters: an attachment made now must do the same as an old one."""
    return GradientCentralization(), FeatureWhitening(**OBSERVING)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    model(x * torch.tensor([1.0, 5.0, 1.0, 0.2], dtype=torch.float64)).square().mean().backward()


class Surgery:
    """Operations that people do to a model and its optimizer between steps."""

    def __init__(self, model: nn.Sequential, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model, self.optimizer, self.random = model, optimizer, random.Random(seed)
        self.out: list[nn.Parameter] = []

    def layer(self) -> nn.Linear:
        return self.model[self.random.choice((0, 2, 4))]

    def remove_a_parameter(self) -> None:
        group = self.random.choice(self.optimizer.param_groups)
        if sum(len(g["params"]) for g in self.optimizer.param_groups) > 2 and group["params"]:
            parameter = group["params"].pop(self.random.randrange(len(group["params"])))
            self.optimizer.state.pop(parameter, None)
            self.out.append(parameter)

    def add_what_was_removed(self) -> None:
        if self.out:
            self.optimizer.add_param_group({"params": [self.out.pop()], "lr": 0.05})

    def remove_a_group(self) -> None:
        if len(self.optimizer.param_groups) > 1 and self.optimizer.param_groups[0]["params"]:
            group = self.optimizer.param_groups.pop()
            self.out += group["params"]
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)

    def swap_a_weight_in_place(self) -> None:
        """As `fully_shard` and others do: another parameter at the same place in module and group."""
        layer = self.layer()
        old, new = layer.weight, nn.Parameter(torch.randn_like(layer.weight))
        for group in self.optimizer.param_groups:
            if any(parameter is old for parameter in group["params"]):
                group["params"][:] = [new if parameter is old else parameter for parameter in group["params"]]
                self.optimizer.state.pop(old, None)
                layer.weight = new

    def swap_a_weight_behind_the_optimizers_back(self) -> None:
        layer = self.layer()
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))

    def new_head(self) -> None:
        self.model[4] = nn.Linear(4, 3, dtype=torch.float64)
        self.optimizer.add_param_group({"params": list(self.model[4].parameters())})

    def freeze_or_unfreeze(self) -> None:
        layer = self.layer()
        layer.weight.requires_grad_(not layer.weight.requires_grad)

    def switch_a_group(self) -> None:
        group = self.random.choice(self.optimizer.param_groups)
        group["wellcond_whitening"] = not group.get("wellcond_whitening", True)

    def __call__(self) -> str:
        names = [name for name in vars(Surgery) if not name.startswith("_") and name != "layer"]
        name = self.random.choice(names)
        getattr(self, name)()
        return name


def twin(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Copy both, without what is attached; parameters that left the model have their copies, too."""
    memo: dict[int, Any] = {}
    other = copy.deepcopy(model, memo)
    groups = [{**g, "params": [copy.deepcopy(p, memo) for p in g["params"]]} for g in optimizer.param_groups]
    return other, torch.optim.SGD([g for g in groups if g["params"]], lr=0.1)


@pytest.mark.parametrize("seed", range(25))
def test_after_any_surgery_an_old_attachment_does_and_says_what_a_new_one_would(seed: int) -> None:
    model = net(seed)
    optimizer = torch.optim.SGD(
        [{"params": list(model[0].parameters())}, {"params": [*model[2].parameters(), *model[4].parameters()]}], lr=0.1
    )
    handle = wellcond.attach(optimizer, model, *transforms())
    surgery = Surgery(model, optimizer, seed)
    done = []
    for step in range(8):
        done.append(surgery())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in model.parameters()):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WellcondWarning)
            backward(model, 2 * step)
            optimizer.step()
            other, theirs = twin(model, optimizer)
            fresh = wellcond.attach(theirs, other, *transforms())
            for each, its in ((model, optimizer), (other, theirs)):
                backward(each, 2 * step + 1)
                its.step()
        for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{done} {name}: {m}")
        assert handle.coverage() == fresh.coverage(), done
        assert handle.stats() == fresh.stats(), done
        optimizer.state_dict()
        for parameter, entry in optimizer.state.items():
            assert id(parameter) in held or not entry, done
            assert parameter.requires_grad or not any("wellcond" in key for key in entry), done


@pytest.mark.parametrize("transform", [FeatureWhitening, FeatureDescent])
@pytest.mark.parametrize("later", [False, True])
def test_a_bias_in_a_group_that_is_switched_off_stays_as_it_is_and_out_of_its_weights_product(
    transform: Any, later: bool
) -> None:
    """As with a second optimizer that holds the biases, to which nothing is attached; also when switched off later."""
    model, other = net(), net()
    weights, biases = ([p for p in model.parameters() if p.dim() == dims] for dims in (2, 1))
    optimizer = torch.optim.SGD([{"params": weights}, {"params": biases}], lr=0.05)
    switch = f"wellcond_{transform.name}"
    optimizer.param_groups[1][switch] = later
    handle = wellcond.attach(optimizer, model, transform(**OBSERVING))
    if later:
        backward(model, 0)
        optimizer.step()
        other.load_state_dict(model.state_dict())
        assert "together with 0.weight" in handle.report()
        optimizer.param_groups[1][switch] = False
        backward(model, 1)
        optimizer.step()  # whose forward pass was of other statistics
        other.load_state_dict(model.state_dict())
    apart = torch.optim.SGD([p for p in other.parameters() if p.dim() == 1], lr=0.05)
    plain = torch.optim.SGD([p for p in other.parameters() if p.dim() == 2], lr=0.05)
    wellcond.attach(plain, other, transform(**OBSERVING))
    for step in range(2, 5):
        backward(model, step)
        backward(other, step)
        for each in (optimizer, plain, apart):
            each.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert "together with" not in handle.report()
    assert handle.report().count("unchanged: a bias") == 3


def test_a_weight_that_left_is_let_go_with_its_hooks_and_trained_by_another_as_it_is() -> None:
    model = net()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    wellcond.attach(optimizer, model, *transforms())
    backward(model, 0)
    optimizer.step()
    group = optimizer.param_groups.pop()
    for parameter in group["params"]:
        optimizer.state.pop(parameter)
    other = torch.optim.SGD(group["params"], lr=0.1)
    backward(model, 1)
    before = model[2].weight.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(model[2].weight.grad, before)
    assert set(optimizer.state) == set(model[0].parameters())
    assert len(model[0]._forward_hooks) == 1
    assert not model[2]._forward_hooks
    optimizer.load_state_dict(optimizer.state_dict())


def test_a_state_that_is_loaded_after_surgery_goes_to_the_parameters_that_are_held_now() -> None:
    model = net()
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2], model[4])]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    handle = wellcond.attach(optimizer, model, *transforms())
    for step in range(2):
        backward(model, step)
        optimizer.step()
    del optimizer.param_groups[0], optimizer.param_groups[0]
    for layer in (model[0], model[2]):
        for parameter in layer.parameters():
            optimizer.state.pop(parameter)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert handle.stats()["whitening"]["weights"] == 1
    backward(model, 2)
    optimizer.step()
    assert optimizer.state[model[4].weight]["wellcond_whitening_step"] == 3


def test_a_lazy_layer_that_wakes_after_a_group_left() -> None:
    """Its first forward pass looks at the groups as they are then."""
    model = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3)).double()
    optimizer = torch.optim.SGD([{"params": model[1].parameters()}, {"params": model[0].parameters()}], lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))
    del optimizer.param_groups[1]
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert handle.stats()["whitening"]["weights"] == 1
    assert optimizer.state[model[1].weight]["wellcond_whitening_step"] == 1


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("change", ["prune", "parametrize", "weight_norm"])
def test_reports_follow_pruning_and_parametrizations(change: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))
    backward(model, 0)
    optimizer.step()
    if change == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif change == "parametrize":
        parametrize.register_parametrization(model[0], "weight", Double())
    else:
        parametrizations.weight_norm(model[0])
    backward(model, 1)
    raw = [p.grad.clone() for p in model[0].parameters()]
    optimizer.step()
    if change != "parametrize":
        assert all(torch.equal(a, p.grad) for a, p in zip(raw, model[0].parameters(), strict=True))
    fresh = wellcond.attach(torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.1), model, FeatureWhitening())
    assert handle.coverage() == fresh.coverage()
    assert handle.stats()["whitening"]["weights"] == (3 if change == "parametrize" else 2)


def test_a_frozen_weight_holds_nothing_until_it_is_unfrozen() -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))

    def row() -> Any:
        return handle.coverage()["whitening"][0]

    assert row().how == "unchanged: frozen (requires_grad=False)"
    assert row().state_bytes is None
    for step in range(6):
        if step == 2:
            model[0].requires_grad_(True)
        if step == 4:
            model[0].requires_grad_(False)
        backward(model, step)
        optimizer.step()
        trained = step in (2, 3)
        kept = any("wellcond" in key for key in optimizer.state.get(model[0].weight, {}))
        assert kept == trained
        assert row().how.startswith("preconditioned") == trained
        assert handle.stats()["whitening"]["weights"] == 2 + trained


def test_a_weight_that_is_frozen_for_a_moment_keeps_its_statistics() -> None:
    """Some freeze all but what another optimizer trains now; the gradient is there, and the step uses it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, FeatureWhitening(**OBSERVING))
    backward(model, 0)
    model.requires_grad_(False)
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert not torch.equal(raw, model[0].weight.grad)
    assert handle.stats()["whitening"]["weights"] == 3


def test_a_model_of_which_the_optimizer_holds_nothing_any_more_trains_on() -> None:
    """As after `torch.__future__.set_overwrite_module_params_on_conversion`: torch's own optimizers say nothing."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = wellcond.attach(optimizer, model, *transforms())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    model(torch.randn(3, 4)).sum().backward()
    with pytest.warns(WellcondWarning, match="holds none of the model's parameters any more"):
        optimizer.step()
    optimizer.step()
    assert {row.how for row in handle.coverage()["whitening"]} == {"not held by this optimizer"}


def test_a_step_searches_no_model_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wellcond.attach(optimizer, model, *transforms())
    searched = []
    monkeypatch.setattr(sys.modules[wellcond.Attachment.__module__], "find_layers", searched.append)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert not searched


class TestSwitches:
    @pytest.mark.parametrize("key", ["wellcond_whiting", "wellcond_", "wellcond_Whitening", "wellcond_attachments"])
    def test_a_key_that_is_no_transforms_is_refused(self, key: str) -> None:
        model = net()
        optimizer = torch.optim.SGD([{"params": model.parameters(), key: False}], lr=0.1)
        with pytest.raises(ValueError, match=rf"parameter group 0 has '{key}'; a transform is switched by .*whitening"):
            wellcond.attach(optimizer, model, *transforms())

    @pytest.mark.parametrize("value", ["no", 0, None])
    def test_a_value_that_is_no_boolean_is_refused(self, value: Any) -> None:
        model = net()
        optimizer = torch.optim.SGD([{"params": model.parameters(), "wellcond_whitening": value}], lr=0.1)
        with pytest.raises(ValueError, match="wellcond_whitening of parameter group 0 must be True or False"):
            wellcond.attach(optimizer, model, *transforms())

    def test_of_a_group_that_comes_later_it_is_said(self) -> None:
        model = net()
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        wellcond.attach(optimizer, model, *transforms())
        optimizer.add_param_group({"params": model[2].parameters(), "wellcond_whiting": False})
        backward(model, 0)
        with pytest.warns(WellcondWarning, match="did you mean 'wellcond_whitening'"):
            optimizer.step()

    @pytest.mark.parametrize("value", ["yes", 1, None, [0, 1]])
    def test_synchronize(self, value: Any) -> None:
        model = net()
        with pytest.raises(TypeError, match="synchronize must be True, False or a torch.distributed.ProcessGroup"):
            wellcond.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, *transforms(), synchronize=value)
