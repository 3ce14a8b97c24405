"""The contents of a chart, apart from its drawing."""

from __future__ import annotations

from dataclasses import dataclass

from wellcond.lab.report.styles import Style


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
