"""`wellcond repair`: average, merge, round or prune trained networks, and give the result its own statistics."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from wellcond.lab.cli.before_after import calibrate_and_show, open_networks
from wellcond.lab.cli.calibrate import add_pass_options, pass_options
from wellcond.lab.cli.options import add_data_options
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError

if TYPE_CHECKING:
    from torch import nn

_DESCRIPTION = """\
Do something to the weights of trained networks, take the statistics anew that it has made stale, in one pass over
training images, and show how well the network does before and after that pass.

  average   of checkpoints of one run (SWA, EMA) or of several (a soup)
  merge     of two networks that were trained apart, the channels of the second matched to those of the first
  round     weights to --bits, as simulated quantization
  prune     a --share of each layer's channels, those of the smallest weights; they become zeros, so shapes stay"""

_EXAMPLES = """\
examples:
  wellcond repair average epoch6.pt epoch7.pt epoch8.pt --model resnet8 --data cifar10/ --out swa.pt
  wellcond repair round resnet8.pt --bits 4 --model resnet8 --data cifar10/ --samples 512 --out resnet8-w4.pt

The file written is a plain state dict. In Python: wellcond.repair."""

_CHECKPOINTS = {"average": (2, None), "merge": (2, 2), "round": (1, 1), "prune": (1, 1)}
_OPTIONS = {"bits": ("round",), "per": ("round",), "share": ("prune", "merge")}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "repair",
        help="average, merge, round or prune trained networks, with statistics that fit",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=tuple(_CHECKPOINTS), help="what is done (see above)")
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files of the networks' state dicts")
    parser.add_argument("--model", required=True, metavar="NAME", help="the network (see `wellcond list models`)")
    parser.add_argument("--out", required=True, action=OutputFile, metavar="FILE", help="where the new state dict goes")
    parser.add_argument("--bits", type=int, metavar="B", help="of rounded weights, 2 to 16")
    parser.add_argument(
        "--per", choices=("channel", "tensor"), help="a scale for each output channel or weight (default: channel)"
    )
    parser.add_argument(
        "--share",
        type=float,
        metavar="S",
        help="of the channels that go; in a merge, of the first network (default there: 0.5)",
    )
    add_pass_options(parser)
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
    """Change the weights, evaluate, calibrate, evaluate again, and write the state dict.

    Args:
        arguments: The options.
        command_line: As it was typed.

    Returns:
        The exit code, 0.

    Raises:
        LabError: If a file, the network, the data or a number is not what it must be.
    """
    _check(arguments)
    options = pass_options(arguments)
    found = open_networks(arguments, "repair", arguments.checkpoints)
    title = f"{arguments.what}: {found.work.model} on {found.work.task.name}, new statistics"
    calibrate_and_show(
        found, lambda: _changed(arguments, found.models, found.data), arguments.out, title, "repaired", **options
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise a LabError if options and checkpoints do not fit what is done."""
    what, count = arguments.what, len(arguments.checkpoints)
    least, most = _CHECKPOINTS[what]
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        raise LabError(f"{what} takes {wanted} checkpoint{'' if least == most == 1 else 's'}, got {count}")
    for name, fits in _OPTIONS.items():
        if getattr(arguments, name) is not None and what not in fits:
            raise LabError(f"--{name} is for {' and '.join(fits)}, not for {what}")
    for name, needs in (("bits", "round"), ("share", "prune")):
        if what == needs and getattr(arguments, name) is None:
            raise LabError(f"{what} needs --{name}")
    bits, share = arguments.bits, arguments.share
    if bits is not None and not 2 <= bits <= 16:
        raise LabError(f"--bits must be between 2 and 16, got {bits}")
    if share is not None and not (0 < share < 1 if what == "prune" else 0 <= share <= 1):
        raise LabError(f"--share must lie between 0 and 1, got {share:g}")


def _changed(arguments: argparse.Namespace, models: list[nn.Module], data: Any) -> nn.Module:
    """Return the network with its new weights and its old statistics."""
    from wellcond import repair

    model = models[0]
    if arguments.what == "average":
        return repair.average(models)
    if arguments.what == "round":
        return repair.round_weights(model, arguments.bits, per=arguments.per or "channel")
    if arguments.what == "prune":
        return repair.prune_channels(model, arguments.share, remove=False)
    share = 0.5 if arguments.share is None else arguments.share
    repair.align(models[1], model, itertools.islice(data.batches(), 4))
    return repair.average(models, weights=[share, 1 - share])
