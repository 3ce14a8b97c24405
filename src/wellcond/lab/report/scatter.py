"""What each method of a family gains over what it costs, as an SVG picture for the report."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.comparison.summary import Summary
from wellcond.lab.report.curves import BASELINE, Style, method_style
from wellcond.lab.report.formats import difference_text
from wellcond.lab.report.svg import BOTTOM, HEIGHT, LEFT, MARKERS, RIGHT, TOP, WIDTH, css_class, ticks

_NONE = Difference(0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Point:
    """One method: what it costs and what it gains.

    Attributes:
        name: The method.
        style: How it is drawn.
        cost: Its time per step over the baseline's.
        gain: Its paired difference to the baseline after the last epoch; nothing for the baseline itself.
    """

    name: str
    style: Style
    cost: float
    gain: Difference


@dataclass(frozen=True)
class Scatter:
    """A family's points.

    Attributes:
        baseline: What costs and gains are against.
        score: What the score is called.
        epochs: After how many the gain is taken.
        points: The methods, the baseline among them.
    """

    baseline: str
    score: str
    epochs: int
    points: tuple[Point, ...]

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the lowest and highest cost and gain to show, the baseline and every interval within."""
        costs = [1.0, *(point.cost for point in self.points)]
        ends = [end for point in self.points for end in (point.gain.low, point.gain.high) if end is not None]
        gains = [0.0, *(point.gain.mean for point in self.points), *ends]
        return _padded(min(costs), max(costs), 0.1), _padded(min(gains), max(gains), 0.5)


def make_scatters(summary: Summary) -> list[Scatter]:
    """Return one scatter for each baseline that a method with a time is measured against."""
    scatters = []
    for baseline, methods in summary.families().items():
        points = [
            Point(
                method.name,
                BASELINE if method.is_baseline else method_style(method, place),
                1.0 if method.is_baseline else method.time_ratio or 1.0,
                method.final_difference or _NONE,
            )
            for place, method in enumerate(methods)
            if method.is_baseline or (method.time_ratio is not None and method.final_difference is not None)
        ]
        if len(points) > 1:
            scatters.append(Scatter(baseline, summary.score, summary.epochs, tuple(points)))
    return scatters


def draw_scatter(scatter: Scatter) -> Markup:
    """Return a scatter as an SVG element, without a legend; colours as in `draw_svg`.

    Each point carries its numbers in ``data-cost`` and ``data-gain``, and says them when pointed at.
    """
    (x_low, x_high), (y_low, y_high) = scatter.ranges()

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + 8 + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT - 16)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    about = f"{scatter.baseline} and methods on it: gain in points of test {scatter.score} over time per step"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">']
    for y in ticks(y_low, y_high, 6):
        height = place(x_low, y)[1]
        kind = "zero" if y == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{height + 4.5:.1f}" text-anchor="end">{f"{y:+g}" if y else "0"}</text>')
    for x in ticks(x_low, x_high, 6):
        across = place(x, y_low)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{x:g}</text>')
    label = f"time per step, x {scatter.baseline} (gain in points)"
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 9}" text-anchor="middle">{escape(label)}</text>')
    for point in scatter.points:
        x, y = place(point.cost, point.gain.mean)
        parts.append(
            f'<g class="point {css_class(point.style)}" data-method="{escape(point.name)}" '
            f'data-cost="{point.cost!r}" data-gain="{point.gain.mean!r}">'
        )
        if point.gain.low is not None and point.gain.high is not None and point.gain.low < point.gain.high:
            top, bottom = place(point.cost, point.gain.high)[1], place(point.cost, point.gain.low)[1]
            caps = "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in (top, bottom))
            parts.append(f'<path class="interval" d="M{x:.1f} {top:.1f}V{bottom:.1f}{caps}"/>')
        said = "the baseline" if point.gain is _NONE else f"{difference_text(point.gain)} points"
        parts.append(
            f'<path class="marker" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[point.style.marker]}">'
            f"<title>{escape(point.name)}: x {point.cost:.2f}, {said}</title></path></g>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def draw_point_key(point: Point) -> Markup:
    """Return a method's marker, for a legend."""
    marker = f'<path class="marker" transform="translate(8 7)" d="{MARKERS[point.style.marker]}"/>'
    return Markup(f'<svg class="square {css_class(point.style)}" viewBox="0 0 16 14" aria-hidden="true">{marker}</svg>')


def _padded(low: float, high: float, least: float) -> tuple[float, float]:
    margin = max(least, 0.08 * (high - low))
    return low - margin, high + margin
