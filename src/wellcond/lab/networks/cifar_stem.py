"""torchvision's blocks behind the CIFAR stem (a 3×3 convolution, no max-pool), with the parameter names of torchvision.

The architectures are those of https://github.com/kuangliu/pytorch-cifar, whose numbers of parameters are the ones that
the literature gives for CIFAR.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn
from torchvision.models import DenseNet
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import make_layers


def bottleneck_resnet(channels: int, classes: int, planes: Sequence[int], blocks: Sequence[int]) -> nn.Module:
    """Return a residual net of bottleneck blocks.

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        planes: Channels of each stage's 3×3 convolutions; its output has four times as many.
        blocks: Blocks of each stage; every stage but the first halves the image.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    return _staged(channels, classes, planes[0], planes, blocks)


def resnext(
    channels: int, classes: int, stem: int, blocks: Sequence[int], groups: int, width_per_group: int
) -> nn.Module:
    """Return a ResNeXt; a stage's width is twice that of the stage before, and its output twice its width.

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        stem: Channels of the stem.
        blocks: Blocks of each stage; every stage but the first halves the image.
        groups: Groups of the 3×3 convolutions.
        width_per_group: Channels of a group in the first stage.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    # A block's output has four times its planes; torchvision makes it planes · base_width / 64 · groups wide inside.
    planes = [groups * width_per_group * 2**stage // 2 for stage in range(len(blocks))]
    return _staged(channels, classes, stem, planes, blocks, groups, base_width=128 // groups)


def _staged(
    channels: int,
    classes: int,
    stem: int,
    planes: Sequence[int],
    blocks: Sequence[int],
    groups: int = 1,
    base_width: int = 64,
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(channels, stem, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(stem), relu=nn.ReLU(inplace=True)
    )
    current = stem
    for stage, (width, count) in enumerate(zip(planes, blocks, strict=True)):
        stride = 1 if stage == 0 else 2
        out = width * Bottleneck.expansion
        # Every stage changes the number of channels, so its first block always has a convolution in the shortcut.
        shortcut = nn.Sequential(nn.Conv2d(current, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))
        rows = [Bottleneck(current, width, stride, shortcut, groups, base_width)]
        rows += [Bottleneck(out, width, groups=groups, base_width=base_width) for _ in range(count - 1)]
        layers[f"layer{stage + 1}"] = nn.Sequential(*rows)
        current = out
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(current, classes)}
    return nn.Sequential(layers)


def vgg(channels: int, classes: int, plan: Sequence[int | str]) -> nn.Module:
    """Return a VGG with batch normalization whose only linear layer is the classifier.

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        plan: The width of each 3×3 convolution, and ``"M"`` for each max-pool.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    features = make_layers(list(plan), batch_norm=True)
    widths = [width for width in plan if isinstance(width, int)]
    if channels != 3:
        features[0] = nn.Conv2d(channels, widths[0], 3, padding=1)
    return nn.Sequential(
        OrderedDict(
            features=features,
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Linear(widths[-1], classes),
        )
    )


def densenet(channels: int, classes: int, growth: int, blocks: Sequence[int]) -> nn.Module:
    """Return a DenseNet-BC; its first dense block normalizes what the stem gives, so the stem is a convolution alone.

    Args:
        channels: Channels of the images.
        classes: How many classes to tell apart.
        growth: Channels that each layer adds; the stem has twice as many.
        blocks: Layers of each dense block; all but the last are followed by a transition that halves the image.

    Returns:
        The net, from images [n, channels, h, w] to logits [n, classes].
    """
    network: nn.Module = DenseNet(growth, tuple(blocks), num_init_features=2 * growth, num_classes=classes)
    stem = nn.Conv2d(channels, 2 * growth, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight)  # as torchvision draws this class's other convolutions
    features = network.get_submodule("features")
    features.conv0 = stem
    del features.norm0, features.relu0, features.pool0
    return network
