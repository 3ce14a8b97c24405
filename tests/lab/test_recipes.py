"""Every recipe that comes with the lab, end to end at its smoke scale."""

from __future__ import annotations

import json

import pytest

from wellcond.__main__ import main
from wellcond.lab.recipe import bundled_recipes
from wellcond.lab.recipe_panels import needed_data, scaled_panels

RECIPES = {recipe.name: recipe for recipe in bundled_recipes()}


@pytest.fixture
def data(tmp_path):
    """The function that makes what a recipe needs, and returns what binds it."""

    def bind(names: list[str]) -> list[str]:
        assert set(names) <= {"digits"}
        return []

    return bind


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs_and_sets_its_figures_beside_the_sources(name, tmp_path, capsys, data):
    recipe = RECIPES[name]
    panels = scaled_panels(recipe, "smoke")
    arguments = ["reproduce", name, "--scale", "smoke", "--out", str(tmp_path / "out"), *data(needed_data(panels))]
    assert main(arguments) == 0
    text = (tmp_path / "out" / "reproduce.json").read_text()
    assert len(text) < 60_000
    content = json.loads(text)
    assert (content["recipe"], content["scale"], content["source"]) == (name, "smoke", recipe.source)
    assert content["command"].startswith(f"wellcond reproduce {name} --scale smoke")
    assert set(content["data"]) == set(needed_data(panels))
    assert [panel["name"] for panel in content["panels"]] == [panel.table.name for panel in panels]
    for panel, found in zip(panels, content["panels"], strict=True):
        assert [method["label"] for method in found["methods"]] == [override.label for override in panel.methods]
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
    assert "http" not in page.split("<style>")[0]
