"""A model's weights, each with the layer that owns it and the rule for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize

from wellcond.layouts.layout import Layout, Rows
from wellcond.layouts.own_forward import Watched
from wellcond.layouts.registry import layout_of
from wellcond.layouts.unusual import leaves_flat_pieces, plain_input, why_unfit
from wellcond.layouts.watching import UnknownInputError

_FLAT = "sharded into flat pieces by FullyShardedDataParallel (FSDP1): fully_shard (FSDP2) keeps weights whole"
_WEIGHT_NORM = torch.nn.utils.parametrizations._WeightNorm


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight of one module, and the bias that is added to its product.

    Attributes:
        name: Qualified name of the weight, as in ``model.named_parameters()``.
        module_name: Qualified name of the module.
        module: The module.
        layout: The rule for this weight.
        weight: The weight. Of a parametrized layer: the parameter that its parametrization starts from.
        bias: The bias, or None.
        bias_name: Qualified name of the bias, or None.
        parent: The module whose forward uses the weight, where the layer itself is never called.
        unfit: Why the weight's gradient cannot be transformed, whatever the rule; None if it can.
    """

    name: str
    module_name: str
    module: nn.Module
    layout: Layout
    weight: Parameter
    bias: Parameter | None = None
    bias_name: str | None = None
    parent: nn.Module | None = None
    unfit: str | None = None

    _forward: tuple[object, object] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_forward", _forward_of(self.called))

    @property
    def called(self) -> nn.Module:
        """The module whose calls show the layer's input."""
        return self.module if self.parent is None else self.parent

    @property
    def groups(self) -> int:
        """How many matrices the weight is."""
        return self.layout.groups(self.module)

    @property
    def matrix_shape(self) -> torch.Size:
        """The weight's shape as [groups, out, *inputs]; of the whole weight where it is sharded over ranks."""
        return self.matrix(torch.empty(self.weight.shape, device="meta")).shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as [groups, out, *inputs]."""
        return self.layout.matrix(self.module, tensor)

    def bias_matrix(self, tensor: Tensor) -> Tensor:
        """View a tensor of the bias's shape as [groups, out]."""
        return self.layout.bias_matrix(self.module, tensor)

    def unit_mean(self, tensor: Tensor) -> Tensor:
        """Average a tensor of the weight's shape over everything but the output unit."""
        return self.layout.unit_mean(self.module, tensor)

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick from a call of `called` the arguments of `rows`, as plain tensors; None if there are none.

        Raises:
            UnknownInputError: If what the weight multiplies cannot be told: the message says why.
        """
        found = self._look(args, kwargs)
        return None if found is None else found[0]

    def seen(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Tensor] | None:
        """Return `inputs`, and the weight that multiplies them: computed from ``weight``, where the layer does that.

        Raises:
            UnknownInputError: As `inputs`.
        """
        found = self._look(args, kwargs)
        if found is None:
            return None
        inputs, weight = found
        *_, place, attribute, _ = ("", "", *self.name.split("."))
        if weight is None:
            weight = getattr(self.module, attribute) if place == "parametrizations" else self.weight
        return inputs, weight

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Tensor | None] | None:
        """Return the arguments of `rows`, and the weight where the rule finds that out, too."""
        if self._forward != _forward_of(self.called):
            raise UnknownInputError("its forward was replaced after its rule was looked up (attach again)")
        picked: tuple[Any, ...] | None = None
        weight: Tensor | None = None
        if not isinstance(self.layout, Watched):
            picked = self.layout.inputs(self.called, args, kwargs)
        elif (found := self.layout.seen(self.called, args, kwargs)) is not None:
            picked, weight = found
        if picked is None or any(isinstance(value, Tensor) and value.device.type == "meta" for value in picked):
            return None
        return tuple(plain_input(value, self.layout.trailing(self.module)) for value in picked), weight

    def rows(self, *inputs: Any) -> Rows:
        """Lay out the module's input as rows [groups, n, d]."""
        return self.layout.rows(self.module, *inputs)


@dataclass
class Layers:
    """The layers that `find_layers` found in a model.

    Attributes:
        known: The weights with a rule. A weight that several modules share appears once for each of them.
        unknown: Qualified parameter name → type name of its module, or of its parametrization, for parameters no rule
            speaks of.
        unfit: Qualified parameter name → why no rule could speak of it, whatever its module.
        lazy: Qualified name → module, of those that are lazily initialised and have not seen their first input.
    """

    known: list[Layer] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    lazy: dict[str, nn.Module] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.known)


