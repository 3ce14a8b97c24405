"""Speed and memory of the normalization layers, as ratios to torch's in the same run.

For each shape: forward and backward of every layer in training against ``nn.BatchNorm2d``, in rounds of random order;
forward in evaluation against ``nn.InstanceNorm2d`` (there ``nn.BatchNorm2d`` is one pass, which nothing that looks at
the input first can match; its ratio is shown too); and the most memory that a forward and backward pass holds above its
inputs.

    python benchmarks/norm_layers.py --json docs/results/norm-layers.json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timing import setting, write
from torch import Tensor, nn

import wellcond.nn as wnn
from wellcond.lab.benchmark.timing import quartiles, ratio_quartiles

SHAPES = ((128, 64, 32, 32), (32, 256, 16, 16), (2, 64, 56, 56))
BASE = "nn.BatchNorm2d"
BASE_EVAL = "nn.InstanceNorm2d"


def momentum(channels: int, shape: tuple[int, ...]) -> nn.Module:
    """Return an MBN in the midst of its schedule."""
    layer = wnn.MomentumBatchNorm2d(channels)
    layer.stat_momentum = 0.5
    return layer


def sparse(channels: int, shape: tuple[int, ...]) -> nn.Module:
    """Return an SSN in the midst of its schedule."""
    layer = wnn.SparseSwitchableNorm2d(channels)
    layer.radius = 0.3
    return layer


class Two(nn.Module):
    """A layer after a convolution of one channel that another, small one has normalized: what a Kalman Norm needs."""

    def __init__(self, make: Callable[[int], nn.Module], channels: int) -> None:
        super().__init__()
        self.first, self.between, self.norm = make(1), nn.Conv2d(1, channels, 1), make(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize one channel, convolve, normalize."""
        return self.norm(self.between(self.first(x[:, :1])))


def kalman(channels: int, learned: bool) -> nn.Module:
    """Return a Kalman Norm that has another one before it."""
    layer = Two(partial(wnn.KalmanBatchNorm2d, learned=learned), channels)
    wnn.connect_kalman(layer)
    return layer


def compiled(make: Callable[[int, tuple[int, ...]], nn.Module]) -> Callable[[int, tuple[int, ...]], nn.Module]:
    """Return a maker of the same layer, compiled."""
    return lambda channels, shape: torch.compile(make(channels, shape), dynamic=False)


