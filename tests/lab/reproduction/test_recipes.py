"""Every recipe that comes with the lab, end to end at its smoke scale, each method trained once."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from image_sets import write_aircraft, write_class_folders
from segmentation_files import WRITERS as SEGMENTATION
from stopped_runs import uncounted

from wellcond.__main__ import main
from wellcond.lab.reproduction.panels import ScaledPanel, needed_data, scaled_panels
from wellcond.lab.reproduction.recipe import bundled_recipes
from wellcond.lab.training.run_memory import RunMemory

pytestmark = pytest.mark.usefixtures("quick_collections")

RECIPES = {recipe.name: recipe for recipe in bundled_recipes()}


# Headlines of the sources, written down apart from the recipes: recipe, panel, baseline, method, their figures.
HEADLINES = [
    ("4.1", "ResNet-18", "w/o GC", "w/ GC", 76.87, 78.82),
    ("4.2", "ResNet-50", "SGDW w/o GC", "SGDW w/ GC", 74.02, 76.82),
    ("4.5", "ResNet-101 / GN", "GN w/o GC", "GN w/ GC", 23.34, 22.14),
    ("3.1", "CIFAR-100 / ResNet-50 / m = 2", "EMA", "BSR", 70.47, 75.88),
    ("3.1", "CIFAR-100 / ResNet-50 / m = 16", "EMA", "BSR", 79.02, 79.50),
    ("3.2", "m = 2", "EMA", "BSR", 65.70, 72.24),
    ("3.5", "m = 2", "EMA", "BSR", 34.2, 35.6),
    ("2.9", "m = 2", "BRN", "MBN", 55.47, 56.50),
    ("5.3", "CIFAR-100 / ResNet-18", "SGDM", "FSGD", 77.20, 79.10),
    ("5.4", "ResNet-50", "SGDM", "FSGD", 76.31, 77.06),
    ("6.3", "CIFAR-100 / ResNet-18", "AdamW", "W-Adam", 77.23, 78.75),
    ("6.5", "ResNet-50", "SGDM", "W-SGDM", 76.31, 77.48),
    ("6.10", "T_xx = 50 / T_svd = 500", "SGDM", "W-SGDM", 77.20, 79.28),
    ("slides", "32 / 4", "BN", "GN", 72.7, 75.8),
]


@pytest.mark.parametrize(("name", "panel", "baseline", "method", "before", "after"), HEADLINES)
def test_it_has_the_sources_figures(name, panel, baseline, method, before, after):
    (table,) = (table for table in RECIPES[name].panels if table.name == panel)
    assert (table.paper[baseline][0], table.paper[method][0]) == (before, after)


def make(name: str, root: Path) -> Path:
    """Write a tiny copy of a data set in its real format, and return what `--data` names."""
    if name == "aircraft":
        return write_aircraft(root, count=12)
    if name in ("coco", "market1501", "dukemtmc"):
        pytest.importorskip("wellcond.lab.tasks.detection.task", reason="the lab has no detection yet")
        from coco_files import write_coco
        from reid_files import write_reid

        return write_coco(root) if name == "coco" else write_reid(root, duke=name == "dukemtmc")
    if name in SEGMENTATION:
        return SEGMENTATION[name](root)
    assert name in ("imagenet", "mini-imagenet")
    return write_class_folders(root)


@pytest.fixture
def data(tmp_path):
    """The function that makes what a recipe needs, and returns what binds it."""

    def bind(names: list[str]) -> list[str]:
        made = {name: make(name, tmp_path / name) for name in names if name != "digits"}
        return [word for name, path in made.items() for word in ("--data", f"{name}={path}")]

    return bind


@pytest.fixture
def _each_method_trains_once(monkeypatch):
    """Leave out what depends on no recipe: the choice of an lr, memory, and equal time (see `test_reproduce`)."""

    def first_lrs(*arguments) -> list[ScaledPanel]:
        panels = scaled_panels(*arguments)
        return [replace(each, methods=tuple(replace(one, lrs=one.lrs[:1]) for one in each.methods)) for each in panels]

    monkeypatch.setattr("wellcond.lab.reproduction.panels.scaled_panels", first_lrs)
    monkeypatch.setattr(RunMemory, "of", uncounted)


@pytest.mark.usefixtures("_each_method_trains_once")
@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_and_sets_its_figures_beside_the_sources(name, tmp_path, capsys, data):
    recipe = RECIPES[name]
    panels = scaled_panels(recipe, "smoke")
    arguments = ["reproduce", name, "--scale", "smoke", "--out", str(tmp_path / "out"), *data(needed_data(panels))]
    assert main([*arguments, "--no-equal-time"]) == 0
    text = (tmp_path / "out" / "reproduce.json").read_text()
    assert len(text) < 60_000
    content = json.loads(text)
    assert (content["recipe"], content["scale"], content["source"]) == (name, "smoke", recipe.source)
    assert content["command"].startswith(shlex.join(["wellcond", *arguments[:5]]))
    assert set(content["data"]) == set(needed_data(panels))
    assert [panel["name"] for panel in content["panels"]] == [panel.table.name for panel in panels]
    for panel, found in zip(panels, content["panels"], strict=True):
        assert [method["label"] for method in found["methods"]] == [method.name for method in panel.methods]
        for method in found["methods"]:
            paper = panel.table.paper.get(method["label"])
            assert method["paper"] == (None if paper is None else list(paper))
            assert len(method["ends"]) == found["seeds"]
            assert method["ours"]["mean"] == pytest.approx(sum(method["ends"]) / found["seeds"], rel=1e-5)
            assert (method["difference"] is None) == (method["baseline"] == method["label"])
            assert method["lr"] in [point["lr"] for point in method["lr_grid"]]
            assert method["metrics"]["seconds per epoch"] > 0
    printed = capsys.readouterr().out
    assert recipe.title in printed
    page = (tmp_path / "out" / "reproduce.html").read_text()
    assert recipe.source in page
    assert "<svg" in page
    # The sources' figures have training accuracies and training losses beside the test's.
    assert "training loss over epochs" in page
    if content["panels"][0]["settings"]["task"] == "classification":
        assert "training accuracy over epochs" in page
    assert "http" not in page.split("<style>")[0]
