"""The comparison on the terminal: three tables, the findings and the notes."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from wellcond.lab.comparison.summary import MethodSummary, Summary
from wellcond.lab.report.findings import findings, notes
from wellcond.lab.report.formats import (
    NOTHING,
    difference_text,
    epoch_text,
    evaluation_text,
    lr_text,
    memory_text,
    score_text,
    spread_text,
    state_text,
    target_text,
    time_text,
)


def print_summary(summary: Summary, title: str, console: Console) -> None:
    """Print the comparison.

    Args:
        summary: The comparison in numbers.
        title: What was compared, in one line.
        console: Where to.
    """
    console.print(f"\n{title}\n", style="bold", highlight=False)
    console.print(_score_table(summary))
    console.print(_difference_table(summary))
    console.print(_cost_table(summary))
    for heading, lines in (("Findings", findings(summary)), ("Notes", notes(summary))):
        if lines:
            console.print(f"\n{heading}", style="bold")
        for line in lines:
            console.print(Padding(f"- {line}", (0, 0, 0, 1), expand=False), highlight=False, markup=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="italic", box=None, padding=(0, 1), pad_edge=False)


def _sections(summary: Summary, table: Table, row: list[tuple[MethodSummary, list[str]]]) -> Table:
    """Fill a table, its families apart from each other."""
    for index, (method, cells) in enumerate(row):
        last = index + 1 == len(row) or row[index + 1][0].baseline != method.baseline
        table.add_row(method.name, *cells, style="dim" if method.is_baseline else None, end_section=last)
    return table


def _score_table(summary: Summary) -> Table:
    deviation = f", mean ± std over {summary.seeds} seeds" if summary.seeds > 1 else ", one seed"
    cost = "; and what evaluating an image costs" if summary.compares_evaluation else ""
    table = _table(f"Test {score_text(summary.score)} after each epoch{deviation}{cost}")
    table.add_column("method", no_wrap=True)
    table.add_column("lr", justify="right", no_wrap=True)
    for epoch in summary.shown_epochs:
        table.add_column(f"epoch {epoch}", justify="right", no_wrap=True)
    table.add_column(f"epochs to {summary.target:g} %", justify="right", no_wrap=True)
    if summary.compares_evaluation:
        table.add_column("time/image", justify="right", no_wrap=True)
    rows = [
        (
            method,
            [
                lr_text(method),
                *(spread_text(method.scores[epoch]) for epoch in summary.shown_epochs),
                target_text(method, summary),
                *([evaluation_text(method)] if summary.compares_evaluation else []),
            ],
        )
        for method in summary.methods
    ]
    return _sections(summary, table, rows)


def _difference_table(summary: Summary) -> Table:
    interval = ", paired, with 95 % interval" if summary.seeds > 1 else ""
    table = _table(f"\nDifference to the baseline in points of test {summary.score}{interval}; and what a step costs")
    table.add_column("method", no_wrap=True)
    if summary.early_epoch is not None:
        table.add_column(f"epoch {summary.early_epoch}", justify="right", no_wrap=True)
    table.add_column(f"epoch {summary.epochs}", justify="right", no_wrap=True)
    table.add_column("time/step", justify="right", no_wrap=True)
    table.add_column("steps in\nequal time", justify="right", no_wrap=True)
    table.add_column(f"{summary.score} at\nequal time", justify="right", no_wrap=True)
    table.add_column("difference at\nequal time", justify="right", no_wrap=True)
    rows = []
    for method in summary.methods:
        equal = method.equal_time
        cells = [] if summary.early_epoch is None else [difference_text(method.early_difference)]
        cells += [difference_text(method.final_difference), time_text(method)]
        if equal is not None:
            cells += [str(equal.steps), spread_text(equal.score), difference_text(equal.difference)]
        elif method.is_baseline:
            cells += [str(summary.steps), spread_text(method.scores[summary.epochs]), NOTHING]
        else:
            cells += [NOTHING, NOTHING, NOTHING]
        rows.append((method, cells))
    return _sections(summary, table, rows)


def _cost_table(summary: Summary) -> Table:
    table = _table("\nWhat training costs; peak memory as a ratio to the baseline's, state to the parameters")
    table.add_column("method", no_wrap=True)
    for head in ("time/step", "time/epoch", "peak memory", "optimizer state"):
        table.add_column(head, justify="right", no_wrap=True)
    rows = [
        (method, [time_text(method), epoch_text(method), memory_text(method), state_text(method)])
        for method in summary.methods
    ]
    return _sections(summary, table, rows)
