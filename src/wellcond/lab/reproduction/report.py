"""A reproduced table as JSON, on the terminal and as one HTML page: the source's figures and ours side by side."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from wellcond.lab.comparison.statistics import Difference, Spread
from wellcond.lab.report.charts import Quantity, curves
from wellcond.lab.report.formats import (
    chosen_text,
    difference_text,
    quantity_text,
    ratio_text,
    signed_text,
    spread_text,
)
from wellcond.lab.report.page import drawn, learned, page_environment
from wellcond.lab.report.shares import method_shares
from wellcond.lab.report.table import NOTHING, Cell, ReportTable, Row
from wellcond.lab.report.tables import grid_tables
from wellcond.lab.reproduction.across import across_charts
from wellcond.lab.reproduction.reproduce import SECONDS, Figure, PanelResults, Reproduction
from wellcond.lab.runs.files import rounded, to_json, write_atomically
from wellcond.lab.runs.metric import Metric
from wellcond.runtime.texts import bytes_text

FORMAT = 1
"""The version of reproduce.json's layout."""

SEEN, CHANCE, OPPOSITE = "same direction, beyond chance", "within chance", "other direction, beyond chance"

_METRICS = {
    "error": Metric("error", higher_is_better=False),
    "disparity": Metric("disparity", unit="", higher_is_better=False),
    "condition": Metric("condition number", unit="", higher_is_better=False),
}
# As the sources have them.
_DIGITS = 2
# What the sources draw over epochs.
_DRAWN: tuple[Quantity, ...] = ("score", "training score", "training loss")
_HEADS = (
    "method",
    "source",
    "ours",
    "source's difference",
    "our difference",
    "at equal time",
    "time/step",
    "time/epoch",
    "memory",
    "lr",
    "verdict",
)


def write_reproduction(reproduction: Reproduction, folder: Path) -> list[Path]:
    """Write reproduce.json and the page.

    Args:
        reproduction: What to write.
        folder: Where to; it must exist.

    Returns:
        The files, the page first.
    """
    page, numbers = folder / "reproduce.html", folder / "reproduce.json"
    content = describe(reproduction)
    write_atomically(numbers, to_json(content))
    write_atomically(page, render_page(reproduction, content))
    return [page, numbers]


def print_reproduction(reproduction: Reproduction, console: Console) -> None:
    """Print a table a panel."""
    console.print(f"\n{headline(reproduction)}\n", style="bold", highlight=False)
    content = describe(reproduction)
    for panel in content["panels"]:
        table = panel_table(panel, content["score"])
        replace(table, caption=f"{panel['name']} ({panel['title']})").print(console)
        for note in panel["notes"]:
            console.print(f" - {note}", highlight=False, markup=False)
        console.print()
    for line in (line for claim in content["claims"] for line in claim["said"]):
        console.print(line, highlight=False, markup=False)


def headline(reproduction: Reproduction) -> str:
    """Return what was reproduced, in one line."""
    recipe = reproduction.recipe
    return f"{recipe.source}: {recipe.title} ({reproduction.scale} scale)"


def metric_of(score: str) -> Metric:
    """Return what a recipe's score is.

    Args:
        score: As `Recipe.score` has it.
    """
    return _METRICS.get(score, Metric(score))


def verdict(method: dict[str, Any]) -> str:
    """Return whether a method's difference points where the source's does, as far as chance lets one say it.

    Args:
        method: Of a panel in reproduce.json.

    Returns:
        A few words; nothing for a baseline.
    """
    if method["difference"] is None:
        return ""
    ours, source = Difference(**method["difference"]), method["paper_difference"]
    if ours.low is None:
        return "one seed"
    if not ours.beyond_chance:
        return CHANCE
    if not source:
        return "above its baseline, beyond chance" if ours.mean > 0 else "below its baseline, beyond chance"
    return SEEN if ours.mean * source > 0 else OPPOSITE


def panel_table(panel: dict[str, Any], score: str) -> ReportTable:
    """Return a panel in words, without the columns that hold nothing.

    Args:
        panel: Of reproduce.json.
        score: What its figures are, as `Recipe.score` has it.
    """
    by_label = {method["label"]: method for method in panel["methods"]}
    first = panel["methods"][0]["label"]
    rows = tuple(_row(method, by_label, first, metric_of(score)) for method in panel["methods"])
    text = quantity_text(metric_of(score).name, metric_of(score))
    caption = f"{panel['title']}; {panel['seeds']} paired seed{'s' if panel['seeds'] != 1 else ''}. {text}"
    if panel["seeds"] > 1:
        caption += ", mean ± standard deviation; our differences are paired over the seeds, with their 95 % interval"
    return ReportTable(panel["name"], caption, _HEADS, rows, worded=True).without_empty()


def _row(method: dict[str, Any], by_label: dict[str, dict[str, Any]], first: str, metric: Metric) -> Row:
    is_baseline = method["baseline"] == method["label"]
    ours, equal, source = method["ours"], method["equal_time"], method["paper_difference"]
    seconds = [
        by_label.get(label, {}).get("metrics", {}).get(SECONDS) for label in (method["label"], method["baseline"])
    ]
    epoch = seconds[0] / seconds[1] if seconds[0] and seconds[1] else None
    peak, step = method.get("peak_memory"), method.get("milliseconds_per_step")
    if is_baseline:
        costs = [
            NOTHING if step is None else f"{step:.2f} ms",
            NOTHING,
            NOTHING if peak is None else bytes_text(peak),
        ]
    else:
        costs = [ratio_text(ratio) for ratio in (method["time_ratio"], epoch, method.get("memory_ratio"))]
    cells = (
        _spread(method["paper"] and {"mean": method["paper"][0], "std": method["paper"][1], "count": 0}),
        _spread(ours),
        Cell(NOTHING if source is None else signed_text(source, _DIGITS)),
        _difference(method["difference"], metric),
        _difference(None if equal is None else equal["difference"], metric),
        *(Cell(cost) for cost in costs),
        Cell(chosen_text(method["lr"], method.get("lr_edge"), method.get("swept", {}), method.get("edges", {}))),
        Cell(verdict(method) or NOTHING),
    )
    label = method["label"] if method["baseline"] in (first, method["label"]) else against(method)
    return Row(label, cells, is_baseline)


