"""IBN-Net puts Instance-Batch Normalization at given places of torchvision's and timm's ResNets and DenseNets."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.norm.instance_batch import check_instance_fraction
from wellcond.runtime.checks import checked, checks_itself

_STAGES_A = (1, 2, 3)
_STAGES_B = (1, 2)


class _Block(NamedTuple):
    """A block: its first norm; the children that a residual branch applies in order (some may be None), and the last.

    The branch is empty where there is no addition.
    """

    norm: str
    branch: tuple[str, ...] = ()
    activation: str = ""


class _Network(NamedTuple):
    """A kind of network: its class, the names of its stages and of its stem's norm (or what has it), and its blocks.

    The blocks are by the name of their class, in the same source.
    """

    source: str
    name: str
    stage: str
    stem: str
    blocks: dict[str, _Block]


def _block(branch: str, activation: str) -> _Block:
    return _Block("bn1", tuple(branch.split()), activation)


_SE_BOTTLENECK = _block("conv1 bn1 relu conv2 bn2 relu conv3 bn3 se_module", "relu")
_RESNETS = (
    _Network(
        "torchvision.models.resnet",
        "ResNet",
        "layer{}",
        "bn1",
        {
            "BasicBlock": _block("conv1 bn1 relu conv2 bn2", "relu"),
            "Bottleneck": _block("conv1 bn1 relu conv2 bn2 relu conv3 bn3", "relu"),
        },
    ),
    _Network(
        "timm.models.resnet",
        "ResNet",
        "layer{}",
        "bn1",
        {
            "BasicBlock": _block("conv1 bn1 drop_block act1 aa conv2 bn2 se drop_path", "act2"),
            "Bottleneck": _block("conv1 bn1 act1 conv2 bn2 drop_block act2 aa conv3 bn3 se drop_path", "act3"),
        },
    ),
    _Network(
        "timm.models.senet",
        "SENet",
        "layer{}",
        "layer0",
        {
            "SEResNetBlock": _block("conv1 bn1 relu conv2 bn2 relu se_module", "relu"),
            "SEBottleneck": _SE_BOTTLENECK,
            "SEResNetBottleneck": _SE_BOTTLENECK,
            "SEResNeXtBottleneck": _SE_BOTTLENECK,
        },
    ),
)
_DENSENETS = tuple(
    _Network(
        f"{package}.models.densenet", "DenseNet", "features.denseblock{}", "features.norm0", {layer: _Block("norm1")}
    )
    for package, layer in (("torchvision", "_DenseLayer"), ("timm", "DenseLayer"))
)
_NETWORKS = (*_RESNETS, *_DENSENETS)


@checked
@checks_itself("instance_fraction", "stages")
def ibn_a(
    model: nn.Module, *, instance_fraction: float | None = None, stages: Iterable[int] | None = None
) -> nn.Module:
    """Make a network an IBN-Net-a, in place: instance normalization of a part of the channels early in its blocks.

    Becomes an `InstanceBatchNorm2d`

    - in a ResNet, ResNeXt or SE-ResNet: the first norm of every residual block (``bn1``), the first half of whose
      channels is normalized by instance;
    - in a DenseNet: the norm before the first convolution (``norm1``) of the first, fourth, seventh, … layer of a dense
      block, the last 0.4 of whose channels are normalized by instance.

    Known are `torchvision.models.ResNet` and `DenseNet`, timm's of the same names (its SE-ResNets are ResNets with
    ``se``), and timm's `SENet`, the older SE-ResNets and SE-ResNeXts.

    Weights carry over: a converted layer is the same object as before, with the same parameters, and the running
    statistics of all channels. Its state dict has the same keys and shapes, so the weights of the plain network can be
    loaded afterwards as well as before; so can the authors' checkpoints, into torchvision's ResNets.

    Args:
        model: The network itself, not a wrapper of it.
        instance_fraction: Of the channels; None for 0.5 in ResNets and 0.4 in DenseNets, as the authors have it.
        stages: Numbers of the stages (``layer1``, …, or dense blocks), from 1; None for the first three.

    Returns:
        `model`.

    Raises:
        TypeError: If the network or the type of a block is not known, or a norm cannot be converted (`convert_norm`).
            Then nothing has changed.
        ValueError: If an argument is out of its range.

    Source:
        Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = ibn_a(resnet18())
        >>> model.layer1[0].bn1
        InstanceBatchNorm2d(64, instance_fraction=0.5, eps=1e-05, momentum=0.1, affine=True)
        >>> type(model.layer4[0].bn1).__name__
        'BatchNorm2d'
    """
    if instance_fraction is not None:
        check_instance_fraction(instance_fraction)
    network = _network(model, _NETWORKS)
    dense = network in _DENSENETS
    names = []
    for stage in _checked_stages(model, network, _STAGES_A if stages is None else stages):
        prefix = network.stage.format(stage)
        blocks = list(model.get_submodule(prefix).named_children())
        for name, block in blocks[:: 3 if dense else 1]:
            kind = _known_block(network, f"{prefix}.{name}", block)
            names.append(f"{prefix}.{name}.{kind.norm}")
    default, order = (0.4, "batch_first") if dense else (0.5, "instance_first")
    fraction = default if instance_fraction is None else instance_fraction
    others = {
        name: type(layer).__name__ for name in names if not isinstance(layer := model.get_submodule(name), _BatchNorm)
    }
    if others:
        lines = [f"\n  {name!r}: {kind} is not a batch normalization" for name, kind in others.items()]
        raise TypeError(f"ibn_a cannot convert these layers, and changed none:{''.join(lines)}")
    chosen = set(names)
    return convert_norm(model, "ibn", lambda name, _: name in chosen, instance_fraction=fraction, order=order)


@checked
def ibn_b(model: nn.Module) -> nn.Module:
    """Make a ResNet an IBN-Net-b, in place: instance normalization of whole features, in few places.

    The last norm of the stem becomes `nn.InstanceNorm2d`, with the same γ and β; its running statistics are dropped.
    The last block of each of the first two stages gets one more, named ``IN``, after its addition and before its last
    activation; its γ is 1 and its β 0. There they are only where appearance is still plain in the features.

    Known are the ResNets, ResNeXts and SE-ResNets that `ibn_a` knows; the authors have no such DenseNet. The outputs
    change, in evaluation too: pre-trained weights are a start. The plain network's state dict can be loaded with
    ``strict=False``, the authors' checkpoints as they are into torchvision's ResNets. Make the optimizer afterwards,
    so that it has the new parameters.

    Args:
        model: The network itself, not a wrapper of it.

    Returns:
        `model`.

    Raises:
        TypeError: If the network or the type of a block is not known, a block has its instance normalization already,
            or the stem's norm cannot be converted (`convert_norm`). Then nothing has changed.

    Source:
        Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018.

    Example:
        >>> from torchvision.models import resnet18
        >>> [name for name, module in ibn_b(resnet18()).named_modules() if isinstance(module, nn.InstanceNorm2d)]
        ['bn1', 'layer1.1.IN', 'layer2.1.IN']
    """
    network = _network(model, _RESNETS)
    blocks = []
    for stage in _checked_stages(model, network, _STAGES_B):
        prefix = network.stage.format(stage)
        name, block = list(model.get_submodule(prefix).named_children())[-1]
        kind = _known_block(network, f"{prefix}.{name}", block)
        if isinstance(block, _InstanceAfterAddition):
            raise TypeError(f"{prefix + '.' + name!r} has instance normalization after its addition already")
        _check_block(f"{prefix}.{name}", block, kind)
        blocks.append((block, _instance_norm_after(block, kind)))
    stem = _stem_norm(model, network)
    layer = model.get_submodule(stem)
    if not isinstance(layer, nn.BatchNorm2d):
        raise TypeError(f"{stem!r} must be a batch normalization, got {type(layer).__name__}")
    convert_norm(model, "in", where=lambda name, module: name == stem)
    for block, norm in blocks:
        # From here on nothing can fail.
        block.IN = norm
        block.__class__ = _with_instance_norm(type(block))
    return model


# which network, and which of its parts ------------------------------------------------------------------------------


def _network(model: nn.Module, known: tuple[_Network, ...]) -> _Network:
    """Return what is known of a model's class, or raise a TypeError that says what is known at all."""
    for network in known:
        # If there is such a model, its module has been imported.
        source = sys.modules.get(network.source)
        if source is not None and isinstance(model, getattr(source, network.name)):
            return network
    names = ", ".join(f"{network.source}.{network.name}" for network in known)
    raise TypeError(
        f"{type(model).__module__}.{type(model).__qualname__} is not a network that is known: {names}; in others "
        "convert_norm(model, to='ibn' or 'in', where=...) converts the layers that you name"
    )


