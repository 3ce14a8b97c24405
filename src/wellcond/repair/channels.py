"""Finds which tensors of a network share their channels, so that these can be permuted or taken away together."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What keeps channels where they are, each by itself, and 0 where it was.
_KEEPING_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Mish, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample),
)
_KEEPING: set[Any] = {
    *(F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.hardswish, F.elu, F.mish, F.dropout, F.dropout2d, F.interpolate),
    *(torch.relu, torch.tanh, torch.clone, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *("relu", "relu_", "tanh", "clone", "contiguous", "detach", "float", "double", "half"),
}
_ADDING: set[Any] = {operator.add, operator.iadd, operator.sub, torch.add, "add", "add_"}
_FLATTENING: set[Any] = {torch.flatten, "flatten"}
_AVERAGING: set[Any] = {torch.mean, "mean"}

ChannelRole = Literal["makes", "takes", "keeps"]


class Use(NamedTuple):
    """A tensor with a dimension of some channels.

    Attributes:
        module: Whose tensor.
        name: Of the tensor in it.
        dim: The dimension.
        role: What the module does with the channels: it makes them, takes them, or keeps them as they are.
        block: Entries of the dimension for each channel: positions that were flattened into it.
    """

    module: nn.Module
    name: str
    dim: int
    role: ChannelRole
    block: int = 1


@dataclass
class Channels:
    """Channels that stand in the same order wherever they are.

    Attributes:
        size: How many.
        uses: Every tensor that has them.
        modules: Names of the modules that return them.
        fixed: Why they have to stay as they are; None if they need not.
    """

    size: int
    uses: list[Use] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    fixed: str | None = None

    def select(self, positions: Tensor) -> None:
        """Keep the channels at these positions, in this order, wherever they are; parameters are replaced.

        Args:
            positions: Shape [n], integers.
        """
        for module, name, dim, _, block in self.uses:
            tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
            assert tensor is not None
            positions = positions.to(tensor.device)
            entries = (positions[:, None] * block + torch.arange(block, device=tensor.device)).flatten()
            selected = tensor.data.index_select(dim, entries)
            if selected.shape == tensor.shape:
                tensor.data.copy_(selected)
            elif isinstance(tensor, nn.Parameter):
                module._parameters[name] = nn.Parameter(selected, tensor.requires_grad)
            else:
                module._buffers[name] = selected
        for module in {use.module: None for use in self.uses}:
            _say_sizes(module)

    def blank(self, positions: Tensor) -> None:
        """Make zeros of the channels at these positions: of what makes them and of what keeps them."""
        for module, name, dim, role, _ in self.uses:
            tensor = module._parameters.get(name)  # Running statistics stay, whatever they are.
            if role != "takes" and tensor is not None:
                tensor.data.index_fill_(dim, positions.to(tensor.device), 0)


class _Value(NamedTuple):
    """What a node returns: the channels in its dimension 1, and how many entries each has there (0: to be seen)."""

    channels: Channels
    block: int = 1


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Look inside of nothing that has no modules inside, nor of any normalization."""
        return super().is_leaf_module(module, name) or isinstance(module, _BatchNorm) or not any(module.children())


