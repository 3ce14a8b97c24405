"""Time of an epoch in the lab, as a ratio to a bare loop over tensors that are augmented beforehand.

    python benchmarks/lab_epoch.py --json docs/results/lab-epoch.json

The lab's epoch is all that `wellcond compare` does between two evaluations: Lightning's loop, batches that are drawn,
augmented (crop and flip) and normalized as they are needed, SGD with momentum, its schedule, and the records. The bare
loop does no more than forward, backward, the optimizer's step and the schedule's, over a list of normalized float
batches. Both train a network of the same weights. Epochs take turns in one process: after each epoch of the lab, in the
place of its evaluation, comes one of the bare loop. The first two are left out. The ratio is given of wall time and of
the processor time of the process: on a machine that is busy with other things, only the latter says much.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import setting, write
from torch import Tensor, nn

from wellcond.lab.benchmark.timing import ratio_quartiles
from wellcond.lab.data.load import ImageData, LabelledImages
from wellcond.lab.data.splits import derived_seed
from wellcond.lab.networks.registry import initial_model
from wellcond.lab.plan import make_plan
from wellcond.lab.runs.settings import Settings
from wellcond.lab.tasks.base import Defaults, Evaluation
from wellcond.lab.tasks.in_memory import InMemorySeed, InMemoryTask
from wellcond.lab.training.runner import Runner

CLASSES = 10
LEFT_OUT = 2
# What is trained, and how many steps an epoch has: epochs of about the same length on a CPU.
WORKLOADS = (("resnet18", 4), ("resnet8", 40))


class BareLoop:
    """A network, SGD with momentum, a cosine, and batches that need nothing any more.

    Args:
        model: The network.
        batches: An epoch's batches.
        epochs: How many epochs there will be.
    """

    def __init__(self, model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int) -> None:
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=epochs * len(batches))

    def train_epoch(self) -> None:
        """Train an epoch."""
        for images, labels in self.batches:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            self.schedule.step()


class TakingTurns(InMemoryTask):
    """A task whose evaluation is an epoch of the bare loop, and that notes the seconds of both."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bare: BareLoop | None = None
        # Wall and processor seconds of each epoch.
        self.lab_seconds: list[np.ndarray] = []
        self.bare_seconds: list[np.ndarray] = []
        self.began = synchronized()

    def for_seed(self, *arguments: Any, **named: Any) -> InMemorySeed:
        """Return one seed's images, which evaluate as said."""
        data = super().for_seed(*arguments, **named)
        data.evaluate = self.take_turn
        return data

    def take_turn(self, model: nn.Module, role: str, stopwatch: Any) -> Evaluation:
        """Note the lab's epoch, and let the other loop have one."""
        if role == "validation":
            now = synchronized()
            self.lab_seconds.append(now - self.began)
            with torch.enable_grad():  # which evaluation has switched off
                self.bare.train_epoch()
            self.bare_seconds.append(synchronized() - now)
        self.began = synchronized()
        return Evaluation(100.0 / CLASSES, 1.0, 1)


def synchronized() -> np.ndarray:
    """Return the wall and the processor time in seconds, with the device's queue empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def noise(count: int, size: int) -> LabelledImages:
    """Return images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, np.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))


def measure(model: str, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let the lab and the bare loop take turns with one network."""
    train, epochs = steps * options.batch, options.rounds + LEFT_OUT
    settings = Settings(methods=("SGDM",), model=model, epochs=epochs, batch_size=options.batch, seeds=1)
    data = ImageData("noise", noise(train + CLASSES, options.image_size), noise(CLASSES, options.image_size))
    task = TakingTurns(data, train, CLASSES, "crop-flip", Defaults(model, epochs, options.batch))
    plan = make_plan(settings, task)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = plan.spec(plan.methods[0], 0.1, seed=0)
    network = initial_model(model, 3, CLASSES, derived_seed("weights", 0)).to(device)
    task.bare = BareLoop(network, list(InMemoryTask.for_seed(task, spec, device, 0, 1).batches()), epochs)
    task.began = synchronized()
    Runner(task, device).run(spec)
    lab, bare = np.array(task.lab_seconds[LEFT_OUT:]), np.array(task.bare_seconds[LEFT_OUT:])
    wall, processor = (ratio_quartiles(lab[:, kind], bare[:, kind]) for kind in (0, 1))
    print(
        f"{model:10} batch {options.batch}, {steps:3} steps an epoch: bare {np.median(bare[:, 0]):7.3f} s, "
        f"lab {wall.median:.3f} x (quartiles {wall.low:.3f} to {wall.high:.3f}, {len(lab)} rounds); "
        f"processor time {processor.median:.3f} x ({processor.low:.3f} to {processor.high:.3f})",
        flush=True,
    )
    return {
        "steps": steps,
        "bare_seconds": float(np.median(bare[:, 0])),
        "lab_seconds": float(np.median(lab[:, 0])),
        "ratio": wall._asdict(),
        "processor_time_ratio": processor._asdict(),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[name for name, _ in WORKLOADS], help="default: all of them")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    chosen = [(name, steps) for name, steps in WORKLOADS if options.models is None or name in options.models]
    figures = setting(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write(options.json, {**figures, "models": {name: measure(name, steps, options) for name, steps in chosen}})


if __name__ == "__main__":
    main()
