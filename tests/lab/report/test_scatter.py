"""Gain against cost: what is measured is shown, whole, and nothing else."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.report.curves import BASELINE, Style
from wellcond.lab.report.scatter import Point, Scatter, draw_scatter

OTHER = Style("#0072b2", "#4aa8e0", "^")
NOTHING = Difference(0.0, 0.0, 0.0, 0)


def scatter(*points: Point) -> Scatter:
    return Scatter("SGDM", "accuracy", 6, (Point("SGDM", BASELINE, 1.0, NOTHING), *points))


def drawn(*points: Point):
    """Return, by method, the place of its marker and the ends of its interval."""
    root = ElementTree.fromstring(str(draw_scatter(scatter(*points))))
    found = {}
    for group in root.iter("g"):
        marker = next(path for path in group if path.get("class") == "marker")
        place = tuple(map(float, re.findall(r"[\d.]+", marker.get("transform"))))
        lines = [path.get("d") for path in group if path.get("class") == "interval"]
        found[group.get("data-method")] = (place, [tuple(map(float, re.findall(r"[\d.]+", d))) for d in lines])
    return found


def test_what_gains_more_is_higher_and_what_costs_more_further_right():
    found = drawn(
        Point("a", OTHER, 1.5, Difference(2.0, 1.0, 3.0, 5)), Point("b", OTHER, 2.0, Difference(-1.0, -2.0, 0.0, 5))
    )
    (x, y), none = found["SGDM"]
    (ax, ay), ((_, top, bottom, *_),) = found["a"]
    (bx, by), _ = found["b"]
    assert x < ax < bx
    assert ay < y < by  # downwards in SVG
    assert none == []
    # Linear: 0.5 more in cost and 1 point are as far apart everywhere.
    assert ax - x == pytest.approx(bx - ax, abs=0.2)
    assert y - ay == pytest.approx(2 * (by - y), abs=0.3)
    assert (ay - top, bottom - ay) == pytest.approx((by - y, by - y), abs=0.3)


@pytest.mark.parametrize("gain", [Difference(0.3, -40.0, 40.6, 2), Difference(5.0, None, None, 1), NOTHING])
def test_everything_is_within_the_picture(gain):
    for (x, y), ends in drawn(Point("a", OTHER, 9.0, gain)).values():
        assert 48 <= x <= 468
        assert 12 <= y <= 282
        for _, top, bottom, *_ in ends:
            assert 12 <= top < bottom <= 282


def test_names_are_escaped():
    picture = str(draw_scatter(scatter(Point('<"&>', OTHER, 1.2, NOTHING))))
    ElementTree.fromstring(picture)
    assert "<&" not in picture
