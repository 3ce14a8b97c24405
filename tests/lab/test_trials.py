"""Grids: every method tries equally many trials, whatever it has to sweep."""

from __future__ import annotations

import pytest

from wellcond.lab.errors import LabError
from wellcond.lab.methods.method import METHODS, select_methods
from wellcond.lab.trials import make_trials, parse_sweep


def test_without_sweeps_trials_are_the_lr_grid():
    trials = make_trials(select_methods(["SGDM", "W-SGDM"]))
    assert {name: [trial.lr for trial in some] for name, some in trials.items()} == {
        "SGDM": [0.03, 0.1, 0.3],
        "W-SGDM": [0.03, 0.1, 0.3],
    }
    assert all(trial.method is METHODS[name] for name, some in trials.items() for trial in some)


@pytest.mark.parametrize(
    "sweeps",
    [
        ["damping=0.01,0.1"],
        ["weight_decay=0,1e-4,5e-4"],
        ["damping=0.01,0.1,1", "weight_decay=0,1e-3"],
        ["norm.num_groups=2,4", "rank=2,4,8"],
        ["batch_size=16,32", "damping=0.1,0.3"],
    ],
)
@pytest.mark.parametrize("search", ["grid", "random"])
def test_all_methods_try_equally_many(sweeps, search):
    methods = select_methods(["SGDM", "W-SGDM", "W-SGDM+GC", "GN", "AdamW", "FAdam"])
    trials = make_trials(methods, [parse_sweep(text) for text in sweeps], search)
    assert len({len(some) for some in trials.values()}) == 1
    for name, some in trials.items():
        assert len(set(some)) == len(some)
        lrs = [trial.lr for trial in some]
        grid = METHODS[name].lrs
        assert all(grid[0] <= lr <= grid[-1] for lr in lrs)
        if search == "grid":
            assert {grid[0], grid[-1]} <= set(lrs)


def test_a_swept_value_reaches_the_part_that_has_it():
    sweeps = [parse_sweep("damping=0.01,0.1"), parse_sweep("weight_decay=0.5"), parse_sweep("norm.num_groups=4")]
    trials = make_trials(select_methods(["W-SGDM", "GN"]), sweeps)
    for trial in trials["W-SGDM"]:
        swept = dict(trial.swept)
        assert dict(trial.method.transforms[0].options)["damping"] == swept["damping"]
        assert dict(trial.method.options)["weight_decay"] == 0.5
    for trial in trials["GN"]:
        assert trial.swept == (("weight_decay", 0.5), ("norm.num_groups", 4))
        assert trial.method.norm is not None
        assert dict(trial.method.norm.options)["num_groups"] == 4
    assert len({trial.lr for trial in trials["GN"]}) == 6


def test_random_trials_stay_between_the_ends_and_are_the_same_draws_for_all():
    sweeps = [parse_sweep("damping=0.001,1"), parse_sweep("batch_size=8,64")]
    trials = make_trials(select_methods(["W-SGDM", "FSGD", "SGDM"]), sweeps, "random", 7)
    whitened, descended, plain = trials.values()
    assert [trial.swept for trial in whitened] == [trial.swept for trial in descended]
    assert [trial.lr for trial in whitened] == [trial.lr for trial in plain]
    for trial in whitened:
        swept = dict(trial.swept)
        assert 0.001 <= swept["damping"] <= 1
        assert isinstance(swept["batch_size"], int)
        assert 8 <= swept["batch_size"] <= 64
    assert len({trial.swept for trial in whitened}) == 7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("damping", "--sweep must look like damping=0.01,0.1,1, got 'damping'"),
        ("damping=0.1,", "--sweep must look like damping=0.01,0.1,1, got 'damping=0.1,'"),
        ("lr=0.1", "--sweep is for other options; --lrs gives the grid of the lr"),
        ("damping=1,1", "--sweep damping=1,1: names a value twice"),
    ],
)
def test_mistakes_in_a_sweep(text, line):
    with pytest.raises(LabError) as told:
        parse_sweep(text)
    assert str(told.value) == line


def test_an_option_that_no_method_has_and_one_named_twice():
    methods = select_methods(["SGDM"])
    with pytest.raises(LabError, match="unknown option to sweep 'damping'"):
        make_trials(methods, [parse_sweep("damping=0.1,1")])
    with pytest.raises(LabError, match="names? each option once, got 'momentum' twice"):
        make_trials(methods, [parse_sweep("momentum=0.9"), parse_sweep("momentum=0.8")])


def test_values_are_python_literals_or_texts():
    assert parse_sweep("second-moment=dense,kronecker") == ("second_moment", ("dense", "kronecker"))
    assert parse_sweep("nesterov=true,false") == ("nesterov", (True, False))
