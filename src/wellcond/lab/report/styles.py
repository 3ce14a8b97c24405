"""One colour and one marker for each technique, the same in every chart."""

from __future__ import annotations

from dataclasses import dataclass

from wellcond.lab.comparison.summary import MethodSummary


@dataclass(frozen=True)
class Style:
    """The colours and the marker of a technique, in every chart.

    Attributes:
        light: Colour on a light background.
        dark: Colour on a dark background.
        marker: matplotlib's name of the marker.
    """

    light: str
    dark: str
    marker: str


# Okabe and Ito's palette, which readers with any colour vision can tell apart; lighter on dark where it needs to be.
BASELINE = Style("#555555", "#b4b4b4", "o")
_BY_TECHNIQUE = {
    ("GradientCentralization",): Style("#c98500", "#e69f00", "s"),
    ("FeatureWhitening",): Style("#0072b2", "#4aa8e0", "^"),
    ("FeatureDescent",): Style("#d55e00", "#ff7f2a", "D"),
    ("GradientCentralization", "FeatureWhitening"): Style("#009e73", "#2fc79c", "v"),
    ("GradientCentralization", "FeatureDescent"): Style("#b8609a", "#dd8fc0", "P"),
}
# The same colours with other markers: a panel that mixes layers and transforms still tells them apart.
_BY_LAYERS = {
    "ibn-b": Style("#b8609a", "#dd8fc0", "s"),
    "wnn": Style("#0072b2", "#4aa8e0", "h"),
    "gwnn": Style("#5b6abf", "#98a4ee", "D"),
    "eigen": Style("#a0522d", "#d99a73", "^"),
    "mbn": Style("#0072b2", "#4aa8e0", "<"),
    "bsr": Style("#d55e00", "#ff7f2a", ">"),
    "evalnorm": Style("#c98500", "#e69f00", "X"),
    "brn": Style("#009e73", "#2fc79c", "p"),
    "mabn": Style("#7a6a00", "#c9b93a", "X"),
    "cbn": Style("#5b6abf", "#98a4ee", "v"),
    "pn": Style("#b8609a", "#dd8fc0", "h"),
    "gn": Style("#7a6a00", "#c9b93a", "*"),
    "sn": Style("#0072b2", "#4aa8e0", "D"),
    "ssn": Style("#6a51a3", "#a99be0", "X"),
    "ibn": Style("#c98500", "#e69f00", "v"),
    "ibn-a": Style("#c98500", "#e69f00", "p"),
    "kn": Style("#d55e00", "#ff7f2a", "P"),
    "iternorm": Style("#009e73", "#2fc79c", "s"),
    "ln": Style("#5b6abf", "#98a4ee", "p"),
    "in": Style("#a0522d", "#d99a73", "h"),
    "wn": Style("#a0522d", "#d99a73", "*"),
    "ws": Style("#7a6a00", "#c9b93a", "s"),
    "nd": Style("#6a51a3", "#a99be0", "v"),
    "dbn": Style("#b8609a", "#dd8fc0", "^"),
}
_OTHERS = tuple(_BY_TECHNIQUE.values())

SHARE_STYLES = {
    # From the bottom of a bar up; neighbours are apart in lightness, so that bars can be read without colour, too.
    "in": Style("#e69f01", "#e69f00", "s"),
    "ln": Style("#0072b3", "#2f8fd0", "s"),
    "bn": Style("#a9b0b7", "#d5dade", "s"),
}
"""How the shares of the normalizers that are switched between are drawn."""


STYLES = (BASELINE, *_BY_TECHNIQUE.values(), *_BY_LAYERS.values(), *SHARE_STYLES.values())
"""Every style that a chart may use."""


def method_style(method: MethodSummary, place: int = 0) -> Style:
    """Return how a method is drawn.

    Args:
        method: The method.
        place: Its place in the chart, which decides where no technique does: for another optimizer.
    """
    return style_of(method.is_baseline, method.transforms, method.layers or method.norm, place)


def style_of(is_baseline: bool, transforms: tuple[str, ...], layers: str | None, place: int) -> Style:
    """Return how a method is drawn, by what it does; `layers` is its kind of convolutions or norms, None for none."""
    if is_baseline:
        return BASELINE
    other = _OTHERS[place % len(_OTHERS)]
    return _BY_TECHNIQUE.get(transforms, other) if layers is None else _BY_LAYERS.get(layers, other)
