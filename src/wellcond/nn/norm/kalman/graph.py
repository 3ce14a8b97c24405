"""Carries statistics from layer to layer in a forward pass; a Kalman-normalized layer predicts its own from them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import activation, pooling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from wellcond.numerics.moments import statistics_dtype


class Statistics(NamedTuple):
    """Of each channel in each micro-batch.

    Attributes:
        mean: Shape [S, C] for S micro-batches.
        var: Likewise.
        sizes: Samples of each micro-batch.
        positions: Height and width of the features.
    """

    mean: Tensor
    var: Tensor
    sizes: tuple[int, ...]
    positions: tuple[int, ...]


def propagate(
    mean: Tensor, var: Tensor, noise: Tensor, transition: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Predict statistics behind a transition: those of what it makes of a Gaussian sample, √σ²·noise + μ.

    This is how the authors' code of Kalman Normalization gets its prediction, with relu followed by the network's own
    convolution for a transition.

    Args:
        mean: μ, shape [S, C].
        var: σ², shape [S, C].
        noise: Standard normal, shape [S, C, H, W].
        transition: Maps [S, C, H, W] to [S, C', H', W'] (or [S, C']).

    Returns:
        Mean and biased variance over the positions, shape [S, C'], and (H', W').

    Example:
        >>> noise = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> propagate(torch.tensor([[3.0]]), torch.tensor([[4.0]]), noise, lambda sample: 10 * sample)
        (tensor([[30.]]), tensor([[400.]]), (1, 2))
    """
    sample = torch.addcmul(mean[:, :, None, None], noise, var.clamp_min(_TINY).sqrt()[:, :, None, None])
    result = transition(sample)
    wide = result.to(statistics_dtype(result.dtype))
    if result.dim() == 2:
        return wide, torch.zeros_like(wide), ()
    axes = tuple(range(2, result.dim()))
    mean = wide.mean(axes, keepdim=True)
    return mean.flatten(1), (wide - mean).square().mean(axes), tuple(result.shape[2:])


# The derivative of a root at zero is infinite.
_TINY = 1e-30


# what a prediction is made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filtered:
    """The estimate that the filter of a layer returned.

    Attributes:
        layer: Its name.
    """

    layer: str


@dataclass(frozen=True)
class Summed:
    """Of a sum of features: means and variances add.

    Attributes:
        parts: Indices of nodes.
    """

    parts: tuple[int, ...]


@dataclass(frozen=True)
class Concatenated:
    """Of features concatenated along the channels.

    Attributes:
        parts: Indices of nodes.
    """

    parts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """An operation of the network with one tensor input.

    Attributes:
        function: A module; a function, or ``"F."`` and the name of one in `torch.nn.functional`; or the name of a
            tensor's method.
        arguments: What follows the tensor.
        keywords: Of the call.
    """

    function: nn.Module | Callable[..., Any] | str
    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Apply it to a sample, which is no data: without a module's hooks, and as in evaluation."""
        function, keywords = self.function, self.keywords or {}
        if isinstance(function, nn.Module):
            parameter = next(function.parameters(), None)
            features = features if parameter is None else features.to(parameter.dtype)
            with contextlib.nullcontext() if _is_simple(function) else _evaluating(function):
                return cast(Tensor, function.forward(features, *self.arguments, **keywords))
        if isinstance(function, str):
            name = function.removeprefix("F.")
            function = getattr(F, name) if name != function else getattr(torch.Tensor, name)
        return cast(Tensor, function(features, *self.arguments, **keywords))


def _is_simple(module: nn.Module) -> bool:
    """Whether a module does the same in training as in evaluation."""
    return isinstance(module, (_ConvNd, nn.Linear)) or type(module).__module__ in (
        activation.__name__,
        pooling.__name__,
    )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [each for each in module.modules() if each.training]
    for each in training:
        each.training = False
    try:
        yield
    finally:
        for each in training:
            each.training = True


@dataclass(frozen=True, eq=False)
class Through:
    """Of what operations make of a Gaussian sample.

    Attributes:
        part: Index of the node that the sample is drawn from.
        operations: In order.
    """

    part: int
    operations: tuple[Operation, ...]


Node = Filtered | Summed | Concatenated | Through


