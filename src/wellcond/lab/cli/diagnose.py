"""`wellcond diagnose`: why a network is badly conditioned, on one page."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.options import add_task_options, given_settings
from wellcond.lab.cli.paths import OutputFolder
from wellcond.lab.data.named_data import AUGMENTATIONS, DIGITS
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import check_output_folder
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.runs.option import MOST, check_whole
from wellcond.lab.runs.settings import check_seed
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    from torch import Tensor, nn

_DESCRIPTION = """\
Look at one network with every probe of wellcond.diagnostics: the spectra of its features, its gradients with and
without their means, its weights' means, the smoothness of its loss, the noise of its batch statistics and how far
evaluation is from training. One page shows all of them with a list of findings in plain words."""

_EXAMPLES = """\
examples:
  wellcond diagnose
      a small conv-BN net on the bundled digits, as it is initialized
  wellcond diagnose resnet8 cifar10/ --steps 200
      after 200 steps of training, over which gradients are recorded
  wellcond diagnose resnet18 cifar10/ --checkpoint trained.pt --batch-size 2
      a trained network, at the batch size that its statistics are taken over on a device
  wellcond diagnose --task my_project.training:MyTask --steps 200
      your own network, batches and loss"""


# They are all in memory at once.
_MOST_BATCHES = 1000


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "diagnose",
        help="show why a network trains as it does: spectra, gradients, smoothness, noise",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a network of `wellcond list models` (default: by data)"
    )
    parser.add_argument(
        "data", nargs="?", default=DIGITS, metavar="DATA", help="what --data of `compare` takes (default: %(default)s)"
    )
    add_task_options(parser)
    parser.add_argument("--checkpoint", metavar="FILE", help="state dict of the network (default: drawn from the seed)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, images and order (default: 0)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of a batch (default: by data)")
    parser.add_argument(
        "--batches", type=int, default=32, metavar="N", help="batches of training images to look at (default: 32)"
    )
    parser.add_argument(
        "--steps", type=int, default=0, metavar="N", help="train so many steps before (default: not at all)"
    )
    parser.add_argument("--lr", type=float, default=0.05, metavar="LR", help="of these steps (default: %(default)s)")
    parser.add_argument("--train-images", type=int, metavar="N", help="images to draw from (default: as for `compare`)")
    parser.add_argument("--image-size", type=int, metavar="S", help="average-pool the images to SxS")
    parser.add_argument(
        "--augment", dest="augmentation", metavar="NAME", help=f"{', '.join(AUGMENTATIONS)} (default: as for `compare`)"
    )
    parser.add_argument(
        "--out", action=OutputFolder, metavar="DIR", help="folder of the page (default: runs/diagnose-<model>-<data>)"
    )


def run(arguments: argparse.Namespace, command_line: str) -> int:
    """Diagnose, write the page and print the findings.

    Args:
        arguments: The options.
        command_line: As it was typed, for the page.

    Returns:
        The exit code.
    """
    from wellcond.lab.diagnosis.diagnose import PROBES, diagnose, trained_briefly
    from wellcond.lab.diagnosis.findings import describe_diagnosis
    from wellcond.lab.diagnosis.page import write_diagnosis
    from wellcond.lab.hardware.machine import training_device
    from wellcond.lab.networks.weights import check_weights
    from wellcond.lab.opened_task import opened_task

    for name, least, most in (("batches", 2, _MOST_BATCHES), ("steps", 0, MOST)):
        check_whole(name, getattr(arguments, name), least, most)
    check_seed(arguments.seed)
    if not 0 < arguments.lr < math.inf:
        raise LabError(f"--lr must be {'finite' if arguments.lr > 0 else 'positive'}, got {arguments.lr:g}")
    if arguments.checkpoint is not None:
        check_weights("--checkpoint", arguments.checkpoint)
    opened = opened_task(given_settings(arguments, seeds=1))
    task = opened.task
    folder = _folder(arguments.out, f"{opened.model}-{task.name}")
    device = training_device()
    model = opened.network(arguments.seed, arguments.checkpoint).to(device)
    data = opened.data(arguments.seed, device)

    def call(network: nn.Module, batch: Any) -> Tensor:
        return data.loss(network, batch)

    def loss(value: Any, batch: Any) -> Tensor:
        found: Tensor = value
        return found

    stream = data.batches()
    batches = list(itertools.islice(stream.endless(), arguments.batches))
    training = None
    progress = StepProgress(Console(stderr=True), f"diagnosing {opened.model}")
    with interruptible(), progress:
        progress.expect(arguments.steps + len(PROBES))
        if arguments.steps:
            recorded = {"steps": arguments.steps, "lr": arguments.lr, "call": call, "told": progress.advance}
            try:
                training = trained_briefly(model, stream.endless(), loss, **recorded)
            except ValueError as error:
                raise LabError(f"--lr {arguments.lr:g}: {error}") from error
        found = diagnose(
            model, batches, loss, batch_size=opened.batch_size, call=call, training=training, told=progress.advance
        )
    settings = {
        "model": opened.model,
        "data": opened.settings.task or opened.settings.data,
        "checkpoint": arguments.checkpoint,
        **task.describe(),
        "batch_size": opened.batch_size,
        "batches": len(batches),
        "augmentation": task.augmentation,
        "seed": arguments.seed,
        "steps_of_training": arguments.steps,
        "lr": arguments.lr if arguments.steps else None,
    }
    state = f"after {arguments.steps} steps of SGD at lr {arguments.lr:g}" if arguments.steps else "as it is"
    if not arguments.steps and arguments.checkpoint is None:
        state = "as it is initialized"
    title = f"{opened.model} {state}, on {len(batches)} batches of {opened.batch_size} of {task.name}"
    folder.mkdir(parents=True, exist_ok=True)
    files = write_diagnosis(found, folder, title=title, settings=settings, command=command_line)
    print(title)
    for line in describe_diagnosis(found):
        print(f" - {line}")
    print(f"\nWritten: {' '.join(str(file) for file in files)}")
    return 0


def _folder(out: str | None, name: str) -> Path:
    folder = Path(out) if out is not None else Path("runs") / f"diagnose-{name.replace(':', '-')}"
    return check_output_folder("--out", folder)
