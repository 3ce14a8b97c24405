"""Methods as data: every one can be built, and each family tries equally many lrs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import wellcond.nn
from wellcond.lab.methods.method import DEFAULT_METHODS, METHODS, Refresh, baselines, select_methods, with_lrs
from wellcond.lab.methods.optimizers import take_step
from wellcond.lab.networks.registry import initial_model


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_builds_its_optimizer_with_its_options(name):
    method = METHODS[name]
    # IBN-a knows the blocks of torchvision's and timm's networks alone.
    network, *shape = (
        ("torchvision:resnet18", 3, 64, 64) if method.layers in ("ibn-a", "ibn-b") else ("convnet", 1, 8, 8)
    )
    model = method.with_layers(initial_model(network, shape[0], 10, seed=0))
    optimizer, handle = method.build(model, 0.02, Refresh(5, 25))
    assert type(optimizer).__name__ == method.optimizer
    group, *others = optimizer.param_groups
    if method.groups:  # come first; what they leave has the method's own options
        assert set(method.groups[0].options) <= group.items()
        group = others[-1]
    assert group["lr"] == 0.02
    for key, value in method.options:
        if key in group:
            assert group[key] == value
        else:  # Apollo's and Ranger's are the optimizer's own, Muon's of its second group
            found = {"adamw_lr": "lr", "adamw_wd": "weight_decay"}.get(key)
            assert (others[0][found] if found else getattr(optimizer, key)) == value
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert (handle is None) == (not method.transforms)
    images = torch.randn(4, *shape)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        take_step(optimizer, lambda: model(images).square().mean(), method.second_order)
    optimizer.zero_grad()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_every_method_tries_the_same_number_of_ascending_lrs():
    assert len({len(method.lrs) for method in METHODS.values()}) == 1
    for method in METHODS.values():
        assert list(method.lrs) == sorted(set(method.lrs))
        assert method.baseline is None or method.baseline in METHODS


def test_an_lr_grid_reaches_the_methods_over_its_optimizer_alone():
    methods = with_lrs(select_methods(["SGDM", "FSGD", "AdamW"]), {"SGD": (0.02, 0.06, 0.2)})
    assert [method.lrs for method in methods] == [(0.02, 0.06, 0.2), (0.02, 0.06, 0.2), METHODS["AdamW"].lrs]


def test_baselines_measure_against_themselves():
    assert baselines(select_methods(DEFAULT_METHODS)) == {
        name: "SGDM" if "SG" in name else "AdamW" for name in DEFAULT_METHODS
    }


def test_the_first_method_stands_in_for_a_baseline_that_is_not_compared():
    assert baselines(select_methods(["W-Adam", "SGDM", "FSGD"])) == {"W-Adam": "W-Adam", "SGDM": "SGDM", "FSGD": "SGDM"}


@pytest.mark.parametrize(
    ("steps", "intervals"), [(1, (1, 5)), (186, (5, 25)), (1999, (50, 250)), (2000, (50, 500)), (10**6, (50, 500))]
)
def test_intervals_follow_the_run_length(steps, intervals):
    refresh = Refresh.for_run_of(steps)
    assert (refresh.stats_every, refresh.solve_every) == intervals


def test_transforms_of_a_wrapped_optimizer_act_and_are_saved():
    """Lookahead is the optimizer that it wraps until it first looks back."""
    plain = METHODS["W-SGDM+GC"]
    whole = replace(plain, optimizer="Lookahead", options=(*plain.options, ("k", 100)))
    batches = torch.randn(4, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ends, saved = [], []
    for method in (whole, plain):
        model = initial_model("convnet", 1, 10, seed=0)
        optimizer, _ = method.build(model, 0.1, Refresh(1, 2))
        for batch in batches:
            optimizer.step(lambda batch=batch, model=model, optimizer=optimizer: _backward(model, batch, optimizer))
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
        saved.append(optimizer.state_dict())
    for mine, theirs in zip(*ends, strict=True):
        assert torch.equal(mine, theirs)
    kept = [key for state in saved[0]["base_optimizer"]["state"].values() for key in state]
    assert sorted(kept) == sorted(key for state in saved[1]["state"].values() for key in state)
    assert any(key.startswith("wellcond_") for key in kept)


def _backward(model, batch, optimizer):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    return loss


def test_muon_is_for_hidden_weights():
    model = initial_model("convnet", 1, 10, seed=0)
    optimizer, _ = METHODS["Muon"].build(model, 0.02, Refresh(1, 2))
    hidden, rest = optimizer.param_groups
    assert [parameter.ndim for parameter in hidden["params"]] == [4, 4, 4]
    assert any(parameter is model[-1].weight for parameter in rest["params"])
    assert (hidden["use_muon"], rest["use_muon"], hidden["lr"], rest["lr"]) == (True, False, 0.02, 0.01)


def test_network_deconvolution_takes_the_place_of_batch_normalization():
    model = METHODS["ND"].with_layers(initial_model("resnet8", 3, 10, seed=0))
    kinds = {type(module) for module in model.modules()}
    assert not kinds & {torch.nn.BatchNorm2d, torch.nn.Conv2d}
    layers = [module for module in model.modules() if isinstance(module, wellcond.nn.NetworkDeconvolution2d)]
    assert len(layers) == 9
    assert all(layer.bias is not None for layer in layers)


def test_weight_standardization_leaves_no_mean_in_any_convolution():
    model = METHODS["SGDM+WS"].with_layers(initial_model("resnet8", 3, 10, seed=0))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(weights) == 9
    assert all(weight.mean((1, 2, 3)).abs().max() < 1e-6 for weight in weights)
