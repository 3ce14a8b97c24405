"""Single seeds and lrs: each one that was measured is drawn once, in its place."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from wellcond.lab.comparison.compare import compared
from wellcond.lab.comparison.summary import Summary, summarize
from wellcond.lab.plan import make_plan
from wellcond.lab.report.dots import draw_dots, lr_panels, seed_panels
from wellcond.lab.runs.records import EpochRecord, RunRecord
from wellcond.lab.runs.settings import Settings

LRS = (0.01, 0.1, 1.0)


def summary(seeds: int = 3, lrs: tuple[float, ...] = LRS, diverged: tuple[str, float] | None = None) -> Summary:
    """Return a comparison of two methods: 70 + 10 · seed + lr at the end, SGDM+GC one point better."""
    plan = make_plan(
        Settings(methods=("SGDM", "SGDM+GC"), lrs=(("SGD", lrs),), seeds=seeds, epochs=2, train_images=320)
    )
    records = {}
    for spec in plan.specs():
        score = 70.0 + 10 * spec.seed + spec.lr + ("GC" in spec.method.name)
        epochs = tuple(
            EpochRecord(step, 0.01 * step, 0.5, score, 0.5, score, 0.5) for step in (plan.steps // 2, plan.steps)
        )
        ends = diverged == (spec.method.name, spec.lr) and spec.seed == 0
        records[spec] = RunRecord(epochs[:1] if ends else epochs, ends, 1, {}, ())
    return summarize(compared(plan, records, {name: trials[0] for name, trials in plan.trials.items()}))


def points(picture: str) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for group in ElementTree.fromstring(picture).iter("g"):
        markers = [path.get("transform", "") for path in group if path.get("class") == "marker"]
        found[group.get("data-method", "")] = [
            (float(x), float(y)) for x, y in (re.findall(r"[\d.]+", marker) for marker in markers)
        ]
    return found


def test_every_seed_has_a_point_as_high_as_its_score() -> None:
    (panel,) = seed_panels(summary())
    drawn = points(str(draw_dots(panel)))
    assert {name: len(found) for name, found in drawn.items()} == {"SGDM": 3, "SGDM+GC": 3}
    heights = [y for _, y in drawn["SGDM"]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert all(better < plain for (_, plain), (_, better) in zip(drawn["SGDM"], drawn["SGDM+GC"], strict=True))
    assert max(x for x, _ in drawn["SGDM"]) < min(x for x, _ in drawn["SGDM+GC"])
    assert "SGDM+GC, seed 2: 91.01 %" in str(draw_dots(panel))


def test_a_diverged_run_has_no_point() -> None:
    (panel,) = seed_panels(summary(diverged=("SGDM", LRS[0])))
    assert len(points(str(draw_dots(panel)))["SGDM"]) == 2
    (panel,) = lr_panels(summary(diverged=("SGDM", LRS[1])))
    assert len(points(str(draw_dots(panel)))["SGDM"]) == 2


def test_lrs_are_on_a_logarithmic_axis_with_a_ring_around_the_chosen() -> None:
    (panel,) = lr_panels(summary())
    assert [text for _, text in panel.marks] == ["0.01", "0.1", "1"]
    picture = str(draw_dots(panel))
    (first, second, third) = points(picture)["SGDM"]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert picture.count("<circle") == 2
    x, y = re.findall(r'<circle class="ring" cx="([\d.]+)" cy="([\d.]+)"', picture)[0]
    assert (float(x), float(y)) == first
    assert panel.dots[0].points[0][0] == math.log(0.01)


def test_one_seed_and_one_lr_have_no_picture() -> None:
    assert seed_panels(summary(seeds=1)) == []
    assert lr_panels(summary(lrs=(0.1,))) == []


def test_everything_is_within_the_picture_and_escaped() -> None:
    for panel in (*seed_panels(summary()), *lr_panels(summary())):
        odd = replace(panel, dots=tuple(replace(dots, name='<"&>') for dots in panel.dots))
        for found in points(str(draw_dots(odd))).values():
            assert all(48 <= x <= 468 and 12 <= y <= 282 for x, y in found)
