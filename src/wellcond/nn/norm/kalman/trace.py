"""Traces a model symbolically and connects each Kalman-normalized layer to the layers before it."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation, pooling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from wellcond.nn.norm.kalman.graph import (
    Concatenated,
    Filtered,
    Node,
    Operation,
    StatisticsGraph,
    Summed,
    Through,
    count_uses,
    renumbered,
    sources_of,
)
from wellcond.nn.norm.kalman.layer import KalmanBatchNorm2d
from wellcond.nn.norm.outline import trace_outline
from wellcond.runtime.checks import checked
from wellcond.runtime.texts import quoted_names

_ADDITIONS: tuple[object, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_CONCATENATIONS: tuple[object, ...] = (torch.cat, torch.concat, torch.concatenate)
# They say something of a tensor that is not one.
_QUESTIONS: tuple[object, ...] = ("size", "dim", "numel", "is_contiguous", getattr)
# What leaves statistics as they are, as normalization does in the authors' code: they are those before it.
_LEFT_OUT_FUNCTIONS: tuple[object, ...] = ("contiguous", "clone", torch.clone, F.dropout, F.dropout2d)
_LEFT_OUT_MODULES = (nn.Identity, _DropoutNd, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
# What a branch of a sum or a concatenation may hold and still hand on the statistics that it began with.
_ACTIVATIONS_AND_POOLING = (activation.__name__, pooling.__name__)
_ACTIVATING = (
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "tanh",
    "softplus",
)
_ACTIVATING_ON_PIECES = ("hardtanh", "hardswish", "hardsigmoid")
_POOLING = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_ACTIVATING_AND_POOLING = frozenset((*_ACTIVATING, *_ACTIVATING_ON_PIECES, *_POOLING))


@checked
def connect_kalman(
    model: nn.Module, predecessors: Mapping[str, str | Sequence[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Let each `KalmanBatchNorm2d` of a model predict its statistics from those of the layers before it.

    The order is found in a symbolic trace (`torch.fx`) of the model; modules without such a layer inside are taken
    whole, so only what connects the layers has to be traceable. From a layer back to the ones before it, there may be
    convolutions, activations, pooling, dropout, additions (the statistics of both branches add), and concatenations
    (they are concatenated). Other normalizations in between are left out. A layer that none comes before stays as it
    is; so does one that is not called. Options of a forward pass are taken to have their defaults. The parameters of
    learned transitions are made here, so make the optimizer afterwards; and connect again after modules of the model
    have been replaced.

    With `learned`, the transition E replaces all operations since the layers before; at a sum that has a convolution
    in a branch (as before the first normalization of a pre-activation block) E has columns for the statistics of each
    branch. A tensor that a layer normalizes has that layer's filtered statistics for all who come later.

    Without, a Gaussian sample is drawn with the statistics before, and goes through all operations; those of modules
    without their hooks, and as in evaluation, so that nothing takes the sample for data. As in the authors' code, a
    branch of a sum with nothing but activations and pooling (an identity shortcut) adds the statistics that it began
    with.

    Args:
        model: With at least one such layer.
        predecessors: For each layer's name, the name or names of the layers before it, whose statistics add; for
            models that cannot be traced. Layers that are not named have none. Only for learned transitions.

    Returns:
        For each layer's name, the names of the layers that its prediction is made of; in the model's order.

    Raises:
        TypeError: If `model` is no module, or cannot be traced.
        ValueError: If it has no such layer, a layer is used more than once in a forward pass, it cannot be told what
            a layer's statistics follow from, or `predecessors` is inconsistent.

    Example:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 4, 3), KalmanBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), KalmanBatchNorm2d(8)
        ... )
        >>> connect_kalman(model)
        {'1': (), '4': ('1',)}
        >>> model[4].transition.shape
        torch.Size([8, 4])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[KalmanBatchNorm2d, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, KalmanBatchNorm2d):
            names[module] = name
    if not names:
        raise ValueError(f"{type(model).__name__} has no KalmanBatchNorm2d to connect")
    layers = {name: layer for layer, name in names.items()}
    plan = _traced(model, names) if predecessors is None else _given(layers, predecessors)
    graph = plan.graph()
    widths = {name: plan.width(index) for name, index in plan.priors.items() if layers[name].learned}
    for name, layer in layers.items():
        made = layer.predecessor_features
        if not layer.connected and made is not None and made != widths.get(name):
            raise ValueError(
                f"{name!r} was made with predecessor_features={made}, but its predecessors have {widths.get(name)}"
            )
    for name, layer in layers.items():
        layer.connect(graph if name in plan.layers else None, name, widths.get(name))
    return {name: graph.predecessors(name) for name in plan.layers}


class _Plan:
    """A statistics graph in the making.

    Attributes:
        layers: By name, in the order of the network.
        nodes: So far.
        priors: For each layer that has a prediction, the node that it is made of.
    """

    def __init__(self, layers: Mapping[str, KalmanBatchNorm2d]) -> None:
        self.layers = dict(layers)
        self.nodes: list[Node] = []
        self.priors: dict[str, int] = {}
        self._indices: dict[Node, int] = {}

    def graph(self) -> StatisticsGraph:
        """Return the graph of those nodes that a layer's prediction is made of."""
        uses = count_uses(self.nodes, self.priors.values())
        places = {index: place for place, index in enumerate(index for index, count in enumerate(uses) if count > 0)}
        nodes = [renumbered(self.nodes[index], places) for index in places]
        return StatisticsGraph(self.layers, nodes, {name: places[index] for name, index in self.priors.items()})

    def add(self, node: Node) -> int:
        """Return the index of a node, the same for an equal one."""
        if node not in self._indices:
            self._indices[node] = len(self.nodes)
            self.nodes.append(node)
        return self._indices[node]

    def sum(self, parts: Sequence[int]) -> int:
        return parts[0] if len(parts) == 1 else self.add(Summed(tuple(parts)))

    def concatenate(self, parts: Sequence[int]) -> int:
        return parts[0] if len(parts) == 1 else self.add(Concatenated(tuple(parts)))

    def width(self, index: int) -> int:
        """Return how many channels a node without operations has."""
        node = self.nodes[index]
        if isinstance(node, Filtered):
            return self.layers[node.layer].num_features
        widths = [self.width(part) for part in sources_of(node)]
        return widths[0] if isinstance(node, Summed) else sum(widths)

    def without_operations(self, index: int) -> list[int]:
        """Return what a learned transition takes: the nodes that need no operations of the network."""
        node = self.nodes[index]
        if self._is_plain(index):
            return [index]
        found = [leaf for part in sources_of(node) for leaf in self.without_operations(part)]
        return list(dict.fromkeys(found))

    def _is_plain(self, index: int) -> bool:
        node = self.nodes[index]
        return not isinstance(node, Through) and all(self._is_plain(part) for part in sources_of(node))


