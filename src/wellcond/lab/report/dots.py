"""Single seeds and single lrs of a family, as SVG pictures for the report: what the means of the tables are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from wellcond.lab.comparison.summary import MethodSummary, Summary
from wellcond.lab.report.curves import BASELINE, Style, method_style
from wellcond.lab.report.svg import BOTTOM, HEIGHT, LEFT, MARKERS, RIGHT, TOP, WIDTH, css_class, ticks

_NAMED = 5

Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Dots:
    """One method's points.

    Attributes:
        name: The method.
        style: How it is drawn.
        points: (x, y, what is said of it) each.
        chosen: The place among them of the one that counts; None for none.
        joined: Whether a line joins them.
    """

    name: str
    style: Style
    points: tuple[tuple[float, float, str], ...]
    chosen: int | None = None
    joined: bool = False


@dataclass(frozen=True)
class DotPanel:
    """One family's points over one axis.

    Attributes:
        title: What is shown.
        label: What stands below the axis.
        marks: (x, text) of the axis.
        dots: The methods.
    """

    title: str
    label: str
    marks: tuple[tuple[float, str], ...]
    dots: tuple[Dots, ...]

    @property
    def all_points(self) -> list[tuple[float, float]]:
        """Every point's place."""
        return [(x, y) for dots in self.dots for x, y, _ in dots.points]


def seed_panels(summary: Summary) -> list[DotPanel]:
    """Return, for each family, the test score of every seed after the last epoch; none if there is one seed.

    A run that diverged has no point.
    """
    if summary.seeds < 2:
        return []
    panels = []
    for baseline, methods in summary.families().items():
        dots = tuple(
            Dots(method.name, style, _seeds(method, place, summary.epochs))
            for place, (method, style) in enumerate(_styled(methods))
        )
        label = f"seeds, from left to right (test {summary.score} in %)"
        # More names than these would run into each other; the legend has them all.
        named = len(methods) <= _NAMED
        marks = tuple((float(place), method.name if named else "") for place, method in enumerate(methods))
        title = f"{baseline} and methods on it: every seed after epoch {summary.epochs}"
        panels.append(DotPanel(title, label, marks, dots))
    return [panel for panel in panels if panel.all_points]


def lr_panels(summary: Summary) -> list[DotPanel]:
    """Return, for each family, the mean validation score over the lr grid; none if every method tried one lr.

    An lr with which a run diverged has no point.
    """
    panels = []
    for baseline, methods in summary.families().items():
        dots = tuple(_over_lrs(method, style) for method, style in _styled(methods))
        lrs = sorted({point.lr for method in methods for point in method.lr_grid})
        marks = tuple((math.log(lr), f"{lr:g}") for lr in lrs)
        label = f"lr (mean validation {summary.score} in %)"
        panels.append(DotPanel(f"{baseline} and methods on it: how much hangs on the lr", label, marks, dots))
    return [panel for panel in panels if panel.all_points and len(panel.marks) > 1]


def _styled(methods: Sequence[MethodSummary]) -> list[tuple[MethodSummary, Style]]:
    return [
        (method, BASELINE if method.is_baseline else method_style(method, place))
        for place, method in enumerate(methods)
    ]


def _seeds(method: MethodSummary, place: int, epochs: int) -> tuple[tuple[float, float, str], ...]:
    scores = [
        (seed, curve.test_score[-1]) for seed, curve in enumerate(method.curves) if len(curve.test_score) == epochs
    ]
    width = 0.6 / max(1, len(method.curves) - 1)
    return tuple((place - 0.3 + width * seed, score, f"seed {seed}: {score:.2f} %") for seed, score in scores)


def _over_lrs(method: MethodSummary, style: Style) -> Dots:
    tried = [point for point in method.lr_grid if point.validation_score is not None]
    points = tuple(
        (math.log(point.lr), point.validation_score, f"lr {point.lr:g}: {point.validation_score:.2f} %")
        for point in tried
        if point.validation_score is not None
    )
    chosen = next((place for place, point in enumerate(tried) if point.lr == method.lr), None)
    return Dots(method.name, style, points, chosen, joined=True)


def draw_dots(panel: DotPanel) -> Markup:
    """Return a panel as an SVG element, without a legend; colours as in `draw_svg`.

    Each point says its number when pointed at; the chosen one has a ring.
    """
    xs = [x for x, _ in (*panel.all_points, *panel.marks)]
    ys = [y for _, y in panel.all_points]
    margin = max(0.5, 0.08 * (max(ys) - min(ys)))
    x_low, x_high = min(xs) - 0.15, max(xs) + 0.15
    y_low, y_high = min(ys) - margin, max(ys) + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + 12 + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT - 24)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}">']
    for y in ticks(y_low, y_high, 6):
        height = place(x_low, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{height + 4.5:.1f}" text-anchor="end">{y:g}</text>')
    for x, text in panel.marks:
        across = place(x, y_low)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{escape(text)}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 9}" text-anchor="middle">{escape(panel.label)}</text>'
    )
    parts += [part for dots in panel.dots for part in _draw(dots, place)]
    parts.append("</svg>")
    return Markup("".join(parts))


def draw_dot_key(dots: Dots) -> Markup:
    """Return a method's marker, for a legend."""
    marker = f'<path class="marker" transform="translate(8 7)" d="{MARKERS[dots.style.marker]}"/>'
    return Markup(f'<svg class="square {css_class(dots.style)}" viewBox="0 0 16 14" aria-hidden="true">{marker}</svg>')


def _draw(dots: Dots, place: Place) -> list[str]:
    placed = [place(x, y) for x, y, _ in dots.points]
    parts = [f'<g class="{css_class(dots.style)}" data-method="{escape(dots.name)}">']
    if dots.joined and len(placed) > 1:
        parts.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in placed)}"/>')
    for index, ((x, y), (_, _, said)) in enumerate(zip(placed, dots.points, strict=True)):
        if index == dots.chosen:
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        parts.append(
            f'<path class="marker" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[dots.style.marker]}">'
            f"<title>{escape(dots.name)}, {escape(said)}</title></path>"
        )
    return [*parts, "</g>"]
