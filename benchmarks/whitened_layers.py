"""Speed of the layers that whiten what they multiply, as ratios to a convolution with batch normalization.

For each shape: forward and backward in training in rounds of random order. The amortized layers (WNN, EigenNet, GWNN)
are timed between refreshes, in a pass that takes no statistics; a pass that takes them, and one that renews the
matrices, are listed beside, since their share of a step follows from `stats_every` and `refresh_every`.

    python benchmarks/whitened_layers.py --json docs/results/whitened-layers.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from norm_layers import table, time_calls, train_once
from timing import setting, write
from torch import Tensor, nn

import wellcond.nn as wnn

SHAPES = ((128, 64, 32, 32), (32, 256, 16, 16))
BASE = "nn.Conv2d, nn.BatchNorm2d"
AMORTIZED = {"WNN": wnn.WhitenedConv2d, "EigenNet": wnn.EigenConv2d, "GWNN": wnn.GeneralizedWhitenedConv2d}


def conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def with_batch_norm(layer: nn.Module, channels: int) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(channels))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    BASE: lambda c: with_batch_norm(conv(c), c),
    "nn.Conv2d": conv,
    "weight_standardize, BN": lambda c: with_batch_norm(wnn.weight_standardize(conv(c)), c),
    "ND, block 64": lambda c: wnn.NetworkDeconvolution2d.from_layer(conv(c)),
    "ND, block 64, interleaved": lambda c: wnn.NetworkDeconvolution2d.from_layer(conv(c), interleaved=True),
    "ND, block 16": lambda c: wnn.NetworkDeconvolution2d.from_layer(conv(c), block=16),
    "nn.Conv2d, DBN": lambda c: nn.Sequential(conv(c), wnn.DecorrelatedBatchNorm2d(c)),
    "nn.Conv2d, IterNorm": lambda c: nn.Sequential(conv(c), wnn.IterNorm2d(c)),
}


def amortized(name: str, channels: int, moment: str) -> nn.Module:
    """Return a layer for which every pass is one between two refreshes, one with statistics, or a refresh."""
    every = {"between": (10**9, None), "statistics": (1, None), "refresh": (1, 1)}[moment]
    return AMORTIZED[name].from_layer(conv(channels), stats_every=every[0], refresh_every=every[1])


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Run a pass after a change of the weights, which is what the amortized layers take for a step."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.0)
    train_once(layer, x, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = setting(options, device) | {"base": BASE, "shapes": []}
    for shape in SHAPES:
        torch.manual_seed(0)
        channels = shape[1]
        x = torch.randn(shape, device=device, requires_grad=True)
        grad = torch.randn(shape, device=device)
        layers = {name: make(channels) for name, make in LAYERS.items()}
        for name in AMORTIZED:
            for moment in ("between", "statistics", "refresh"):
                layers[f"{name}, {moment}"] = amortized(name, channels, moment)
        print(f"{shape}, 3 x 3 convolution, training, forward and backward: x {BASE}")
        calls = {name: partial(step, layer.to(device), x, grad) for name, layer in layers.items()}
        training = table(time_calls(calls, options.rounds, device.type == "cuda"), BASE)
        figures["shapes"].append({"shape": list(shape), "training": training})
    write(options.json, figures)


if __name__ == "__main__":
    main()
