"""Normalization layers against the batch size, and what Switchable Normalization learns when batches shrink.

BN (SGDM), GN, SN, IBN, KN and IterNorm train the same network on the same images with m = 32, 4 and 2 samples behind
one set of batch statistics (the batch is 32 always: ghost groups stand for the samples of a device). Then: each one's
test accuracy over m, and SN's shares of IN, LN and BN in every layer. "LN's share rises as the batch shrinks" is shown
or refuted by the paired difference of its average over the layers, LN(m = 2) - LN(m = 32), over the seeds.

    python recipes/normalizers.py --data cifar10-jpeg-train.parquet --jobs 2 --out runs/normalizers

Every finished run is kept: the same command continues where it was stopped. Written to --out: normalizers.json, the
figure as normalizers.png and .svg, and in m32/, m4/ and m2/ the report of each comparison as of `wellcond compare`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from wellcond.lab.comparison.compare import Comparison, run_comparison
from wellcond.lab.comparison.estimate import estimate_seconds
from wellcond.lab.comparison.statistics import Difference, paired_difference
from wellcond.lab.comparison.summing_up import summarize
from wellcond.lab.engines.select import RunFailedError
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.interrupts import Interrupted, interruptible
from wellcond.lab.plan import Plan, make_plan, output_folder, regrouped
from wellcond.lab.report.charts import SHARE_STYLES, method_style
from wellcond.lab.report.formats import difference_text, share_text, spread_text
from wellcond.lab.report.results import Results, collect_results, write_results
from wellcond.lab.report.shares import PARTS, SharesSummary, average_share, method_shares
from wellcond.lab.runs.files import rounded, to_json, write_atomically
from wellcond.lab.runs.records import RunRecord, RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.training.extras import Shares
from wellcond.lab.training.progress import RunProgress

FORMAT = 1
"""The version of normalizers.json's layout."""
METHODS = {"BN": "SGDM", "GN": "GN", "SN": "SN", "IBN": "IBN", "KN": "KN", "IterNorm": "IterNorm"}
"""What is compared: from the name shown to that of the lab's method."""
GROUPS = (32, 4, 2)
"""m: samples behind one set of batch statistics."""
NOTICEABLE = 0.001
"""The least change of a share that counts: smaller ones can be very regular and mean nothing."""
STATEMENT = "LN's share rises as the batch shrinks"

_LABELS = {name: label for label, name in METHODS.items()}
_COMMON = Settings(methods=tuple(METHODS.values()), batch_size=GROUPS[0])
SCALES = {
    "small": replace(
        _COMMON,
        data="",
        model="resnet8",
        lrs=(("SGD", (0.02, 0.06, 0.2)),),
        seeds=3,
        epochs=8,
        train_images=2000,
        validation_images=1000,
        test_images=2000,
        image_size=16,
        augmentation="flip",
    ),
    "smoke": replace(
        _COMMON,
        model="convnet",
        lrs=(("SGD", (0.1,)),),
        seeds=1,
        epochs=1,
        train_images=128,
        validation_images=200,
    ),
}
"""What is trained at each scale; the small one needs --data, the smoke test has scikit-learn's digits."""