def against(method: dict[str, Any]) -> str:
    """Return a method's name with its baseline's."""
    return f"{method['label']} (to {method['baseline']})"


def _spread(given: dict[str, Any] | None) -> Cell:
    return Cell(NOTHING if given is None else spread_text(Spread(**given), digits=_DIGITS))


def _difference(given: dict[str, Any] | None, metric: Metric) -> Cell:
    """Return a difference, coloured where it is beyond chance: by what is better, not by what is more."""
    difference = None if given is None else Difference(**given)
    text = difference_text(difference, digits=_DIGITS)
    if difference is None or not difference.beyond_chance:
        return Cell(text)
    return Cell(text, "up" if metric.sign * difference.mean > 0 else "down")


def render_page(reproduction: Reproduction, content: dict[str, Any]) -> str:
    """Return the reproduction as an HTML page that refers to nothing outside itself.

    Args:
        reproduction: What was run.
        content: What reproduce.json holds of it.
    """
    panels = [
        {
            "results": panel,
            "table": panel_table(described, content["score"]),
            "charts": drawn([chart for quantity in _DRAWN for chart in curves(panel.summary, "epochs", quantity)]),
            "grids": grid_tables(panel.summary)[:1],
            "metrics": _metrics_table(panel),
            "learned": learned(panel.summary),
        }
        for panel, described in zip(reproduction.panels, content["panels"], strict=True)
    ]
    return (
        page_environment()
        .get_template("reproduce.html.j2")
        .render(
            reproduction=reproduction,
            recipe=reproduction.recipe,
            panels=panels,
            across=drawn(across_charts(content["panels"], metric_of(content["score"]))) if content["claims"] else [],
        )
    )


def _metrics_table(panel: PanelResults) -> ReportTable:
    """Return the further figures: ours, and the source's in brackets where it gives one."""
    names = list(dict.fromkeys(name for figure in panel.figures for name in figure.metrics))

    def text(figure: Figure, name: str) -> str:
        ours = f"{figure.metrics[name]:.2f}" if name in figure.metrics else NOTHING
        return f"{ours} ({figure.paper_metrics[name]:.2f})" if name in figure.paper_metrics else ours

    rows = tuple(
        Row(figure.label, tuple(Cell(text(figure, name)) for name in names), figure.summary.is_baseline)
        for figure in panel.figures
    )
    caption = "Further figures after the last epoch, the source's in brackets"
    return ReportTable("Further figures", caption, ("method", *names), rows)


def describe(reproduction: Reproduction) -> dict[str, Any]:
    """Return everything that reproduce.json holds."""
    recipe = reproduction.recipe
    content = {
        "format": FORMAT,
        "recipe": recipe.name,
        "title": recipe.title,
        "source": recipe.source,
        "score": recipe.score,
        "scale": reproduction.scale,
        "data": reproduction.data,
        "command": reproduction.command,
        "versions": reproduction.versions,
        "machine": reproduction.machine,
        "panels": [_describe_panel(panel) for panel in reproduction.panels],
        "claims": [claim.describe() for claim in reproduction.claims],
    }
    described: dict[str, Any] = rounded(content)
    return described


def _describe_panel(panel: PanelResults) -> dict[str, Any]:
    return {
        "name": panel.name,
        "title": panel.title,
        "settings": panel.settings,
        "differs": panel.differs,
        "seeds": panel.summary.seeds,
        "notes": panel.notes,
        "methods": [_describe_figure(figure, panel.summary.epochs) for figure in panel.figures],
    }


def _describe_figure(figure: Figure, epochs: int) -> dict[str, Any]:
    method = figure.summary
    equal = method.equal_time
    return {
        "label": figure.label,
        "trained_with": method.recipe,
        "transforms": method.transforms,
        "norm": method.norm,
        "layers": method.layers,
        "baseline": method.baseline,
        "paper": figure.paper,
        "ours": None if figure.ours is None else asdict(figure.ours),
        "ends": figure.ends,
        "paper_difference": figure.paper_difference,
        "difference": None if figure.difference is None else asdict(figure.difference),
        "verdict": figure.verdict,
        "equal_time": None
        if equal is None or figure.equal_time is None
        else {"steps": equal.steps, "difference": asdict(figure.equal_time)},
        "lr": method.lr,
        "lr_edge": method.lr_edge,
        "swept": method.swept,
        "edges": method.edges,
        "milliseconds_per_step": method.milliseconds_per_step,
        "peak_memory": None if method.memory is None else method.memory.peak,
        "lr_grid": [
            {"lr": point.lr, **point.swept, "validation": point.validation_score, "diverged": point.diverged_runs}
            for point in method.lr_grid
        ],
        "time_ratio": method.time_ratio,
        "evaluation_ratio": method.evaluation_ratio,
        "memory_ratio": method.memory_ratio,
        "paper_metrics": figure.paper_metrics,
        "metrics": figure.metrics,
        "shares": None if (shares := method_shares(method)) is None else shares.describe(),
        "diverged_runs": method.diverged_runs,
        "epochs": epochs,
    }
