"""Residual networks up to their last feature map: what detectors and re-identification networks stand on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

# `wellcond list` names the networks on these trunks; torchvision waits for a build.
if TYPE_CHECKING:
    from torch import Tensor, nn

NormLayer: TypeAlias = "Callable[[int], nn.Module]"
"""From a number of channels to the layer that normalizes them."""

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_FEATURES = ("conv1", "bn1", "relu", "maxpool", *_STAGES)


@dataclass(frozen=True)
class Trunk:
    """A residual network by name, without its classifier.

    Attributes:
        name: As part of the names of the networks that stand on it.
        source: What `load_weights` calls the network; published weights are of the networks of torchvision.
        channels: Of the four stages' feature maps.
        build: From a norm layer to the network, its weights drawn from torch's global generator.
    """

    name: str
    source: str
    channels: tuple[int, int, int, int]
    build: Callable[[NormLayer], nn.Module]


def _thin(widths: tuple[int, int, int, int], norm_layer: NormLayer) -> nn.Module:
    """Return a residual net of one basic block a stage, its layers called as torchvision's."""
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False),
        bn1=norm_layer(widths[0]),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    current = widths[0]
    for name, width in zip(_STAGES, widths, strict=True):
        stride = 1 if name == "layer1" else 2
        shortcut = None
        if stride != 1 or current != width:
            shortcut = nn.Sequential(nn.Conv2d(current, width, 1, stride=stride, bias=False), norm_layer(width))
        layers[name] = nn.Sequential(BasicBlock(current, width, stride, shortcut, norm_layer=norm_layer))
        current = width
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _bottlenecks(norm_layer: NormLayer, depth: int, groups: int = 1, width_per_group: int = 64) -> nn.Module:
    from torchvision.models.resnet import Bottleneck, ResNet

    blocks = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]
    network: nn.Module = ResNet(
        Bottleneck, blocks, groups=groups, width_per_group=width_per_group, norm_layer=norm_layer
    )
    return network


def _resnet18(norm_layer: NormLayer) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)
    return network


_WIDE = (256, 512, 1024, 2048)
TRUNKS = {
    trunk.name: trunk
    for trunk in (
        Trunk("tiny", "tiny", (16, 24, 32, 48), lambda norm_layer: _thin((16, 24, 32, 48), norm_layer)),
        Trunk("r18", "torchvision:resnet18", (64, 128, 256, 512), _resnet18),
        Trunk("r50", "torchvision:resnet50", _WIDE, partial(_bottlenecks, depth=50)),
        Trunk("r101", "torchvision:resnet101", _WIDE, partial(_bottlenecks, depth=101)),
        Trunk("x101-32x4d", "ResNeXt-101 32x4d", _WIDE, partial(_bottlenecks, depth=101, groups=32, width_per_group=4)),
        Trunk(
            "x101-64x4d",
            "torchvision:resnext101_64x4d",
            _WIDE,
            partial(_bottlenecks, depth=101, groups=64, width_per_group=4),
        ),
    )
}
"""Every trunk."""


def build_trunk(trunk: Trunk, norm_layer: NormLayer, weights: str | None) -> nn.Sequential:
    """Return a trunk's layers in order, ``conv1`` to ``layer4``.

    Args:
        trunk: Which.
        norm_layer: What normalizes.
        weights: What `load_weights` takes, for the network that the trunk is of; None keeps what is drawn from torch's
            global generator.
    """
    from torch import nn

    children = dict(build_network(trunk, norm_layer, weights).named_children())
    return nn.Sequential(OrderedDict((name, children[name]) for name in _FEATURES))


def build_network(trunk: Trunk, norm_layer: NormLayer, weights: str | None) -> nn.Module:
    """Return the network that a trunk is of, without what stands on its last feature map.

    Its class is still that of the network, which `ibn_a` knows; its layers are to be applied by `trunk_features`.

    Args:
        trunk: Which.
        norm_layer: What normalizes.
        weights: As for `build_trunk`.
    """
    network = trunk.build(norm_layer)
    if weights is not None:
        from wellcond.lab.networks.weights import load_weights

        load_weights(network, trunk.source, weights)
    for name in dict(network.named_children()).keys() - set(_FEATURES):
        delattr(network, name)
    return network


def trunk_features(network: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map of a network from `build_network`."""
    for name in _FEATURES:
        images = network.get_submodule(name)(images)
    return images


def freeze_first(trunk: nn.Sequential) -> None:
    """Let the stem and the first stage stay as they are in training, in place.

    Their parameters get no gradients, and their batch normalization normalizes with its running statistics and does not
    update them.

    Args:
        trunk: From `build_trunk`.
    """
    for name in ("conv1", "bn1", _STAGES[0]):
        trunk.set_submodule(name, frozen_batch_norms(trunk.get_submodule(name)))
        trunk.get_submodule(name).requires_grad_(False)


def frozen_batch_norms(module: nn.Module) -> nn.Module:
    """Return the module with its batch normalizations fixed, the scales and shifts as well as the statistics.

    >>> from torch import nn
    >>> frozen_batch_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]
    FrozenBatchNorm2d(8, eps=1e-05)
    """
    from torch import nn
    from torchvision.ops import FrozenBatchNorm2d

    if isinstance(module, nn.BatchNorm2d):
        frozen: nn.Module = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        state = module.state_dict()
        frozen.load_state_dict({name: state[name] for name in frozen.state_dict()})
        return frozen
    for name, child in module.named_children():
        setattr(module, name, frozen_batch_norms(child))
    return module


def keep_last_size(trunk: nn.Sequential) -> None:
    """Let the last stage's feature map be as large as that before it, in place: its first block gets stride 1."""
    from torch import nn

    for module in trunk.get_submodule("layer4.0").modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)


def dilate_last(trunk: nn.Module) -> None:
    """Let the last two stages' feature maps be as large as that before them, in place: dilated in place of strided.

    It is as with torchvision's ``replace_stride_with_dilation=[False, True, True]``, also for basic blocks.
    """
    from torch import nn

    before = 1
    for stage, dilation in (("layer3", 2), ("layer4", 4)):
        for place, block in enumerate(trunk.get_submodule(stage).children()):
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if module.kernel_size == (3, 3):
                        # The first block sees what the stage before has made.
                        apart = before if place == 0 else dilation
                        module.dilation = module.padding = (apart, apart)
        before = dilation
