"""Test score over epochs and over training seconds: one panel a family, and its picture as PNG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from wellcond.lab.comparison.statistics import spread
from wellcond.lab.comparison.summary import Curve, MethodSummary, Summary

Axis = Literal["epochs", "seconds"]

AXIS_LABELS: dict[Axis, str] = {"epochs": "epoch", "seconds": "training seconds"}

Quantity = Literal["score", "training loss", "test loss"]
"""What a curve shows: the test score, or the mean loss of the epoch's batches or of the test images."""


@dataclass(frozen=True)
class Style:
    """How a technique is drawn, in every chart.

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
    "mbn": Style("#0072b2", "#4aa8e0", "<"),
    "bsr": Style("#d55e00", "#ff7f2a", ">"),
    "evalnorm": Style("#c98500", "#e69f00", "X"),
    "brn": Style("#009e73", "#2fc79c", "p"),
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
    "ibn-b": Style("#b8609a", "#dd8fc0", "s"),
    "wnn": Style("#0072b2", "#4aa8e0", "h"),
    "gwnn": Style("#5b6abf", "#98a4ee", "D"),
    "eigen": Style("#a0522d", "#d99a73", "^"),
    "ws": Style("#7a6a00", "#c9b93a", "s"),
    "nd": Style("#6a51a3", "#a99be0", "v"),
    "dbn": Style("#b8609a", "#dd8fc0", "^"),
}
_OTHERS = tuple(_BY_TECHNIQUE.values())


@dataclass(frozen=True)
class Series:
    """A curve: the mean over the seeds (at median seconds), and one standard deviation to either side."""

    name: str
    style: Style
    dash: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One family's curves over one axis.

    Attributes:
        title: The family.
        score: What the score is called.
        axis: What is on the horizontal axis.
        series: The curves.
        quantity: What is on the vertical axis.
    """

    title: str
    score: str
    axis: Axis
    series: tuple[Series, ...]
    quantity: Quantity = "score"

    @property
    def y_label(self) -> str:
        """What is on the vertical axis, with its unit."""
        return f"test {self.score} in %" if self.quantity == "score" else self.quantity

    @property
    def y_unit(self) -> str:
        """What follows a number on the vertical axis."""
        return " %" if self.quantity == "score" else ""

    def y_range(self) -> tuple[float, float]:
        """Return the lowest and highest value to show: of a score, whole tens of percent that differ."""
        if self.quantity != "score":
            # Of the means: a band may be wide where one seed's loss leapt.
            highest = max((value for series in self.series for value in series.mean), default=0.0)
            return 0.0, 1.05 * highest or 1.0
        lowest = min((value for series in self.series for value in series.low), default=0.0)
        highest = max((value for series in self.series for value in series.high), default=100.0)
        low = 10.0 * min(9, lowest // 10)
        return low, max(low + 10.0, min(100.0, 10.0 * (highest // 10 + 1)))


def make_panels(summary: Summary, axis: Axis, quantity: Quantity = "score") -> list[Panel]:
    """Return one panel for each baseline with the methods measured against it.

    Args:
        summary: The comparison in numbers.
        axis: What is on the horizontal axis.
        quantity: What is on the vertical axis; test losses may be missing, which leaves curves empty.
    """
    panels = []
    for baseline, methods in summary.families().items():
        drawn: list[Series] = []
        for method in methods:
            style = BASELINE if method.is_baseline else method_style(method, len(drawn))
            # A technique that comes twice in a panel, on another optimizer or in another form, is dotted from then on.
            again = any(series.style == style for series in drawn)
            dash = "dashed" if method.is_baseline else "dotted" if again else "solid"
            drawn.append(_series(method, axis, style, dash, quantity))
        title = f"{baseline} and methods on it" if len(methods) > 1 else baseline
        panels.append(Panel(title, summary.score, axis, tuple(drawn), quantity))
    return panels


def method_style(method: MethodSummary, place: int = 0) -> Style:
    """Return how a method is drawn beside its baseline.

    Args:
        method: The method.
        place: Its place in the panel, which decides where no technique does: for another optimizer.
    """
    if method.layers is not None:
        return _BY_LAYERS[method.layers]
    if method.norm is not None:
        # A method of one's own may have any normalization.
        return _BY_LAYERS.get(method.norm, _OTHERS[place % len(_OTHERS)])
    return _BY_TECHNIQUE.get(method.transforms, _OTHERS[place % len(_OTHERS)])


def _values(curve: Curve, quantity: Quantity) -> tuple[float, ...]:
    if quantity == "score":
        return curve.test_score
    values = curve.train_loss if quantity == "training loss" else curve.test_loss
    return tuple(value for value in values if value is not None)


def _series(method: MethodSummary, axis: Axis, style: Style, dash: str, quantity: Quantity) -> Series:
    values = [_values(curve, quantity) for curve in method.curves]
    # A diverged run ends early; the curve goes as far as every seed does.
    length = min(len(each) for each in values)
    at_epoch = [spread([each[index] for each in values]) for index in range(length)]
    most = 100.0 if quantity == "score" else math.inf
    # The median, as for the time ratios: one run that had to share the machine would bend the curve.
    seconds = tuple(median(curve.seconds[index] for curve in method.curves) for index in range(length))
    return Series(
        name=method.name,
        style=style,
        dash=dash,
        x=seconds if axis == "seconds" else tuple(float(index + 1) for index in range(length)),
        mean=tuple(point.mean for point in at_epoch),
        low=tuple(max(0.0, point.mean - (point.std or 0.0)) for point in at_epoch),
        high=tuple(min(most, point.mean + (point.std or 0.0)) for point in at_epoch),
    )


def draw_png(summary: Summary, axis: Axis, path: Path) -> None:
    """Draw the panels side by side.

    Args:
        summary: The comparison in numbers.
        axis: What is on the horizontal axis.
        path: The PNG file to write.
    """
    # Not pyplot: it would look for a screen and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = make_panels(summary, axis)
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for series in panel.series:
            axes.fill_between(series.x, series.low, series.high, color=series.style.light, alpha=0.13, linewidth=0)
            axes.plot(
                series.x,
                series.mean,
                color=series.style.light,
                linestyle=series.dash,
                marker=series.style.marker,
                markersize=4.5,
                linewidth=1.8,
                label=series.name,
            )
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel(AXIS_LABELS[axis])
        axes.set_ylabel(f"test {summary.score}, %")
        low, high = panel.y_range()
        axes.set_ylim(low, high + 0.02 * (high - low))  # room for a marker at the top
        if axis == "epochs":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xlim(left=0)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        columns = 1 if len(panel.series) <= 6 else 2
        axes.legend(loc="lower right", fontsize=9 if columns == 1 else 8, framealpha=0.9, ncols=columns)
    if summary.seeds > 1:
        figure.supxlabel(f"mean over {summary.seeds} seeds, band: ± 1 standard deviation", fontsize=8, color="#555555")
    canvas.print_figure(path, dpi=150)
