"""Lays out the charts that set a recipe's panels side by side: scores, and learned shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wellcond.lab.report.chart import Chart, Series
from wellcond.lab.report.formats import quantity_text
from wellcond.lab.report.shares import PARTS
from wellcond.lab.report.styles import BASELINE, SHARE_STYLES, Style, style_of
from wellcond.lab.runs.metric import Metric


def across_charts(panels: Sequence[Mapping[str, Any]], metric: Metric) -> list[Chart]:
    """Return the score of each method in each panel, and what each that learns shares has learned.

    Args:
        panels: Of reproduce.json; methods that some of them do not have are left out.
        metric: What the scores are.
    """
    by_label = [{method["label"]: method for method in panel["methods"]} for panel in panels]
    rows = {
        label: [methods[label] for methods in by_label]
        for label in by_label[0]
        if all(label in methods for methods in by_label)
    }
    scores = [
        (name, _style(row[0], place), [method["ours"] for method in row])
        for place, (name, row) in enumerate(rows.items())
    ]
    charts = [_chart("Score over panels", quantity_text(f"test {metric.name}", metric), panels, scores)]
    for name, row in rows.items():
        if not all(method.get("shares") for method in row):
            continue
        averages = [method["shares"]["average"] for method in row]
        for part, called in PARTS.items():
            learned = [
                (kind.upper(), SHARE_STYLES[kind], [average[part][kind] for average in averages])
                for kind in averages[0][part]
            ]
            charts.append(_chart(f"{name}'s shares in the {called}", "share, average over layers", panels, learned))
    return charts


def _chart(
    title: str,
    label: str,
    panels: Sequence[Mapping[str, Any]],
    rows: Sequence[tuple[str, Style, Sequence[Mapping[str, Any] | None]]],
) -> Chart:
    """Return a chart of what each row has in each panel: a mean and a standard deviation, or None."""
    series = []
    for rank, (name, style, spreads) in enumerate(rows):
        # Side by side, so that error bars do not hide each other.
        shift = 0.05 * (rank - (len(rows) - 1) / 2)
        points = [(place + shift, found) for place, found in enumerate(spreads) if found is not None]
        ends = [(found["mean"], found["std"] or 0.0) for _, found in points]
        series.append(
            Series(
                name=name,
                style=style,
                x=tuple(place for place, _ in points),
                y=tuple(mean for mean, _ in ends),
                low=tuple(mean - std for mean, std in ends),
                high=tuple(mean + std for mean, std in ends),
                said=tuple(f"{mean:.4g}" for mean, _ in ends),
                line="dashed" if style == BASELINE else "solid",
            )
        )
    marks = tuple((float(place), panel["name"]) for place, panel in enumerate(panels))
    return Chart(title, "panel", label, tuple(series), marks=marks)


def _style(method: Mapping[str, Any], place: int) -> Style:
    is_baseline = method["label"] == method["baseline"]
    return style_of(is_baseline, tuple(method["transforms"]), method["layers"] or method["norm"], place)
