"""The outline of a model: a symbolic trace of what connects its normalizations, and the layer right before each."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

# Their outputs are linear in their weight, channel by channel. Subclasses may compute with another one.
_LINEAR: dict[type[nn.Module], str] = {
    nn.Linear: "out_features",
    nn.Conv1d: "out_channels",
    nn.Conv2d: "out_channels",
    nn.Conv3d: "out_channels",
}


class _Tracer(fx.Tracer):
    """Takes modules whole, but for those that have a layer inside."""

    def __init__(self, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_layer = is_layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is taken whole."""
        if self._is_layer(m):
            return True
        # Of a plain chain each link is seen by itself: its activations and pooling may be told from its convolutions.
        is_chain = type(m).forward is nn.Sequential.forward
        return not is_chain and not any(self._is_layer(each) for each in m.modules())


def trace_outline(model: nn.Module, is_layer: Callable[[nn.Module], bool], advice: str) -> fx.Graph:
    """Trace a model symbolically; modules without a layer inside are taken whole.

    Args:
        model: Options of its forward are taken to have their defaults.
        is_layer: Which modules are the layers.
        advice: What to do if the model cannot be traced, for the error.

    Raises:
        TypeError: If the model cannot be traced.
    """
    # Options of a forward stay what they are by default, so that it may ask for them.
    options = {
        name: argument.default
        for name, argument in inspect.signature(model.forward).parameters.items()
        if argument.default is None or isinstance(argument.default, (bool, int, float, str))
    }
    try:
        return _Tracer(is_layer).trace(model, concrete_args=options)
    except Exception as error:  # of the user's own forward, whatever it raises without numbers
        raise TypeError(
            f"the order of {type(model).__name__}'s layers cannot be told, since torch.fx cannot trace its forward: "
            f"{error}. {advice}"
        ) from error


@dataclass(frozen=True)
class PrecedingLayer:
    """The layer right before a normalization.

    Attributes:
        name: Its name.
        layer: An `nn.Linear` or `nn.Conv1d/2d/3d`, whose output the normalization's input is.
    """

    name: str
    layer: nn.Module

    @classmethod
    def checked(cls, name: str, layer: nn.Module, norm: nn.Module) -> PrecedingLayer | str:
        """Return a layer as the one before a normalization, or the reason why it cannot be that."""
        kind = type_before_parametrizations(layer)
        if kind not in _LINEAR:
            return f"comes after {name!r}, a {kind.__name__}, not right after an nn.Linear or nn.Conv1d/2d/3d"
        outputs, features = getattr(layer, _LINEAR[kind]), getattr(norm, "num_features", None)
        if features is not None and outputs != features:
            return f"has {features} features, not the {outputs} outputs of {name!r} before it"
        return cls(name, layer)


def find_before(model: nn.Module, norms: Mapping[str, nn.Module], advice: str) -> dict[str, PrecedingLayer | str]:
    """Find the linear layer or convolution right before each normalization.

    Args:
        model: That they are in.
        norms: By name.
        advice: What to do if the model cannot be traced, for the error.

    Returns:
        For each name the layer before, or else the reason why there is none.

    Raises:
        TypeError: If the model cannot be traced.
    """
    if model in norms.values():
        return dict.fromkeys(norms, "has no layer before it: it is no part of a model")
    wanted: Collection[nn.Module] = set(norms.values())
    graph = trace_outline(model, lambda module: module in wanted, advice)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    counts = Counter(modules[str(node.target)] for node in calls)
    sources = {modules[str(node.target)]: node.all_input_nodes[0] for node in calls if node.all_input_nodes}
    found: dict[str, PrecedingLayer | str] = {}
    for name, norm in norms.items():
        if counts[norm] != 1:
            found[name] = f"is called {counts[norm]} times in a forward pass, not once"
            continue
        found[name] = _before(norm, sources[norm], modules, counts)
    return found


def _before(
    norm: nn.Module, source: fx.Node, modules: Mapping[str, nn.Module], calls: Mapping[nn.Module, int]
) -> PrecedingLayer | str:
    if source.op != "call_module":
        what = "the model's input" if source.op == "placeholder" else f"{source.name!r}"
        return f"comes after {what}, not right after an nn.Linear or nn.Conv1d/2d/3d"
    name = str(source.target)
    layer = modules[name]
    if calls[layer] != 1:
        return f"comes after {name!r}, which is called {calls[layer]} times in a forward pass, not once"
    return PrecedingLayer.checked(name, layer, norm)
