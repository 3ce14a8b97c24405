"""Writes what all quoted tables hold: a mean, a difference, a table, and what made the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from wellcond.lab.comparison.statistics import Difference, Spread, paired_difference
from wellcond.lab.report.formats import difference_text, spread_text
from wellcond.lab.report.table import plain_table


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts in Markdown."""
    return plain_table(heads, rows).to_markdown()


def run_by(results: dict[str, Any]) -> str:
    """Return the command, the versions and the machine of a run of the lab."""
    versions, machine = results["versions"], results["machine"]
    made = f"`{results['command']}` (wellcond {versions['wellcond']}, torch {versions['torch']}, "
    return f"{made}{machine['processor']}, {machine['cores']} cores)"


def made_by(results: dict[str, Any]) -> str:
    """Return the command, the network and the machine of a benchmark."""
    made = f"`{results['command']}` ({results['model']}, batch {results['batch']}, {results['rounds']} rounds, "
    return f"{made}torch {results['torch']}, {results['machine']})"


def spread(value: dict[str, Any]) -> str:
    """Return a mean over seeds in words."""
    return spread_text(Spread(**value))


def difference(value: dict[str, Any]) -> str:
    """Return a paired difference in words."""
    return difference_text(Difference(**value))


def interval(value: dict[str, Any], digits: int) -> str:
    """Return a mean with the ends of its interval."""
    mean, low, high = (f"{value[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def last_difference(method: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """Return how two methods of a comparison differ after the last epoch, paired by seed.

    Returns:
        Mean and interval; None if a run diverged in its first epoch, which leaves no score to pair.
    """
    scores = [[curve["test_score"] for curve in each["curves"]] for each in (method, other)]
    if any(not score for one in scores for score in one):
        return None
    mine, theirs = ([score[-1] for score in one] for one in scores)
    return asdict(paired_difference(mine, theirs))
