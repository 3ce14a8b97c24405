"""`wellcond calibrate`: statistics for a network that is trained already."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wellcond.lab.cli.before_after import calibrate_and_show, open_networks
from wellcond.lab.cli.options import add_data_options
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.runs.option import check_whole

if TYPE_CHECKING:
    pass

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
    m = arguments.group
    if m is None and arguments.what != "bn":
        raise LabError(f"--what {arguments.what} needs --batch-size: it asks how batches of that size differ")
    if m is not None and m < 2:
        raise LabError(f"--batch-size must be at least 2, because statistics of a batch are taken, got {m}")
    options = pass_options(arguments) | {"batch_size": m, "what": arguments.what}
    found = open_networks(arguments, "calibrate", [arguments.checkpoint], m)
    title = f"{arguments.what} for {found.work.model} on {found.work.task.name},"
    calibrate_and_show(found, lambda: found.models[0], arguments.out, title, "calibrated", **options)
    return 0
