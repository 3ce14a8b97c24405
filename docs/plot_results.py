"""Draws the pictures that README.md and the pages in docs show, from the JSON files in docs/results.

    python docs/plot_results.py            # draw those whose numbers have changed
    python docs/plot_results.py --check    # only say whether they are up to date

They are charts of the lab, as its reports have them. A picture says in its metadata which numbers it shows, as a digest
of their file and of this one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from wellcond.lab.comparison.summary import read_summary
from wellcond.lab.report.chart import Chart
from wellcond.lab.report.charts import curves
from wellcond.lab.report.drawing import draw_png
from wellcond.lab.reproduction.across import across_charts
from wellcond.lab.runs.metric import ACCURACY

RESULTS = Path(__file__).parent / "results"


def over_epochs(results: dict[str, Any]) -> tuple[list[Chart], str]:
    """Return test accuracy over epochs, a chart for each baseline with the methods that are measured against it."""
    return curves(read_summary(results), "epochs"), f"mean over {results['seeds']} seeds, band: ± 1 standard deviation"


def over_panels(results: dict[str, Any]) -> tuple[list[Chart], str]:
    """Return accuracy in each panel, and the shares that Switchable Normalization learned there."""
    panels = results["panels"]
    note = f"mean over {panels[0]['seeds']} seeds, bars: ± 1 standard deviation; m samples behind one set of statistics"
    return across_charts(panels, ACCURACY), note


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[list[Chart], str]]]] = {
    "digits-curves-epochs.png": ("digits.json", over_epochs),
    "cifar10-jpeg-small-curves.png": ("cifar10-jpeg-small.json", over_epochs),
    "norm-small-batch-curves.png": ("norm-small-batch.json", over_epochs),
    "normalizers.png": ("normalizers.json", over_panels),
}
"""Every picture in docs/results, with the file of its numbers and what lays it out."""


def digest_of(numbers: str) -> str:
    """Return what tells whether a picture shows these numbers, drawn by this program."""
    return hashlib.sha256((RESULTS / numbers).read_bytes() + Path(__file__).read_bytes()).hexdigest()


def is_stale(name: str) -> bool:
    """Whether a picture is missing or shows other numbers than those committed."""
    path = RESULTS / name
    if not path.exists():
        return True
    with Image.open(path) as picture:
        return picture.info.get("numbers") != digest_of(PICTURES[name][0])


def draw(name: str, path: Path) -> None:
    """Draw one picture.

    Args:
        name: Of `PICTURES`.
        path: The PNG file to write.
    """
    numbers, lay_out = PICTURES[name]
    charts, note = lay_out(json.loads((RESULTS / numbers).read_text(encoding="utf-8")))
    draw_png(charts, path, note, {"numbers": digest_of(numbers), "Software": None})


def main(arguments: list[str]) -> int:
    """Draw or check the pictures; return the exit code."""
    stale = [name for name in PICTURES if is_stale(name)]
    if "--check" in arguments:
        return 1 if stale else 0
    for name in stale:
        draw(name, RESULTS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