def find_channels(model: nn.Module) -> list[Channels]:
    """Return a model's channels between convolutions, linear layers and batch normalizations.

    Args:
        model: That `torch.fx` can trace.

    Returns:
        In the order in which they are made. Channels that meet an operation that is not known are `fixed`, as are those
        of the output.

    Raises:
        TypeError: If the model cannot be traced.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> [(each.size, len(each.uses), each.fixed) for each in find_channels(model)]
        [(8, 7, None), (4, 2, 'is the output')]
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it is given no tensors
        raise TypeError(
            f"{type(model).__name__} cannot be traced (torch.fx), so which layers share channels is not known: {error}"
        ) from error
    return _Finder(model, graph).found()


class _Finder:
    """Goes through a traced graph once."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(model.named_modules())
        self._all: list[Channels] = []
        self._joined: dict[int, Channels] = {}
        self._calls: dict[nn.Module, tuple[_Value | None, _Value]] = {}
        values: dict[fx.Node, _Value | None] = {}
        for node in graph.nodes:
            values[node] = self._value(node, values)

    def found(self) -> list[Channels]:
        """Return the channels, once each."""
        return list({id(root): root for root in map(self._root, self._all)}.values())

    def _value(self, node: fx.Node, values: dict[fx.Node, _Value | None]) -> _Value | None:
        inputs = [values[each] for each in node.all_input_nodes]
        if node.op == "output":
            return self._fix(inputs, "is the output")
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "call_module":
            return self._of_module(str(node.target), inputs)
        target = node.target
        first = inputs[0] if inputs else None
        if target in _KEEPING and len(inputs) == 1:
            return first
        if target in _ADDING and len(inputs) == 2:
            if inputs[0] is not None and inputs[1] is not None and inputs[0].block == inputs[1].block:
                return _Value(self._join(inputs[0].channels, inputs[1].channels), inputs[0].block)
        elif target in _FLATTENING and _argument(node, "start_dim", 0) == 1 and _argument(node, "end_dim", -1) == -1:
            return first and _Value(first.channels, 0)
        elif target in _AVERAGING and first is not None:
            dims = _argument(node, "dim", None)
            dims = [dims] if isinstance(dims, int) else dims
            if dims is not None and (all(dim > 1 for dim in dims) or sorted(dims) == [-2, -1]):
                return first
        elif target in ("size", "dim", getattr):  # Numbers.
            return None
        return self._fix(inputs, f"goes into {getattr(target, '__name__', target)}")

    def _of_module(self, name: str, inputs: list[_Value | None]) -> _Value | None:
        module = self._modules[name]
        given = inputs[0] if len(inputs) == 1 else None
        kind = type(module)
        if module in self._calls:  # A layer that is used again has the same channels again.
            before, after = self._calls[module]
            if (given is None) != (before is None):
                self._fix([given, before], f"goes into {name!r}, which is used twice")
            elif given is not None and before is not None:
                self._join(given.channels, before.channels)
            return after
        if len(inputs) == 1 and kind in _KEEPING_MODULES:
            return given
        if len(inputs) == 1 and kind is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
            return given and _Value(given.channels, 0)
        own = {key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
        if kind in (*_Conv, nn.Linear) and own <= {"weight", "bias"}:
            result = self._of_linear_map(name, module, given)
        elif isinstance(module, _BatchNorm) and given is not None and given.block == 1:
            result = given
            self._keeps(given.channels, name, module)
        else:
            return self._fix(inputs, f"goes into {name!r}, a {kind.__name__}")
        self._calls[module] = given, result
        return result

    def _of_linear_map(self, name: str, module: Any, given: _Value | None) -> _Value:
        groups = getattr(module, "groups", 1)
        if groups > 1 and groups == module.in_channels == module.out_channels and given is not None:
            self._keeps(given.channels, name, module)
            return given
        outputs = Channels(module.weight.shape[0])
        self._all.append(outputs)
        if groups > 1:
            self._fix([given, _Value(outputs)], f"goes through {name!r}, a convolution of {groups} groups")
        for key in ("weight", "bias"):
            if getattr(module, key) is not None:
                outputs.uses.append(Use(module, key, 0, "makes"))
        outputs.modules.append(name)
        if given is not None and groups == 1:
            channels = self._root(given.channels)
            block, left = divmod(module.weight.shape[1], channels.size)
            if left or (given.block and block != given.block):
                self._fix([given], f"goes into {name!r}, which takes another number of channels")
            channels.uses.append(Use(module, "weight", 1, "takes", block))
        return _Value(outputs)

    def _keeps(self, channels: Channels, name: str, module: nn.Module) -> None:
        channels = self._root(channels)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.dim() and tensor.shape[0] == channels.size:
                channels.uses.append(Use(module, key, 0, "keeps"))
        channels.modules.append(name)

    def _root(self, channels: Channels) -> Channels:
        while id(channels) in self._joined:
            channels = self._joined[id(channels)]
        return channels

    def _join(self, one: Channels, other: Channels) -> Channels:
        one, other = self._root(one), self._root(other)
        if one is other:
            return one
        if one.size != other.size:
            self._fix([_Value(one), _Value(other)], "is added to another number of channels")
            return one
        one.uses += other.uses
        one.modules += other.modules
        one.fixed = one.fixed or other.fixed
        self._joined[id(other)] = one
        return one

    def _fix(self, values: list[_Value | None], reason: str) -> _Value | None:
        """Fix channels; what comes of them is not known."""
        for value in values:
            if value is not None:
                root = self._root(value.channels)
                root.fixed = root.fixed or reason
        return None


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    """Return an argument beside the tensor, however it was given."""
    place = {"start_dim": 1, "end_dim": 2, "dim": 1}[name]
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _say_sizes(module: nn.Module) -> None:
    """Have a module's attributes say what sizes its tensors have."""
    said: dict[type[nn.Module], Callable[[Any], dict[str, int]]] = {
        nn.Linear: lambda m: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]},
    }
    if isinstance(module, _BatchNorm):
        sizes = [tensor.shape[0] for tensor in (module.running_mean, module.weight) if tensor is not None]
        module.num_features = sizes[0]
    elif isinstance(module, _Conv):
        depthwise = module.groups > 1 and module.groups == module.in_channels
        module.out_channels = module.weight.shape[0]
        module.groups = module.weight.shape[0] if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif type(module) in said:
        for name, value in said[type(module)](module).items():
            setattr(module, name, value)
