"""Draws charts with matplotlib, as SVG for pages and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup, escape

from wellcond.lab.report.chart import Bars, Chart, Series
from wellcond.lab.report.styles import STYLES, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# On white paper, and the style sheet's variables in their place on a page.
_TEXT, _GRID = "#5b6570", "#d9dee3"
# In inches of 72 units: on a phone a unit is about a pixel, so that letters of ten units can be read.
_WIDTH, _HEIGHT, _LEGEND_ROW = 4.6, 3.1, 0.2
_LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "xtick.major.pad": 6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.markersize": 5,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def colours() -> dict[str, Style]:
    """Return the style of each colour's variable, which a page's style sheet has to set."""
    return {_variable(style.light): style for style in STYLES}


def _variable(colour: str) -> str:
    return f"--c-{colour.removeprefix('#')}"


def chart_svg(chart: Chart | Bars) -> Markup:
    """Return a chart with its legend as an SVG element in the colours of the page.

    Each point says its number when pointed at.
    """
    texts: dict[str, Sequence[str]] = {}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        if isinstance(chart, Bars):
            _draw_bars(axes, chart, texts)
        else:
            _draw(axes, chart, texts)
        handles, names = axes.get_legend_handles_labels()
        columns = 2 if max(map(len, names)) > 12 else 3
        figure.set_figheight(_HEIGHT + _LEGEND_ROW * -(-len(names) // columns))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)

    about = chart.title if isinstance(chart, Bars) else f"{chart.title}: {chart.y_label} over {chart.x_label}"
    svg = in_page_colours(figure_svg(draw, about, (_WIDTH, _HEIGHT)))
    return Markup(_with_titles(svg, texts))


def in_page_colours(svg: str) -> str:
    """Return a picture whose colours are the variables of the page's style sheet, which has a light and a dark set."""
    known = {_TEXT: "--quiet", _GRID: "--line"} | {style.light: name for name, style in colours().items()}
    return re.sub("#[0-9a-f]{6}", lambda colour: f"var({known[colour[0]]})" if colour[0] in known else colour[0], svg)


def figure_svg(draw: Callable[[Figure], None], label: str, size: tuple[float, float]) -> str:
    """Return what a function draws on a figure as an SVG element, with text as text and without a size of its own.

    Args:
        draw: Is called with the figure.
        label: What it shows, for readers who do not see it; it also tells its inner names from another figure's.
        size: Width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_LOOK, "svg.hashsalt": label}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(
            buffer, format="svg", dpi=100, transparent=True, metadata={"Date": None, "Creator": None, "Format": None}
        )
    svg = buffer.getvalue()
    head, mark, body = svg[svg.index("<svg") :].partition(">")
    view = re.findall(r'viewBox="[^"]*"', head)[0]
    return f'<svg {view} role="img" aria-label="{escape(label)}"{mark}{_shrunk(body)}'


def draw_png(
    charts: Sequence[Chart], path: Path, note: str = "", metadata: Mapping[str, str | None] | None = None
) -> None:
    """Draw charts side by side.

    Args:
        charts: The charts.
        path: The PNG file to write.
        note: What is said below them.
        metadata: What the file says of itself.
    """
    # Not pyplot: it would look for a screen and keep global state.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(5.5 * max(1, len(charts)), 4.2), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for index, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(1, len(charts), index)
            _draw(axes, chart, {})
            axes.set_title(chart.title.partition(":")[0])
            columns = 1 if len(chart.series) <= 6 else 2
            axes.legend(fontsize=9 if columns == 1 else 8, frameon=True, framealpha=0.9, ncols=columns)
        if not charts:
            figure.text(0.5, 0.5, "no run came to the end of an epoch", ha="center")
        if note:
            figure.supxlabel(note, fontsize=8)
        canvas.print_figure(path, dpi=150, format="png", metadata=metadata)


def _draw(axes: Axes, chart: Chart, texts: dict[str, Sequence[str]]) -> None:
    """Draw a chart; `texts` takes what is said of the points of each line, by the line's name in the picture."""
    from matplotlib.ticker import MaxNLocator

    if chart.zero:
        axes.axhline(0.0, color=_TEXT, linewidth=1.2)
    for index, series in enumerate(chart.series):
        name = f"series{index}"
        texts[name] = [f"{series.name}, {said}" for said in series.said]
        _draw_series(axes, series, chart.band, name)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.y_range is not None:
        low, high = chart.y_range
        axes.set_ylim(low, high + 0.02 * (high - low))  # room for a marker at the top
    if chart.marks:
        axes.set_xticks([place for place, _ in chart.marks], [text for _, text in chart.marks])
        axes.grid(visible=False, axis="x")
    elif chart.whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    elif not chart.x_label.endswith("seconds"):
        # Ratios near each other have long labels: more of them would run into one another.
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    if chart.x_label.endswith("seconds"):
        axes.set_xlim(left=0)


