"""A reproduced table on the terminal and as one HTML page: the source's figures and ours side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from wellcond.lab.comparison.statistics import Difference
from wellcond.lab.report import formats
from wellcond.lab.report.curves import make_panels
from wellcond.lab.report.formats import NOTHING
from wellcond.lab.report.page import page_environment
from wellcond.lab.report.svg import css_class, draw_key, draw_svg
from wellcond.lab.reproduction.reproduce import Figure, PanelResults, Reproduction, describe
from wellcond.lab.runs.records import write_atomically

_LARGE = 1000.0
_HEADS = (
    "source",
    "ours",
    "source's\ndifference",
    "our\ndifference",
    "at equal\ntime",
    "time/step",
    "memory",
    "lr",
    "direction",
)


@dataclass(frozen=True)
class Row:
    """A method of a panel in words; the cells are in the order of the columns."""

    label: str
    is_baseline: bool
    cells: tuple[str, ...]
    kinds: tuple[str, ...]


def write_reproduction(reproduction: Reproduction, folder: Path) -> list[Path]:
    """Write reproduce.json and the page.

    Args:
        reproduction: What to write.
        folder: Where to; it must exist.

    Returns:
        The files, the page first.
    """
    page, numbers = folder / "reproduce.html", folder / "reproduce.json"
    write_atomically(numbers, to_json(reproduction))
    write_atomically(page, render_page(reproduction))
    return [page, numbers]


def to_json(reproduction: Reproduction) -> str:
    """Return the reproduction as reproduce.json holds it."""
    return json_text(describe(reproduction))


def json_text(content: dict[str, Any]) -> str:
    """Return a reproduction as JSON, one method a line: small, and still to be read by eye.

    Args:
        content: What reproduce.json holds.
    """
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key != "panels"]
    written = []
    for panel in content["panels"]:
        methods = ",\n".join(json.dumps(method) for method in panel["methods"])
        less = {key: value for key, value in panel.items() if key != "methods"}
        written.append(f'{json.dumps(less)[:-1]}, "methods": [\n{methods}\n]}}')
    return "{\n" + ",\n".join([*lines, '"panels": [\n' + ",\n".join(written) + "\n]"]) + "\n}\n"


def print_reproduction(reproduction: Reproduction, console: Console) -> None:
    """Print a table a panel."""
    console.print(f"\n{headline(reproduction)}\n", style="bold", highlight=False)
    for panel in reproduction.panels:
        console.print(f"{panel.name} ({panel.title})", style="italic", highlight=False)
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column(score_head(reproduction), no_wrap=True)
        shown = shown_columns(panel)
        for index in shown:
            table.add_column(_HEADS[index], justify="right", overflow="fold")
        for row in rows_of(panel):
            table.add_row(row.label, *(row.cells[index] for index in shown), style="dim" if row.is_baseline else None)
        console.print(table)
        for note in panel.notes:
            console.print(f" - {note}", highlight=False, markup=False)
        console.print()


def headline(reproduction: Reproduction) -> str:
    """Return what was reproduced, in one line."""
    recipe = reproduction.recipe
    return f"{recipe.source}: {recipe.title} ({reproduction.scale} scale)"


def score_head(reproduction: Reproduction) -> str:
    """Return what the figures are, with their unit."""
    score = reproduction.recipe.score
    return {"error": "error in %", "condition": "condition number"}.get(score, formats.score_text(score))


def rows_of(panel: PanelResults) -> list[Row]:
    """Return a panel's methods in words."""
    return [
        Row(
            figure.label,
            figure.summary.is_baseline,
            (
                figure_text(*figure.paper) if figure.paper else NOTHING,
                figure_text(figure.ours.mean, figure.ours.std) if figure.ours else NOTHING,
                NOTHING if figure.paper_difference is None else _signed(figure.paper_difference),
                difference_text(figure.difference),
                difference_text(figure.equal_time),
                formats.time_text(figure.summary),
                formats.memory_ratio_text(figure.summary),
                formats.lr_text(figure.summary),
                figure.verdict or NOTHING,
            ),
            ("", "", "", _kind(figure.difference), _kind(figure.equal_time), "", "", "", ""),
        )
        for figure in panel.figures
    ]


