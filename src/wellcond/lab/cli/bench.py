"""`wellcond bench`: what a training step of each method costs in time and memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.methods.method import Refresh, select_methods
from wellcond.lab.runs.files import rounded, to_json, write_atomically
from wellcond.lab.runs.settings import check_whole
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    import torch

    from wellcond.lab.benchmark.steps import StepCost

_DESCRIPTION = """\
Time a whole training step of each method on one network, with noise for images. The methods take turns, so that a
machine that slows down meets all of them alike; ratios are to the first method in the same round, as median and
quartiles. Memory is counted allocation by allocation."""

_EXAMPLES = """\
examples:
  wellcond bench
      SGDM, SGDM+GC, W-SGDM and FSGD on a ResNet-18 for small images, batch 32
  wellcond bench --methods AdamW,W-Adam --batch-size 128 --rounds 20 --json steps.json
  wellcond bench --model resnet8 --image-size 16 --methods SGDM,MBN,SN,GN
      layers instead of transforms: their cost is in the forward and backward pass"""


# 3 GB in float32, before the first layer.
_MOST_PIXELS = 2**28


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's options."""
    parser = commands.add_parser(
        "bench",
        help="time a training step of each method, and count its memory",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--methods",
        default="SGDM,SGDM+GC,W-SGDM,FSGD",
        metavar="A,B,...",
        help="methods, separated by commas; the others are compared with the first (default: %(default)s)",
    )
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="the network (default: %(default)s)")
    for option, default, what in (
        ("--batch-size", 32, "images of a batch"),
        ("--image-size", 32, "their height and width"),
        ("--rounds", 12, "timed steps of each method"),
        ("--stats-every", 50, "steps that a preconditioner's statistics are spread over"),
        ("--solve-every", 500, "steps that its solves are spread over"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument("--json", action=OutputFile, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Time the methods, print a table, and write the figures if asked to.

    Args:
        arguments: The options.
        command_line: What was typed, for the JSON file.

    Returns:
        The exit code, 0.

    Raises:
        LabError: If an option is out of its range, or a name unknown.
    """
    import torch

    from wellcond.lab.benchmark.steps import Workload, measure_steps
    from wellcond.lab.hardware.machine import machine, training_device, versions

    names = ("batch_size", "image_size", "rounds", "stats_every", "solve_every")
    for name in names:
        value, least = getattr(arguments, name), 2 if name == "batch_size" else 1
        if value < least:
            raise LabError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        check_whole(name.replace("_", "-"), value)
    pixels = arguments.batch_size * arguments.image_size**2
    if pixels > _MOST_PIXELS:
        raise LabError(
            f"--batch-size {arguments.batch_size} and --image-size {arguments.image_size} must give a batch of at most "
            f"{_MOST_PIXELS} pixels, got {pixels}"
        )
    methods = select_methods([name.strip() for name in arguments.methods.split(",")])
    device = training_device()
    refresh = Refresh(arguments.stats_every, arguments.solve_every)
    workload = Workload(arguments.model, arguments.batch_size, arguments.image_size, refresh, device)
    progress = StepProgress(Console(stderr=True), f"timing {len(methods)} methods on {arguments.model}")
    with interruptible(), progress:
        costs = measure_steps(methods, workload, arguments.rounds, progress)
    settings = {name: getattr(arguments, name) for name in ("model", *names)}
    _print(costs, settings, device)
    if arguments.json is not None:
        content = {
            "command": command_line,
            "settings": settings | {"threads": torch.get_num_threads()},
            "versions": versions(),
            "machine": machine(),
            "methods": [asdict(cost) | _named_quartiles(cost) for cost in costs],
        }
        write_atomically(arguments.json, to_json(rounded(content)))
    return 0


def _named_quartiles(cost: StepCost) -> dict[str, dict[str, float]]:
    return {"milliseconds": cost.milliseconds._asdict(), "ratio": cost.ratio._asdict()}


def _print(costs: list[StepCost], settings: dict[str, Any], device: torch.device) -> None:
    import torch

    from wellcond.lab.report.formats import NOTHING, bytes_text
    from wellcond.lab.report.table import plain_table

    def text(value: float, digits: int) -> str:
        # As the file has it: rounded from more digits, 1.0225 could be another figure here than there.
        return f"{rounded(value):.{digits}f}"

    console = Console(width=None if Console().is_terminal else 120)
    size, threads = settings["image_size"], torch.get_num_threads()
    where = f"{device.type}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
    console.print(
        f"\n{settings['model']}, batch {settings['batch_size']} of {size}x{size}, {where}\n",
        style="bold",
        highlight=False,
    )
    first = costs[0].method
    refreshed = any(cost.refresh is not None for cost in costs)
    heads = (
        "method",
        "ms/step",
        f"x {first} (quartiles)",
        "forward and backward, ms",
        "optimizer, ms",
        *(("moments, solve, ms", "x with refreshes") if refreshed else ()),
        "peak memory",
        f"x {first}",
        "optimizer state",
    )
    rows = []
    for cost in costs:
        spread = f"{text(cost.ratio.median, 3)} ({text(cost.ratio.low, 3)}-{text(cost.ratio.high, 3)})"
        cells = [
            text(cost.milliseconds.median, 1),
            "1" if cost.method == first else spread,
            text(cost.forward_backward_ms, 1),
            text(cost.optimizer_ms, 1),
        ]
        if refreshed and cost.refresh is None:
            cells += [NOTHING, NOTHING]
        elif cost.refresh is not None:
            cells += [
                f"{text(cost.refresh.statistics_ms, 1)}, {text(cost.refresh.solve_ms, 1)}",
                text(cost.refresh.amortised_ratio, 3),
            ]
        cells += [
            bytes_text(cost.memory.peak),
            text(cost.memory_ratio, 3),
            bytes_text(cost.memory.optimizer_state),
        ]
        rows.append([cost.method, *cells])
    plain_table(heads, rows).print(console)
    if refreshed:
        console.print(
            f"\nA preconditioner gathers second moments once in {settings['stats_every']} steps "
            f"and solves for all layers once in {settings['solve_every']}.",
            highlight=False,
        )
