"""Evaluates a network before and after something was done to it, shows both, and writes what it has become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from wellcond.lab.runs.files import replacing
from wellcond.lab.training.progress import StepProgress

if TYPE_CHECKING:
    import torch
    from torch import nn

    from wellcond.lab.runs.metric import Metric
    from wellcond.lab.tasks.base import Evaluation, SeedData

# The most images of the loader's batches: as many as keep the device busy.
LOADED = 256


def counted(batches: Iterable[Any], progress: StepProgress) -> Iterator[Any]:
    """Yield batches, and show how many have been passed over."""
    for batch in batches:
        yield batch
        progress.advance("passing over training images")


def evaluate(
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


def save(model: nn.Module, file: Path) -> None:
    """Write the state dict by way of a file beside it, so that what is there is always whole."""
    import torch

    with replacing(file) as part:
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, part)


def show(
    title: str, metric: Metric, before: list[tuple[Evaluation, float]], after: list[tuple[Evaluation, float]]
) -> None:
    """Print both evaluations beside each other."""
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
