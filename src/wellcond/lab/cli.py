"""The command line: `wellcond compare` and `wellcond list`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.console import Console

import wellcond
from wellcond.lab.batches import AUGMENTATIONS
from wellcond.lab.compare import run_comparison
from wellcond.lab.errors import LabError
from wellcond.lab.images import DIGITS
from wellcond.lab.interrupts import Interrupted, interruptible
from wellcond.lab.methods import DEFAULT_METHODS, METHODS, parse_lrs
from wellcond.lab.models import MODELS
from wellcond.lab.plan import Settings, make_plan, output_folder
from wellcond.lab.progress import RunProgress
from wellcond.lab.records import RunStore
from wellcond.lab.results import collect_results, write_results
from wellcond.lab.summary import summarize
from wellcond.lab.table import print_summary
from wellcond.lab.workers import RunFailedError

_COMPARE = """\
Train one network on one data set with several methods, several paired seeds and a small lr grid, and show what each
method gained and cost against its baseline: test accuracy after each epoch, time per step, accuracy at equal wall time.

Every finished run is kept. The same command again continues where it was stopped, or only shows the results."""

_COMPARE_EXAMPLES = """\
examples:
  wellcond compare
      the bundled digits, all default methods, 5 seeds: a few minutes on a laptop
  wellcond compare --methods SGDM,SGDM+GC,W-SGDM --seeds 3 --out runs/try
      fewer methods and seeds, results in runs/try
  wellcond compare --data train.parquet --train-images 5000 --test-images 2000 --image-size 16
      5,000 images of a parquet file in the Hugging Face layout, average-pooled to 16x16, with a ResNet-8
  wellcond compare --data cifar10/ --model resnet18 --epochs 30 --batch-size 128
      a folder with *train*.parquet and *test*.parquet files
  wellcond compare --methods SGDM,MBN,EvalNorm,BSR,GN --ghost-batch 2 --data cifar10/
      normalization layers where batch normalization suffers: statistics of 2 images, in batches of the usual size