def _checked_stages(model: nn.Module, network: _Network, stages: Iterable[int]) -> list[int]:
    count = 0
    names = {name for name, _ in model.named_modules()}
    while network.stage.format(count + 1) in names:
        count += 1
    chosen = list(stages) if isinstance(stages, Iterable) else []
    numbers = all(type(stage) is int and 1 <= stage <= count for stage in chosen)
    if not chosen or not numbers or len(set(chosen)) < len(chosen):
        raise ValueError(f"stages must be different numbers from 1 to {count}, got {stages!r}")
    return chosen


def _known_block(network: _Network, name: str, block: nn.Module) -> _Block:
    original = block.original if isinstance(block, _InstanceAfterAddition) else type(block)
    kind = _kind_of(original)
    if kind is None or original.__module__ != network.source:
        known = ", ".join(network.blocks)
        raise TypeError(
            f"{name!r} is a {type(block).__module__}.{type(block).__qualname__}, but what is known of "
            f"{network.source} are the blocks {known}"
        )
    return kind


def _kind_of(original: type[nn.Module]) -> _Block | None:
    """Return what is known of a block's type, which is not one merely named as a known one."""
    for network in _NETWORKS:
        source = sys.modules.get(network.source)
        kind = network.blocks.get(original.__name__)
        if kind is not None and getattr(source, original.__name__, None) is original:
            return kind
    return None


