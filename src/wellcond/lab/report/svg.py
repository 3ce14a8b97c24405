"""Curves as inline SVG for the report: they follow the page's light or dark colours and its width."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from wellcond.lab.report.curves import AXIS_LABELS, Panel, Series, Style

WIDTH, HEIGHT = 480, 336
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 54
_DASHES = {"solid": "none", "dashed": "7 4", "dotted": "2 4"}
# Around (0, 0), by matplotlib's names for the markers.
MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.5-3.5h7v7h-7z",
    "^": "M0-4.5l4.5 8h-9z",
    "D": "M0-5l4.5 5l-4.5 5l-4.5-5z",
    "v": "M0 4.5l4.5-8h-9z",
    "P": "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "<": "M-4.5 0l8-4v8z",
    ">": "M4.5 0l-8-4v8z",
    "X": "M-4.5-2.5l2-2l2.5 2.5l2.5-2.5l2 2l-2.5 2.5l2.5 2.5l-2 2l-2.5-2.5l-2.5 2.5l-2-2l2.5-2.5z",
    "p": "M0-4.5l4.3 3.1l-1.6 5h-5.4l-1.6-5z",
    "h": "M-2.3-4h4.6l2.3 4l-2.3 4h-4.6l-2.3-4z",
    "*": "M0-5l1.2 3.4h3.6l-2.9 2.2l1.1 3.4l-3-2l-3 2l1.1-3.4l-2.9-2.2h3.6z",
}


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two ends, at most so many.

    >>> ticks(50.0, 100.0, 6)
    [50.0, 60.0, 70.0, 80.0, 90.0, 100.0]
    >>> ticks(0.0, 0.73, 5)
    [0.0, 0.2, 0.4, 0.6]
    """
    if high <= low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def draw_svg(panel: Panel) -> Markup:
    """Return a panel as an SVG element, without a legend.

    Colours come from the CSS classes of `css_class`: the page sets ``color`` for each, light or dark.
    """
    x_high = max((x for series in panel.series for x in series.x), default=1.0)
    x_low = 0.0 if panel.axis == "seconds" else min(1.0, x_high)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = panel.y_range()

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + 8 + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT - 16)
        share = min(1.0, (y - y_low) / (y_high - y_low))  # a band may reach beyond what is shown
        return across, HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(panel.title)}: {panel.y_label} over '
        f'{AXIS_LABELS[panel.axis]}">'
    ]
    for y in ticks(y_low, y_high, 6):
        height = place(x_low, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{height + 4.5:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high, 7):
        if panel.axis == "epochs" and x != round(x):
            continue
        across = place(x, y_low)[0]
        parts.append(f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 19}" text-anchor="middle">{x:g}</text>')
    label = f"{AXIS_LABELS[panel.axis]} ({panel.y_label})"
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 9}" text-anchor="middle">{label}</text>')
    for series in panel.series:
        parts += _draw_series(
            series,
            [place(x, y) for x, y in zip(series.x, series.mean, strict=True)],
            [
                *(place(x, y) for x, y in zip(series.x, series.high, strict=True)),
                *reversed([place(x, y) for x, y in zip(series.x, series.low, strict=True)]),
            ],
            panel.y_unit,
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def draw_key(series: Series) -> Markup:
    """Return a series' line and marker, for a legend."""
    line = f'<path class="line" stroke-dasharray="{_DASHES[series.dash]}" d="M0 7H34"/>'
    marker = f'<path class="marker" transform="translate(17 7)" d="{MARKERS[series.style.marker]}"/>'
    return Markup(
        f'<svg class="key {css_class(series.style)}" viewBox="0 0 34 14" aria-hidden="true">{line}{marker}</svg>'
    )


def css_class(style: Style) -> str:
    """Return the class that gives what is drawn in a style its colour."""
    return f"series-{style.light.removeprefix('#')}"


def _draw_series(
    series: Series, points: Sequence[tuple[float, float]], outline: Sequence[tuple[float, float]], unit: str
) -> list[str]:
    if not points:
        return []
    digits = ".1f" if unit else ".4g"
    markers = "".join(
        f'<path class="marker" transform="translate({x:.1f} {y:.1f})" d="{MARKERS[series.style.marker]}">'
        f"<title>{escape(series.name)}: {value:{digits}}{unit} at {at:.4g}</title></path>"
        for (x, y), at, value in zip(points, series.x, series.mean, strict=True)
    )
    return [
        f'<g class="{css_class(series.style)}">',
        f'<path class="band" d="M{_path(outline)}z"/>',
        f'<path class="line" stroke-dasharray="{_DASHES[series.dash]}" d="M{_path(points)}"/>',
        markers,
        "</g>",
    ]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
