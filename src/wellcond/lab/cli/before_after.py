"""Opens trained networks, calibrates one, shows it before and after, and writes what it has become."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.cli.options import given_settings
from wellcond.lab.errors import LabError
from wellcond.lab.given_paths import is_there
from wellcond.lab.hardware.interrupts import interruptible
from wellcond.lab.runs.files import replacing
from wellcond.lab.runs.settings import check_seed
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wellcond.lab.opened_task import OpenedTask
    from wellcond.lab.tasks.base import Evaluation, SeedData, Task

# The most images of the loader's batches: as many as keep the device busy.
_LOADED = 256


@dataclass(frozen=True)
class OpenedNetworks:
    """Trained networks, and the images to pass over and to evaluate on.

    Attributes:
        work: The data, and how the networks are built.
        models: One for each checkpoint, on the device.
        data: The seed's images.
        device: Where they are.
        loaded: Images that are loaded at once.
    """

    work: OpenedTask
    models: list[nn.Module]
    data: SeedData
    device: torch.device
    loaded: int


def open_networks(
    arguments: argparse.Namespace, command: str, checkpoints: Sequence[str], m: int | None = None
) -> OpenedNetworks:
    """Open the networks that a command works on, and their data.

    Args:
        arguments: The options, with those of the data, ``model``, ``seed`` and ``out``.
        command: What the command is called.
        checkpoints: Files of the networks' state dicts.
        m: Images behind one set of statistics; None for all of them together.

    Raises:
        LabError: If a file, the network or the data is not what it must be.
    """
    from wellcond.lab.hardware.machine import training_device
    from wellcond.lab.networks.weights import check_weights
    from wellcond.lab.opened_task import opened_task

    check_seed(arguments.seed)
    for checkpoint in checkpoints:
        if not is_there(checkpoint):
            raise LabError(f"there is no checkpoint {checkpoint}")
        check_weights("checkpoint", checkpoint)
        if arguments.out.exists() and arguments.out.samefile(checkpoint):
            raise LabError(f"--out {arguments.out}: would write over the checkpoint")
    work = opened_task(given_settings(arguments, weights=checkpoints[0], batch_size=m or _LOADED))
    if work.task.kind != "classification":
        raise LabError(f"{command} is for classification, and {work.settings.data} is for {work.task.kind}")
    device = training_device()
    models = [work.network(arguments.seed, each).to(device) for each in checkpoints]
    # Whole batches of m that leave out as few of the images as can be.
    images, whole = work.task.train_images, m or 1
    loaded = whole * max(1, images // -(-images // _LOADED) // whole)
    return OpenedNetworks(work, models, work.data(arguments.seed, device, loaded), device, loaded)


def calibrate_and_show(
    found: OpenedNetworks, make: Callable[[], nn.Module], out: Path, title: str, done: str, **options: Any
) -> None:
    """Calibrate a network, show it before and after, and write its state dict.

    Args:
        found: What it is calibrated on.
        make: Returns the network.
        out: The file.
        title: What is shown above the scores; how many images were passed over is added.
        done: What is done to the network, as a participle.
        **options: As `wellcond.calibrate` takes them.

    Raises:
        LabError: If it cannot be done.
    """
    import wellcond
    from wellcond.lab.tasks.base import ROLES
    from wellcond.nn import conversion_report

    work, batches = found.work, found.data.batches()
    samples = work.task.samples
    progress = StepProgress(Console(stderr=True), f"calibrating {work.model}")

    def counted() -> Iterator[Any]:
        for batch in batches:
            yield batch
            progress.advance(f"passing over training {samples}")

    with interruptible(), progress:
        progress.expect(len(batches) + 2 * len(ROLES))
        try:
            model = make()
            before = _evaluate(model, found, progress)
            wellcond.calibrate(model, counted(), **options)
        except (TypeError, ValueError) as error:
            raise LabError(f"{work.model} cannot be {done}: {error}") from error
        after = _evaluate(model, found, progress)
        _save(model, out)
    most = len(batches) * found.loaded
    said = re.search(r"(\d+) sample", conversion_report(model).data)
    m = options.get("batch_size")
    passed = f"from {min(int(said[1]), most) if said else most} training {samples}" + (
        f" in batches of {m}" if m else ""
    )
    _show(f"{title} {passed}", work.task, before, after)
    Console().print(f"\nWritten: {out}", highlight=False, soft_wrap=True)


def _evaluate(model: nn.Module, found: OpenedNetworks, progress: StepProgress) -> list[tuple[Evaluation, float]]:
    """Return the network's evaluation on the samples of each role, with the seconds that each took."""
    import torch

    from wellcond.lab.runs.stopwatch import Stopwatch
    from wellcond.lab.tasks.base import ROLES

    model.eval()
    measured = []
    for role in ROLES:
        stopwatch = Stopwatch(found.device)
        with torch.no_grad():
            evaluation = found.data.evaluate(model, role, stopwatch)
        measured.append((evaluation, stopwatch.seconds / evaluation.images))
        progress.advance(f"evaluating {role} {found.work.task.samples}")
    return measured


def _save(model: nn.Module, file: Path) -> None:
    """Write the state dict by way of a file beside it, so that what is there is always whole."""
    import torch

    with replacing(file) as part:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, part)


def _show(
    title: str, task: Task, before: list[tuple[Evaluation, float]], after: list[tuple[Evaluation, float]]
) -> None:
    """Print both evaluations beside each other."""
    from wellcond.lab.report.formats import quantity_text, ratio_text
    from wellcond.lab.report.table import plain_table
    from wellcond.lab.tasks.base import ROLES
    from wellcond.lab.tasks.evaluation import singular

    console = Console(width=None if Console().is_terminal else 120)
    console.print(f"\n{title}\n", style="bold", highlight=False)
    name = quantity_text(task.metric.name, task.metric)
    heads = (
        task.samples,
        f"{name} before",
        "after",
        "change",
        "loss before",
        "loss after",
        f"time per {singular(task.samples)}",
    )
    rows = []
    for role, (old, old_time), (new, new_time) in zip(ROLES, before, after, strict=True):
        losses = ["–" if each.loss is None else f"{each.loss:.4g}" for each in (old, new)]
        cells = (f"{old.score:.2f}", f"{new.score:.2f}", f"{new.score - old.score:+.2f}", *losses)
        rows.append([f"{old.images} {role}", *cells, ratio_text(new_time / old_time)])
    plain_table(heads, rows).print(console)
