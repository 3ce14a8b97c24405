"""Time of a whole training step with Gradient Centralization, as a ratio to the plain optimizer in the same run.

    python benchmarks/step_time.py                          # ResNet-18 with a CIFAR stem, batch 32
    python benchmarks/step_time.py --batch 128 --rounds 5 --json out.json

Every variant trains its own copy of one network with SGD, momentum and weight decay. A round runs each variant once, in
an order that turns from round to round, so that a machine that drifts does so for all. A ratio is the median over
rounds of a variant's time divided by the plain optimizer's in the same round. Because forward and backward are the same
work in all variants and most of the noise, the ratio is also given by the optimizer's part: the plain step with the
variant's `optimizer.step()` in place of its own.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
from timing import Trainer, arguments, random_batch, setting, write
from torch import nn

import wellcond
from wellcond import GradientCentralization
from wellcond.lab.benchmark.timing import ratio_quartiles, time_rounds

CENTRALIZATIONS = {
    "GC": GradientCentralization(),
    "GC, conv only": GradientCentralization("conv"),
    "GC, decay outside": GradientCentralization(decay="outside"),
    "GC on the update": GradientCentralization(where="update"),
}


def main() -> None:
    """Run the benchmark."""
    options = arguments(__doc__, rounds=12).parse_args()
    images, labels = random_batch(options)
    trainers = {"plain SGD": Trainer(options.model, images, labels)}
    for name, transform in CENTRALIZATIONS.items():
        trainers[name] = Trainer(options.model, images, labels, functools.partial(attach, transform))
    times, parts = time_rounds(trainers, options.rounds)

    figures = setting(options, images.device)
    plain, plain_part = statistics.median(times["plain SGD"]), statistics.median(parts["plain SGD"])
    print(f"{options.model}, batch {options.batch}, {figures['machine']}, torch {torch.__version__}")
    print(f"{'plain SGD':28} {plain * 1e3:9.1f} ms")
    rows: dict[str, dict[str, Any]] = {"plain SGD": {"ms": plain * 1e3}}
    for name in CENTRALIZATIONS:
        low, ratio, high = ratio_quartiles(times[name], times["plain SGD"])
        extra = statistics.median(parts[name]) - plain_part
        by_part = 1 + extra / plain
        rows[name] = {"ratio": ratio, "lower_quartile": low, "upper_quartile": high, "ratio_by_optimizer_part": by_part}
        spread = f"quartiles {low:.3f} to {high:.3f}"
        print(f"{name:28} {ratio:9.3f} x   ({spread}); by the optimizer's part {by_part:.4f} x, {extra * 1e3:+.2f} ms")
    write(options.json, {**figures, "results": rows})


def attach(
    transform: wellcond.GradientTransform, optimizer: torch.optim.Optimizer, net: nn.Module
) -> wellcond.Attachment:
    """Attach a transform."""
    return wellcond.attach(optimizer, net, transform)


if __name__ == "__main__":
    main()