def _draw_series(axes: Axes, series: Series, band: bool, name: str) -> None:
    style: dict[str, Any] = {"color": series.style.light}
    if series.low and band:
        axes.fill_between(series.x, series.low, series.high, alpha=0.13, linewidth=0, **style)
    elif series.low:
        below = [y - low for y, low in zip(series.y, series.low, strict=True)]
        above = [high - y for y, high in zip(series.y, series.high, strict=True)]
        axes.errorbar(series.x, series.y, [below, above], fmt="none", capsize=4, elinewidth=1.4, **style)
    line = series.line or "none"
    axes.plot(series.x, series.y, linestyle=line, marker=series.style.marker, label=series.name, gid=name, **style)
    if series.chosen is not None:
        place = [series.x[series.chosen]], [series.y[series.chosen]]
        axes.plot(*place, "o", markersize=12, fillstyle="none", markeredgewidth=1.3, gid=f"ring-{name}", **style)


def _draw_bars(axes: Axes, bars: Bars, texts: dict[str, Sequence[str]]) -> None:
    layers = len(bars.parts[0][2])
    # The average stands apart from the layers, and is wider.
    places, widths = [*range(1, layers + 1), layers + 2.0], [0.8] * layers + [1.4]
    bottom = [0.0] * (layers + 1)
    for index, (kind, style, heights, average, said) in enumerate(bars.parts):
        tops = [*heights, average]
        drawn = axes.bar(places, tops, widths, bottom, color=style.light, label=kind)
        for place, (bar, text) in enumerate(zip(drawn, said, strict=True)):
            bar.set_gid(f"bar{index}-{place}")
            texts[f"bar{index}-{place}"] = [f"{text} ({kind})"]
        if average >= 0.06:
            # Named at the average's bar: the legend alone would leave it to colours.
            axes.text(layers + 2.85, bottom[-1] + average / 2, kind, va="center", fontsize=9)
        bottom = [low + height for low, height in zip(bottom, tops, strict=True)]
    every = -(-layers // 12)
    axes.set_xticks([*range(1, layers + 1, every), layers + 2], [*map(str, range(1, layers + 1, every)), "all"])
    axes.set_xlim(0.4, layers + 3.6)
    axes.set_ylim(0, 1)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("share")


def _with_titles(svg: str, texts: Mapping[str, Sequence[str]]) -> str:
    """Return a picture whose markers say texts when pointed at.

    Args:
        svg: The picture.
        texts: From the name of a group to what its markers say, or what its one path does.
    """
    root = ElementTree.fromstring(svg)
    for group in root.iter("g"):
        said = texts.get(group.get("data-name", ""), ())
        marks = list(group.iter("use")) or list(group.iter("path"))
        # A marker beyond the picture is not drawn, and then it is not known which are.
        for mark, text in zip(marks, said, strict=False) if len(marks) == len(said) else ():
            ElementTree.SubElement(mark, "title").text = text
    return ElementTree.tostring(root, encoding="unicode")


def _shrunk(svg: str) -> str:
    """Leave out what decides nothing: comments, metadata, names, lists of fonts, digits beyond a hundredth."""
    # The style would be of the whole page.
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    # Names of groups are the same in every picture of a page; those given here stay, as what they are.
    svg = re.sub(r'<g id="((?:series|ring|bar)[^"]*)"', r'<g data-name="\1"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"(font-family:|font: [\d.]+px) '[^;\"]*sans-serif", r"\1 sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(?<= [dxy]=")[^"]*(?=")', lambda places: re.sub(r"(\.\d\d)\d+", r"\1", places[0]), svg)
    return re.sub(r"\n\s*", "\n", svg)
