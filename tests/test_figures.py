"""The figures of docs/diagnostics.md: small, embedded, with their command; and some of their numbers made anew."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawing() -> Any:
    spec = importlib.util.spec_from_file_location("draw_figures", ROOT / "docs" / "draw_figures.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_figures"] = module
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_kept_and_shown_with_its_command(drawing: Any) -> None:
    for name in drawing.FIGURES:
        content = json.loads((RESULTS / f"figure-{name}.json").read_text(encoding="utf-8"))
        assert content["figure"] == name
        assert content["command"].startswith("python docs/draw_figures.py")
        picture = RESULTS / f"figure-{name}.png"
        assert picture.exists() is (name != "closed-forms")
        if picture.exists():
            assert picture.stat().st_size < 60_000
            assert f"(results/{picture.name})" in PAGE
    assert "python docs/draw_figures.py" in PAGE


def test_drawn_batches_decide_between_derived_and_printed(drawing: Any, tmp_path: Path) -> None:
    found = drawing.closed_forms(tmp_path, draws=400_000)
    kept = json.loads((RESULTS / "figure-closed-forms.json").read_text(encoding="utf-8"))["found"]
    assert found.keys() == kept.keys()
    for name, row in found.items():
        assert row["derived"] == pytest.approx(kept[name]["derived"], rel=1e-5)
        # Large m and the penalties are leading terms: a few percent off.
        slack = 0.05 * row["derived"] if ("large m" in name or "slides" in name or name.startswith("R_")) else 0.0
        assert abs(row["drawn"] - row["derived"]) < 5 * row["error"] + slack, name
    refuted = {
        name for name, row in found.items() if row["thesis"] and abs(row["drawn"] - row["thesis"]) > 8 * row["error"]
    }
    assert {name.split(",")[0] for name in refuted} == {
        "Var ξ_σ for large m (theorem 1)",
        "E x̂ (2.4)",
        "Var x̂ (2.4)",
        "Var ξ_μ of MBN (2.11)",
    }


def test_the_network_of_the_figures_can_be_trained_by_each_method(drawing: Any) -> None:
    batches = drawing.digits(32, 0)
    assert len(batches) == 31
    for make in (drawing.sgdm, drawing.centred, drawing.fsgd):
        model = drawing.convnet()
        with torch.no_grad():
            before = model[6].weight.clone()
        found = drawing.train(model, batches, make)
        assert found.layers["6.weight"].batches == tuple(range(31))
        assert not torch.equal(model[6].weight, before)
