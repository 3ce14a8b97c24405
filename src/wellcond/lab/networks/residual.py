"""Small convolutional nets and residual nets of basic blocks, with the CIFAR stem (a 3×3 convolution, no max-pool)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


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


def resnet(channels: int, classes: int, widths: Sequence[int], blocks: Sequence[int]) -> nn.Module:
    """Return a residual net of basic blocks.

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Blocks of each stage.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    return nn.Sequential(*residual_layers(channels, widths, blocks), *_head(widths[-1], classes))


def residual_layers(channels: int, widths: Sequence[int], blocks: Sequence[int]) -> list[nn.Module]:
    """Return the layers of a residual net of basic blocks up to its last feature map.

    Args:
        channels: Channels of the images.
        widths: Channels of each stage; every stage but the first halves the image.
        blocks: Blocks of each stage.
    """
    layers: list[nn.Module] = [ConvNormAct(channels, widths[0])]
    current = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            layers.append(BasicBlock(current, width, stride=2 if stage > 0 and block == 0 else 1))
            current = width
    return layers


def _head(features: int, classes: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)
