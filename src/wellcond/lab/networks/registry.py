"""The networks that methods are compared on, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wellcond.lab.errors import LabError, unknown_name

# What builds a network waits for a build: `wellcond list` and the options' help only name them.
if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelSpec:
    """A network by name.

    Attributes:
        name: What it is called on the command line.
        description: One line for `wellcond list`.
        smallest_image: The least height and width for which the features of its last convolution are 2×2.
        build: From (channels, classes) to the network, its weights drawn from torch's global generator.
    """

    name: str
    description: str
    smallest_image: int
    build: Callable[[int, int], nn.Module]


def _convnet(channels: int, classes: int) -> nn.Module:
    from wellcond.lab.networks.residual import convnet

    return convnet(channels, classes)


def _resnet(name: str, widths: tuple[int, ...], blocks: tuple[int, ...]) -> ModelSpec:
    def build(channels: int, classes: int) -> nn.Module:
        from wellcond.lab.networks.residual import resnet

        return resnet(channels, classes, widths, blocks)

    return ModelSpec(
        name,
        f"residual net, CIFAR stem, {_stages(blocks)} ({'-'.join(map(str, widths))})",
        2 ** len(widths),
        build,
    )


def _bottleneck(name: str, planes: tuple[int, ...], blocks: tuple[int, ...]) -> ModelSpec:
    def build(channels: int, classes: int) -> nn.Module:
        from wellcond.lab.networks.cifar_stem import bottleneck_resnet

        return bottleneck_resnet(channels, classes, planes, blocks)

    widths = "-".join(str(4 * width) for width in planes)
    return ModelSpec(
        name, f"residual net of bottlenecks, CIFAR stem, {_stages(blocks)} ({widths})", 2 ** len(planes), build
    )


def _vgg(name: str, plan: tuple[int | str, ...]) -> ModelSpec:
    def build(channels: int, classes: int) -> nn.Module:
        from wellcond.lab.networks.cifar_stem import vgg

        return vgg(channels, classes, plan)

    widths = "-".join(str(width) for width in plan if width != "M")
    return ModelSpec(name, f"VGG with batch normalization and one linear layer ({widths})", 2 ** plan.count("M"), build)


def _densenet(name: str, growth: int, blocks: tuple[int, ...]) -> ModelSpec:
    def build(channels: int, classes: int) -> nn.Module:
        from wellcond.lab.networks.cifar_stem import densenet

        return densenet(channels, classes, growth, blocks)

    layers = "-".join(map(str, blocks))
    return ModelSpec(
        name, f"DenseNet-BC, CIFAR stem, growth {growth}, blocks of {layers} layers", 2 ** len(blocks), build
    )


def _resnext(name: str, stem: int, blocks: tuple[int, ...], groups: int, width_per_group: int) -> ModelSpec:
    def build(channels: int, classes: int) -> nn.Module:
        from wellcond.lab.networks.cifar_stem import resnext

        return resnext(channels, classes, stem, blocks, groups, width_per_group)

    description = f"ResNeXt {groups}x{width_per_group}d, CIFAR stem, {_stages(blocks)}"
    return ModelSpec(name, description, 2 ** len(blocks), build)


def _stages(blocks: tuple[int, ...]) -> str:
    if len(set(blocks)) > 1:
        return f"stages of {'-'.join(map(str, blocks))} blocks"
    return f"{len(blocks)} stages of {blocks[0]} block{'' if blocks[0] == 1 else 's'}"


MODELS = {
    model.name: model
    for model in (
        ModelSpec("convnet", "3 conv-BN layers of 16, 32 and 32 channels", 4, _convnet),
        _resnet("resnet8", (16, 32, 64), (1, 1, 1)),
        _resnet("resnet14", (16, 32, 64), (2, 2, 2)),
        _bottleneck("resnet11-bottleneck", (16, 32, 64), (1, 1, 1)),
        _resnet("resnet18-thin", (16, 32, 64, 128), (2, 2, 2, 2)),
        _resnet("resnet18", (64, 128, 256, 512), (2, 2, 2, 2)),
        _resnet("resnet34", (64, 128, 256, 512), (3, 4, 6, 3)),
        _bottleneck("resnet50", (64, 128, 256, 512), (3, 4, 6, 3)),
        _bottleneck("resnet101", (64, 128, 256, 512), (3, 4, 23, 3)),
        _vgg("vgg-small", (16, "M", 32, "M", 64, 64, "M")),
        _vgg("vgg11", (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")),
        _vgg(
            "vgg16",
            (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
        ),
        _densenet("densenet-small", 12, (3, 3, 3)),
        _densenet("densenet121", 32, (6, 12, 24, 16)),
        _resnext("resnext-small", 32, (1, 1, 1), groups=4, width_per_group=8),
        _resnext("resnext29", 64, (3, 3, 3), groups=4, width_per_group=64),
    )
}
"""Every network with the CIFAR stem, in the order in which they are listed."""


def find_model(name: str) -> ModelSpec:
    """Return the network of this name.

    Args:
        name: A name in `MODELS`, or ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        LabError: If no network has the name, or its library is not installed.

    >>> find_model("resnet18").smallest_image
    16
    """
    if ":" in name:
        from wellcond.lab.networks.imagenet import find_build

        return ModelSpec(name, "with its library's own stem", 1, find_build(name))
    if name not in MODELS:
        raise unknown_name("model", name, [*MODELS, "torchvision:NAME", "timm:NAME"])
    return MODELS[name]


def select_model(name: str, image_size: int, channels: int = 3) -> ModelSpec:
    """Return the network of this name, if it takes images of this size.

    Raises:
        LabError: If no network has the name, or it does not take such images.

    >>> select_model("convnet", image_size=8).name
    'convnet'
    """
    model = find_model(name)
    if image_size < model.smallest_image:
        raise LabError(
            f"model {name} needs images of at least {model.smallest_image}x{model.smallest_image}, "
            f"got {image_size}x{image_size}"
        )
    if ":" in name:
        _try_size(model, image_size, channels)
    return model


def _try_size(model: ModelSpec, image_size: int, channels: int) -> None:
    """Show the network an image without values: only it knows which sizes it takes."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            model.build(channels, 2).eval()(torch.empty(2, channels, image_size, image_size))
    except LabError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        if "meta" in reason:
            return  # it looks at values, so only a real image can tell
        raise LabError(f"model {model.name} does not take images of {image_size}x{image_size}: {reason}") from error


def initial_model(name: str, channels: int, classes: int, seed: int, weights: str | None = None) -> nn.Module:
    """Return the network that a run begins with, leaving torch's global generator as it was.

    Args:
        name: A name in `MODELS`, or ``torchvision:NAME`` or ``timm:NAME``.
        channels: Channels of the images.
        classes: How many classes to tell apart.
        seed: What the weights are drawn from.
        weights: A file of weights, or ``torchvision:NAME`` of published ones (see `load_weights`); None keeps all that
            were drawn.

    Raises:
        LabError: If no network has the name, or the weights do not fit it.
    """
    import torch

    build = find_model(name).build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(channels, classes)
    if weights is not None:
        from wellcond.lab.networks.weights import load_weights

        load_weights(network, name, weights)
    return network