def _sparse(module: nn.Module, layout: Layout) -> str | None:
    return "sparse gradients (sparse=True)" if layout.kind == "embedding" and getattr(module, "sparse", False) else None


def _forward_of(module: nn.Module) -> tuple[object, object]:
    """Return a class's forward, and the object's own."""
    return type(module).forward, vars(module).get("forward")


def find_layers(model: nn.Module) -> Layers:
    """List a model's weights by the layers that own them; what no rule speaks of is named, not guessed.

    Args:
        model: Any module, also wrapped (DDP, ``torch.compile``).

    Returns:
        The known layers, in the order of ``model.named_modules()``, the unknown parameters by name, and the modules
        that will only be known after their first forward pass.

    Example:
        >>> [layer.name for layer in find_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))]
        ['0.weight', '1.weight']
    """
    found = Layers()
    parents: dict[nn.Module, tuple[nn.Module, Layout]] = {}
    starting_points: set[nn.Module] = set()
    flat: set[nn.Module] = set()
    for module_name, module in model.named_modules():
        if module in starting_points:
            continue
        if leaves_flat_pieces(module):
            flat.update(module.modules())
        own = dict(module.named_parameters(recurse=False))
        if any(nn.parameter.is_lazy(parameter) for parameter in own.values()):
            found.lazy[module_name] = module
            continue
        names = {attribute: attribute for attribute in own}
        if parametrize.is_parametrized(module):
            _add_starting_points(module, own, names)
            starting_points.update(_parametrizations(module).modules())
        parent, layout = parents.get(module, (None, layout_of(module)))
        if layout is not None:
            for child_name, child_layout in layout.adopted(module).items():
                parents[getattr(module, child_name)] = module, child_layout
        _list_layers(found, module_name, module, layout, own, names, parent, _FLAT if module in flat else None)
    return found


def _add_starting_points(module: nn.Module, own: dict[str, Parameter], names: dict[str, str]) -> None:
    """Add, under the attribute that a parametrization computes, the parameter of its shape that it starts from.

    That is ``original`` where the parametrization has one parameter and keeps its shape (torch checks that unless told
    not to, ``unsafe=True``), and the direction v of ``weight_norm``. Any other parameter appears under its own name, of
    which no rule speaks.
    """
    for attribute, chain in _parametrizations(module).items():
        start = None if chain.unsafe else "original"
        if isinstance(next(chain.children()), _WEIGHT_NORM):
            start = "original1"
        for name, parameter in chain.named_parameters():
            key = attribute if name == start else f"parametrizations.{attribute}.{name}"
            own[key] = parameter
            names[key] = f"parametrizations.{attribute}.{name}"


def _parametrizations(module: nn.Module) -> nn.ModuleDict:
    found = module.parametrizations
    assert isinstance(found, nn.ModuleDict)
    return found


def _kind_of_parametrization(chain: nn.Module) -> str:
    return ", ".join(type(step).__name__ for step in chain.children())


def _list_layers(
    found: Layers,
    module_name: str,
    module: nn.Module,
    layout: Layout | None,
    own: dict[str, Parameter],
    names: dict[str, str],
    parent: nn.Module | None,
    unfit: str | None,
) -> None:
    """Add a module's weights to what was found."""
    prefix = f"{module_name}." if module_name else ""
    claimed: set[str] = set()
    for weight_name, bias_name in layout.weights(module) if layout is not None else []:
        weight = own.get(weight_name)
        if weight is None or layout is None:
            continue
        bias = own.get(bias_name) if bias_name else None
        claimed |= {weight_name} | ({bias_name} if bias_name and bias is not None else set())
        found.known.append(
            Layer(
                name=prefix + names[weight_name],
                module_name=module_name,
                module=module,
                layout=layout.of_weight(weight_name),
                weight=weight,
                bias=bias,
                bias_name=f"{prefix}{names[str(bias_name)]}" if bias is not None else None,
                parent=parent,
                unfit=unfit or why_unfit(weight) or _sparse(module, layout),
            )
        )
    for attribute, parameter in own.items():
        # Vectors that a known layer keeps beside its weights (attention's packed biases) are nothing to wonder about.
        of_parametrization = attribute.startswith("parametrizations.")
        if attribute in claimed or (layout is not None and parameter.dim() < 2 and not of_parametrization):
            continue
        kind = type(module).__name__
        if of_parametrization:
            kind = _kind_of_parametrization(_parametrizations(module)[attribute.split(".")[1]])
        if unfit is not None:
            found.unfit[prefix + names[attribute]] = unfit
        else:
            found.unknown[prefix + names[attribute]] = kind
