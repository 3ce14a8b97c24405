"""Methods under labels of their own: what differs differs, everything else stays, and mistakes are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS, Refresh
from wellcond.lab.methods.overrides import MethodOverride
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings


def test_an_override_without_changes_is_the_method_under_its_label():
    assert MethodOverride("mine", "W-SGDM").apply() == replace(METHODS["W-SGDM"], name="mine")


def test_options_reach_the_optimizer_and_the_transforms():
    override = MethodOverride(
        "mine",
        "W-SGDM+GC",
        lrs=(0.2,),
        options=(("weight_decay", 0.25),),
        transform=(("damping", 0.5), ("stats_every", 3), ("solve_every", 6)),
        baseline="theirs",
    )
    method = override.apply()
    assert (method.lrs, method.baseline, method.name) == ((0.2,), "theirs", "mine")
    model = torch.nn.Linear(4, 3)
    optimizer, handle = method.build(model, 0.2, Refresh(50, 500))
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    assert optimizer.param_groups[0]["momentum"] == 0.9  # the method's own
    whitening = handle.transforms[1]
    assert (whitening.damping, whitening.stats_every, whitening.solve_every) == (0.5, 3, 6)
    assert METHODS["W-SGDM+GC"].options == (("momentum", 0.9), ("weight_decay", 5e-4))


def test_norm_options_reach_the_layers():
    method = MethodOverride("GN4", "GN", norm=(("num_groups", 4),)).apply()
    model = method.with_layers(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8)))
    assert model[1].num_groups == 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (MethodOverride("a", "W-SDGM"), "unknown method 'W-SDGM': did you mean 'W-SGDM'? Known: "),
        (
            MethodOverride("a", "SGDM", options=(("momentun", 0.5),)),
            "method a: unknown optimizer option 'momentun': did you mean 'momentum'? Known: momentum, dampening, ",
        ),
        (
            MethodOverride("a", "Ranger", options=(("beta", 0.5),)),
            "method a: unknown optimizer option 'beta': did you mean 'betas'? Known: betas, alpha, k, ",
        ),
        (
            MethodOverride("a", "FSGD", transform=(("dampening", 0.5),)),
            "method a: unknown transform option 'dampening': did you mean 'damping'? Known: damping, ",
        ),
        (
            MethodOverride("a", "SGDM", transform=(("damping", 0.5),)),
            "method a: unknown transform option 'damping': Known: none",
        ),
        (
            MethodOverride("a", "SGDM", norm=(("momentum", 0.5),)),
            "method a: SGDM keeps batch normalization, so it takes no norm options",
        ),
        (
            MethodOverride("a", "SGDM", lrs=(0.1, -1.0)),
            "method a: learning rates must be positive and ascending, got (0.1, -1.0)",
        ),
    ],
)
def test_mistakes(override, said):
    with pytest.raises(LabError) as caught:
        override.apply()
    assert str(caught.value).startswith(said)


def test_a_plan_compares_labels():
    theirs = MethodOverride("plain", "SGDM", lrs=(0.1,))
    mine = MethodOverride("damped", "FSGD", lrs=(0.1,), transform=(("damping", 0.5),), baseline="plain")
    plan = make_plan(Settings(methods=("plain", "damped"), overrides=(theirs, mine), seeds=1))
    assert plan.baselines == {"plain": "plain", "damped": "plain"}
    keys = {spec.key() for spec in plan.specs()}
    other = make_plan(Settings(methods=("plain", "damped"), overrides=(theirs, replace(mine, transform=())), seeds=1))
    assert len(keys & {spec.key() for spec in other.specs()}) == 1  # the options are part of what a run is
    with pytest.raises(LabError, match="method damped: damping must be"):
        make_plan(Settings(methods=("damped",), overrides=(replace(mine, transform=(("damping", -1.0),)),)))
    unknown = MethodOverride("GN4", "GN", norm=(("groups", 4),))
    with pytest.raises(LabError, match=r"method GN4: .* takes the options 'num_groups', .*, got 'groups'"):
        make_plan(Settings(methods=("GN4",), overrides=(unknown,)))