LAYERS: dict[str, Callable[[int, tuple[int, ...]], nn.Module]] = {
    BASE: lambda channels, shape: nn.BatchNorm2d(channels),
    "MBN": momentum,
    "BSR": lambda channels, shape: wnn.BSRBatchNorm2d(channels),
    "BSR, exact=False": lambda channels, shape: wnn.BSRBatchNorm2d(channels, exact=False),
    "Ghost, 8 groups": lambda channels, shape: wnn.GhostBatchNorm2d(channels, max(1, shape[0] // 8)),
    "Batch Renorm": lambda channels, shape: wnn.BatchRenorm2d(channels),
    "EvalNorm": lambda channels, shape: wnn.EvalNorm2d(channels),
    "PopulationNorm": lambda channels, shape: wnn.PopulationNorm2d(channels),
    "SwitchableNorm": lambda channels, shape: wnn.SwitchableNorm2d(channels),
    "SparseSwitchableNorm": sparse,
    "InstanceBatchNorm": lambda channels, shape: wnn.InstanceBatchNorm2d(channels),
    "1x1 conv, nn.BatchNorm2d": lambda channels, shape: Two(nn.BatchNorm2d, channels),
    "1x1 conv, KalmanBatchNorm": lambda channels, shape: kalman(channels, learned=True),
    "1x1 conv, Kalman, learned=False": lambda channels, shape: kalman(channels, learned=False),
    "DecorrelatedBatchNorm": lambda channels, shape: wnn.DecorrelatedBatchNorm2d(channels),
    "IterNorm": lambda channels, shape: wnn.IterNorm2d(channels),
    "IterNorm, 16 channels": lambda channels, shape: wnn.IterNorm2d(channels, channels_per_group=16),
    "nn.InstanceNorm2d": lambda channels, shape: nn.InstanceNorm2d(channels, affine=True),
    "nn.GroupNorm, 8 groups": lambda channels, shape: nn.GroupNorm(8, channels),
    "nn.BatchNorm2d, compiled": compiled(lambda channels, shape: nn.BatchNorm2d(channels)),
    "MBN, compiled": compiled(momentum),
    "SwitchableNorm, compiled": compiled(lambda channels, shape: wnn.SwitchableNorm2d(channels)),
    "BSR, compiled": compiled(lambda channels, shape: wnn.BSRBatchNorm2d(channels)),
}
EVALUATED: dict[str, Callable[[int, tuple[int, ...]], nn.Module]] = {
    BASE_EVAL: lambda channels, shape: nn.InstanceNorm2d(channels, affine=True),
    BASE: LAYERS[BASE],
    "BSR": LAYERS["BSR"],
    "EvalNorm": LAYERS["EvalNorm"],
    "MBN": LAYERS["MBN"],
    "SwitchableNorm": LAYERS["SwitchableNorm"],
    "InstanceBatchNorm": LAYERS["InstanceBatchNorm"],
    "IterNorm": LAYERS["IterNorm"],
}


def train_once(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    layer(x).backward(grad)
    x.grad = None
    layer.zero_grad()


def peak_bytes(layer: nn.Module, x: Tensor, grad: Tensor) -> int:
    """Return the most that a forward and backward pass holds at once, above what was there before."""
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_once(layer, x, grad)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        train_once(layer, x, grad)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def time_calls(calls: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, list[float]]:
    """Call each once a round, in an order drawn anew each time (each leaves its mark on the next one's memory)."""
    for call in calls.values():
        call()
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            calls[name]()
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return times


def table(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return each one's milliseconds and ratio to the base, and print them."""
    rows = {}
    for name, own in times.items():
        low, median, high = ratio_quartiles(own, times[base])
        rows[name] = {"ms": 1e3 * quartiles(own)[1], "ratio": median, "ratio_low": low, "ratio_high": high}
        print(f"  {name:32}{rows[name]['ms']:9.2f} ms   x {median:.3f} ({low:.3f} to {high:.3f})")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = setting(options, device) | {"shapes": []}
    for shape in SHAPES:
        torch.manual_seed(0)
        torch.compiler.reset()
        x = torch.randn(shape, device=device, requires_grad=True)
        grad = torch.randn(shape, device=device)
        layers = {name: make(shape[1], shape).to(device) for name, make in LAYERS.items()}
        # Small layers are quick, and their times scatter more.
        rounds = options.rounds * (1 if x.numel() > 2_000_000 else 10)
        print(f"{shape}, training, forward and backward: x nn.BatchNorm2d")
        calls = {name: partial(train_once, layer, x, grad) for name, layer in layers.items()}
        training = table(time_calls(calls, rounds, device.type == "cuda"), BASE)
        print(f"{shape}, evaluation, forward: x nn.InstanceNorm2d")
        images = x.detach()
        evaluated = {name: make(shape[1], shape).to(device) for name, make in EVALUATED.items()}
        for layer in evaluated.values():
            if not isinstance(layer, nn.InstanceNorm2d):
                layer(images)
            layer.eval()
        with torch.no_grad():
            calls = {name: partial(layer, images) for name, layer in evaluated.items()}
            evaluation = table(time_calls(calls, rounds, device.type == "cuda"), BASE_EVAL)
        memory = {name: peak_bytes(layer, x, grad) for name, layer in layers.items()}
        print(f"{shape}, peak memory above nn.BatchNorm2d's {memory[BASE] / 1e6:.2f} MB, in units of N*C floats")
        extra = {name: (bytes_ - memory[BASE]) / (4 * shape[0] * shape[1]) for name, bytes_ in memory.items()}
        print("  " + ", ".join(f"{name} {units:+.1f}" for name, units in extra.items() if name != BASE))
        figures["shapes"].append(
            {
                "shape": list(shape),
                "training": training,
                "evaluation": evaluation,
                "peak_mb": {name: bytes_ / 1e6 for name, bytes_ in memory.items()},
                "peak_extra_nc": extra,
            }
        )
    write(options.json, figures)


if __name__ == "__main__":
    main()