def sources_of(node: Node) -> tuple[int, ...]:
    """Return the indices of the nodes that a node is computed from.

    >>> sources_of(Summed((0, 2))), sources_of(Filtered("bn1"))
    ((0, 2), ())
    """
    if isinstance(node, Filtered):
        return ()
    return (node.part,) if isinstance(node, Through) else node.parts


def renumbered(node: Node, places: Mapping[int, int]) -> Node:
    """Return a node as it is after the nodes have moved to other places.

    >>> renumbered(Summed((0, 2)), {0: 0, 2: 1})
    Summed(parts=(0, 1))
    """
    if isinstance(node, Filtered):
        return node
    if isinstance(node, Through):
        return Through(places[node.part], node.operations)
    return type(node)(tuple(places[part] for part in node.parts))


# their values during a forward pass ---------------------------------------------------------------------------------

# What a layer read, by node.
Read = dict[int, Statistics]


class _Reader(NamedTuple):
    """A layer that asks for its prediction.

    Attributes:
        layer: Its name.
        like: Its own statistics.
        read: Values that were there.
        made: Values that were computed for it.
        repeated: Whether it asks again, in a forward pass that activation checkpointing repeats.
    """

    layer: str
    like: Statistics
    read: Read
    made: Read
    repeated: bool


class StatisticsGraph:
    """The predictions of statistics between a model's layers, and the values that a forward pass hands on.

    Each value is kept until the last of its readers has had it, and none outlives the pass: nothing is copied or
    pickled with the model. A layer that is in evaluation mode hands on its running statistics.

    Args:
        layers: By name.
        nodes: Each computed from ones before it.
        priors: For the layers that have a prediction, the node that it is made of.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm], nodes: Sequence[Node], priors: Mapping[str, int]) -> None:
        self.layers = dict(layers)
        self.nodes = tuple(nodes)
        self.priors = dict(priors)
        self._uses = count_uses(self.nodes, self.priors.values())
        self._filtered = {node.layer: index for index, node in enumerate(self.nodes) if isinstance(node, Filtered)}
        self._live: dict[int, tuple[Statistics, int]] = {}
        self._ran: set[str] = set()

    def predecessors(self, layer: str) -> tuple[str, ...]:
        """Return the names of the layers that the prediction of a layer is made of, in the order of the network."""
        found: set[int] = set()
        pending = [self.priors[layer]] if layer in self.priors else []
        while pending:
            index = pending.pop()
            if index not in found:
                found.add(index)
                pending.extend(sources_of(self.nodes[index]))
        named = (self.nodes[index] for index in sorted(found))
        names = {node.layer for node in named if isinstance(node, Filtered)}
        return tuple(name for name in self.layers if name in names)

    def enter(self, layer: str) -> None:
        """Note that a layer runs. The first one, or one that ran before, begins a pass: nothing of the last is left."""
        if layer in self._ran:
            self._ran.clear()
        if not self._ran:
            self._live.clear()
        self._ran.add(layer)
        if len(self._ran) == len(self.layers):
            self._ran.clear()

    def publish(self, layer: str, statistics: Statistics) -> None:
        """Hand on what the filter of a layer returned, if another layer will read it."""
        index = self._filtered.get(layer, -1)
        if index >= 0 and self._uses[index] > 0:
            self._live[index] = (statistics, self._uses[index])

    def predict(self, layer: str, like: Statistics) -> tuple[Statistics, Read]:
        """Return what the layers before say of a layer's statistics, and what of other layers was read for that.

        Args:
            layer: Its name.
            like: Its own statistics.

        Raises:
            RuntimeError: If a layer before has not run in this pass, or with other micro-batches.
        """
        read: Read = {}
        return self._value(self.priors[layer], _Reader(layer, like, read, {}, repeated=False)), read

    def repeat(self, layer: str, like: Statistics, read: Read) -> Statistics:
        """Return what `predict` returned, computed again from what was read then."""
        return self._value(self.priors[layer], _Reader(layer, like, read, {}, repeated=True))

    def skip(self, layer: str) -> None:
        """Note that a layer, which is in evaluation mode, will not read its prediction."""
        pending = [self.priors[layer]] if self._live and layer in self.priors else []
        while pending:
            index = pending.pop()
            if index in self._live:
                self._take(index)
            elif self._uses[index] == 1:
                pending.extend(sources_of(self.nodes[index]))

    def _value(self, index: int, reader: _Reader) -> Statistics:
        if index in reader.made:
            if index in self._live and not reader.repeated:
                self._take(index)
            return reader.made[index]
        if index in reader.read and (reader.repeated or index not in self._live):
            return reader.read[index]
        if index in self._live and not reader.repeated:
            reader.read[index] = value = self._take(index)
            self._check_sizes(value, reader)
            return value
        node = self.nodes[index]
        if isinstance(node, Filtered):
            return self._of_estimates(node.layer, reader)
        parts = [self._value(part, reader) for part in sources_of(node)]
        reader.made[index] = value = _combined(node, parts)
        if not reader.repeated and self._uses[index] > 1:
            self._live[index] = (value, self._uses[index] - 1)
        return value

    def _take(self, index: int) -> Statistics:
        value, uses = self._live.pop(index)
        if uses > 1:
            self._live[index] = (value, uses - 1)
        return value

    def _check_sizes(self, value: Statistics, reader: _Reader) -> None:
        if value.sizes != reader.like.sizes:
            before = ", ".join(repr(name) for name in self.predecessors(reader.layer))
            raise RuntimeError(
                f"{reader.layer!r} and the layers before it ({before}) must have the same micro-batches: "
                f"it has micro-batches of {list(reader.like.sizes)} samples, they had {list(value.sizes)}"
            )

    def _of_estimates(self, name: str, reader: _Reader) -> Statistics:
        """Return a layer's running statistics, if it is normalized with them."""
        layer, like = self.layers[name], reader.like
        # One that has been converted to another kind since then does not say either.
        if getattr(layer, "uses_batch", True) or layer.running_mean is None or layer.running_var is None:
            raise RuntimeError(
                f"{reader.layer!r} predicts its statistics from those of {name!r}, which has not run before it in this "
                "forward pass: run the model as a whole, each layer once, as `connect_kalman` saw it"
            )
        shape = (len(like.sizes), -1)
        mean, var = (buffer.to(like.mean.dtype).expand(shape) for buffer in (layer.running_mean, layer.running_var))
        return Statistics(mean, var, like.sizes, like.positions)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_live": {}, "_ran": set()}


