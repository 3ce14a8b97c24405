"""`wellcond bench`: what a training step of each method costs in time and memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.options import add_method_options, add_task_options, given_methods, given_settings
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.methods.method import Refresh, select_methods
from wellcond.lab.runs.files import rounded, to_json, write_atomically
from wellcond.lab.runs.option import check_whole
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    import torch

    from wellcond.lab.benchmark.steps import StepCost, Workload

_DESCRIPTION = """\
Time a whole training step of each method on one network with noise for images, or on a task of your own with its
first batch: before any training, what would each method cost? The methods take turns, so that a machine that slows down
meets all of them alike; ratios are to the first method in the same round, as median and quartiles. Memory is counted
allocation by allocation."""

_EXAMPLES = """\
examples:
  wellcond bench
      SGDM, SGDM+GC, W-SGDM and FSGD on a ResNet-18 for small images, batch 32
  wellcond bench --methods AdamW,W-Adam --batch-size 128 --rounds 20 --json steps.json
  wellcond bench --model resnet8 --image-size 16 --methods SGDM,MBN,SN,GN
      layers instead of transforms: their cost is in the forward and backward pass
  wellcond bench --task my_project.training:MyTask --methods AdamW,W-Adam
      your own network, batch and loss"""


_MODEL, _SIZE = "resnet18", 32
# 3 GB in float32, before the first layer.
_MOST_PIXELS = 2**28


_METHODS = ("SGDM", "SGDM+GC", "W-SGDM", "FSGD")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's options."""
    parser = commands.add_parser(
        "bench",
        help="time a training step of each method, and count its memory",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_method_options(parser, ",".join(_METHODS))
    parser.add_argument("--model", metavar="NAME", help=f"the network (default: {_MODEL})")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"images of a batch (default: {_SIZE})")
    parser.add_argument("--image-size", type=int, metavar="N", help=f"their height and width (default: {_SIZE})")
    for option, default, what in (
        ("--rounds", 12, "timed steps of each method"),
        ("--stats-every", 50, "steps that a preconditioner's statistics are spread over"),
        ("--solve-every", 500, "steps that its solves are spread over"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add_task_options(parser)
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

    from wellcond.lab.benchmark.steps import measure_steps
    from wellcond.lab.hardware.machine import machine, training_device, versions

    names = ("rounds", "stats_every", "solve_every")
    for name in names:
        _check(arguments, name)
    named = given_methods(arguments)
    methods = select_methods(_METHODS if named is None else named)
    device = training_device()
    workload, described = _workload(arguments, Refresh(arguments.stats_every, arguments.solve_every), device)
    progress = StepProgress(Console(stderr=True), f"timing {len(methods)} methods on {described['model']}")
    with interruptible(), progress:
        costs = measure_steps(methods, workload, arguments.rounds, progress)
    settings = described | {name: getattr(arguments, name) for name in names}
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


def _check(arguments: argparse.Namespace, name: str, least: int = 1) -> None:
    value = getattr(arguments, name)
    if value < least:
        raise LabError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    check_whole(name.replace("_", "-"), value)


def _workload(arguments: argparse.Namespace, refresh: Refresh, device: torch.device) -> tuple[Workload, dict[str, Any]]:
    """Return what is timed, and its description."""
    from wellcond.lab.benchmark.steps import NoiseWorkload, TaskWorkload
    from wellcond.lab.tasks.open import open_task

    settings = given_settings(arguments)
    if settings.task is not None:
        task = open_task(settings)
        task.check(device)
        return TaskWorkload(task, refresh, device), {
            "task": settings.task,
            "model": task.model_name,
            "batch_size": task.batch_size,
        }
    for name, default in (("model", _MODEL), ("batch_size", _SIZE), ("image_size", _SIZE)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    _check(arguments, "batch_size", 2)
    _check(arguments, "image_size")
    pixels = arguments.batch_size * arguments.image_size**2
    if pixels > _MOST_PIXELS:
        raise LabError(
            f"--batch-size {arguments.batch_size} and --image-size {arguments.image_size} must give a batch of at most "
            f"{_MOST_PIXELS} pixels, got {pixels}"
        )
    described = {name: getattr(arguments, name) for name in ("model", "batch_size", "image_size")}
    return NoiseWorkload(**described, refresh=refresh, device=device), described


def _named_quartiles(cost: StepCost) -> dict[str, dict[str, float]]:
    return {"milliseconds": cost.milliseconds._asdict(), "ratio": cost.ratio._asdict()}


def _print(costs: list[StepCost], settings: dict[str, Any], device: torch.device) -> None:
    import torch

    from wellcond.lab.report.table import NOTHING, plain_table
    from wellcond.runtime.texts import bytes_text

    def text(value: float, digits: int) -> str:
        # As the file has it: rounded from more digits, 1.0225 could be another figure here than there.
        return f"{rounded(value):.{digits}f}"

    console = Console(width=None if Console().is_terminal else 120)
    threads = torch.get_num_threads()
    size = f" of {settings['image_size']}x{settings['image_size']}" if "image_size" in settings else ""
    where = f"{device.type}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"
    console.print(
        f"\n{settings['model']}, batch {settings['batch_size']}{size}, {where}\n",
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
