"""`wellcond calibrate`: statistics for a network that is trained already."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import wellcond
from wellcond.lab.cli.options import add_data_options, given_settings
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import is_there
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.runs.files import replacing
from wellcond.lab.runs.settings import check_seed
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wellcond.lab.runs.metric import Metric
    from wellcond.lab.tasks.base import Evaluation, SeedData

_DESCRIPTION = """\
Take a trained network's normalization statistics anew, in one pass over training images in batches of the size that it
was trained with, and show how well it does before and after.

  bsr       each image is normalized with statistics that are predicted for it (Batch Statistics Regression)
  evalnorm  each image's own statistics are mixed with the running ones, with weights that are learned from the batches
  bn        the running statistics, as they are at the end of training"""

_EXAMPLES = """\
examples:
  wellcond calibrate resnet8.pt --model resnet8 --data cifar10/ --what bsr --batch-size 4 --out resnet8-bsr.pt
      a network that was trained with batches (or ghost groups) of 4 images

The file written is a plain state dict. In Python, with the same network:
  model = wellcond.nn.convert_norm(model, "bsr")      (not for bn)
  model.load_state_dict(torch.load("resnet8-bsr.pt"))"""

# The most images of the loader's batches, which the pass divides into batches of m: as many as keep the device busy.
_LOADED = 256


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "calibrate",
        help="take a trained network's normalization statistics anew",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file of the network's state dict")
    parser.add_argument("--model", required=True, metavar="NAME", help="the network (see `wellcond list models`)")
    parser.add_argument("--what", required=True, choices=("bsr", "evalnorm", "bn"), help="what is taken (see above)")
    parser.add_argument(
        "--batch-size",
        dest="samples",
        required=True,
        type=int,
        metavar="M",
        help="images behind one set of statistics in training: of one device, or of a ghost group",
    )
    parser.add_argument("--out", required=True, action=OutputFile, metavar="FILE", help="where the new state dict goes")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the seed whose training images are passed over and whose validation images evaluate, as in "
        "`wellcond compare` (default: %(default)s)",
    )
    add_data_options(parser)


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Calibrate, evaluate before and after, and write the state dict.

    Args:
        arguments: The options.
        command_line: As it was typed.

    Returns:
        The exit code, 0.

    Raises:
        LabError: If a file, the network, the data or a number is not what it must be.
    """
    from wellcond.lab.hardware.machine import training_device
    from wellcond.lab.networks.weights import check_weights
    from wellcond.lab.plan import make_plan
    from wellcond.lab.tasks.base import ROLES

    m, out = arguments.samples, arguments.out
    if m < 2:
        raise LabError(f"--batch-size must be at least 2, because statistics of a batch are taken, got {m}")
    check_seed(arguments.seed)
    if not is_there(arguments.checkpoint):
        raise LabError(f"there is no checkpoint {arguments.checkpoint}")
    check_weights("checkpoint", arguments.checkpoint)
    if out.exists() and out.samefile(arguments.checkpoint):
        raise LabError(f"--out {out}: would write over the checkpoint")
    settings = given_settings(arguments, methods=("SGDM",), weights=arguments.checkpoint, batch_size=m)
    plan = make_plan(settings)
    if plan.task.kind != "classification":
        raise LabError(f"calibrate is for classification, and {settings.data} is for {plan.task.kind}")
    device = training_device()
    model = plan.task.initial_model(plan.model, arguments.seed, settings.weights).to(device)
    # Whole batches of m that leave out as few of the images as can be.
    images = plan.task.train_images
    loaded = m * max(1, images // -(-images // _LOADED) // m)
    spec = replace(plan.spec(plan.methods[0], plan.methods[0].lrs[0], arguments.seed), batch_size=loaded)
    plan.task.check_files()
    data = plan.task.for_seed(spec, device, rank=0, ranks=1)
    batches = data.batches()
    progress = StepProgress(Console(stderr=True), f"calibrating {plan.model}")
    with interruptible(), progress:
        progress.expect(len(batches) + 2 * len(ROLES))
        before = _evaluate(model, data, device, progress)
        try:
            wellcond.calibrate(model, _counted(batches, progress), batch_size=m, what=arguments.what)
        except ValueError as error:
            raise LabError(f"{plan.model} cannot be calibrated: {error}") from error
        after = _evaluate(model, data, device, progress)
        _save(model, out)
    passed = f"{len(batches) * loaded} training images in batches of {m}"
    title = f"{arguments.what} for {plan.model} on {plan.task.name}, from {passed}"
    _print(title, plan.task.metric, before, after)
    Console().print(f"\nWritten: {out}", highlight=False, soft_wrap=True)
    return 0


def _counted(batches: Iterable[Any], progress: StepProgress) -> Iterator[Any]:
    for batch in batches:
        yield batch
        progress.advance("passing over training images")


def _evaluate(
    model: nn.Module, data: SeedData, device: torch.device, progress: StepProgress
) -> list[tuple[Evaluation, float]]:
    """Return the network's evaluation on the images of each role, with the seconds that an image took."""
    import torch

    from wellcond.lab.runs.stopwatch import Stopwatch
    from wellcond.lab.tasks.base import ROLES

    model.eval()
    found = []
    for role in ROLES:
        stopwatch = Stopwatch(device)
        with torch.no_grad():
            evaluation = data.evaluate(model, role, stopwatch)
        found.append((evaluation, stopwatch.seconds / evaluation.images))
        progress.advance(f"evaluating {role} images")
    return found


def _save(model: nn.Module, file: Path) -> None:
    """Write the state dict by way of a file beside it, so that what is there is always whole."""
    import torch

    with replacing(file) as part:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, part)


def _print(
    title: str, metric: Metric, before: list[tuple[Evaluation, float]], after: list[tuple[Evaluation, float]]
) -> None:
    from wellcond.lab.report.formats import quantity_text, ratio_text
    from wellcond.lab.report.table import plain_table
    from wellcond.lab.tasks.base import ROLES

    console = Console(width=None if Console().is_terminal else 120)
    console.print(f"\n{title}\n", style="bold", highlight=False)
    name = quantity_text(metric.name, metric)
    heads = ("images", f"{name} before", "after", "change", "loss before", "loss after", "time per image")
    rows = []
    for role, (old, old_time), (new, new_time) in zip(ROLES, before, after, strict=True):
        losses = ["–" if each.loss is None else f"{each.loss:.4g}" for each in (old, new)]
        cells = (f"{old.score:.2f}", f"{new.score:.2f}", f"{new.score - old.score:+.2f}", *losses)
        rows.append([f"{old.images} {role}", *cells, ratio_text(new_time / old_time)])
    plain_table(heads, rows).print(console)