def shown_columns(panel: PanelResults) -> list[int]:
    """Return which columns hold anything; what we measured is always shown."""
    rows = rows_of(panel)
    return [index for index in range(len(_HEADS)) if index == 1 or any(row.cells[index] != NOTHING for row in rows)]


def figure_text(mean: float, std: float | None) -> str:
    """Return a mean with its standard deviation, to two digits as the sources have them; three of a large number.

    >>> figure_text(76.87, 0.26), figure_text(23.71, None), figure_text(1.7e6, None)
    ('76.87 ± 0.26', '23.71', '1.7e+06')
    """
    if abs(mean) >= _LARGE:
        return f"{mean:.3g}" if std is None else f"{mean:.3g} ± {std:.2g}"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def difference_text(difference: Difference | None) -> str:
    """Return a signed difference with its interval, to two digits.

    >>> difference_text(Difference(1.954, 0.5, 3.4, 3))
    '+1.95 [+0.50, +3.40]'
    """
    if difference is None:
        return NOTHING
    if difference.low is None or difference.high is None:
        return _signed(difference.mean)
    return f"{_signed(difference.mean)} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if abs(value) >= _LARGE else f"{round(value, 2) + 0.0:+.2f}"


def _kind(difference: Difference | None) -> str:
    """Return how a difference is coloured: only where it is beyond chance."""
    if difference is None or not difference.beyond_chance:
        return ""
    return "up" if difference.mean > 0 else "down"


def render_page(reproduction: Reproduction) -> str:
    """Return the reproduction as an HTML page that refers to nothing outside itself."""
    drawn = {panel.name: make_panels(panel.summary, "epochs") for panel in reproduction.panels}
    styles = {
        css_class(series.style): series.style
        for charts in drawn.values()
        for chart in charts
        for series in chart.series
    }
    return (
        page_environment()
        .get_template("reproduce.html.j2")
        .render(
            reproduction=reproduction,
            recipe=reproduction.recipe,
            headline=headline(reproduction),
            score=score_head(reproduction),
            panels=[_page_panel(panel, drawn[panel.name]) for panel in reproduction.panels],
            colours=styles,
            nothing=NOTHING,
        )
    )


def _page_panel(panel: PanelResults, charts: list[Any]) -> dict[str, Any]:
    shown = shown_columns(panel)
    metrics = list(dict.fromkeys(name for figure in panel.figures for name in figure.metrics))
    return {
        "results": panel,
        "heads": [_HEADS[index].replace("\n", " ") for index in shown],
        "rows": [
            (row.label, row.is_baseline, [(row.cells[index], row.kinds[index]) for index in shown])
            for row in rows_of(panel)
        ],
        "metric_heads": metrics,
        "metric_rows": [(figure.label, [_metric_cell(figure, name) for name in metrics]) for figure in panel.figures],
        "charts": [
            {
                "title": chart.title,
                "svg": draw_svg(chart),
                "keys": [(draw_key(series), series.name) for series in chart.series],
            }
            for chart in charts
        ],
        "grids": [
            (
                figure.label,
                [(point.lr, point.validation_score, point.lr == figure.summary.lr) for point in figure.summary.lr_grid],
            )
            for figure in panel.figures
        ],
    }


def _metric_cell(figure: Figure, name: str) -> str:
    """Return a metric: ours, and the source's in brackets where it gives one."""
    ours = f"{figure.metrics[name]:.2f}" if name in figure.metrics else NOTHING
    return f"{ours} ({figure.paper_metrics[name]:.2f})" if name in figure.paper_metrics else ours
