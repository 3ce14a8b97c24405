"""Methods as they are written: what is printed is read again, words mean what they say, and mistakes are placed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wellcond.lab.errors import LabError
from wellcond.lab.methods.clipping import Clipping
from wellcond.lab.methods.grammar import Times, split_list
from wellcond.lab.methods.layers import LAYERS
from wellcond.lab.methods.method import METHODS, Refresh, baselines, method, select_methods, with_lrs
from wellcond.lab.methods.norms import NormSpec
from wellcond.lab.methods.reading import read_method
from wellcond.lab.methods.spec import GroupSpec, Method, TransformSpec
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings

_LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)
_NAMES = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=20).filter(
    lambda name: bool(name.strip()) and name == name.strip() and name.isprintable()
)
_LRS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=4, unique=True).map(lambda lrs: tuple(sorted(lrs)))


def _options(*names: str, values: st.SearchStrategy = _LITERALS) -> st.SearchStrategy:
    return st.dictionaries(st.sampled_from(names), values, max_size=len(names)).map(
        lambda options: tuple(options.items())
    )


@st.composite
def _methods(draw):
    layers = draw(st.sampled_from([None, *LAYERS]))
    norm = draw(st.sampled_from([None, "gn", "bsr", "pn"])) if layers != "nd" else None
    schedule = (("target", "derived"),) if norm == "bsr" and draw(st.booleans()) else ()
    group = st.builds(
        GroupSpec,
        st.lists(st.sampled_from(["norms", "biases", "head", "layer4.*", "a b"]), min_size=1, max_size=2).map(tuple),
        _options("lr", "weight_decay", values=_LITERALS | st.floats(0, 9).map(Times)).filter(bool),
    )
    return Method(
        name=draw(_NAMES),
        description="",
        optimizer=draw(st.sampled_from(["SGD", "AdamW"])),
        options=draw(_options("weight_decay", "foreach")),
        lrs=draw(_LRS),
        baseline=draw(st.none() | _NAMES),
        transforms=tuple(
            TransformSpec(name, draw(_options(*options)))
            for name, options in (
                ("GradientCentralization", ["layers"]),
                ("FeatureWhitening", ["damping", "rank"]),
            )
            if draw(st.booleans())
        ),
        norm=None if norm is None else NormSpec(norm, draw(_options("eps")), schedule, norm == "pn"),
        layers=layers,
        layer_options=() if layers is None else draw(_options("eps")),
        groups=tuple(draw(st.lists(group, max_size=2))),
        schedule=draw(st.sampled_from([None, "constant", "step:5,0.1"])),
        create_graph=draw(st.booleans()),
        clipping=Clipping(*draw(st.tuples(*[st.none() | st.floats(1e-6, 1e6)] * 2))),
    )


@settings(max_examples=150, deadline=None)
@given(_methods())
def test_what_is_written_is_read_again(drawn):
    assert read_method(drawn.written(), METHODS) == drawn


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_of_the_list_is_read_again(name):
    again = read_method(METHODS[name].written(), METHODS)
    assert (again, again.description) == (METHODS[name], METHODS[name].description)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("SGDAdamWx=+()[]{},.:'\"0123 group norms lr norm layers"), max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text):
    try:
        said, lrs = "", read_method(text, METHODS, check=False).lrs
    except LabError as error:
        said, lrs = str(error), ()
    assert bool(said) != bool(lrs)
    assert "\n" not in said


def test_a_class_has_what_is_written_and_a_listed_method_what_the_list_says():
    assert method("AdamW()").options == ()
    assert method("AdamW").options == (("weight_decay", 0.05),)
    changed = method("mine = W-SGDM+GC(damping=0.5, weight_decay=0.25)")
    assert (changed.name, changed.lrs, changed.baseline) == ("mine", METHODS["SGDM"].lrs, "SGDM")
    assert changed.text() == (
        "SGD(momentum=0.9, weight_decay=0.25) + GradientCentralization + FeatureWhitening(damping=0.5)"
    )
    assert method("GN(num_groups=4)").norm == NormSpec("gn", (("num_groups", 4),))
    assert METHODS["W-SGDM+GC"].options == (("momentum", 0.9), ("weight_decay", 5e-4))


def test_intervals_of_its_own_go_before_the_runs():
    _, handle = method("SGD() + FeatureWhitening(stats_every=3)").build(torch.nn.Linear(4, 3), 0.1, Refresh(50, 500))
    (whitening,) = handle.transforms
    assert (whitening.stats_every, whitening.solve_every) == (3, 500)


def test_groups_multiply_what_the_method_has():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    written = "AdamW(weight_decay=0.5) + group(norms, biases, weight_decay=0) + group(head, lr=0.1x, weight_decay=2x)"
    optimizer, _ = method(written).build(model, 0.2, Refresh(1, 2))
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(0.2, 0, 4), (pytest.approx(0.02), 1.0, 1), (0.2, 0.5, 1)]


@pytest.mark.parametrize(
    ("text", "character", "said"),
    [
        (
            "mine = AdamW(weight_decy=0.05)",
            14,
            "unknown option of AdamW 'weight_decy': did you mean 'weight_decay'? Known",
        ),
        ("SGD() + GradientCentralisation", 9, "unknown transform 'GradientCentralisation': did you mean 'GradientCen"),
        ("AdamX()", 1, "unknown optimizer or method 'AdamX': did you mean 'Adam"),
        ("W-SGDM(dampng=1)", 8, "unknown option of W-SGDM 'dampng': did you mean 'damping'? Known: momentum, "),
        ("SGD() + norm=gnn", 14, "unknown norm 'gnn': did you mean 'gn'? Known: bn, "),
        ("SGD() + layers=w", 16, "unknown layers 'w': "),
        ("SGD() + nrm=gn", 9, "unknown setting 'nrm': did you mean 'norm'? Known: norm, layers, lrs, schedule, base"),
        ("SGD() + norm=gn + norm=gn", 24, "norm= is given twice"),
        ("a = SGD(momentum=.9", 20, "expected ',' or ')', got the end"),
        ("SGD(momentum=)", 14, "expected a value, got ')'"),
        ("SGD(momentum=high)", 14, "a value must be a number, a text in quotes, True, False, None or a list of these"),
        ("SGD(momentum=1, momentum=2)", 17, "momentum is given twice"),
        ("SGD(0.9)", 5, "expected OPTION=VALUE, got '0.9'"),
        ("SGD(lr=0.1)", 5, "learning rates are a part of their own: + lrs=[0.01, 0.1]"),
        ("SGD() + lrs=[0.1, -1]", 13, "learning rates must be positive numbers, got"),
        ("SGD() + lrs=[0.1, 0.1]", 13, "learning rates must differ, got"),
        ("SGD(weight_decay=0.1x)", 5, "only in a group(...) is a value a multiple, as 0.1x"),
        ("SGD() + group(norms)", 9, "a group has selectors and options: group(norms, biases, weight_decay=0)"),
        (
            "SGD() + group(norms, weight_dcay=0)",
            22,
            "unknown option of SGD 'weight_dcay': did you mean 'weight_decay'?",
        ),
        ("SGD() GradientCentralization", 7, "expected '+' and another part, or the end, got 'GradientCentralization'"),
        ("no_such_module:Lion", 1, "no_such_module:Lion: there is no module 'no_such_module' in"),
        ("torch.optim:Lion_", 1, "torch.optim:Lion_: torch.optim has no Lion_; its classes: "),
        ("collections:OrderedDict", 1, "collections:OrderedDict is no optimizer"),
        ("SGD() + torch.optim:SGD", 9, "torch.optim:SGD is no wellcond.GradientTransform"),
        ("norm=gn", 6, "a method begins with its optimizer, not with norm="),
        ("mine =", 7, "expected an optimizer, a transform or a setting, got the end"),
    ],
)
def test_mistakes_are_placed(text, character, said):
    with pytest.raises(LabError) as caught:
        method(text)
    assert str(caught.value).startswith(f"method {text!r}, character {character}: {said}")


def test_changes_of_a_recipe_are_checked():
    for part, pair, said in (
        ("options", ("momentun", 0.5), "unknown optimizer option 'momentun': did you mean 'momentum'?"),
        ("transform", ("dampening", 0.5), "unknown transform option 'dampening': did you mean 'damping'?"),
        (
            "norm",
            ("momentum", 0.5),
            "SGD(momentum=0.9, weight_decay=0.0005) + FeatureDescent keeps batch normalization",
        ),
    ):
        with pytest.raises(LabError) as caught:
            METHODS["FSGD"].changed(**{part: (pair,)})
        assert str(caught.value).startswith(said)


def test_ones_own_classes_come_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    source = (
        "import torch, wellcond\n"
        "class Slow(torch.optim.SGD):\n    pass\n"
        "class Halve(wellcond.GradientTransform):\n    name = 'halve'\n"
    )
    Path("own_methods_for_tests.py").write_text(source)
    found = method("own_methods_for_tests:Slow(momentum=0.5) + own_methods_for_tests:Halve")
    assert found.lrs == (0.000333, 0.001, 0.003)
    optimizer, _ = replace(found, transforms=()).build(torch.nn.Linear(2, 2), 0.1, Refresh(1, 1))
    assert type(optimizer).__name__ == "Slow"
    assert found.code  # runs of other code are not taken for its
    Path("own_methods_for_tests.py").write_text("# a comment\n" + source)
    assert method("own_methods_for_tests:Slow(momentum=0.5)").code == method("own_methods_for_tests:Slow").code
    Path("own_broken_for_tests.py").write_text("raise OSError('no\\nway')")
    with pytest.raises(
        LabError,
        match=r"own_broken_for_tests:Slow: importing it failed: OSError: no \(own_broken_for_tests.py, line 1\)",
    ):
        method("own_broken_for_tests:Slow")


def test_lists_are_parted_at_their_own_commas():
    texts = split_list("SGDM, mine = SGD(momentum=0.9, nesterov=True) + lrs=[0.1, 0.2],'a, b' = AdamW(), ")
    assert texts == ["SGDM", "mine = SGD(momentum=0.9, nesterov=True) + lrs=[0.1, 0.2]", "'a, b' = AdamW()"]


def test_two_methods_need_two_names_and_grids_one_length():
    with pytest.raises(LabError, match="--methods must name each method once, got 'SGDM' twice"):
        select_methods(["SGDM", "SGDM = AdamW()"])
    with pytest.raises(LabError, match="the same number of learning rates to try, got SGDM 3, mine 2"):
        with_lrs(select_methods(["SGDM", "mine = SGD() + lrs=[0.1, 0.2]"]), {})
    with pytest.raises(
        LabError, match=r"method mine: unknown baseline 'SGDN': did you mean 'SGDM'\? Known: SGDM, mine"
    ):
        baselines(select_methods(["SGDM", "mine = SGD() + baseline=SGDN"]))


def test_a_plan_compares_what_is_written():
    mine = "damped = FSGD(damping=0.5) + lrs=[0.1] + baseline=plain"
    plan = make_plan(Settings(methods=("plain = SGDM + lrs=[0.1]", mine), seeds=1))
    assert plan.baselines == {"plain": "plain", "damped": "plain"}
    keys = {spec.key() for spec in plan.specs()}
    other = make_plan(Settings(methods=("plain = SGDM + lrs=[0.1]", mine.replace("0.5", "0.4")), seeds=1))
    assert len(keys & {spec.key() for spec in other.specs()}) == 1  # the options are part of what a run is
    with pytest.raises(LabError, match="method damped: damping must be"):
        make_plan(Settings(methods=(mine.replace("0.5", "-1.0"),), seeds=1))
    with pytest.raises(LabError, match=r"method GN4: .* takes the options 'num_groups', .*, got 'groups'"):
        make_plan(Settings(methods=("GN4 = SGD() + norm=gn(groups=4)",)))
