"""A reproduced table: the source's figures and ours in one count, runs that are kept, mistakes in one line."""

from __future__ import annotations

import json

import pytest

from wellcond.__main__ import main
from wellcond.lab.comparison.statistics import paired_difference

pytestmark = pytest.mark.usefixtures("quick_collections")

RECIPE = """\
title = "Plain and centralized"
source = "a paper, table 9.1"
names = ["9.1"]
score = "{score}"
baseline = "plain"

[settings]
data = "digits"
model = "convnet"
train_images = 128
validation_images = 64
test_images = 128
epochs = 2
seeds = 3

[[method]]
label = "plain"
method = "SGDM"
lrs = [0.05, 0.1]

[[method]]
label = "centralized"
method = "SGDM+GC"
lrs = [0.05, 0.1]
options = {{ weight_decay = 1e-3 }}

[[panel]]
name = "A"
paper = {{ plain = [20.0, 0.5], centralized = [18.5, 0.4] }}
metrics = {{ "top-5" = {{ plain = 90.0 }} }}

[[panel]]
name = "B"
settings = {{ batch_size = 64 }}

[scale.small]

[scale.smoke]
settings = {{ seeds = 1 }}
"""


def run(folder, score: str, *more: str) -> dict:
    file = folder / f"{score}.toml"
    file.write_text(RECIPE.format(score=score))
    out = str(folder / "out")
    assert main(["reproduce", str(file), "--out", out, "--quiet", *more]) == 0
    return json.loads((folder / "out" / "reproduce.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reproduce")


@pytest.fixture(scope="module")
def accuracy(folder):
    return run(folder, "accuracy")


def test_differences_are_paired_over_seeds(accuracy):
    for panel in accuracy["panels"]:
        plain, centralized = panel["methods"]
        expected = paired_difference(centralized["ends"], plain["ends"])
        found = centralized["difference"]
        assert (found["mean"], found["low"], found["high"], found["count"]) == pytest.approx(
            (expected.mean, expected.low, expected.high, 3), abs=1e-3
        )
        assert plain["difference"] is None
        assert centralized["equal_time"]["steps"] >= 1
        assert [point["lr"] for point in plain["lr_grid"]] == [0.05, 0.1]
        assert centralized["trained_with"] == "SGD(momentum=0.9, weight_decay=0.001) + GradientCentralization"


def test_the_sources_figures_stand_beside_ours(accuracy):
    first, second = accuracy["panels"]
    assert [method["paper"] for method in first["methods"]] == [[20.0, 0.5], [18.5, 0.4]]
    assert [method["paper_difference"] for method in first["methods"]] == [None, -1.5]
    assert [method["paper"] for method in second["methods"]] == [None, None]
    assert [method["verdict"] for method in second["methods"]] == ["", ""]
    assert first["methods"][0]["paper_metrics"] == {"top-5": 90.0}
    assert 0 <= first["methods"][0]["metrics"]["top-5"] <= 100
    assert (second["settings"]["batch_size"], first["settings"]["batch_size"]) == (64, 32)


def test_errors_are_the_same_runs_counted_from_the_other_end(folder, accuracy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    # The runs are kept: a table that counts errors trains nothing anew.
    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    errors = run(folder, "error")
    for panel, counted in zip(errors["panels"], accuracy["panels"], strict=True):
        for one, other in zip(panel["methods"], counted["methods"], strict=True):
            assert one["ends"] == pytest.approx([100 - end for end in other["ends"]])
            assert one["ours"]["std"] == pytest.approx(other["ours"]["std"], rel=1e-4)
        here, there = panel["methods"][1], counted["methods"][1]
        assert here["difference"]["mean"] == pytest.approx(-there["difference"]["mean"])
        assert here["difference"]["low"] == pytest.approx(-there["difference"]["high"])
    centralized = errors["panels"][0]["methods"][1]
    direction = "same" if centralized["difference"]["mean"] < 0 else "other"
    if centralized["difference"]["mean"] != 0:
        assert centralized["verdict"].startswith(f"{direction} direction, ")


def test_a_swept_option_is_chosen_with_the_lr(folder, monkeypatch):
    sweeps = "epochs = 1\nsweeps = {{ weight_decay = [0, 1e-2] }}"
    monkeypatch.setitem(globals(), "RECIPE", RECIPE.replace("epochs = 2", sweeps))
    swept = folder / "swept"
    swept.mkdir()
    (panel,) = run(swept, "accuracy", "--seeds", "1", "--panels", "A")["panels"]
    for method in panel["methods"]:
        assert [(point["lr"], point["weight_decay"]) for point in method["lr_grid"]] == [
            (0.05, 0),
            (0.1, 0),
            (0.05, 0.01),
            (0.1, 0.01),
        ]
        assert method["swept"]["weight_decay"] in (0, 0.01)
        assert f"weight_decay={method['swept']['weight_decay']}" in method["trained_with"]
    assert "weight_decay 0" in (swept / "out" / "reproduce.html").read_text()


def test_panels_methods_and_seeds_can_be_chosen(folder, accuracy):
    content = run(folder, "accuracy", "--panels", "B", "--methods", "centralized", "--seeds", "2")
    (panel,) = content["panels"]
    (method,) = panel["methods"]
    assert (panel["name"], panel["seeds"], method["label"], method["baseline"]) == (
        "B",
        2,
        "centralized",
        "centralized",
    )
    assert method["ends"] == accuracy["panels"][1]["methods"][1]["ends"][:2]


def test_few_seeds_choose_the_lr_and_equal_time_can_be_left_out(folder, accuracy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a run was started")

    # All runs are kept: those of the whole grid, of which these are some.
    monkeypatch.setattr("wellcond.lab.training.runner.Runner.run", refuse)
    for panel in run(folder, "accuracy", "--trial-seeds", "1", "--no-equal-time")["panels"]:
        assert panel["settings"]["seeds that choose"] == 1
        for method in panel["methods"]:
            scores = {point["lr"]: point["validation"] for point in method["lr_grid"]}
            assert scores[method["lr"]] == max(scores.values())
            assert method["equal_time"] is None
            assert len(method["ends"]) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["5.33"], "unknown table '5.33': did you mean '5.3'? Known: "),
        (["4.1", "--panels", "ResNet-19"], "unknown panel of 4.1 'ResNet-19': did you mean 'ResNet-18'? Known: "),
        (["4.1"], "--data cifar100=PATH must say where the data lie: "),
        (["4.1", "--scale", "smoke", "--seeds", "0"], "--seeds must be a positive integer, got 0"),
        (["4.1", "--scale", "tiny"], "argument --scale: invalid choice: 'tiny'"),
        (
            ["4.1", "--scale", "smoke", "--panels", "ResNet-18", "--data", "cifar10=/a"],
            None,
        ),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WELLCOND_DATA", raising=False)
    if line is None:  # a path that is not needed does no harm
        assert main(["reproduce", *arguments, "--quiet"]) == 0
        return
    assert main(["reproduce", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"wellcond: error: {line}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_they_are_listed_a_line_each(capsys):
    assert main(["list", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "6.3" and line.endswith("(thesis, table 6.3)") for line in lines)
