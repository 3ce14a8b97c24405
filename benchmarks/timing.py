"""What the benchmarks share, beside `wellcond.lab.benchmark.timing`: their options, their network, what they write."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.lab.benchmark.timing import StepTimer
from wellcond.lab.networks.registry import MODELS

Attach = Callable[[torch.optim.Optimizer, nn.Module], object]


class Trainer(StepTimer):
    """A network, SGD with momentum and weight decay, and what is attached to it.

    Args:
        model: Name of the network.
        images: A batch, always the same.
        labels: Its labels.
        attach: Attaches something to the optimizer and the network.
        steps: Over how many steps a time is averaged, for networks whose steps are short.
        processor: Whether the process's processor time is taken, all threads together, instead of the wall's.
    """

    def __init__(
        self,
        model: str,
        images: Tensor,
        labels: Tensor,
        attach: Attach | None = None,
        steps: int = 1,
        processor: bool = False,
    ) -> None:
        self.steps, self.processor = steps, processor
        torch.manual_seed(0)
        net = MODELS[model].build(images.shape[1], 10).to(images.device)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        super().__init__(net, optimizer, lambda net: F.cross_entropy(net(images), labels))
        self.attached = None if attach is None else attach(optimizer, net)

    def seconds(self) -> tuple[float, float]:
        """Time training steps, and ``optimizer.step()`` in them."""
        taken = [super(Trainer, self).seconds() for _ in range(self.steps)]
        whole, part = map(sum, zip(*taken, strict=True))
        return whole / self.steps, part / self.steps

    def _now(self) -> float:
        return time.process_time() if self.processor else super()._now()


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=sorted(MODELS))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser


def random_batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return images and labels, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(options.batch, options.channels, options.image_size, options.image_size, device=device)
    return images, torch.randint(10, (options.batch,), device=device)


def setting(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Say what was run, with what, where."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    capability = "" if device.type == "cuda" else f" ({torch.backends.cpu.get_cpu_capability()})"
    processor = platform.processor() or platform.machine()
    # Which folders a machine keeps its files in is nobody else's business.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return {
        "command": shlex.join(["python", *words]),
        "torch": torch.__version__,
        "machine": f"{processor}, {torch.get_num_threads()} threads, {where}{capability}",
        **{name: getattr(options, name) for name in ("batch", "model", "rounds") if hasattr(options, name)},
    }


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
