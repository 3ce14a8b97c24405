"""Methods as data: every one can be built, and each family tries equally many lrs."""

from __future__ import annotations

import pytest
import torch

from wellcond.lab.methods import DEFAULT_METHODS, METHODS, Refresh, baselines, select_methods, with_lrs
from wellcond.lab.models import initial_model


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_builds_its_optimizer_with_its_options(name):
    method = METHODS[name]
    model = method.with_layers(initial_model("convnet", 1, 10, seed=0))
    optimizer, handle = method.build(model, 0.02, Refresh(5, 25))
    assert type(optimizer).__name__ == method.optimizer
    group, *others = optimizer.param_groups
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
    model(torch.randn(4, 1, 8, 8)).square().mean().backward(create_graph=method.second_order)
    optimizer.step()
    optimizer.zero_grad()


def test_every_method_tries_the_same_number_of_ascending_lrs():
    assert len({len(method.lrs) for method in METHODS.values()}) == 1
    for method in METHODS.values():
        assert list(method.lrs) == sorted(set(method.lrs))
        assert method.lrs == METHODS[method.baseline].lrs


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
