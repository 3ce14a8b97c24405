"""`wellcond reproduce`: a table or figure of a source, its figures beside those measured here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from wellcond.lab.cli.kept_runs import keeping_runs
from wellcond.lab.cli.paths import OutputFolder
from wellcond.lab.data.named_data import VARIABLE, bind_data
from wellcond.lab.errors import LabError
from wellcond.lab.runs.locks import locked
from wellcond.lab.runs.records import RunStore
from wellcond.lab.runs.settings import Scale

_DESCRIPTION = """\
Run a table or figure of a source as a recipe says, and show its figures beside those measured: mean and standard
deviation, difference to the baseline, and what a step costs.

Every finished run is kept. The same command again continues where it was stopped, or only shows the results."""

_EXAMPLES = f"""\
examples:
  wellcond reproduce 6.3 --scale smoke
      every step of the recipe in seconds, on the bundled digits
  wellcond reproduce 4.1 --scale small --data cifar10-jpeg=cifar10/ --jobs 2
      smaller networks, few images: the direction of the differences in minutes
  wellcond reproduce 4.1 --data cifar100=cifar-100-python --panels ResNet-18
      the source's own settings, one of its networks

Data: `--data NAME=PATH` for each data set that the recipe names, or {VARIABLE}, a folder that holds them by name.
Weights: torchvision's are downloaded; others, which a recipe names, need `--weights NAME=FILE`. All panels are checked
before the first one trains.
`wellcond list recipes` shows what can be reproduced; a TABLE that ends in .toml is a recipe of your own."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "reproduce",
        help="run a table of a source and show its figures beside ours",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="TABLE", help='as the source calls it: 4.1, "table 4.1", "figure 2.4"')
    parser.add_argument("--scale", choices=get_args(Scale), default="full", help="how much to train (default: full)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=PATH", help="where a data set lies; once for each"
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="where weights that the recipe names come from: a file, torchvision:NAME, or none to draw them; "
        "'none' alone draws all",
    )
    parser.add_argument("--panels", metavar="A,B,...", help="panels to run (default: the scale's)")
    parser.add_argument(
        "--methods", metavar="A,B,...", help="methods to compare, by the source's labels (default: all)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="paired seeds (default: the scale's)")
    parser.add_argument(
        "--trial-seeds",
        type=int,
        metavar="N",
        help="choose each method's lr with the first N seeds; the others train at that lr alone (default: all)",
    )
    parser.add_argument(
        "--equal-time",
        action=argparse.BooleanOptionalAction,
        help="train again for the baseline's wall time (default: as the recipe says)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: %(default)s)")
    parser.add_argument(
        "--out",
        action=OutputFolder,
        metavar="DIR",
        help="folder of the results (default: runs/reproduce-<table>-<scale>)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, no tables: only errors and the files' places"
    )


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Run the recipe, write the results and show them.

    Args:
        arguments: The options.
        command_line: As it was typed, for the report.

    Returns:
        The exit code.
    """
    from wellcond.lab.networks.named_weights import bind_weights
    from wellcond.lab.plan import writable_folder
    from wellcond.lab.reproduction.panels import needed_data, needed_weights, scaled_panels
    from wellcond.lab.reproduction.recipe import find_recipe
    from wellcond.lab.reproduction.report import print_reproduction, write_reproduction
    from wellcond.lab.reproduction.reproduce import collect, reproduce

    recipe = find_recipe(arguments.table)
    if arguments.equal_time is not None:
        recipe = recipe.model_copy(update={"equal_time": arguments.equal_time})
    scale: Scale = arguments.scale
    panels = scaled_panels(recipe, scale, _names("panels", arguments.panels), _names("methods", arguments.methods))
    paths = bind_data(arguments.data, needed_data(panels))
    places = bind_weights(arguments.weights, needed_weights(panels))
    panels = [panel.with_weights(places) for panel in panels]
    settings = [panel.settings(paths, arguments.jobs, arguments.seeds, arguments.trial_seeds) for panel in panels]
    default = f"reproduce-{recipe.name.replace(' ', '-')}-{scale}"
    out = arguments.out if arguments.out is not None else Path("runs") / default
    folder = writable_folder(Path(out))
    with locked(folder):
        with keeping_runs(folder, arguments.quiet) as progress:
            results = reproduce(recipe, panels, settings, RunStore(folder / "runs"), progress)
        reproduction = collect(recipe, scale, paths, command_line, results)
        files = write_reproduction(reproduction, folder)
    console = Console()
    if not console.is_terminal:
        # Piped to a file or a pager, rich would assume 80 columns and cut the tables.
        console = Console(width=180)
    if not arguments.quiet:
        print_reproduction(reproduction, console)
    console.print(f"Written: {' '.join(str(file) for file in files)}", highlight=False, soft_wrap=True)
    return 0


def _names(option: str, text: str | None) -> Sequence[str] | None:
    names = None if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if names == []:
        raise LabError(f"--{option} must name at least one, got {text!r}")
    return names
