"""Passes over data for the diagnostics: they choose layers, run the model and leave it as it was found."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.feeding import Limits
from wellcond.calibration.replay import Passed, Seen, training_pass
from wellcond.layouts import Layer, find_layers
from wellcond.layouts.unusual import is_sharded
from wellcond.nn.norm.history import PastStatistics
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import Predicate
from wellcond.runtime.models import Call, device_of, kept_random_state, moved, run_on
from wellcond.runtime.texts import quoted_names
from wellcond.transforms.centralize import GradientCentralization
from wellcond.transforms.observe import CallHook

Loss: TypeAlias = Callable[[Any, Any], Tensor]
"""``loss(output, batch)``: the scalar whose gradient is asked for."""

NO_BATCH = "the loader gave no batch"


def centred_layers(model: nn.Module, where: Predicate | None, *, trained: bool = True) -> list[Layer]:
    """Return the weights that `GradientCentralization` would centre, each once.

    Args:
        model: Without a wrapper.
        where: A predicate of (module name, module), or None for all linear maps and convolutions.
        trained: Only those that require a gradient.

    Returns:
        The layers; of a weight that several use, the first.

    Raises:
        TypeError: If `where` is not callable.
        ValueError: If there is none, a layer is not initialized, or a weight is sharded over ranks.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
        >>> [layer.name for layer in centred_layers(model, None)]
        ['0.weight']
    """
    check_where(where)
    uses: dict[int, list[Layer]] = {}
    for layer in layers_of(model):
        uses.setdefault(id(layer.weight), []).append(layer)

    def covered(choice: Predicate | None) -> list[Layer]:
        transform = GradientCentralization("all" if choice is None else choice)
        return [own[0] for own in uses.values() if transform.cover_shared(own).applies]

    found = covered(where)
    if not found:
        if where is not None and covered(None):
            raise ValueError(f"where selects none of the linear maps and convolutions of {type(model).__name__}")
        raise ValueError(f"{type(model).__name__} has no linear map or convolution whose gradient could be centred")
    if trained:
        found = [layer for layer in found if layer.weight.requires_grad]
        if not found:
            raise ValueError(f"no selected weight of {type(model).__name__} requires a gradient: all are frozen")
    for layer in found:
        if is_sharded(layer.weight):
            raise ValueError(f"{layer.name!r} is sharded over ranks: measure the model before it is sharded")
    return found


def check_where(where: Predicate | None) -> None:
    """Raise a TypeError unless a choice of layers is a function or None."""
    if where is not None and not callable(where):
        raise TypeError(f"where must be a predicate of (module name, module), got {where!r}")


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the layers with a weight, each use of it; raise a ValueError if one is not initialized."""
    layers = find_layers(model)
    if layers.lazy:
        names = ", ".join(map(repr, layers.lazy))
        raise ValueError(f"{names} is known only after its first forward pass: run the model once")
    return list(layers)


def batches_on_device(model: nn.Module, loader: Iterable[Any], max_batches: int | None) -> Iterator[Any]:
    """Yield a loader's batches on the model's device.

    Raises:
        ValueError: If there is none.
    """
    device = device_of(model)
    empty = True
    for batch in itertools.islice(loader, max_batches):
        empty = False
        yield moved(batch, device)
    if empty:
        raise ValueError(NO_BATCH)


def observed_pass(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int | None,
    layers: Mapping[str, _BatchNorm],
    observe: Callable[[str, Seen], None],
    call: Call | None,
    max_batches: int | None,
) -> Passed:
    """Run `training_pass` over at least one batch; its arguments.

    Raises:
        ValueError: If the loader gives none.
    """
    limits = Limits(max_batches=max_batches)
    passed = training_pass(model, loader, batch_size or "first", layers, observe, call=call, limits=limits)
    if passed.batches == 0:
        raise ValueError(NO_BATCH)
    return passed