# by name ------------------------------------------------------------------------------------------------------------


def _given(layers: Mapping[str, KalmanBatchNorm2d], predecessors: Mapping[str, str | Sequence[str]]) -> _Plan:
    plan = _Plan(layers)
    for name, before in predecessors.items():
        before = (before,) if isinstance(before, str) else tuple(before)
        unknown = [each for each in (name, *before) if each not in layers]
        if unknown:
            raise ValueError(f"predecessors must name the model's {len(layers)} KalmanBatchNorm2d, got {unknown[0]!r}")
        if not layers[name].learned:
            raise ValueError(
                f"{name!r} has learned=False: what lies between it and its predecessors must be traced, not given"
            )
        if len({layers[each].num_features for each in before}) > 1:
            widths = ", ".join(f"{each!r} {layers[each].num_features}" for each in before)
            raise ValueError(f"predecessors of {name!r} must have equally many channels to be added, got {widths}")
        if before:
            plan.priors[name] = plan.sum([plan.add(Filtered(each)) for each in before])
    graph = plan.graph()
    for name in layers:
        pending, seen = list(graph.predecessors(name)), set[str]()
        while pending:
            each = pending.pop()
            if each == name:
                raise ValueError(f"{name!r} must not be its own predecessor, not by way of others either")
            if each not in seen:
                seen.add(each)
                pending.extend(graph.predecessors(each))
    return plan


# by a trace ---------------------------------------------------------------------------------------------------------


class _Branch(NamedTuple):
    """What is known of a tensor's statistics.

    Attributes:
        node: That it comes from.
        operations: Since.
    """

    node: int
    operations: tuple[Operation, ...] = ()


class _Unknown(NamedTuple):
    """A tensor that comes from a layer, in a way that says nothing of its statistics.

    Attributes:
        reason: Why.
    """

    reason: str


_State = _Branch | _Unknown | None


def _traced(model: nn.Module, names: Mapping[KalmanBatchNorm2d, str]) -> _Plan:
    if isinstance(model, KalmanBatchNorm2d):
        return _Plan({"": model})
    traced = trace_outline(
        model,
        lambda module: isinstance(module, KalmanBatchNorm2d),
        "Name them: connect_kalman(model, predecessors={layer: the layers before it})",
    )
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = Counter(
        names[layer]
        for node in traced.nodes
        if node.op == "call_module" and isinstance(layer := modules[str(node.target)], KalmanBatchNorm2d)
    )
    twice = [name for name, count in calls.items() if count > 1]
    if twice:
        raise ValueError(
            f"{quoted_names(twice)}: a KalmanBatchNorm2d must be used once in a forward pass, since others "
            "read its statistics"
        )
    plan = _Plan({name: layer for name in calls for layer, own in names.items() if own == name})
    # Which statistics a shortcut has depends on whether transitions are learned.
    for learned in sorted({layer.learned for layer in plan.layers.values()}):
        _Walk(plan, modules, names, learned).walk(traced)
    return plan


