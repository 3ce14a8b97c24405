"""Lays out the charts of a comparison: curves, gain against cost, single seeds, trials, learned shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from wellcond.lab.comparison.statistics import Spread, spread
from wellcond.lab.comparison.summary import Curve, MethodSummary, Summary
from wellcond.lab.report.formats import (
    difference_text,
    exact_text,
    point_text,
    points_text,
    quantity_text,
    score_text,
    share_text,
)
from wellcond.lab.report.shares import SharesSummary

Axis = Literal["epochs", "seconds"]
Quantity = Literal["score", "training score", "training loss", "test loss"]
"""What a curve shows: a score of the test images or of the training batches, or a mean loss."""

_OVER: dict[Axis, str] = {"epochs": "epoch", "seconds": "training seconds"}
# More names than these below an axis would run into each other; the legend has them all.
_NAMED = 4


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


@dataclass(frozen=True)
class Series:
    """The line of one method in a chart.

    Attributes:
        name: The method.
        style: How it is drawn.
        x: Places on the horizontal axis.
        y: Places on the vertical axis.
        low: Lower ends of the intervals; empty for none.
        high: Their upper ends.
        said: What is said of each point when it is pointed at.
        line: Style of the line that joins the points; empty for none.
        chosen: The place of the point that has a ring; None for none.
    """

    name: str
    style: Style
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    said: tuple[str, ...] = ()
    line: str = ""
    chosen: int | None = None


@dataclass(frozen=True)
class Chart:
    """Series over one pair of axes.

    Attributes:
        title: What is shown.
        x_label: What is on the horizontal axis.
        y_label: What is on the vertical axis, with its unit.
        series: The methods.
        y_range: The lowest and highest value to show; None fits what there is.
        marks: (place, text) below the horizontal axis; empty for numbers.
        whole: Whether only whole numbers stand below the horizontal axis.
        band: Whether intervals are a band around a line rather than bars.
        zero: Whether a line marks no difference.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_range: tuple[float, float] | None = None
    marks: tuple[tuple[float, str], ...] = ()
    whole: bool = False
    band: bool = False
    zero: bool = False


@dataclass(frozen=True)
class Bars:
    """Stacked bars: the shares of each layer, and apart from them their average.

    Attributes:
        title: What is shown.
        parts: (name, style, one height a layer, that of the average, what is said of each) of each part, from below.
    """

    title: str
    parts: tuple[tuple[str, Style, tuple[float, ...], float, tuple[str, ...]], ...]


def curves(summary: Summary, axis: Axis, quantity: Quantity = "score") -> list[Chart]:
    """Return one chart for each baseline with the methods measured against it, without those that have no curve.

    Args:
        summary: The comparison in numbers.
        axis: What is on the horizontal axis.
        quantity: What is on the vertical axis.
    """
    charts = []
    for baseline, methods in summary.families().items():
        drawn: list[Series] = []
        for place, method in enumerate(methods):
            style = method_style(method, place)
            # A technique that comes twice in a chart, on another optimizer or in another form, is dotted from then on.
            again = any(series.style == style for series in drawn)
            line = "dashed" if method.is_baseline else "dotted" if again else "solid"
            drawn.append(_curve(summary, method, axis, quantity, style, line))
        if not any(series.y for series in drawn):
            continue
        what = {"score": f"test {summary.score}", "training score": f"training {summary.score}"}.get(quantity, quantity)
        is_score = quantity.endswith("score")
        charts.append(
            Chart(
                title=f"{_family(baseline, methods)}: {what} over {'epochs' if axis == 'epochs' else _OVER[axis]}",
                x_label=_OVER[axis],
                y_label=quantity_text(what, summary.metric) if is_score else what,
                series=tuple(drawn),
                y_range=_range(drawn, is_score and summary.metric.is_percentage, is_score),
                whole=axis == "epochs",
                band=True,
            )
        )
    return charts


_CURVES: tuple[tuple[Quantity, Axis], ...] = (
    ("score", "epochs"),
    ("score", "seconds"),
    ("training score", "epochs"),
    ("training loss", "epochs"),
    ("test loss", "epochs"),
)


def report_charts(summary: Summary) -> dict[str, list[Chart]]:
    """Return the charts of a comparison's page, by its sections."""
    return {
        "curves": [chart for quantity, axis in _CURVES for chart in curves(summary, axis, quantity)],
        "gains": gains(summary),
        "timed": timed(summary),
        "seeds": seeds(summary),
        "trials": trials(summary),
    }