def check_reached(passed: Passed, names: Iterable[str], reached: Collection[str]) -> None:
    """Raise a ValueError if a pass reached none of the normalizations with a whole batch."""
    if reached:
        return
    if 0 < passed.largest < (passed.batch_size or 0):
        raise ValueError(f"no batch has batch_size={passed.batch_size} samples: the largest has {passed.largest}")
    raise ValueError(f"no batch reached any of the batch normalizations {quoted_names(names)}")


@contextlib.contextmanager
def calls_shown(calls: Iterable[tuple[nn.Module, Callable[..., None], Callable[..., None] | None]]) -> Iterator[None]:
    """Show calls of modules to those who gather, with kernels that call every layer.

    Args:
        calls: Of each module who is shown its arguments before it runs (module, args, kwargs), and who its output
            afterwards (module, args, output), if anybody.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        for module, before, after in calls:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after).remove)
        # In evaluation, torch's transformer layers would run as one kernel.
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def loss_of(model: nn.Module, batch: Any, loss: Loss, call: Call | None) -> Tensor:
    """Run a model on a batch and return its loss, a scalar with a gradient.

    Args:
        model: Without a wrapper.
        batch: On the model's device.
        loss: ``loss(output, batch)``.
        call: ``call(model, batch)``, for a model that is run otherwise.

    Returns:
        The scalar.

    Raises:
        TypeError: If the loss is no tensor.
        ValueError: If the loss is no scalar or has no gradient.

    Example:
        >>> loss_of(nn.Linear(2, 1), torch.zeros(3, 2), lambda output, batch: output.sum(), None).shape
        torch.Size([])
    """
    value = loss(run_on(model, batch, call), batch)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a scalar tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar tensor, got the shape {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss must depend on the model's weights: the tensor that it returned has no gradient")
    return value.reshape(())


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Let a model run with gradients, in the modes that it is in, and leave no trace of that.

    Modules work on copies of their buffers; the buffers themselves are not written to. Attributes, modes and torch's
    random state are put back, and attached transforms do not observe. `.grad` stays as long as only
    `torch.autograd.grad` is called. So a second run under a second context sees the same state as the first.

    Args:
        model: Without a wrapper.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with left_as_found(model):
        ...     _ = model(torch.randn(4, 2))
        >>> int(model.num_batches_tracked)
        0
    """
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(kept_random_state(model))
        if "torch._dynamo" in sys.modules:  # Compiled code has the buffers built in, and no second derivatives.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            stack.callback(_put_back, module, dict(vars(module)), dict(module._buffers), dict(module._forward_hooks))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    # Modules that share a buffer share its copy.
                    copies.setdefault(id(buffer), buffer.detach().clone())
                    module._buffers[name] = copies[id(buffer)]
            for name, value in vars(module).items():
                if isinstance(value, PastStatistics):
                    vars(module)[name] = copy.copy(value)
            for key, hook in module._forward_hooks.items():
                if isinstance(hook, CallHook):
                    module._forward_hooks[key] = _no_hook
        yield


def _put_back(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Any], hooks: dict[int, Any]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del vars(module)[name]
    vars(module).update(attributes)
    for own, found in ((module._buffers, buffers), (module._forward_hooks, hooks)):
        own.clear()
        own.update(found)  # type: ignore[arg-type]


def _no_hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Stand where an attached transform observes."""


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, or float32 on devices that have none; dense.

    >>> widened(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float64
    """
    tensor = tensor.detach()
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    return dense.to(statistics_dtype(tensor.dtype) if tensor.device.type == "mps" else torch.float64)


def norm_of(tensors: Sequence[Tensor | None]) -> float:
    """Return the norm of tensors taken together; None counts as zeros."""
    return math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors if tensor is not None))


def sizes_of(layer: Layer) -> tuple[int, int]:
    """Return a weight's output units and the inputs of each."""
    groups, units, *inputs = layer.matrix_shape
    return groups * units, math.prod(inputs)
