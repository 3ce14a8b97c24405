"""One pass of a trained model over data with its batch normalizations as in training: to see what they see."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wellcond.calibration.replay import Run, Seen, StandIn, replaced

Call = Callable[[Any, Any], object]


class Passed(NamedTuple):
    """What a pass went over.

    Attributes:
        batches: That the loader gave.
        largest: Samples of the largest of them, as far as that can be told.
        batch_size: m.
    """

    batches: int
    largest: int
    batch_size: int


def training_pass(
    model: nn.Module,
    loader: Iterable[Any],
    batch_size: int | None,
    layers: Mapping[str, _BatchNorm],
    observe: Callable[[str, Seen], None],
    *,
    call: Call | None = None,
    max_batches: int | None = None,
) -> Passed:
    """Run a model over data with some batch normalizations in training mode, and report what these see.

    They normalize consecutive samples in groups of m, whatever the loader's batches are; other modules are in
    evaluation mode. Samples that fill no group go through the model uncounted. Nothing is learned and nothing remains:
    parameters, gradients, buffers, modes and torch's random state are afterwards as before, also when the pass raises.
    Nor does it communicate: synchronized normalizations use this process's batch.

    Args:
        model: Without a wrapper (`unwrapped`).
        loader: Gives batches: a tensor; a tuple or list, whose first element is the input; or a mapping, for
            ``model(**batch)``. They are moved to the model's device.
        batch_size: m; None for the size of the loader's first batch.
        layers: The normalizations by name.
        observe: Called with the layer's name and what it saw, at each of its calls with at least one whole batch.
        call: ``call(model, batch)`` runs a model that is run otherwise. The layers' input is then taken to have one row
            per sample.
        max_batches: Stop after so many of the loader's batches.

    Returns:
        How much there was.

    Raises:
        TypeError: If a layer object has its own `forward`.
        ValueError: If m is to be found and cannot be, or a layer has one value per channel in a batch of m samples.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1)).eval()
        >>> means = []
        >>> loader = [torch.tensor([[1.0], [3.0], [5.0], [5.0], [9.0]])]
        >>> training_pass(model, loader, 2, {"0": model[0]}, lambda name, seen: means.append(seen.batches.mean))
        Passed(batches=1, largest=5, batch_size=2)
        >>> means[0].flatten().tolist()
        [2.0, 5.0]
    """
    run = Run(batch_size or 0)
    device = device_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_random_state(model))
        stack.enter_context(_evaluating(model))
        if "torch._dynamo" in sys.modules:  # Compiled code knows nothing of the layers' stand-ins.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        named = {layer: name for name, layer in layers.items()}
        for name, layer in model.named_modules():
            # Without running statistics a layer always takes the batch's, and these should be of m samples, too.
            if layer in named or (isinstance(layer, _BatchNorm) and layer.running_mean is None):
                stack.enter_context(replaced(layer, StandIn(run, name, layer, observe if layer in named else None)))
        for batch in itertools.islice(loader, max_batches):
            run.batches += 1
            run.samples = _samples(batch) if call is None else None
            run.largest = max(run.largest, run.samples or 0)
            if run.batch_size == 0:
                run.batch_size = run.samples or 0
            if run.batch_size == 0:
                raise ValueError("batch_size must be given: the first batch does not say how many samples it has")
            if run.samples is not None and run.samples < run.batch_size:
                continue
            batch = moved(batch, device)
            if call is None:
                _forward(model, batch)
            else:
                call(model, batch)
    return Passed(run.batches, run.largest, run.batch_size)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `DistributedDataParallel`, `DataParallel` and `torch.compile`.

    >>> model = nn.Linear(2, 1)
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def named_batch_norms(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None
) -> tuple[dict[str, _BatchNorm], int]:
    """Return the batch normalizations with running statistics, by their first name, and how many there are of any kind.

    Args:
        model: Without a wrapper.
        where: A predicate of (qualified name, layer); a layer with several names is taken if it holds for one.

    Returns:
        The selected ones with running statistics, and the number of all.
    """
    names: dict[_BatchNorm, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names.setdefault(module, []).append(name)
    selected = {
        own[0]: layer
        for layer, own in names.items()
        if layer.running_mean is not None and (where is None or any(where(name, layer) for name in own))
    }
    return selected, len(names)


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model's first parameter or buffer; None if it has neither."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), None)


def moved(batch: Any, device: torch.device | None) -> Any:
    """Move a batch's tensors, and whatever has a method ``to``, to a device; other things stay as they are.

    >>> moved([torch.zeros(1), {"label": "cat"}], torch.device("cpu"))
    [tensor([0.]), {'label': 'cat'}]
    """
    if device is None:
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch


def _forward(model: nn.Module, batch: Any) -> None:
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(inputs)


def _samples(batch: Any) -> int | None:
    """Return how many samples a batch has; None where that cannot be told."""
    if isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    if isinstance(batch, Mapping):
        batch = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return batch.shape[0] if isinstance(batch, Tensor) and batch.dim() else None


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, by the flag alone: `eval()` may do more. Let none share its buffers."""
    modes = [(module, module.training) for module in model.modules()]
    wrappers = [
        (module, module.require_forward_param_sync)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel)
    ]
    try:
        for module, _ in modes:
            module.training = False
        for wrapper, _ in wrappers:
            # Ranks may have different numbers of batches.
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for wrapper, shares in wrappers:
            wrapper.require_forward_param_sync = shares


@contextlib.contextmanager
def kept_random_state(model: nn.Module) -> Iterator[None]:
    """Restore torch's random state afterwards: data loaders draw from it, too."""
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    indices: dict[str, list[torch.device]] = {}
    for device in devices:
        if device.type not in ("cpu", "meta"):
            indices.setdefault(device.type, []).append(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, own in indices.items():
            stack.enter_context(torch.random.fork_rng(devices=own, device_type=kind))
        yield