def _combined(node: Node, parts: Sequence[Statistics]) -> Statistics:
    first = parts[0]
    if isinstance(node, Through):
        noise = torch.randn(
            *first.mean.shape, *_plane(first.positions), dtype=first.mean.dtype, device=first.mean.device
        )
        mean, var, positions = propagate(first.mean, first.var, noise, _chain(node.operations))
        return Statistics(mean.to(first.mean.dtype), var.to(first.var.dtype), first.sizes, positions)
    means, variances = [part.mean for part in parts], [part.var for part in parts]
    # A branch that was pooled hands on the statistics of what was pooled: the smallest are the sum's own positions.
    smallest = min(parts, key=lambda part: part.positions).positions
    if isinstance(node, Summed):
        mean, var = functools.reduce(torch.add, means), functools.reduce(torch.add, variances)
    else:
        mean, var = torch.cat(means, 1), torch.cat(variances, 1)
    return Statistics(mean, var, first.sizes, smallest)


def _plane(positions: tuple[int, ...]) -> tuple[int, ...]:
    return positions if len(positions) == 2 else (1, 1)


def _chain(operations: Sequence[Operation]) -> Callable[[Tensor], Tensor]:
    def transition(sample: Tensor) -> Tensor:
        for operation in operations:
            sample = operation(sample)
        return sample

    return transition


def count_uses(nodes: Sequence[Node], priors: Iterable[int]) -> tuple[int, ...]:
    """Return how often each node is read in one forward pass: by layers, and by nodes that are read themselves.

    >>> count_uses([Filtered("bn1"), Filtered("bn2"), Summed((0, 1)), Summed((1, 1))], priors=[0, 2])
    (2, 1, 1, 0)
    """
    uses = [0] * len(nodes)
    for index in priors:
        uses[index] += 1
    for index in reversed(range(len(nodes))):
        if uses[index] > 0:
            for part in sources_of(nodes[index]):
                uses[part] += 1
    return tuple(uses)