def _check_block(name: str, block: nn.Module, kind: _Block) -> None:
    """Refuse a block with a part that the order of its parts does not mention: another version's, or the user's."""
    if "forward" in vars(block):
        raise TypeError(f"{name!r} has its own 'forward', set on this one object")
    unknown = {child for child, _ in block.named_children()} - {*kind.branch, kind.activation, "downsample"}
    if unknown:
        raise TypeError(f"{name!r} has the parts {sorted(unknown)}, of which it is not known where they are applied")


def _stem_norm(model: nn.Module, network: _Network) -> str:
    """Return the name of the last norm of the stem."""
    stem = model.get_submodule(network.stem)
    if not isinstance(stem, nn.Sequential):
        return network.stem
    # timm's SENet has one or three convolutions there.
    return f"{network.stem}.{[name for name, _ in stem.named_children() if name.startswith('bn')][-1]}"


# instance normalization after the addition --------------------------------------------------------------------------


class _InstanceAfterAddition(nn.Module):
    """A residual block with instance normalization between its addition and its last activation.

    It is the block that it was, and an instance of its class; with another forward, since torchvision's blocks use one
    activation in several places.
    """

    original: ClassVar[type[nn.Module]]
    kind: ClassVar[_Block]
    downsample: nn.Module | None
    IN: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        branch = x
        for name in self.kind.branch:
            part = getattr(self, name)
            branch = branch if part is None else part(branch)
        shortcut = x if self.downsample is None else self.downsample(x)
        output: Tensor = getattr(self, self.kind.activation)(self.IN(branch + shortcut))
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on demand, so it has no name under which it could be found again.
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        return _empty_block, (self.original,), *reduced[2:]


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {}


def _with_instance_norm(original: type[nn.Module]) -> type[nn.Module]:
    """Return the type of a known block with instance normalization after its addition."""
    if original not in _BLOCKS:
        members = {
            "original": original,
            "kind": _kind_of(original),
            "__module__": __name__,
            "__doc__": _InstanceAfterAddition.__doc__,
        }
        _BLOCKS[original] = type(f"{original.__name__}IN", (_InstanceAfterAddition, original), members)
    return _BLOCKS[original]


def _empty_block(original: type[nn.Module]) -> nn.Module:
    """Make a block for `pickle` and `copy` to fill."""
    block = _with_instance_norm(original)
    return block.__new__(block)


def _instance_norm_after(block: nn.Module, kind: _Block) -> nn.InstanceNorm2d:
    """Make an instance normalization for the features that a block's branch ends with."""
    last = [name for name in kind.branch if name.startswith("conv")][-1]
    convolution = block.get_submodule(last)
    assert isinstance(convolution, nn.Conv2d)
    weight = convolution.weight
    norm = nn.InstanceNorm2d(convolution.out_channels, affine=True, device=weight.device, dtype=weight.dtype)
    return norm.train(block.training)