class _Walk:
    """Follows a trace from the first operation to the last, and notes what each layer's statistics follow from."""

    def __init__(
        self,
        plan: _Plan,
        modules: Mapping[str, nn.Module],
        names: Mapping[KalmanBatchNorm2d, str],
        learned: bool,
    ) -> None:
        self.plan, self.modules, self.names, self.learned = plan, modules, names, learned
        self.states: dict[fx.Node, _State] = {}

    def walk(self, traced: fx.Graph) -> None:
        for node in traced.nodes:
            function = self.modules[str(node.target)] if node.op == "call_module" else node.target
            if isinstance(function, KalmanBatchNorm2d):
                self.states[node] = self._layer(node, function)
            elif node.op in ("call_module", "call_function", "call_method"):
                self.states[node] = self._operation(node, function)
            else:
                self.states[node] = None

    def _layer(self, node: fx.Node, layer: KalmanBatchNorm2d) -> _State:
        name = self.names[layer]
        source = node.all_input_nodes[0]
        state = self.states[source]
        if isinstance(state, _Unknown):
            raise ValueError(f"it cannot be told what the statistics of {name!r} follow from: {state.reason}")
        own = _Branch(self.plan.add(Filtered(name)))
        if state is not None and layer.learned == self.learned:
            if self.learned:
                self.plan.priors[name] = self.plan.concatenate(self.plan.without_operations(state.node))
            else:
                self.plan.priors[name] = self._close(state)
        if self.learned:
            # The tensor has been observed: the filter knows more of it than the branches that it came from.
            self.states[source] = own
        return own

    def _operation(self, node: fx.Node, function: Any) -> _State:
        is_module = isinstance(function, nn.Module)
        if not is_module and function in _QUESTIONS:
            return None
        states = {source: self.states[source] for source in node.all_input_nodes}
        unknown = [state for state in states.values() if isinstance(state, _Unknown)]
        branches = {source: state for source, state in states.items() if isinstance(state, _Branch)}
        if unknown or not branches:
            return unknown[0] if unknown else None
        if not is_module and function in _ADDITIONS and len(node.args) == 2 and not node.kwargs:
            added = [self.states[each] for each in node.args if isinstance(each, fx.Node)]
            if len(added) == 2:
                return self._sum(added)
        if not is_module and function in _CONCATENATIONS:
            return self._concatenation(node)
        if len(branches) > 1:
            return _Unknown(f"{_described(node, function)} combines several tensors")
        ((source, branch),) = branches.items()
        if isinstance(function, _LEFT_OUT_MODULES) if is_module else function in _LEFT_OUT_FUNCTIONS:
            return branch
        operation = _as_operation(node, source, function)
        if operation is None:
            if not self.learned:
                return _Unknown(f"{_described(node, function)} has arguments that are computed in the forward pass")
            # It will not be called: the transition is in its place.
            operation = Operation(function)
        return branch._replace(operations=(*branch.operations, operation))

    def _sum(self, states: Sequence[_State]) -> _State:
        branches = [state for state in states if isinstance(state, _Branch)]
        if len(branches) < len(states):
            return None  # With an input of the model, whose statistics nobody knows.
        return _Branch(self.plan.sum([self._part(branch) for branch in branches]))

    def _concatenation(self, node: fx.Node) -> _State:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if not isinstance(tensors, (list, tuple)) or dim not in (1, -3):
            return _Unknown(f"{_described(node, node.target)} does not concatenate along the channels")
        branches = [state for state in (self.states[each] for each in tensors) if isinstance(state, _Branch)]
        if len(branches) < len(tensors):
            return None
        return _Branch(self.plan.concatenate([self._part(branch) for branch in branches]))

    def _part(self, branch: _Branch) -> int:
        """Return what a branch of a sum or a concatenation hands on."""
        kept = all(_keeps_statistics(operation) for operation in branch.operations)
        return branch.node if kept else self._close(branch)

    def _close(self, branch: _Branch) -> int:
        if not branch.operations:
            return branch.node
        return self.plan.add(Through(branch.node, branch.operations))


def _as_operation(node: fx.Node, source: fx.Node, function: Any) -> Operation | None:
    """Return an operation with its constant arguments; None if others than its first are computed."""
    computed: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), computed.append)
    if computed or not node.args or node.args[0] is not source:
        return None
    if not isinstance(function, (nn.Module, str)):
        name = getattr(function, "__name__", "")
        # By name, since some of them cannot be pickled.
        function = f"F.{name}" if getattr(F, name, None) is function else function
    return Operation(function, tuple(node.args[1:]), dict(node.kwargs))


def _keeps_statistics(operation: Operation) -> bool:
    function = operation.function
    if isinstance(function, nn.Module):
        return type(function).__module__ in _ACTIVATIONS_AND_POOLING
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    return name.removeprefix("F.").rstrip("_") in _ACTIVATING_AND_POOLING


def _described(node: fx.Node, function: Any) -> str:
    kind = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", str(function))
    return f"{kind} (node {node.name!r})"
