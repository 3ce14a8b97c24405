"""What the measured tables of examples share: options, seeds, and the JSON that `docs/quote_results.py` reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from timing import setting, write

from wellcond.lab.data.load import ImageData

EXAMPLES = Path(__file__).parents[1] / "examples"
# The programs that are measured are the examples themselves.
sys.path.append(str(EXAMPLES))

Scores = dict[str, dict[str, list[float]]]


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the options that each of them has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def title_of(source: str, data: ImageData) -> str:
    """Return what tables call a data set: CIFAR-10 by its classes, and by its files that these are JPEG."""
    if not {"airplane", "frog", "truck"} <= set(data.pool.classes):
        return data.name
    files = [Path(source), *Path(source).glob("*.parquet")]
    return "CIFAR-10 (JPEG)" if any("jpeg" in file.name for file in files) else "CIFAR-10"


def note(scores: Scores, row: str, **values: float) -> None:
    """Add one seed's values to a row, and print them."""
    for column, value in values.items():
        scores.setdefault(row, {}).setdefault(column.replace("_", " "), []).append(value)
    print(row, " ".join(f"{column}={value:.4f}" for column, value in values.items()), flush=True)


def report(given: argparse.Namespace, about: str, scores: Scores, percent: bool, **further: Any) -> None:
    """Write the figures with what made them.

    Args:
        given: The options.
        about: What was done, for the table's head.
        scores: Of each row by column, a value a seed.
        percent: Whether they are shares.
        further: What else is to be kept.
    """
    what = {"about": about, "seeds": given.seeds, "percent": percent, **further}
    write(given.json, {**setting(given, torch.device("cpu")), "measured": what, "results": scores})
