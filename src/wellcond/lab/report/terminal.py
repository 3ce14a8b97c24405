"""The comparison on the terminal: its tables, the findings and the notes."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding

from wellcond.lab.comparison.summary import Summary
from wellcond.lab.report.findings import describe_comparison, notes
from wellcond.lab.report.tables import tables


def print_summary(summary: Summary, title: str, console: Console) -> None:
    """Print the comparison.

    Args:
        summary: The comparison in numbers.
        title: What was compared, in one line.
        console: Where to.
    """
    console.print(f"\n{title}\n", style="bold", highlight=False)
    for table in tables(summary):
        table.print(console)
        console.print()
    for heading, lines in (("Findings", describe_comparison(summary)), ("Notes", notes(summary))):
        if lines:
            console.print(heading, style="bold")
        for line in lines:
            console.print(Padding(f"- {line}", (0, 0, 0, 1), expand=False), highlight=False, markup=False)