@dataclass(frozen=True)
class Claim:
    """Whether the data bear the statement out.

    Attributes:
        verdict: ``"shown"``, ``"refuted"``, or ``"undecided"`` if the interval holds zero, there is none, or the change
            is less than `NOTICEABLE`.
        groups: The larger and the smaller m that are compared.
        differences: Of each normalizer's share, averaged over the layers, the smaller m's minus the larger's: in the
            means, in the variances, and in both ("both", their average), which decides.
        at_lr: LN's difference ("both") at each lr of the grid, since the chosen ones may differ between the two m.
    """

    verdict: str
    groups: tuple[int, int]
    differences: dict[str, dict[str, Difference]]
    at_lr: dict[str, Difference]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: The arguments, without the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 1 a run failed, 2 a mistake in the arguments or the data, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(argv)
    command = shlex.join(["python", "recipes/normalizers.py", *argv])
    console = Console(stderr=True)
    try:
        plans = make_plans(_settings(options))
        folder = output_folder(plans[GROUPS[0]], options.out)
        store = RunStore(folder / "runs")
        if not options.quiet or options.estimate:
            runs, seconds = estimate_seconds(plans.values(), store)
            print(f"{runs} runs to train: about {max(1, round(seconds / 60))} min", flush=True)
        if options.estimate:
            return 0
        comparisons = {}
        with interruptible():
            for m, plan in plans.items():
                if not options.quiet:
                    console.print(f"m = {m}", highlight=False)
                with RunProgress(console, quiet=options.quiet) as progress:
                    comparisons[m] = run_comparison(plan, store, progress, equal_time=False)
    except LabError as error:
        print(f"normalizers: error: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        print(f"normalizers: interrupted; the same command continues with the runs in {folder}", file=sys.stderr)
        return 130
    except RunFailedError as error:
        print(f"normalizers: error: {error}\nFinished runs are kept in {folder}.", file=sys.stderr)
        return 1
    results = {m: collect_results(each, summarize(each), command) for m, each in comparisons.items()}
    for m, each in results.items():
        (folder / f"m{m}").mkdir(exist_ok=True)
        write_results(each, comparisons[m].records, folder / f"m{m}")
    claim = check_claim(comparisons)
    content = describe(results, claim)
    files = [folder / f"normalizers.{kind}" for kind in ("json", "png", "svg")]
    write_atomically(files[0], to_json(rounded(content)))
    draw(results, files[1:])
    if not options.quiet:
        print(
            "\n".join(["", content["title"], "", *_table(results), "", *(f"- {line}" for line in content["findings"])])
        )
    print(f"\nWritten: {' '.join(str(file) for file in files)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normalizers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="WHAT", help="a parquet file or folder, as `wellcond compare` takes it")
    parser.add_argument("--scale", choices=list(SCALES), default="small", help="how much to train (default: small)")
    for name, what in (
        ("seeds", "paired seeds"),
        ("epochs", "epochs of a run"),
        ("train-images", "images that train"),
        ("image-size", "average-pool the images to SxS"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the scale's)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    parser.add_argument("--out", default="runs/normalizers", metavar="DIR", help="results (default: %(default)s)")
    parser.add_argument("--estimate", action="store_true", help="only say how long it will take")
    parser.add_argument("--quiet", action="store_true", help="only errors and the files' places")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    names = ("data", "seeds", "epochs", "train_images", "image_size")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings = replace(SCALES[options.scale], jobs=options.jobs, **given)
    if not settings.data:
        raise LabError("--data must name a parquet file or a folder of them; --scale smoke needs none")
    return settings


def make_plans(settings: Settings) -> dict[int, Plan]:
    """Return the comparison of each m; they share their images."""
    whole = make_plan(settings)
    return {m: whole if m == whole.batch_size else regrouped(whole, m) for m in GROUPS}


def check_claim(comparisons: Mapping[int, Comparison]) -> Claim | None:
    """Return whether LN's share is larger at the smallest m than at the largest; None if SN's runs have no shares."""
    large, small = (comparisons[m].methods["SN"] for m in (max(GROUPS), min(GROUPS)))

    def pairs(runs: Iterable[RunRecord], others: Iterable[RunRecord]) -> list[tuple[Shares, Shares]]:
        found = [
            (one.extras.get("shares"), other.extras.get("shares")) for one, other in zip(runs, others, strict=True)
        ]
        return [(one, other) for one, other in found if one and other]

    at_lr = {
        trial.lr: pairs(runs, others)
        for (trial, runs), others in zip(large.trials.items(), small.trials.values(), strict=True)
    }
    return claim_of(pairs(large.runs, small.runs), at_lr)


def claim_of(
    pairs: Sequence[tuple[Shares, Shares]], at_lr: Mapping[float, Sequence[tuple[Shares, Shares]]]
) -> Claim | None:
    """Return what seeds' shares say about the statement.

    Args:
        pairs: Of each seed the shares at the largest and at the smallest m, both at their chosen lr.
        at_lr: The same at each lr of the grid.
    """
    if not pairs:
        return None
    differences = {kind: {part: _difference(pairs, part, kind) for part in (*PARTS, "both")} for kind in SHARE_STYLES}
    deciding = differences["ln"]["both"]
    decided = deciding.beyond_chance and abs(deciding.mean) >= NOTICEABLE
    verdict = "undecided" if not decided else "shown" if deciding.mean > 0 else "refuted"
    each_lr = {f"{lr:g}": _difference(some, "both", "ln") for lr, some in at_lr.items() if some}
    return Claim(verdict, (max(GROUPS), min(GROUPS)), differences, each_lr)


def _difference(pairs: Sequence[tuple[Shares, Shares]], part: str, kind: str) -> Difference:
    parts = tuple(PARTS) if part == "both" else (part,)
    large, small = (
        [fmean(average_share(shares, each, kind) for each in parts) for shares in side]
        for side in zip(*pairs, strict=True)
    )
    return paired_difference(small, large)


def say(claim: Claim) -> list[str]:
    """Return the claim's verdict and what it rests on, as sentences."""
    large, small = claim.groups
    ln = {part: _signed(difference) for part, difference in claim.differences["ln"].items()}
    verdict = {
        "shown": f"{STATEMENT}: shown.",
        "refuted": f"{STATEMENT}: refuted, it falls.",
        "undecided": f"{STATEMENT}: neither shown nor refuted.",
    }[claim.verdict]
    others = ", ".join(f"{kind.upper()}'s {_signed(claim.differences[kind]['both'])}" for kind in ("in", "bn"))
    return [
        f"{verdict} From m = {large} to {small} it changes by {ln['both']}, averaged over layers, means and variances "
        f"({ln['mean']} in the means, {ln['var']} in the variances; paired over {_count(claim)}); {others}.",
        "At the same lr for both m: " + ", ".join(f"{_signed(d)} (lr {lr})" for lr, d in claim.at_lr.items()) + ".",
    ]


def _count(claim: Claim) -> str:
    count = claim.differences["ln"]["both"].count
    return "one seed, so without an interval" if count == 1 else f"{count} seeds, 95 % intervals"


def _signed(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _shares(results: Results) -> SharesSummary | None:
    method = next(method for method in results.summary.methods if method.name == "SN")
    return method_shares(method)


def describe(results: Mapping[int, Results], claim: Claim | None) -> dict[str, Any]:
    """Return everything that normalizers.json holds.

    Args:
        results: Of each m.
        claim: What the shares say.
    """
    first = results[GROUPS[0]]
    settings = {key: value for key, value in first.settings.items() if key != "ghost_batch"}
    found = []
    for m, each in results.items():
        best = max(each.summary.methods, key=lambda method: method.scores[each.summary.epochs].mean)
        chosen = spread_text(best.scores[each.summary.epochs])
        found.append(f"At m = {m} the best mean test accuracy is {_LABELS[best.name]}'s, {chosen} %.")
        shares = _shares(each)
        if shares is not None:
            parts = {
                part: f"{share_text(shares.average(part, 'ln'))} in the {called}" for part, called in PARTS.items()
            }
            found.append(
                f"At m = {m} LN's share is {' and '.join(parts.values())}, averaged over {len(shares.layers)} layers."
            )
    notes = {note: None for m, each in results.items() for note in _notes(m, each)}
    return {
        "format": FORMAT,
        "recipe": "normalizers",
        "title": first.title,
        "command": first.command,
        "settings": settings,
        "versions": first.versions,
        "machine": first.machine,
        "seeds": first.summary.seeds,
        "epochs": first.summary.epochs,
        "findings": [*found, *(say(claim) if claim is not None else ["SN has no shares: its runs diverged."])],
        "notes": list(notes),
        "claim": None if claim is None else {"statement": STATEMENT, **asdict(claim)},
        "groups": {str(m): _describe_group(each) for m, each in results.items()},
    }


def _notes(m: int, results: Results) -> list[str]:
    """Return what weakens the numbers of one m."""
    said = []
    for method in results.summary.methods:
        name = f"{_LABELS[method.name]} at m = {m}"
        if method.lr_edge is not None:
            said.append(f"{name}: the chosen lr {method.lr:g} is the {method.lr_edge} of its grid.")
        if method.diverged_runs:
            said.append(
                f"{name}: {method.diverged_runs} runs ended with a NaN or infinite loss, and count as guessing."
            )
        said += [f"{name} warned: {warning}" for warning in method.warnings]
    return said


def _describe_group(results: Results) -> dict[str, Any]:
    summary, shares = results.summary, _shares(results)
    methods = {
        _LABELS[method.name]: {
            "lr": method.lr,
            "accuracy": asdict(method.scores[summary.epochs]),
            "difference": None if method.final_difference is None else asdict(method.final_difference),
            "time_ratio": method.time_ratio,
            "diverged_runs": method.diverged_runs,
        }
        for method in summary.methods
    }
    return {"methods": methods, "shares": None if shares is None else _describe_shares(shares)}


def _describe_shares(shares: SharesSummary) -> dict[str, Any]:
    """Return each layer's shares and their average over layers, each a mean over the seeds with its spread."""
    layers = {
        layer: {part: {kind: asdict(shares.of_layer(layer, part, kind)) for kind in shares.kinds} for part in PARTS}
        for layer in shares.layers
    }
    average = {part: {kind: asdict(shares.average(part, kind)) for kind in shares.kinds} for part in PARTS}
    return {"layers": layers, "average": average}


def _table(results: Mapping[int, Results]) -> list[str]:
    """Return the test accuracies and differences to BN as lines of text."""
    lines = ["Test accuracy in %, and difference to BN at the same m:"]
    for m, each in results.items():
        lines.append(f"m = {m}")
        for method in each.summary.methods:
            accuracy = spread_text(method.scores[each.summary.epochs])
            difference = difference_text(method.final_difference)
            lines.append(f"  {_LABELS[method.name]:<10}{accuracy:>12}   {difference:<22}lr {method.lr:g}")
    return lines


def draw(results: Mapping[int, Results], files: Sequence[Path]) -> None:
    """Draw accuracy over m, and SN's shares of each layer at every m.

    Args:
        results: Of each m.
        files: What to write, by their suffixes.
    """
    # Not pyplot: it would look for a screen and keep global state.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The same file for the same numbers.
    with mpl.rc_context({"svg.hashsalt": "normalizers"}):
        figure = Figure(figsize=(13.5, 5.2), layout="constrained")
        FigureCanvasAgg(figure)
        halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.7))
        accuracy = halves[0].add_subplot()
        _draw_accuracy(accuracy, results)
        halves[0].legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
        _draw_shares(halves[1], {m: _shares(each) for m, each in results.items()})
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=150, metadata=metadata)


def _draw_accuracy(axes: Any, results: Mapping[int, Results]) -> None:
    groups = sorted(results)
    summaries = {m: results[m].summary for m in groups}
    for rank, method in enumerate(summaries[groups[0]].methods):
        style = method_style(method)
        spreads = [summaries[m].methods[rank].scores[summaries[m].epochs] for m in groups]
        # Side by side, so that error bars do not hide each other.
        shift = 1.0 + 0.035 * (rank - (len(METHODS) - 1) / 2)
        axes.errorbar(
            [m * shift for m in groups],
            [spread.mean for spread in spreads],
            yerr=[spread.std or 0.0 for spread in spreads],
            color=style.light,
            marker=style.marker,
            markersize=5,
            linewidth=1.6,
            linestyle="dashed" if method.is_baseline else "solid",
            capsize=2,
            label=_LABELS[method.name],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(groups, [str(m) for m in groups])
    axes.minorticks_off()
    axes.set_xlabel("m, samples behind one set of batch statistics")
    axes.set_ylabel("test accuracy, %")
    seeds = summaries[groups[0]].seeds
    axes.set_title("Test accuracy" + (f", mean ± std over {seeds} seeds" if seeds > 1 else ", one seed"), fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(figure: Any, shares: Mapping[int, SharesSummary | None]) -> None:
    panels = figure.subplots(len(PARTS), len(shares), sharex=True, sharey=True, squeeze=False)
    for column, (m, each) in enumerate(shares.items()):
        for row, (part, called) in enumerate(PARTS.items()):
            axes = panels[row, column]
            axes.set_title(f"m = {m}, {called}", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            if each is None:
                axes.text(0.5, 0.5, "every run diverged", ha="center", transform=axes.transAxes)
                continue
            count = len(each.layers)
            places, widths = [*range(1, count + 1), count + 2], [0.85] * count + [1.3]
            bottom = [0.0] * (count + 1)
            for kind in each.kinds:
                spreads = [each.of_layer(layer, part, kind) for layer in each.layers] + [each.average(part, kind)]
                heights = [spread.mean for spread in spreads]
                axes.bar(places, heights, widths, bottom, color=SHARE_STYLES[kind].light, label=kind.upper())
                middle = bottom[-1] + heights[-1] / 2
                if heights[-1] >= 0.08:
                    text = f"{heights[-1]:.3f}"
                    colour = "white" if kind == "ln" else "black"
                    axes.text(places[-1], middle, text, ha="center", va="center", fontsize=6, rotation=90, color=colour)
                bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
            axes.set_xticks([*range(1, count + 1, 1 + (count - 1) // 10), count + 2], minor=False)
            axes.set_xticklabels(
                [str(place) for place in range(1, count + 1, 1 + (count - 1) // 10)] + ["all"], fontsize=8
            )
            axes.set_ylim(0, 1)
            if column == 0:
                axes.set_ylabel("share", fontsize=9)
            if row == len(PARTS) - 1:
                axes.set_xlabel("layer", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=9, title="SN's shares")


if __name__ == "__main__":
    sys.exit(main())
