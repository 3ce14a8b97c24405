"""The networks of the benchmark of stale statistics: a ResNet-8 and a depthwise network, trained once for each seed.

    python benchmarks/stale_networks.py --data cifar10-jpeg/ --work runs/ --seeds 0 1 2 3 4

writes a file of weights for each network and seed into the folder `--work`, and leaves those alone that are there. All
seeds train on the same images, from weights and in an order of their own: first at a high learning rate, whose epochs
are kept, too, then with a cosine down to 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.lab.data.batches import TrainingBatches, channel_moments
from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split
from wellcond.lab.networks.residual import resnet

BATCH = 64
HIGH_EPOCHS, KEPT_EPOCHS, FALLING_EPOCHS = 7, 4, 5
HIGH_LR = 0.1


class Inverted(nn.Module):
    """An inverted residual block: 1×1 up, 3×3 depthwise, 1×1 down."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 3) -> None:
        super().__init__()
        width = inputs * expand
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return features, [n, outputs, h / stride, w / stride]."""
        features: Tensor = self.body(x)
        return x + features if self.adds else features


def depthwise(channels: int, classes: int) -> nn.Module:
    """Return a small MobileNet-like network."""
    stem = (nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Inverted(16, 16, 1), Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 48, 2), Inverted(48, 48, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes))


def resnet8(channels: int, classes: int) -> nn.Module:
    """Return the lab's ResNet-8."""
    return resnet(channels, classes, (16, 32, 64), (1, 1, 1))


NETWORKS = {"resnet8": resnet8, "depthwise": depthwise}


class Images(NamedTuple):
    """Images, uint8 [n, channels, h, w], their classes, and what normalizes them."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    moments: tuple[Tensor, Tensor]
    classes: int

    def normalized(self, images: Tensor) -> Tensor:
        """Return images as a network takes them."""
        return (images.float() - self.moments[0]) / self.moments[1]


def images_of(options: argparse.Namespace) -> Images:
    """Load the images that all seeds train on, and those that test."""
    data = load_data(options.data, options.image_size, options.test_images, options.train_images)
    part = torch.from_numpy(draw_split(data.pool.labels, options.train_images, 1, 0).train)
    train = data.pool.images[part]
    return Images(
        train,
        torch.from_numpy(data.pool.labels)[part],
        data.test.images,
        torch.from_numpy(data.test.labels),
        channel_moments(train),
        len(data.pool.classes),
    )


def train(name: str, images: Images, seed: int, epochs: tuple[int, int, int] | None = None) -> dict[str, Any]:
    """Train one network.

    Args:
        name: Of `NETWORKS`.
        images: What to train on.
        seed: Of the weights and the order.
        epochs: At the high learning rate, how many of these are kept, and of the cosine.

    Returns:
        The state dicts of the end and of the kept epochs, and the seconds that it took.
    """
    high, kept, falling = epochs or (HIGH_EPOCHS, KEPT_EPOCHS, FALLING_EPOCHS)
    torch.manual_seed(seed)
    model = NETWORKS[name](images.train.shape[1], images.classes).train()
    batches = TrainingBatches(images.train, images.train_labels, images.moments, BATCH, "flip", seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=HIGH_LR, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=falling * len(batches))
    states, start = [], time.perf_counter()
    for epoch in range(high + falling):
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if epoch >= high:
                schedule.step()
        if high - kept <= epoch < high:
            states.append({key: value.clone() for key, value in model.state_dict().items()})
    return {"final": model.state_dict(), "high": states, "seconds": time.perf_counter() - start}


def file_of(folder: Path, name: str, seed: int) -> Path:
    """Return where a trained network lies."""
    return folder / f"{name}-{seed}.pt"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that name the data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as `wellcond compare --data`")
    parser.add_argument("--work", type=Path, required=True, help="the folder of the trained networks")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--train-images", type=int, default=8000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    return parser


def kept_rows(
    options: argparse.Namespace,
    name: str,
    measured: Callable[[argparse.Namespace, str, int, Images], dict[str, Any]],
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield each network's and seed's measurements, kept in files so that the same command goes on.

    Args:
        options: Of `arguments`.
        name: With which the files' names begin.
        measured: Measures one.
    """
    images = images_of(options)
    for network in options.networks:
        for seed in options.seeds:
            file = options.work / f"{name}-{network}-{seed}.json"
            if not file.exists():
                file.write_text(json.dumps(measured(options, network, seed, images)))
            yield network, seed, json.loads(file.read_text())


def main() -> None:
    options = arguments(__doc__).parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    images = None
    for seed in options.seeds:
        for name in options.networks:
            file = file_of(options.work, name, seed)
            if file.exists():
                continue
            images = images or images_of(options)
            found = train(name, images, seed)
            partial = file.with_suffix(".partial")
            torch.save(found, partial)
            partial.replace(file)
            print(f"{file.name}: {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
