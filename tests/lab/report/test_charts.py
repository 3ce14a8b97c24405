"""Charts: each number that was measured is drawn once, in its place, and said; the same numbers give the same file."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from wellcond.lab.comparison.compare import compared
from wellcond.lab.comparison.summary import Summary
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.plan import make_plan
from wellcond.lab.report.chart import Bars, Chart, Series
from wellcond.lab.report.charts import curves, gains, seeds, share_bars, trials
from wellcond.lab.report.drawing import chart_svg, colours, draw_png
from wellcond.lab.report.shares import summarize_shares
from wellcond.lab.report.styles import BASELINE, Style
from wellcond.lab.runs.records import EpochRecord, RunRecord
from wellcond.lab.runs.settings import Settings

LRS = (0.01, 0.1, 1.0)


def summary(count: int = 3, lrs: tuple[float, ...] = LRS, diverged: tuple[str, float] | None = None) -> Summary:
    """Return a comparison of two methods: 70 + 10 · seed + lr at the end, SGDM+GC one point better."""
    plan = make_plan(
        Settings(methods=("SGDM", "SGDM+GC"), lrs=(("SGD", lrs),), seeds=count, epochs=2, train_images=320)
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


OTHER = Style("#0072b2", "#4aa8e0", "^")


def chart(*series: Series, **changes) -> Chart:
    return replace(Chart("some methods", "time/step", "difference", series), **changes)


def drawn(picture: str) -> dict[str, list[tuple[float, float]]]:
    """Return the place of every marker by what is said of it."""
    found = {}
    for group in ElementTree.fromstring(picture).iter("g"):
        if group.get("data-name", "").startswith("series"):
            for use in group.iter("use"):
                found[use.findtext("title")] = (float(use.get("x")), float(use.get("y")))
    return found


def test_every_seed_has_a_point_as_high_as_its_score() -> None:
    (panel,) = seeds(summary())
    places = drawn(str(chart_svg(panel)))
    assert set(places) == {
        f"{name}, seed {seed}: {70 + 10 * seed + 0.01 + better:.2f} %"
        for name, better in (("SGDM", 0), ("SGDM+GC", 1))
        for seed in range(3)
    }
    plain = [place for said, place in places.items() if said.startswith("SGDM,")]
    better = [place for said, place in places.items() if said.startswith("SGDM+GC,")]
    assert plain[0][1] - plain[1][1] == pytest.approx(plain[1][1] - plain[2][1], abs=0.2)
    assert all(above < below for (_, below), (_, above) in zip(plain, better, strict=True))
    assert max(x for x, _ in plain) < min(x for x, _ in better)


def test_a_diverged_run_has_no_point() -> None:
    (panel,) = seeds(summary(diverged=("SGDM", LRS[0])))
    assert [len(series.y) for series in panel.series] == [2, 3]
    (panel,) = trials(summary(diverged=("SGDM", LRS[1])))
    assert [len(series.y) for series in panel.series] == [2, 3]


def test_lrs_are_on_a_logarithmic_axis_with_a_ring_around_the_chosen() -> None:
    (panel,) = trials(summary())
    assert [text for _, text in panel.marks] == ["0.01", "0.1", "1"]
    picture = str(chart_svg(panel))
    places = drawn(picture)
    first, second, third = (places[f"SGDM, lr {lr:g}: {80 + lr:.2f} %"] for lr in LRS)
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    (ring,) = re.findall(r'data-name="ring-series0">.*?<use [^>]*x="([\d.]+)" y="([\d.]+)"', picture, flags=re.DOTALL)
    assert (float(ring[0]), float(ring[1])) == pytest.approx(first, abs=0.02)
    assert panel.series[0].x[0] == math.log10(0.01)


def test_one_seed_and_one_lr_have_no_picture() -> None:
    assert seeds(summary(count=1)) == []
    assert trials(summary(lrs=(0.1,))) == []


def test_the_gain_over_the_cost_has_its_interval_and_no_gain_is_marked() -> None:
    (panel,) = gains(summary())
    plain, better = panel.series
    assert (plain.x, plain.y, plain.low, plain.said) == ((1.0,), (0.0,), (), ("x 1.00, the baseline",))
    assert (better.x, better.y, better.low, better.high) == ((1.0,), (1.0,), (1.0,), (1.0,))
    assert better.said == ("x 1.00, +1.0 [+1.0, +1.0] points",)
    assert panel.zero


def test_what_gains_more_is_higher_and_what_costs_more_further_right() -> None:
    shown = chart(
        Series("plain", BASELINE, (1.0,), (0.0,), said=("the baseline",)),
        Series("a", OTHER, (1.5,), (2.0,), (1.0,), (3.0,), ("+2",)),
        Series("b", OTHER, (2.0,), (-1.0,), (-2.0,), (0.0,), ("-1",)),
    )
    places = drawn(str(chart_svg(shown)))
    (x, y), (ax, ay), (bx, by) = places["plain, the baseline"], places["a, +2"], places["b, -1"]
    assert x < ax < bx
    assert ay < y < by  # downwards in SVG
    assert ax - x == pytest.approx(bx - ax, abs=0.2)
    assert y - ay == pytest.approx(2 * (by - y), abs=0.3)


@pytest.mark.parametrize("ends", [(-40.0, 40.6), (0.3, 0.3)])
def test_everything_is_within_the_picture_and_escaped(ends) -> None:
    name = '<"&>'
    shown = [
        chart(
            Series(name, OTHER, (9.0,), (0.3,), ends[:1], ends[1:], (name,)), Series("plain", BASELINE, (1.0,), (0.0,))
        ),
        *(
            replace(panel, title=name)
            for panel in (*seeds(summary()), *trials(summary()), *curves(summary(), "epochs"))
        ),
    ]
    for panel in shown:
        picture = str(chart_svg(panel))
        width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', picture)[0])
        assert "<&" not in picture
        for x, y in drawn(picture).values():
            assert 0 < x < width
            assert 0 < y < height


def test_the_same_numbers_give_the_same_picture_and_two_pictures_share_no_names() -> None:
    first, again = (str(chart_svg(seeds(summary())[0])) for _ in range(2))
    assert first == again
    other = str(chart_svg(trials(summary())[0]))
    names = [set(re.findall(r' id="([^"]*)"', picture)) for picture in (first, other)]
    assert names[0]
    assert not names[0] & names[1]
    for picture, own in zip((first, other), names, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', picture)) <= own


def test_colours_are_the_pages() -> None:
    for panel in (*seeds(summary()), *curves(summary(), "seconds")):
        picture = str(chart_svg(panel))
        assert set(re.findall(r"var\((--[^)]*)\)", picture)) <= {"--quiet", "--line", *colours()}
        assert not re.search('#[0-9a-f]{6}[;"]', picture)


def test_a_curve_ends_where_a_seed_diverged(tmp_path) -> None:
    (panel,) = curves(summary(diverged=("SGDM", LRS[0])), "epochs")
    assert [len(series.y) for series in panel.series] == [1, 2]
    assert panel.y_label == "test accuracy in %"
    draw_png([panel], tmp_path / "curve")
    assert (tmp_path / "curve").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layers", [1, 3, 9, 20, 60])
def test_bars_stack_to_the_whole_and_say_their_shares(layers: int) -> None:
    values = {"in": 0.2, "ln": 0.5, "bn": 0.3}
    seed = {f"layer.{index}": dict.fromkeys(("mean", "var"), values) for index in range(layers)}
    bars = share_bars("S&N", summarize_shares([seed]), "mean")
    assert isinstance(bars, Bars)
    assert bars.title == "S&N, means and variances"
    picture = str(chart_svg(bars))
    assert 'aria-label="S&amp;N, means and variances"' in picture
    root = ElementTree.fromstring(picture)
    said = [title.text for title in root.iter("title")]
    assert len(said) == 3 * (layers + 1)  # and their average
    assert f"layer {layers}, layer.{layers - 1}: 0.200 (IN)" in said
    assert "average over layers: 0.500 (LN)" in said
    heights = {}
    for path in root.iter("path"):
        if (title := path.findtext("title")) is not None:
            ys = [float(y) for y in re.findall(r"[ML] [\d.-]+ ([\d.-]+)", path.get("d"))]
            heights[title] = max(ys) - min(ys)
    whole = sum(height for title, height in heights.items() if title.startswith("average"))
    for title, height in heights.items():
        assert height == pytest.approx(whole * float(re.findall(r": ([\d.]+)", title)[0]), abs=0.05)
    texts = {"".join(text.itertext()) for text in root.iter("text")}
    assert {"IN", "LN", "BN", "all", "1"} <= texts
    numbers = sorted(int(text) for text in texts if text.isdigit())
    assert all(after - before == numbers[1] - numbers[0] for before, after in pairwise(numbers))