def _family(baseline: str, methods: Sequence[MethodSummary]) -> str:
    return f"{baseline} and methods on it" if len(methods) > 1 else baseline


_VALUES: dict[Quantity, Callable[[Curve], tuple[float | None, ...]]] = {
    "score": lambda curve: curve.test_score,
    "training score": lambda curve: curve.train_score,
    "training loss": lambda curve: curve.train_loss,
    "test loss": lambda curve: curve.test_loss,
}


def _curve(summary: Summary, method: MethodSummary, axis: Axis, quantity: Quantity, style: Style, line: str) -> Series:
    """Return the mean over the seeds (at median seconds), and one standard deviation to either side."""
    values = [[value for value in _VALUES[quantity](curve) if value is not None] for curve in method.curves]
    # A diverged run ends early; the curve goes as far as every seed does.
    length = min((len(each) for each in values), default=0)
    points = [spread([each[index] for each in values]) for index in range(length)]
    # The median, as for the time ratios: one run that had to share the machine would bend the curve.
    seconds = tuple(median(curve.seconds[index] for curve in method.curves) for index in range(length))
    x = seconds if axis == "seconds" else tuple(float(index + 1) for index in range(length))
    is_score = quantity.endswith("score")
    percentage = summary.metric.is_percentage
    lowest = -math.inf if is_score and not percentage else 0.0
    highest = 100.0 if is_score and percentage else math.inf
    return Series(
        name=method.name,
        style=style,
        x=x,
        y=tuple(point.mean for point in points),
        low=tuple(max(lowest, point.mean - (point.std or 0.0)) for point in points),
        high=tuple(min(highest, point.mean + (point.std or 0.0)) for point in points),
        said=tuple(
            f"{score_text(point.mean, summary.metric) if is_score else f'{point.mean:.4g}'} at {place:.4g}"
            for place, point in zip(x, points, strict=True)
        ),
        line=line,
    )


