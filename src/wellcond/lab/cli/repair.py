"""`wellcond repair`: average, merge, round or prune trained networks, and give the result its own statistics."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.before_after import LOADED, counted, evaluate, save, show
from wellcond.lab.cli.calibrate import add_pass_options, batch_of, pass_options, passed_over
from wellcond.lab.cli.options import add_data_options, given_settings
from wellcond.lab.cli.paths import OutputFile
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import is_there
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.runs.settings import check_seed
from wellcond.lab.training.progress import StepProgress

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
    import wellcond
    from wellcond.lab.hardware.machine import training_device
    from wellcond.lab.networks.weights import check_weights
    from wellcond.lab.plan import make_plan
    from wellcond.lab.tasks.base import ROLES

    _check(arguments)
    options = pass_options(arguments)
    check_seed(arguments.seed)
    for checkpoint in arguments.checkpoints:
        if not is_there(checkpoint):
            raise LabError(f"there is no checkpoint {checkpoint}")
        check_weights("checkpoint", checkpoint)
        if arguments.out.exists() and arguments.out.samefile(checkpoint):
            raise LabError(f"--out {arguments.out}: would write over a checkpoint")
    settings = given_settings(arguments, methods=("SGDM",), weights=arguments.checkpoints[0], batch_size=LOADED)
    plan = make_plan(settings)
    if plan.task.kind != "classification":
        raise LabError(f"repair is for classification, and {settings.data} is for {plan.task.kind}")
    device = training_device()
    models = [plan.task.initial_model(plan.model, arguments.seed, each).to(device) for each in arguments.checkpoints]
    loaded = batch_of(plan.task.train_images, None)
    spec = replace(plan.spec(plan.methods[0], plan.methods[0].lrs[0], arguments.seed), batch_size=loaded)
    plan.task.check_files()
    data = plan.task.for_seed(spec, device, rank=0, ranks=1)
    batches = data.batches()
    progress = StepProgress(Console(stderr=True), f"repairing {plan.model}")
    with interruptible(), progress:
        progress.expect(len(batches) + 2 * len(ROLES))
        try:
            model = _changed(arguments, models, data)
            before = evaluate(model, data, device, progress)
            wellcond.calibrate(model, counted(batches, progress), **options)
        except (TypeError, ValueError) as error:
            raise LabError(f"{plan.model} cannot be repaired: {error}") from error
        after = evaluate(model, data, device, progress)
        save(model, arguments.out)
    passed = passed_over(model, len(batches) * loaded)
    title = f"{arguments.what}: {plan.model} on {plan.task.name}, new statistics {passed}"
    show(title, plan.task.metric, before, after)
    Console().print(f"\nWritten: {arguments.out}", highlight=False, soft_wrap=True)
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
