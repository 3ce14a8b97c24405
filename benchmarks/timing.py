"""What the benchmarks share: a network in training, rounds that turn, ratios to a baseline in the same round."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.lab.models import MODELS

Attach = Callable[[torch.optim.Optimizer, nn.Module], object]


class Trainer:
    """A network, SGD with momentum and weight decay, and what is attached to it."""

    def __init__(self, model: str, images: Tensor, labels: Tensor, attach: Attach | None = None) -> None:
        torch.manual_seed(0)
        self.images, self.labels = images, labels
        self.net = MODELS[model].build(images.shape[1], 10).to(images.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        self.attached = None if attach is None else attach(self.optimizer, self.net)

    def seconds(self) -> tuple[float, float]:
        """Time one training step, and `optimizer.step()` in it, waiting for the device."""
        synchronize = torch.cuda.synchronize if self.images.is_cuda else (lambda: None)
        synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(self.images), self.labels).backward()
        synchronize()
        between = time.perf_counter()
        self.optimizer.step()
        synchronize()
        end = time.perf_counter()
        return end - start, end - between


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=sorted(MODELS))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def random_batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return images and labels, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    return images, torch.randint(10, (options.batch,), device=device)


def setting(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Say what was run, with what, where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    capability = "" if device.type == "cuda" else f" ({torch.backends.cpu.get_cpu_capability()})"
    processor = platform.processor() or platform.machine()
    return {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "machine": f"{processor}, {torch.get_num_threads()} threads, {where}{capability}",
        **{name: getattr(options, name) for name in ("batch", "model", "rounds") if hasattr(options, name)},
    }


def time_rounds(trainers: dict[str, Trainer], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run every trainer once a round, in an order that turns; return whole steps' and optimizer steps' seconds."""
    for trainer in trainers.values():
        trainer.seconds()
        trainer.seconds()
    names = list(trainers)
    times: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            whole, part = trainers[name].seconds()
            times[name].append(whole)
            parts[name].append(part)
    return times, parts


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def ratios(own: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return quartiles of the ratio to the baseline in the same round."""
    return quartiles([a / b for a, b in zip(own, base, strict=True)])


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
