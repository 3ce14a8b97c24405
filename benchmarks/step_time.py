"""Time of a whole training step with each transform, as a ratio to the plain optimizer in the same run.

    python benchmarks/step_time.py                          # ResNet-18 with a CIFAR stem, batch 32
    python benchmarks/step_time.py --only GC --rounds 40    # Gradient Centralization alone
    python benchmarks/step_time.py --batch 128 --rounds 5 --json out.json

Every variant trains its own copy of one network with SGD, momentum and weight decay. A round runs each variant once, in
an order that turns from round to round, so that a machine that drifts does so for all. A ratio is the median over
rounds of a variant's time divided by the plain optimizer's in the same round. Because forward and backward are the same
work in all variants and most of the noise, the ratio is also given by the optimizer's part: the plain step with the
variant's `optimizer.step()` in place of its own. The preconditioners' refreshes are timed as steps of their own, and
shown amortised over the default intervals.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import wellcond
from wellcond import FeatureDescent, FeatureWhitening, GradientCentralization, GradientTransform
from wellcond.lab.models import MODELS

NEVER = 10**9
STATS_EVERY, SOLVE_EVERY = FeatureWhitening().stats_every, FeatureWhitening().solve_every

CENTRALIZATIONS: dict[str, GradientTransform] = {
    "GC": GradientCentralization(),
    "GC, conv only": GradientCentralization("conv"),
    "GC, decay outside": GradientCentralization(decay="outside"),
    "GC on the update": GradientCentralization(where="update"),
}
PRECONDITIONERS: dict[str, type[FeatureWhitening] | type[FeatureDescent]] = {
    "W-SGDM": FeatureWhitening,
    "FSGD": FeatureDescent,
}


class Trainer:
    """One variant: a network, SGD with momentum and weight decay, and perhaps a transform."""

    def __init__(self, model: str, images: Tensor, labels: Tensor, transform: GradientTransform | None) -> None:
        torch.manual_seed(0)
        self.images, self.labels = images, labels
        self.net = MODELS[model].build(images.shape[1], 10).to(images.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
        if transform is not None:
            wellcond.attach(self.optimizer, self.net, transform)

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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", choices=sorted(MODELS))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["GC", "preconditioners"])
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size, device=device)
    labels = torch.randint(10, (arguments.batch,), device=device)

    def trainer(transform: GradientTransform | None) -> Trainer:
        return Trainer(arguments.model, images, labels, transform)

    trainers = {"plain SGD": trainer(None)}
    solve_seconds: dict[str, float] = {}
    if arguments.only != "preconditioners":
        trainers |= {name: trainer(transform) for name, transform in CENTRALIZATIONS.items()}
    if arguments.only != "GC":
        for name, kind in PRECONDITIONERS.items():
            # Their first step takes statistics and factorizes; then one never refreshes, the other observes always.
            trainers[name] = trainer(kind(stats_every=NEVER, solve_every=NEVER, solve_warmup=False))
            trainers[f"{name}, with statistics"] = trainer(kind(stats_every=1, solve_every=NEVER, solve_warmup=False))
            solve_seconds[name], _ = trainers[name].seconds()
    times, parts = time_rounds(trainers, arguments.rounds)

    figures: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "batch": arguments.batch,
        "model": arguments.model,
        "rounds": arguments.rounds,
    }
    plain = times["plain SGD"]
    print(f"{arguments.model}, batch {arguments.batch}, {figures['machine']}, torch {torch.__version__}")
    print(f"{'plain SGD':28} {statistics.median(plain) * 1e3:9.1f} ms")
    rows: dict[str, dict[str, float]] = {"plain SGD": {"ms": statistics.median(plain) * 1e3}}
    for name, own in times.items():
        if name == "plain SGD":
            continue
        low, ratio, high = quartiles([a / b for a, b in zip(own, plain, strict=True)])
        extra = statistics.median(parts[name]) - statistics.median(parts["plain SGD"])
        by_part = 1 + extra / statistics.median(plain)
        rows[name] = {"ratio": ratio, "lower_quartile": low, "upper_quartile": high, "ratio_by_optimizer_part": by_part}
        spread = f"quartiles {low:.3f} to {high:.3f}"
        print(f"{name:28} {ratio:9.3f} x   ({spread}); by the optimizer's part {by_part:.4f} x, {extra * 1e3:+.2f} ms")
    for name in solve_seconds:
        ordinary, base = statistics.median(times[name]), statistics.median(plain)
        with_statistics = statistics.median(times[f"{name}, with statistics"])
        solve = max(0.0, solve_seconds[name] - with_statistics)
        amortised = (ordinary + (with_statistics - ordinary) / STATS_EVERY + solve / SOLVE_EVERY) / base
        rows[name] |= {"amortised_ratio": amortised, "solve_seconds": solve}
        print(f"{name + ', amortised':28} {amortised:9.3f} x   ({STATS_EVERY}/{SOLVE_EVERY}; one solve {solve:.1f} s)")
    if arguments.json:
        arguments.json.write_text(json.dumps({**figures, "results": rows}, indent=1) + "\n")


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


if __name__ == "__main__":
    main()