def _range(series: Iterable[Series], percentage: bool, is_score: bool) -> tuple[float, float] | None:
    """Return what to show: of percentages, whole tens that differ; of losses, from zero to the highest mean."""
    if percentage:
        lowest = min((value for one in series for value in one.low), default=0.0)
        highest = max((value for one in series for value in one.high), default=100.0)
        low = 10.0 * min(9, lowest // 10)
        return low, max(low + 10.0, min(100.0, 10.0 * (highest // 10 + 1)))
    means = [value for one in series for value in one.y]
    if is_score or min(means) < 0:
        return None
    # Of the means: a band may be wide where one seed's loss leapt.
    return 0.0, 1.05 * max(means) or 1.0


def gains(summary: Summary) -> list[Chart]:
    """Return, for each baseline, what each method gains at the end over what a step costs; none without times."""
    charts, unit = [], points_text(summary.metric)
    for baseline, methods in summary.families().items():
        drawn = []
        for place, method in enumerate(methods):
            gain, cost = method.final_difference, 1.0 if method.is_baseline else method.time_ratio
            if cost is None or (gain is None and not method.is_baseline):
                continue
            mean = 0.0 if gain is None else gain.mean
            ends = [] if gain is None or gain.low is None or gain.high is None else [(gain.low, gain.high)]
            text = "the baseline" if gain is None else f"{difference_text(gain, summary.metric)} {unit}".strip()
            drawn.append(
                Series(
                    name=method.name,
                    style=method_style(method, place),
                    x=(cost,),
                    y=(mean,),
                    low=tuple(low for low, _ in ends),
                    high=tuple(high for _, high in ends),
                    said=(f"x {cost:.2f}, {text}",),
                )
            )
        if len(drawn) > 1:
            label = f"difference in {unit}" if unit else "difference"
            charts.append(Chart(_family(baseline, methods), f"time/step, x {baseline}", label, tuple(drawn), zero=True))
    return charts


def seeds(summary: Summary) -> list[Chart]:
    """Return, for each family, the test score of every seed after the last epoch; none if there is one seed.

    A run that diverged has no point.
    """
    charts = []
    for baseline, methods in summary.families().items() if summary.seeds > 1 else ():
        drawn = []
        for place, method in enumerate(methods):
            ends = [
                (curve.seed, curve.test_score[-1]) for curve in method.curves if curve.seed not in method.unfinished
            ]
            width = 0.6 / max(1, len(method.curves) - 1)
            drawn.append(
                Series(
                    name=method.name,
                    style=method_style(method, place),
                    x=tuple(place - 0.3 + width * seed for seed, _ in ends),
                    y=tuple(score for _, score in ends),
                    said=tuple(f"seed {seed}: {exact_text(score, summary.metric)}" for seed, score in ends),
                )
            )
        named = len(methods) <= _NAMED
        marks = tuple((float(place), method.name if named else "") for place, method in enumerate(methods))
        charts.append(
            Chart(
                title=f"{_family(baseline, methods)}: every seed after epoch {summary.epochs}",
                x_label="seeds, from left to right",
                y_label=quantity_text(f"test {summary.score}", summary.metric),
                series=tuple(drawn),
                marks=marks,
            )
        )
    return [chart for chart in charts if any(series.y for series in chart.series)]


def trials(summary: Summary) -> list[Chart]:
    """Return, for each family, the mean validation score over the grids; none if every method tried one lr.

    A trial of which a run diverged has no point.
    """
    charts = []
    for baseline, methods in summary.families().items():
        drawn = []
        for place, method in enumerate(methods):
            tried = [(point, score) for point in method.lr_grid if (score := point.validation_score) is not None]
            chosen = [index for index, (point, _) in enumerate(tried) if point.chosen]
            drawn.append(
                Series(
                    name=method.name,
                    style=method_style(method, place),
                    x=tuple(math.log10(point.lr) for point, _ in tried),
                    y=tuple(score for _, score in tried),
                    said=tuple(f"{point_text(point)}: {exact_text(score, summary.metric)}" for point, score in tried),
                    # With other options swept there is more than one point at an lr.
                    line="" if any(point.swept for point, _ in tried) else "solid",
                    chosen=chosen[0] if chosen else None,
                )
            )
        lrs = sorted({point.lr for method in methods for point in method.lr_grid})
        every = -(-len(lrs) // 8)
        charts.append(
            Chart(
                title=f"{_family(baseline, methods)}: how much hangs on the lr",
                x_label="lr",
                y_label=quantity_text(f"validation {summary.score}", summary.metric),
                series=tuple(drawn),
                marks=tuple((math.log10(lr), f"{lr:g}") for lr in lrs[::every]),
            )
        )
    return [chart for chart in charts if len(chart.marks) > 1 and any(series.y for series in chart.series)]


def timed(summary: Summary) -> list[Chart]:
    """Return, for each family, the score at each share of the baseline's time; none for fewer than two shares."""
    charts = []
    for baseline, methods in summary.families().items():
        drawn = []
        for place, method in enumerate(methods):
            points = sorted(_at_shares(method, summary.epochs).items())
            drawn.append(
                Series(
                    name=method.name,
                    style=method_style(method, place),
                    x=tuple(share for share, _ in points),
                    y=tuple(score.mean for _, score in points),
                    low=tuple(score.mean - (score.std or 0.0) for _, score in points),
                    high=tuple(score.mean + (score.std or 0.0) for _, score in points),
                    said=tuple(f"{score_text(score.mean, summary.metric)} at x {share:g}" for share, score in points),
                    line="dashed" if method.is_baseline else "solid",
                )
            )
        if max(len(series.x) for series in drawn) > 1:
            label = quantity_text(f"test {summary.score}", summary.metric)
            charts.append(
                Chart(_family(baseline, methods), f"time, x a full run of {baseline}", label, tuple(drawn), band=True)
            )
    return charts


def _at_shares(method: MethodSummary, epochs: int) -> dict[float, Spread]:
    """Return a method's score at each share of the baseline's time that was compared, a full run's with it."""
    equal = method.equal_time
    full = method.scores[epochs] if method.is_baseline else None if equal is None else equal.score
    return {shorter.share: shorter.score for shorter in method.shares} | ({} if full is None else {1.0: full})


def share_bars(name: str, shares: SharesSummary, part: str) -> Bars:
    """Return the shares in the means or in the variances: a bar for each layer, and their average.

    Args:
        name: The method.
        shares: Its shares.
        part: One of `SharesSummary.parts`.
    """
    parts = []
    for kind in shares.kinds:
        spreads = [shares.of_layer(layer, part, kind) for layer in shares.layers]
        average = shares.average(part, kind)
        places = [f"layer {index}, {layer}" for index, layer in enumerate(shares.layers, start=1)]
        said = [
            f"{place}: {share_text(share)}"
            for place, share in zip([*places, "average over layers"], [*spreads, average], strict=True)
        ]
        heights = tuple(share.mean for share in spreads)
        parts.append((kind.upper(), SHARE_STYLES[kind], heights, average.mean, tuple(said)))
    return Bars(f"{name}, {shares.parts[part]}", tuple(parts))
