"""`wellcond compare`: several methods on one data set, with paired seeds."""

from __future__ import annotations

import argparse

from rich.console import Console

from wellcond.lab.cli.kept_runs import keeping_runs
from wellcond.lab.cli.options import (
    add_data_options,
    add_method_options,
    add_options,
    add_task_options,
    add_training_options,
    given_methods,
    given_settings,
    leave_open,
    parse_shares,
)
from wellcond.lab.cli.paths import OutputFolder
from wellcond.lab.cli.processes import in_processes
from wellcond.lab.methods.method import DEFAULT_METHODS, TEXT_METHODS, parse_lrs
from wellcond.lab.runs.comparison_file import read_comparison
from wellcond.lab.runs.locks import locked
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Settings
from wellcond.lab.trials import parse_sweep

_DESCRIPTION = """\
Train one network on one data set, or a task of your own, with several methods, several paired seeds and a small lr
grid, and show what each method gained and cost against its baseline: test score after each epoch, time per step, score
at equal wall time.

Every finished run is kept, and an unfinished one every half minute. The same command again continues where it was
stopped, or only shows the results."""

_EXAMPLES = """\
examples:
  wellcond compare
      the bundled digits, all default methods, 5 seeds: a few minutes on a laptop
  wellcond compare --methods SGDM,SGDM+GC,W-SGDM --seeds 3 --out runs/try
      fewer methods and seeds, results in runs/try
  wellcond compare --methods AdamW --method "mine = AdamW(weight_decay=0.1) + GradientCentralization"
      a method of your own beside one of the list; docs/lab.md has the grammar
  wellcond compare --data train.parquet --train-images 5000 --test-images 2000 --image-size 16
      5,000 images of a parquet file in the Hugging Face layout, average-pooled to 16x16, with a ResNet-8
  wellcond compare --data cifar10/ --model resnet18 --epochs 30 --batch-size 128
      a folder with *train*.parquet and *test*.parquet files
  wellcond compare --methods SGDM,MBN,EvalNorm,BSR,GN --ghost-batch 2 --data cifar10/
      normalization layers where batch normalization suffers: statistics of 2 images, in batches of the usual size
  wellcond compare --task my_project.training:MyTask --task-args width=64 --methods SGDM,W-SGDM
      your own model, data and loss (see `wellcond.lab.Task`)
  wellcond compare --task my_project.module:LitModel --data-module my_project.data:LitData --score val_acc:max
      a LightningModule with its data, trained by each method's optimizer

`wellcond list` shows the methods, models and data that can be named."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="train with several methods and show what each gained and cost",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE.toml",
        help="a whole comparison: fields named as the options, with _ for - (the results hold the file that repeats "
        "them); options go before it",
    )
    what = parser.add_argument_group("what is compared")
    add_method_options(what, f"{','.join(DEFAULT_METHODS)}; of a text {','.join(TEXT_METHODS)}; or what the task names")
    what.add_argument(
        "--lrs",
        action="append",
        default=[],
        metavar="OPTIMIZER=A,B,...",
        help="lr grid of all methods over this optimizer, e.g. SGD=0.02,0.06,0.2; may be given for several "
        "(default: see `wellcond list`)",
    )
    add_options(what, "search")
    add_training_options(parser)
    add_data_options(parser)
    add_task_options(parser)
    output = parser.add_argument_group("running and results")
    output.add_argument(
        "--out", action=OutputFolder, metavar="DIR", help="folder of the results (default: runs/compare-<data>)"
    )
    add_options(output, "runs")
    add_options(output, "processes")
    output.add_argument(
        "--quiet", action="store_true", help="no progress, no tables: only errors and the files' places"
    )
    leave_open(parser)


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Compare, write the results and show them.

    Args:
        arguments: The options.
        command_line: As it was typed, for the report.

    Returns:
        The exit code.
    """
    file = {} if arguments.file is None else read_comparison(arguments.file)
    methods = given_methods(arguments)
    grids = tuple(parse_lrs(text) for text in arguments.lrs)
    # What the command line says goes before the file.
    more = {name: value for name, value in file.items() if name not in arguments}
    more |= {
        "methods": file.get("methods") if methods is None else methods,
        "lrs": tuple((dict(file.get("lrs", ())) | dict(grids)).items()),
    }
    if "sweeps" in arguments:
        more["sweeps"] = tuple(parse_sweep(text) for text in arguments.sweeps)
    if "time_shares" in arguments:
        more["time_shares"] = parse_shares(arguments.time_shares)
    settings = given_settings(arguments, **more)
    return in_processes(settings, command_line, lambda first: _compare(arguments, settings, command_line, first))


def _compare(arguments: argparse.Namespace, settings: Settings, command_line: str, first: bool) -> int:
    from wellcond.lab.comparison.compare import run_comparison
    from wellcond.lab.comparison.summing_up import summarize
    from wellcond.lab.plan import make_plan, output_folder
    from wellcond.lab.report.results import collect_results, write_results
    from wellcond.lab.report.terminal import print_summary

    plan = make_plan(settings)
    folder = output_folder(plan, arguments.out)
    with locked(folder, here=first):
        with keeping_runs(folder, quiet=arguments.quiet or not first) as progress:
            comparison = run_comparison(plan, RunStore(folder / "runs"), progress)
        if not first:
            return 0
        summary = summarize(comparison)
        results = collect_results(comparison, summary, command_line)
        files = write_results(results, comparison.records, folder)
    console = Console()
    if not console.is_terminal:
        # Piped to a file or a pager, rich would assume 80 columns and cut the tables.
        console = Console(width=120)
    if not arguments.quiet:
        print_summary(summary, results.title, console)
    console.print(f"\nWritten: {' '.join(str(file) for file in files)}", highlight=False, soft_wrap=True)
    return 0
