"""`wellcond calibrate`: statistics for a network that is trained already."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

import wellcond
from wellcond.lab.cli.before_after import LOADED, counted, evaluate, save, show
from wellcond.lab.cli.options import add_data_options, given_settings
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import is_there
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.runs.settings import check_seed, check_whole
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    from torch import nn

_DESCRIPTION = """\
Take a trained network's normalization statistics anew, in one pass over training images, and show how well it does
before and after. After averaging, merging, rounding or pruning: `wellcond repair`.

  bn        the running statistics, as they are at the end of training: of all images together, or, with --batch-size,
            the average over batches
  bsr       each image is normalized with statistics that are predicted for it (Batch Statistics Regression)
  evalnorm  each image's own statistics are mixed with the running ones, with weights that the batches decide"""

_EXAMPLES = """\
examples:
  wellcond calibrate resnet8.pt --model resnet8 --data cifar10/ --what bsr --batch-size 4 --out resnet8-bsr.pt
      a network that was trained with batches (or ghost groups) of 4 images
  wellcond calibrate swa.pt --model resnet8 --data cifar10/ --what bn --samples 512 --out swa-bn.pt
      the statistics of 512 images, for a network whose weights have changed

The file written is a plain state dict. In Python, with the same network:
  model = wellcond.nn.convert_norm(model, "bsr")      (not for bn)
  model.load_state_dict(torch.load("resnet8-bsr.pt"))"""


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
        dest="group",
        type=int,
        metavar="M",
        help="images behind one set of statistics in training: of one device, or of a ghost group; bsr and evalnorm "
        "need it (default: all images together)",
    )
    add_pass_options(parser)
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


def add_pass_options(parser: argparse.ArgumentParser) -> None:
    """Add how many images a pass goes over."""
    parser.add_argument(
        "--samples", type=int, metavar="N", help="images that the pass goes over (default: all that train)"
    )
    parser.add_argument(
        "--until",
        type=float,
        metavar="ERROR",
        help="stop once the standard errors of all statistics are below this, such as 0.01: of the means in standard "
        "deviations, of the variances as a share of them",
    )


def pass_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what `wellcond.calibrate` gets of them.

    Raises:
        LabError: If a value is out of its range.
    """
    if arguments.samples is not None:
        check_whole("samples", arguments.samples)
    if arguments.until is not None and not 0 < arguments.until < float("inf"):
        raise LabError(f"--until must be positive, such as 0.01, got {arguments.until:g}")
    return {"max_samples": arguments.samples, "until": arguments.until}


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

    m, out = arguments.group, arguments.out
    if m is None and arguments.what != "bn":
        raise LabError(f"--what {arguments.what} needs --batch-size: it asks how batches of that size differ")
    if m is not None and m < 2:
        raise LabError(f"--batch-size must be at least 2, because statistics of a batch are taken, got {m}")
    options = pass_options(arguments)
    check_seed(arguments.seed)
    if not is_there(arguments.checkpoint):
        raise LabError(f"there is no checkpoint {arguments.checkpoint}")
    check_weights("checkpoint", arguments.checkpoint)
    if out.exists() and out.samefile(arguments.checkpoint):
        raise LabError(f"--out {out}: would write over the checkpoint")
    settings = given_settings(arguments, methods=("SGDM",), weights=arguments.checkpoint, batch_size=m or LOADED)
    plan = make_plan(settings)
    if plan.task.kind != "classification":
        raise LabError(f"calibrate is for classification, and {settings.data} is for {plan.task.kind}")
    device = training_device()
    model = plan.task.initial_model(plan.model, arguments.seed, settings.weights).to(device)
    loaded = batch_of(plan.task.train_images, m)
    spec = replace(plan.spec(plan.methods[0], plan.methods[0].lrs[0], arguments.seed), batch_size=loaded)
    plan.task.check_files()
    data = plan.task.for_seed(spec, device, rank=0, ranks=1)
    batches = data.batches()
    progress = StepProgress(Console(stderr=True), f"calibrating {plan.model}")
    with interruptible(), progress:
        progress.expect(len(batches) + 2 * len(ROLES))
        before = evaluate(model, data, device, progress)
        try:
            wellcond.calibrate(model, counted(batches, progress), batch_size=m, what=arguments.what, **options)
        except ValueError as error:
            raise LabError(f"{plan.model} cannot be calibrated: {error}") from error
        after = evaluate(model, data, device, progress)
        save(model, out)
    passed = passed_over(model, len(batches) * loaded) + (f" in batches of {m}" if m else "")
    show(f"{arguments.what} for {plan.model} on {plan.task.name}, {passed}", plan.task.metric, before, after)
    Console().print(f"\nWritten: {out}", highlight=False, soft_wrap=True)
    return 0


def batch_of(images: int, m: int | None) -> int:
    """Return how many images to load at once: whole batches of m that leave out as few of the images as can be."""
    whole = m or 1
    return whole * max(1, images // -(-images // LOADED) // whole)


def passed_over(model: nn.Module, most: int) -> str:
    """Return how many images the calibration of a network went over."""
    from wellcond.nn import conversion_report

    said = re.search(r"(\d+) sample", conversion_report(model).data)
    return f"from {min(int(said[1]), most) if said else most} training images"
