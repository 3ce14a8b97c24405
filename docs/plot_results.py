"""Draws the pictures that README.md and the pages in docs show, from the JSON files in docs/results.

    python docs/plot_results.py            # draw those whose numbers have changed
    python docs/plot_results.py --check    # only say whether they are up to date

A picture says in its metadata which numbers it shows, as a digest of their file and of this one.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

RESULTS = Path(__file__).parent / "results"
# Colour and marker: Okabe and Ito's palette, which readers with any colour vision can tell apart.
BASELINE = ("#555555", "o")
STYLES = {
    "SGDM+GC": ("#c98500", "s"),
    "AdamW+GC": ("#c98500", "s"),
    "W-SGDM": ("#0072b2", "^"),
    "W-Adam": ("#0072b2", "^"),
    "FSGD": ("#d55e00", "D"),
    "FAdam": ("#d55e00", "D"),
    "W-SGDM+GC": ("#009e73", "v"),
    "FSGD+GC": ("#b8609a", "P"),
    "MBN": ("#0072b2", "<"),
    "BSR": ("#d55e00", ">"),
    "EvalNorm": ("#c98500", "X"),
    "GN": ("#7a6a00", "*"),
    "SN": ("#0072b2", "D"),
    "IBN": ("#c98500", "v"),
    "KN": ("#d55e00", "P"),
    "IterNorm": ("#009e73", "s"),
}
SHARES = {"in": "#0072b2", "ln": "#d55e00", "bn": "#999999"}


def draw_curves(figure: Figure, results: dict[str, Any]) -> None:
    """Draw test accuracy over epochs, a panel for each baseline with the methods that are measured against it."""
    methods = results["methods"]
    baselines = list(dict.fromkeys(method["baseline"] for method in methods))
    figure.set_size_inches(5.5 * len(baselines), 4.2)
    for place, baseline in enumerate(baselines, start=1):
        axes = figure.add_subplot(1, len(baselines), place)
        family = [method for method in methods if method["baseline"] == baseline]
        for method in family:
            is_baseline = method["name"] == baseline
            colour, marker = BASELINE if is_baseline else STYLES[method["name"]]
            runs = [curve["test_score"] for curve in method["curves"]]
            # A diverged run ends early; the curve goes as far as every seed does.
            by_epoch = list(zip(*runs, strict=False))
            epochs = range(1, len(by_epoch) + 1)
            means = [fmean(scores) for scores in by_epoch]
            stds = [stdev(scores) for scores in by_epoch]
            low = [max(0.0, mean - std) for mean, std in zip(means, stds, strict=True)]
            high = [min(100.0, mean + std) for mean, std in zip(means, stds, strict=True)]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(
                epochs,
                means,
                color=colour,
                linestyle="dashed" if is_baseline else "solid",
                marker=marker,
                markersize=4.5,
                linewidth=1.8,
                label=method["name"],
            )
        axes.set_title(f"{baseline} and methods on it", fontsize=11)
        axes.set_xlabel("epoch")
        axes.set_ylabel("test accuracy, %")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
        _plain(axes)
    note = f"mean over {results['seeds']} seeds, band: ± 1 standard deviation"
    figure.supxlabel(note, fontsize=8, color="#555555")


def draw_normalizers(figure: Figure, results: dict[str, Any]) -> None:
    """Draw accuracy over the samples behind one set of statistics, and SN's shares, averaged over layers."""
    figure.set_size_inches(12.0, 4.4)
    groups = {int(m): group for m, group in results["groups"].items()}
    axes = figure.add_subplot(1, 2, 1)
    names = list(next(iter(groups.values()))["methods"])
    for rank, name in enumerate(names):
        colour, marker = BASELINE if name == "BN" else STYLES[name]
        scores = [group["methods"][name]["accuracy"] for group in groups.values()]
        # Side by side, so that error bars do not hide each other.
        shift = 1.0 + 0.035 * (rank - (len(names) - 1) / 2)
        axes.errorbar(
            [m * shift for m in groups],
            [score["mean"] for score in scores],
            yerr=[score["std"] for score in scores],
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.6,
            linestyle="dashed" if name == "BN" else "solid",
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(groups), [str(m) for m in groups])
    axes.minorticks_off()
    axes.set_xlabel("m, samples behind one set of batch statistics")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Test accuracy, mean ± std over {results['seeds']} seeds", fontsize=11)
    axes.legend(fontsize=9, ncols=2)
    _plain(axes)
    axes = figure.add_subplot(1, 2, 2)
    bars = [(m, part) for part in ("mean", "var") for m in sorted(groups, reverse=True)]
    places = [index + (part == "var") for index, (_, part) in enumerate(bars)]
    bottom = [0.0] * len(bars)
    for kind, colour in SHARES.items():
        heights = [groups[m]["shares"]["average"][part][kind]["mean"] for m, part in bars]
        axes.bar(places, heights, 0.8, bottom, color=colour, label=kind.upper())
        for place, low, height in zip(places, bottom, heights, strict=True):
            axes.text(place, low + height / 2, f"{height:.2f}", ha="center", va="center", fontsize=9, color="white")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    called = {"mean": "means", "var": "variances"}
    axes.set_xticks(places, [f"{called[part]}\nm = {m}" for m, part in bars], fontsize=9)
    axes.set_ylim(0, 1)
    axes.set_title("Shares that Switchable Normalization learned, average over layers", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(axes: Any) -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, tuple[str, Callable[[Figure, dict[str, Any]], None]]] = {
    "digits-curves-epochs.png": ("digits.json", draw_curves),
    "cifar10-jpeg-small-curves.png": ("cifar10-jpeg-small.json", draw_curves),
    "norm-small-batch-curves.png": ("norm-small-batch.json", draw_curves),
    "normalizers.png": ("normalizers.json", draw_normalizers),
}
"""Every picture in docs/results, with the file of its numbers and what draws it."""


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
    numbers, painter = PICTURES[name]
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    painter(figure, json.loads((RESULTS / numbers).read_text(encoding="utf-8")))
    figure.savefig(path, dpi=150, metadata={"numbers": digest_of(numbers), "Software": None})


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
