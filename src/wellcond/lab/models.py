"""The networks that methods are compared on: a small conv-BN net and two residual nets with the CIFAR stem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellcond.lab.errors import LabError, unknown_name


class ConvNormAct(nn.Sequential):
    """A 3×3 convolution without bias, batch normalization, and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNormAct(in_channels, out_channels, stride)
        self.second = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's features, [n, out_channels, h / stride, w / stride]."""
        features: Tensor = self.second(self.first(images)) + self.shortcut(images)
        return features.relu()


def convnet(channels: int, classes: int) -> nn.Module:
    """Return a conv-BN net of 16, 32 and 32 channels with one max-pool, global average pooling and a linear layer."""
    return nn.Sequential(
        ConvNormAct(channels, 16),
        ConvNormAct(16, 32),
        nn.MaxPool2d(2),
        ConvNormAct(32, 32),
        *_head(32, classes),
    )


def resnet(channels: int, classes: int, widths: tuple[int, ...], blocks: int) -> nn.Module:
    """Return a residual net with the CIFAR stem (a 3×3 convolution, no max-pool).

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Blocks in each stage.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    layers: list[nn.Module] = [ConvNormAct(channels, widths[0])]
    current = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(current, width, stride=2 if stage > 0 and block == 0 else 1))
            current = width
    return nn.Sequential(*layers, *_head(current, classes))


def _head(features: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)


@dataclass(frozen=True)
class ModelSpec:
    """A network by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        smallest_image: The least height and width for which its last feature map is 2×2.
        build: From (channels, classes) to the network, its weights drawn from torch's global generator.
    """

    name: str
    description: str
    smallest_image: int
    build: Callable[[int, int], nn.Module]


MODELS = {
    model.name: model
    for model in (
        ModelSpec("convnet", "3 conv-BN layers of 16, 32 and 32 channels", 4, convnet),
        ModelSpec(
            "resnet8",
            "residual net, CIFAR stem, 3 stages of 1 block (16-32-64)",
            8,
            lambda channels, classes: resnet(channels, classes, (16, 32, 64), blocks=1),
        ),
        ModelSpec(
            "resnet18",
            "residual net, CIFAR stem, 4 stages of 2 blocks (64-128-256-512)",
            16,
            lambda channels, classes: resnet(channels, classes, (64, 128, 256, 512), blocks=2),
        ),
    )
}
"""Every network, in the order in which they are listed."""


def select_model(name: str, image_size: int) -> ModelSpec:
    """Return the network of this name, if images of this size are large enough for it.

    Raises:
        LabError: If no network has the name, or the images are too small.

    >>> select_model("convnet", image_size=8).name
    'convnet'
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    model = MODELS[name]
    if image_size < model.smallest_image:
        raise LabError(
            f"model {name} needs images of at least {model.smallest_image}x{model.smallest_image}, "
            f"got {image_size}x{image_size}"
        )
    return model


def initial_model(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """Return the network with the weights that this seed gives, leaving torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name].build(channels, classes)
