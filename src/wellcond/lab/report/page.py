"""Renders a comparison as one HTML page that is whole by itself."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from wellcond.lab.comparison.summary import Summary
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.report import charts, tables
from wellcond.lab.report.chart import Bars, Chart
from wellcond.lab.report.drawing import chart_svg, colours
from wellcond.lab.report.findings import describe_comparison, notes
from wellcond.lab.report.shares import method_shares
from wellcond.lab.report.table import NOTHING

FILES = {
    "results.json": "all numbers of this page, with the settings",
    "compare.toml": "the comparison, to repeat it or to change it: wellcond compare compare.toml",
    "epochs.csv": "every epoch of every run, for a spreadsheet",
    "curves-epochs.png": "the curves over epochs, as a picture",
    "curves-seconds.png": "the curves over training seconds, as a picture",
}
"""What lies beside the page, and what is in it."""


def render_report(
    summary: Summary,
    title: str,
    settings: dict[str, Any],
    command: str,
    versions: dict[str, str],
    machine: dict[str, str],
    file: str,
) -> str:
    """Return the report.

    Args:
        summary: The comparison in numbers.
        title: What was compared, in one line.
        settings: What was compared, the defaults filled in.
        command: The command line that made it.
        versions: Of Python and of the packages that decide the numbers.
        machine: Where the numbers were measured.
        file: Text of the file that repeats the comparison.

    Returns:
        An HTML page that is whole by itself; it links to the files that `write_results` puts beside it.
    """
    shown = tables.tables(summary)
    if summary.mode != "target":
        shown.append(tables.target_table(summary))
    shown.append(tables.training_table(summary))
    grids = tables.grid_tables(summary)
    kept = [table for method in summary.methods for table in tables.coverage_tables(method)]
    pictures = {section: drawn(made) for section, made in charts.report_charts(summary).items()}
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            title=title,
            settings=settings,
            command=command,
            file=file,
            versions=versions,
            machine=machine,
            findings=describe_comparison(summary),
            notes=notes(summary),
            tables=shown,
            grids=grids,
            kept=kept,
            learned=learned(summary),
            files=FILES,
            schedule=parse_schedule(settings["schedule"]).text(settings["warmup"]),
            **pictures,
        )
    )


def page_environment() -> Environment:
    """Return what renders the pages, with the filters and names that all of them use."""
    environment = Environment(
        loader=PackageLoader("wellcond.lab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["label"] = lambda key: key.replace("_", " ")
    environment.globals |= {"nothing": NOTHING, "colours": colours()}
    return environment


def drawn(shown: list[Chart] | list[Bars]) -> list[tuple[str, Any]]:
    """Return charts as a page takes them: each one's title and picture."""
    return [(chart.title, chart_svg(chart)) for chart in shown]


def learned(summary: Summary) -> list[dict[str, Any]]:
    """Return the shares of each method that has any, as pictures and a table."""
    made = []
    for method in summary.methods:
        shares = method_shares(method)
        if shares is not None:
            parts = [charts.share_bars(method.name, shares, part) for part in shares.parts]
            made.append(
                {
                    "name": method.name,
                    "lr": method.lr,
                    "seeds": len(shares.seeds),
                    "charts": drawn(parts),
                    "table": tables.shares_table(shares),
                }
            )
    return made