`wellcond list` shows the methods, models and data that can be named."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it, and takes options by their whole names alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise LabError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the program's name; None: those of this process.

    Returns:
        The exit code: 0 done, 1 a run failed, 2 a mistake in the arguments or the data, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments = _parser().parse_args(argv)
        if arguments.command == "list":
            return _list(arguments.what)
        return _compare(arguments, shlex.join(["wellcond", *argv]))
    except LabError as error:
        print(f"wellcond: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first run or after the last
        print("wellcond: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wellcond",
        description="Measure what statistics-driven training techniques gain and cost.",
        epilog="`wellcond compare --help` explains the comparison, with examples.",
    )
    parser.add_argument("--version", action="version", version=f"wellcond {wellcond.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{compare,list}")
    compare = commands.add_parser(
        "compare",
        help="train with several methods and show what each gained and cost",
        description=_COMPARE,
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_compare_options(compare)
    listing = commands.add_parser("list", help="show the methods, models or data that can be named")
    listing.add_argument("what", nargs="?", choices=("methods", "models", "data"), help="default: all three")
    return parser


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--methods",
        default=",".join(DEFAULT_METHODS),
        metavar="A,B,...",
        help="methods, separated by commas (default: %(default)s)",
    )
    what.add_argument(
        "--model", metavar="NAME", help=f"{', '.join(MODELS)} (default: convnet for digits, else resnet8)"
    )
    what.add_argument(
        "--lrs",
        action="append",
        default=[],
        metavar="OPTIMIZER=A,B,...",
        help="lr grid of all methods over this optimizer, e.g. SGD=0.02,0.06,0.2; may be given for several "
        "(default: see `wellcond list`)",
    )
    what.add_argument(
        "--seeds", type=int, default=defaults.seeds, metavar="N", help="paired seeds (default: %(default)s)"
    )
    what.add_argument("--epochs", type=int, metavar="N", help="epochs of a run (default: 6 for digits, else 8)")
    what.add_argument("--batch-size", type=int, metavar="N", help="images of a batch (default: 32 for digits, else 64)")
    what.add_argument(
        "--ghost-batch",
        type=int,
        metavar="M",
        help="take batch statistics in training over groups of M images, as if each were on a device of its own; "
        "methods without batch statistics (GN) stay as they are (default: over the whole batch)",
    )
    what.add_argument(
        "--stats-every",
        type=int,
        metavar="N",
        help="steps between statistics of a preconditioner (default: by run length)",
    )
    what.add_argument("--solve-every", type=int, metavar="N", help="steps between its solves (default: by run length)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=defaults.data,
        metavar="WHAT",
        help="digits, a .parquet file in the Hugging Face image layout, or a folder of them (default: %(default)s)",
    )
    data.add_argument(
        "--train-images", type=int, metavar="N", help="images that train (default: 1000 for digits, else all)"
    )
    data.add_argument(
        "--val-images", type=int, metavar="N", help="images that choose the lr (default: a tenth; digits: 398)"
    )
    data.add_argument(
        "--test-images",
        type=int,
        metavar="N",
        help="images that measure (default: a fifth, or the test file; digits: 399)",
    )
    data.add_argument(
        "--image-size", type=int, metavar="S", help="average-pool the images to SxS (default: as they are)"
    )
    data.add_argument(
        "--augment", metavar="NAME", help=f"{', '.join(AUGMENTATIONS)} (default: none for digits, else crop-flip)"
    )
    output = parser.add_argument_group("running and results")
    output.add_argument("--out", metavar="DIR", help="folder of the results (default: runs/compare-<data>)")
    output.add_argument("--target", type=float, metavar="PERCENT", help="test accuracy to count the epochs to")
    output.add_argument(
        "--jobs",
        type=int,
        default=defaults.jobs,
        metavar="N",
        help="runs at the same time (default: %(default)s, for clean times)",
    )
    output.add_argument(
        "--quiet", action="store_true", help="no progress, no tables: only errors and the files' places"
    )


def _compare(arguments: argparse.Namespace, command: str) -> int:
    settings = Settings(
        data=arguments.data,
        methods=tuple(name.strip() for name in arguments.methods.split(",") if name.strip()),
        model=arguments.model,
        lrs=tuple(parse_lrs(text) for text in arguments.lrs),
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        train_images=arguments.train_images,
        validation_images=arguments.val_images,
        test_images=arguments.test_images,
        image_size=arguments.image_size,
        augmentation=arguments.augment,
        batch_size=arguments.batch_size,
        ghost_batch=arguments.ghost_batch,
        stats_every=arguments.stats_every,
        solve_every=arguments.solve_every,
        target=arguments.target,
        jobs=arguments.jobs,
    )
    plan = make_plan(settings)
    folder = output_folder(plan, arguments.out)
    progress = RunProgress(Console(stderr=True), quiet=arguments.quiet)
    try:
        with interruptible(), progress:
            comparison = run_comparison(plan, RunStore(folder / "runs"), progress)
    except Interrupted:
        print(
            f"wellcond: interrupted; {progress.done} finished runs are kept in {folder}; the same command continues.",
            file=sys.stderr,
        )
        return 130
    except RunFailedError as error:
        print(f"wellcond: error: {error}\n{progress.done} finished runs are kept in {folder}.", file=sys.stderr)
        return 1
    summary = summarize(comparison)
    results = collect_results(comparison, summary, command)
    files = write_results(results, folder)
    console = Console()
    if not console.is_terminal:
        # Piped to a file or a pager, rich would assume 80 columns and cut the tables.
        console = Console(width=120)
    if not arguments.quiet:
        print_summary(summary, results.title, console)
    console.print(f"\nWritten: {' '.join(str(file) for file in files)}", highlight=False, soft_wrap=True)
    return 0


def _list(what: str | None) -> int:
    # Plain lines rather than a table: they can be searched and cut by other programs at any width.
    listed = {
        "methods": [
            (
                method.name,
                f"{method.description}; lr {', '.join(f'{lr:g}' for lr in method.lrs)}"
                f"{'' if method.name in DEFAULT_METHODS else ' (not run by default)'}",
            )
            for method in METHODS.values()
        ],
        "models": [(model.name, model.description) for model in MODELS.values()],
        "data": [
            (DIGITS, "scikit-learn's bundled digits: 1,797 images of 8x8 in 10 classes"),
            ("FILE.parquet", "an image column of struct<bytes, path> and an integer label column; a fifth of it tests"),
            ("FOLDER", "the same, with *train*.parquet and *test*.parquet files; shards are joined"),
        ],
    }
    for kind in [what] if what else list(listed):
        if not what:
            print(f"{kind}:")
        for name, description in listed[kind]:
            print(f"  {name:<16}{description}")
    return 0
