"""Run a module's forward once more without a trace, to see what it does."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map_only

from wellcond.layouts.watching import UnknownInputError
from wellcond.runtime.random_state import random_numbers_kept

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = frozenset(("_parameters", "_buffers", "_modules", *_HOOKS))
_DICTS = (dict, OrderedDict, defaultdict, Counter)


def twin_of(module: nn.Module) -> nn.Module:
    """Return a module of the same class with the same parameters, whose attributes and buffers are its own.

    What its forward assigns, counts, or writes to buffers leaves the original as it is, children included. Children's
    hooks are left out, those of all modules too, except torch's own, which compute weights.

    Args:
        module: Any module.

    Returns:
        The twin.

    Raises:
        UnknownInputError: If the module draws from a generator of its own.

    Example:
        >>> layer = nn.BatchNorm1d(2)
        >>> _ = twin_of(layer)(torch.randn(4, 2))
        >>> int(layer.num_batches_tracked)
        0
    """
    return _twin(module, {})


def _twin(module: nn.Module, made: dict[int, Any]) -> nn.Module:
    if id(module) in made:
        found: nn.Module = made[id(module)]
        return found
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
    # What torch calls in the place of hooks and forward where a module was compiled.
    attributes["_compiled_call_impl"] = functools.partial(_call, twin)
    twin.__dict__.update((name, value if name in _OWN else _own(value, made)) for name, value in attributes.items())
    return twin


def _call(twin: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a child's forward, after the hooks that compute its weights."""
    for hook in twin._forward_pre_hooks.values():
        hook(twin, args)
    return twin.forward(*args, **kwargs)


def _own(value: Any, made: dict[int, Any], *, inside: bool = False) -> Any:
    """Return what a twin has in the place of an attribute: a copy of what a forward may write to.

    Args:
        value: The attribute.
        made: Copies by the ``id`` of what they are of.
        inside: Whether it is an object's, of which no further objects are copied.
    """
    if id(value) in made:
        return made[id(value)]
    kind = type(value)
    if isinstance(value, nn.Module):
        return _twin(value, made)
    if isinstance(value, Tensor):
        made[id(value)] = value if value.requires_grad else value.detach().clone()
    elif isinstance(value, (torch.Generator, random.Random)) or kind.__module__ == "numpy.random._generator":
        raise UnknownInputError("it draws from a random generator of its own")
    elif isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _own(value.__self__, made, inside=inside))
    elif kind is tuple:
        return tuple(_own(part, made, inside=inside) for part in value)
    elif kind in _DICTS:
        made[id(value)] = mapping = copy.copy(value)
        mapping.update({key: _own(part, made, inside=inside) for key, part in value.items()} if mapping else {})
    elif kind in (list, deque):
        made[id(value)] = sequence = copy.copy(value)
        for index, part in enumerate(value):
            sequence[index] = _own(part, made, inside=inside)
    elif kind in (set, bytearray):
        made[id(value)] = kind(value)
    elif not inside and _is_plain(kind) and hasattr(value, "__dict__"):
        made[id(value)] = thing = object.__new__(kind)
        thing.__dict__.update((name, _own(part, made, inside=True)) for name, part in vars(value).items())
    return made.get(id(value), value)


def _is_plain(kind: type) -> bool:
    """Whether objects of a class are nothing but their attributes, so that they can be copied."""
    bases = [base for base in kind.__mro__ if base is not object]
    in_python = all(b.__flags__ & _MADE_IN_PYTHON and not b.__module__.startswith("torch.") for b in bases)
    return in_python and not any(_SPECIAL & vars(base).keys() for base in bases)


_SPECIAL = {"__del__", "__slots__", "__reduce__", "__reduce_ex__", "__getstate__"}
_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE


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
    """Call a twin's forward under a mode, with gradients; random generators stand as before afterwards.

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
    unseen = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    with random_numbers_kept(device), torch.enable_grad(), unseen, mode:
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
