"""One rank of the tests of detection and re-identification: ``python search_worker.py RANK WORLD FOLDER``.

A check is a function of (rank, world); run without a process group, with world 1, it is the one-process result.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))

from coco_files import write_coco
from launch_ranks import Check, serve
from reid_files import write_reid

from wellcond.lab.runs.settings import Settings
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.detection.task import open_detection
from wellcond.lab.tasks.reid.networks import Judged
from wellcond.lab.tasks.reid.task import open_reid

CPU = torch.device("cpu")


class ByColour(nn.Module):
    """Detects one box around what is red and one around what is blue, and something that is not there."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        predictions = []
        for image in images:
            boxes, scores = [[1.0, 1.0, 9.0, 9.0]], [0.5]
            for channel in (0, 2):
                rows, columns = (image[channel] - image[1] > 0.3).nonzero(as_tuple=True)
                if len(rows):
                    boxes.append([float(v) for v in (columns.min(), rows.min(), columns.max() + 3, rows.max() + 1)])
                    scores.append(float(image.mean()))
            labels = torch.arange(len(boxes)) % 2 + 1
            predictions.append({"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": labels})
        return predictions


class Linear(nn.Module):
    """A network without batch statistics, which ranks do not share."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.inner, self.classifier = nn.Linear(3 * 32 * 16, 4), nn.Linear(4, classes)
        self.register_buffer("centers", torch.randn(classes, 4))

    def forward(self, images: Tensor) -> Judged | Tensor:
        features = self.inner(images.flatten(1))
        return Judged(features, self.classifier(features)) if self.training else features


def detection(rank: int, world: int) -> dict[str, Any]:
    """Evaluate on a number of images that the ranks cannot share equally."""
    with tempfile.TemporaryDirectory() as folder:
        task = open_detection(Settings(data=str(write_coco(Path(folder) / "coco", test=5))))
        spec = SimpleNamespace(
            seed=0, model="fasterrcnn-tiny", batch_size=2, augmentation="none", train_images=4, validation_images=3
        )
        data = task.for_seed(spec, CPU, rank, world)
        with torch.no_grad():
            found = {role: data.evaluate(ByColour(), role, Stopwatch(CPU)) for role in ("validation", "test")}
    return {role: (result.score, result.images, result.metrics) for role, result in found.items()}


def re_identification(rank: int, world: int) -> dict[str, Any]:
    """Take the gradient of a batch's loss, move the centers, and evaluate."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            data=str(write_reid(Path(folder) / "market")), image_size=32, batch_size=16, validation_images=8, seeds=1
        )
        task = open_reid(settings)
        spec = SimpleNamespace(seed=0, batch_size=16, augmentation="crop-flip-erase")
        data = task.for_seed(spec, CPU, rank, world)
        torch.manual_seed(0)
        model = Linear(len(set(task.split(0).train.identities)))
        data.loss(model, next(iter(data.batches()))).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        if world > 1:
            dist.all_reduce(gradient)
        with torch.no_grad():
            result = data.evaluate(model.eval(), "test", Stopwatch(CPU))
    return {
        "gradient": gradient / world,
        "centers": model.get_buffer("centers").clone(),
        "scores": torch.tensor([result.score, *result.metrics.values()]),
        "images": result.images,
    }


def checks() -> dict[str, Check]:
    """Name all checks."""
    return {"detection": detection, "re-identification": re_identification}


if __name__ == "__main__":
    serve(checks())
