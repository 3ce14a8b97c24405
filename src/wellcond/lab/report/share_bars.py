"""The shares that switchable normalizations have learned, as stacked bars: one a layer, in the report's style."""

from __future__ import annotations

from markupsafe import Markup, escape

from wellcond.lab.comparison.statistics import Spread
from wellcond.lab.report.curves import Style
from wellcond.lab.report.formats import share_text
from wellcond.lab.report.shares import SharesSummary

# From the bottom up; in neighbours' lightness apart, so that the bars can be read without colour, too.
SHARE_STYLES = {
    "in": Style("#e69f00", "#e69f00", "s"),
    "ln": Style("#0072b2", "#2f8fd0", "s"),
    "bn": Style("#a9b0b7", "#d5dade", "s"),
}
_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 44, 12, 54
# The average stands apart from the layers by half a bar, and is wider by as much.
_AVERAGE = 1.5


def share_class(kind: str) -> str:
    """Return the CSS class that gives a normalizer's bars their colour."""
    return f"share-{kind}"


def draw_shares(name: str, shares: SharesSummary, part: str) -> Markup:
    """Return the shares in the means or in the variances as an SVG element: a bar for each layer, and their average.

    Colours come from the CSS classes of `share_class`: the page sets ``color`` for each, light or dark.

    Args:
        name: The method.
        shares: Its shares.
        part: One of `SharesSummary.parts`.
    """
    averages = {kind: shares.average(part, kind) for kind in shares.kinds}
    about = (
        f"{name}: shares in the {shares.parts[part]}, a bar for each layer; average over layers: {_listed(averages)}"
    )
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(about)}">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = _height(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {height:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{height + 4.5:.1f}" text-anchor="end">{tick:g}</text>')
    count = len(shares.layers)
    step = (_WIDTH - _LEFT - _RIGHT) / (count + 0.5 + _AVERAGE)
    # Labels of three digits' width each, also where phones show them larger.
    every = max(1, -(-26 // int(max(step, 1.0))))
    base = _HEIGHT - _BOTTOM + 19
    for index, layer in enumerate(shares.layers):
        spreads = {kind: shares.of_layer(layer, part, kind) for kind in shares.kinds}
        left = _LEFT + index * step
        parts += _bar(left + 0.1 * step, 0.8 * step, spreads, f"layer {index + 1}, {layer}")
        if index % every == 0 and left + step / 2 < _WIDTH - _RIGHT - 36:  # the rest is the average's label's
            parts.append(f'<text x="{left + step / 2:.1f}" y="{base}" text-anchor="middle">{index + 1}</text>')
    left, width = _LEFT + (count + 0.5) * step, _AVERAGE * step
    parts += _bar(left, width, averages, "average over layers")
    # Named at the average's bar: the key alone would leave it to colours.
    bottom = 0.0
    for kind, share in averages.items():
        if share.mean >= 0.06:
            y = _height(bottom + share.mean / 2) + 4.5
            parts.append(f'<text x="{_WIDTH - _RIGHT + 5}" y="{y:.1f}">{kind.upper()}</text>')
        bottom += share.mean
    across = min(left + width / 2, _WIDTH - _RIGHT - 11)
    parts.append(f'<text x="{across:.1f}" y="{base}" text-anchor="middle">all</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 9}" text-anchor="middle">layer (share)</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def draw_share_key(kind: str) -> Markup:
    """Return a normalizer's square, for a legend."""
    square = '<rect class="share" x="2" y="1" width="12" height="12"/>'
    return Markup(f'<svg class="square {share_class(kind)}" viewBox="0 0 16 14" aria-hidden="true">{square}</svg>')


def _bar(left: float, width: float, spreads: dict[str, Spread], what: str) -> list[str]:
    """Return a stacked bar that says its numbers when pointed at."""
    parts = [f"<g><title>{escape(f'{what}: {_listed(spreads)}')}</title>"]
    bottom = 0.0
    for kind, share in spreads.items():
        top = _height(bottom + share.mean)
        size = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{_height(bottom) - top:.1f}"'
        parts.append(f'<rect class="share {share_class(kind)}" {size}/>')
        bottom += share.mean
    return [*parts, "</g>"]


def _height(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _listed(spreads: dict[str, Spread]) -> str:
    return ", ".join(f"{kind.upper()} {share_text(share)}" for kind, share in spreads.items())
