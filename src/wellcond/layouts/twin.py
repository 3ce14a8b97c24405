"""Run a module's forward once more without a trace, to see what it does."""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from wellcond.layouts.watching import UnknownInputError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def twin_of(module: nn.Module) -> nn.Module:
    """Return a module of the same class with the same parameters, whose attributes and buffers are its own.

    What its forward assigns, or writes to buffers, leaves the original as it is, children included. Children's hooks
    are left out except torch's own, which compute weights.

    Args:
        module: Any module.

    Returns:
        The twin.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> _ = twin_of(layer)(torch.randn(4, 2))
        >>> int(layer.num_batches_tracked)
        0
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    twin: nn.Module = object.__new__(type(module))  # FSDP2's classes refuse `copy.copy`
    made[id(module)] = twin
    attributes = dict(module.__dict__)
    attributes["_parameters"] = type(module._parameters)(module._parameters)
    attributes["_buffers"] = {
        name: None if buffer is None else buffer.detach().clone() for name, buffer in module._buffers.items()
    }
    attributes["_modules"] = {
        name: None if child is None else _twin(child, made) for name, child in module._modules.items()
    }
    for kind in _HOOKS:
        hooks = attributes.get(kind, {})
        attributes[kind] = OrderedDict((key, hook) for key, hook in hooks.items() if _is_torchs(hook))
    own = attributes.get("forward")
    if isinstance(own, types.MethodType) and own.__self__ is module:
        attributes["forward"] = types.MethodType(own.__func__, twin)
    twin.__dict__.update(attributes)
    return twin


def _is_torchs(hook: object) -> bool:
    return (type(hook).__module__ or "").startswith("torch.nn.utils")


def compute_parametrizations(twin: nn.Module) -> None:
    """Compute a parametrized twin's tensors, and keep them as its parameters: leaves that require a gradient."""
    if not parametrize.is_parametrized(twin):
        return
    found = twin._modules["parametrizations"]
    assert isinstance(found, nn.ModuleDict)
    values = {name: getattr(twin, name) for name in found}
    twin.__class__ = parametrize.type_before_parametrizations(twin)
    del twin._modules["parametrizations"]
    for name, value in values.items():
        twin._buffers.pop(name, None)
        twin._parameters[name] = nn.Parameter(value.detach())


def run_twin(
    twin: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    device: torch.device,
    mode: contextlib.AbstractContextManager[object],
) -> Any:
    """Call a twin's forward under a mode, with gradients; random numbers that it draws are there to be drawn again.

    It is given copies of the arguments, outside of their graph; saved tensors are seen by no one's hooks, so that
    activation checkpointing does not count them.

    Args:
        twin: What `twin_of` returned.
        args: Of its forward.
        kwargs: Likewise.
        device: Whose random state is put back afterwards, beside the CPU's.
        mode: What to enter.

    Returns:
        What the forward returned.

    Raises:
        UnknownInputError: If it writes to what it was given: the module's own run has done so, too.
    """
    args, kwargs = tree_map_only(Tensor, _copy, (args, dict(kwargs)))
    given = [(value, value._version) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with fork, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same), mode:
        outputs = twin.forward(*args, **kwargs)
    if any(value._version != version for value, version in given):
        raise UnknownInputError("its forward changes its input in place")
    return outputs


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(tensor: Tensor) -> Tensor:
    return tensor


def own_forward(module: nn.Module, known: type[nn.Module], uses: tuple[str, ...]) -> str | None:
    """Say who changes a module's forward, if it is not that of a class whose forward is known.

    Args:
        module: An instance of ``known``.
        known: The class.
        uses: Further methods that its forward calls and that a subclass may override.

    Returns:
        The name of the class that overrides one of them; "" where the object itself has its own; None if nobody does.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, input):
        ...         return super().forward(2 * input)
        >>> own_forward(Scaled(2, 2), nn.Linear, ()), own_forward(nn.Linear(2, 2), nn.Linear, ())
        ('Scaled', None)
    """
    names = ("forward", *uses)
    for name in names:
        if name in vars(module) and not _is_class_method(module, name):
            return ""
    for cls in type(module).__mro__:
        if cls is known:
            break
        for name in names:
            if name in vars(cls) and getattr(known, name, None) is not vars(cls)[name]:
                return cls.__name__
    return None


def _is_class_method(module: nn.Module, name: str) -> bool:
    """Whether an attribute of the object is only its class's method again, wrapped perhaps, as decorators leave it."""
    value = vars(module)[name]
    return isinstance(value, types.MethodType) and value.__func__ is getattr(type(module), name, None)


def can_be_moved(module: nn.Module) -> bool:
    """Whether a forward that one object has for itself can run on a twin: a method, not a function over the object."""
    own = vars(module).get("forward")
    return own is None or (isinstance(own, types.MethodType) and own.__self__ is module)
