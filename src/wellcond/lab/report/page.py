"""The comparison as one self-contained HTML page."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from wellcond.lab.comparison.summary import MethodSummary, Summary
from wellcond.lab.methods.schedule import parse_schedule
from wellcond.lab.report import formats
from wellcond.lab.report.curves import Axis, Panel, Quantity, make_panels
from wellcond.lab.report.dots import DotPanel, draw_dot_key, draw_dots, lr_panels, seed_panels
from wellcond.lab.report.findings import findings, notes
from wellcond.lab.report.scatter import Scatter, draw_point_key, draw_scatter, make_scatters
from wellcond.lab.report.share_bars import SHARE_STYLES, draw_share_key, draw_shares, share_class
from wellcond.lab.report.shares import method_shares
from wellcond.lab.report.svg import css_class, draw_key, draw_svg

FILES = {
    "results.json": "all numbers of this page, with the settings",
    "compare.toml": "the comparison, to repeat it or to change it: wellcond compare compare.toml",
    "epochs.csv": "every epoch of every run, for a spreadsheet",
    "curves-epochs.png": "the curves over epochs, as a picture",
    "curves-seconds.png": "the curves over training seconds, as a picture",
}
"""What lies beside the page, and what is in it."""

_CHARTS: tuple[tuple[Quantity, Axis], ...] = (
    ("score", "epochs"),
    ("score", "seconds"),
    ("training loss", "epochs"),
    ("test loss", "epochs"),
)


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
    environment = page_environment()
    panels = [
        panel
        for quantity, axis in _CHARTS
        for panel in make_panels(summary, axis, quantity)
        if any(series.mean for series in panel.series) or quantity == "score"
    ]
    scatters = make_scatters(summary)
    learned = [shares for method in summary.methods if (shares := _learned(method)) is not None]
    styles = {css_class(series.style): series.style for panel in panels for series in panel.series}
    if learned:
        styles |= {share_class(kind): style for kind, style in SHARE_STYLES.items()}
    return environment.get_template("report.html.j2").render(
        summary=summary,
        title=title,
        settings=settings,
        command=command,
        file=file,
        versions=versions,
        machine=machine,
        findings=findings(summary),
        notes=notes(summary),
        nothing=formats.NOTHING,
        target_text=formats.target_text,
        charts=[_chart(panel) for panel in panels],
        scatters=[_scatter_chart(scatter) for scatter in scatters],
        seed_charts=[_dot_chart(panel) for panel in seed_panels(summary)],
        lr_charts=[_dot_chart(panel) for panel in lr_panels(summary)],
        files=FILES,
        kept=[method for method in summary.methods if method.coverage],
        learned=learned,
        schedule=parse_schedule(settings["schedule"]).text(settings["warmup"]),
        colours=styles,
        recipes={method.name: method.recipe for method in summary.methods},
    )


def page_environment() -> Environment:
    """Return what renders the pages, with the filters that write numbers."""
    environment = Environment(
        loader=PackageLoader("wellcond.lab.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "score": formats.score_text,
        "spread": formats.spread_text,
        "difference": formats.difference_text,
        "lr": formats.lr_text,
        "time": formats.time_text,
        "evaluation": formats.evaluation_text,
        "epoch": formats.epoch_text,
        "memory": formats.memory_text,
        "state": formats.state_text,
        "bytes": formats.bytes_text,
        "label": lambda key: key.replace("_", " "),
    }
    return environment


def _chart(panel: Panel) -> dict[str, Any]:
    over = "epochs" if panel.axis == "epochs" else "training seconds"
    what = f"test {panel.score}" if panel.quantity == "score" else panel.quantity
    return {
        "title": f"{panel.title}: {what} over {over}",
        "svg": draw_svg(panel),
        "keys": [(draw_key(series), series.name) for series in panel.series],
    }


def _scatter_chart(scatter: Scatter) -> dict[str, Any]:
    return {
        "title": f"{scatter.baseline} and methods on it",
        "svg": draw_scatter(scatter),
        "keys": [(draw_point_key(point), point.name) for point in scatter.points],
    }


def _dot_chart(panel: DotPanel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "svg": draw_dots(panel),
        "keys": [(draw_dot_key(dots), dots.name) for dots in panel.dots],
    }


def _learned(method: MethodSummary) -> dict[str, Any] | None:
    """Return a method's shares as pictures and a table; None if it has none."""
    shares = method_shares(method)
    if shares is None:
        return None
    columns = [(part, kind) for part in shares.parts for kind in shares.kinds]
    rows = [(layer, [shares.of_layer(layer, *column) for column in columns]) for layer in shares.layers]
    rows.append(("average over layers", [shares.average(*column) for column in columns]))
    return {
        "name": method.name,
        "lr": method.lr,
        "seeds": len(shares.seeds),
        "charts": [
            (f"{method.name}, {called}", draw_shares(method.name, shares, part))
            for part, called in shares.parts.items()
        ],
        "keys": [(draw_share_key(kind), kind.upper()) for kind in reversed(shares.kinds)],
        "heads": [f"{kind.upper()}, {shares.parts[part]}" for part, kind in columns],
        "rows": [(name, [formats.share_text(share) for share in cells]) for name, cells in rows],
    }
