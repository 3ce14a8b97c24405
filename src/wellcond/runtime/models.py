"""Operations on any model: unwrap it, find its device, run it on a batch, restore its random state."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

Call = Callable[[Any, Any], object]


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


def run_on(model: nn.Module, batch: Any, call: Call | None = None) -> Any:
    """Run a model on a batch: on its first element, if it has several; on keywords, if it is a mapping.

    A list of images, or of mappings, is the input itself for a model whose `forward` declares that it takes a list, as
    detectors do.

    Args:
        model: Without a wrapper.
        batch: On the model's device.
        call: ``call(model, batch)``, for a model that is run otherwise.

    Returns:
        The output.
    """
    if call is not None:
        return call(model, batch)
    inputs = _inputs_of(batch, model)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def samples_of(batch: Any, model: Any) -> int | None:
    """Return how many samples a batch has; None where that cannot be told.

    >>> samples_of((torch.zeros(3, 2), "labels"), nn.Linear(2, 1))
    3
    """
    batch = _inputs_of(batch, model) if not isinstance(batch, (tuple, list)) or batch else None
    if isinstance(batch, Mapping):
        batch = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    if isinstance(batch, (tuple, list)):
        return len(batch)
    return batch.shape[0] if isinstance(batch, Tensor) and batch.dim() else None


def _inputs_of(batch: Any, model: Any) -> Any:
    """Return the part of a batch that a model is called with."""
    if not isinstance(batch, (tuple, list)):
        return batch
    # (images, targets), each a sequence; or images alone, for a model that takes a list.
    alone = all(isinstance(each, Mapping) or (isinstance(each, Tensor) and each.dim() == 3) for each in batch)
    return batch if alone and _takes_list(model) else batch[0]


def _takes_list(model: Any) -> bool:
    """Whether a model takes a list: it declares so, or is one of torchvision's detectors, which do not."""
    if not isinstance(model, nn.Module):
        return False
    detection = sys.modules.get("torchvision.models.detection.transform")
    if detection is not None and isinstance(model._modules.get("transform"), detection.GeneralizedRCNNTransform):
        return True
    try:
        parameters = iter(inspect.signature(type(model).forward).parameters.values())
    except (TypeError, ValueError):  # of compiled code
        return False
    next(parameters, None)  # self
    annotation = getattr(next(parameters, None), "annotation", None)
    said = annotation if isinstance(annotation, str) else str(annotation)
    return said.lower().removeprefix("typing.").startswith("list[")


def first_samples(batch: Any, count: int, model: Any) -> Any:
    """Return a batch of its first samples alone: of each tensor that has one entry for each of them.

    >>> first_samples((torch.zeros(4, 2), torch.arange(4)), 2, nn.Linear(2, 1))
    (tensor([[0., 0.],
            [0., 0.]]), tensor([0, 1]))
    """
    samples = samples_of(batch, model)
    if samples is None or samples <= count:
        return batch

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.dim() and len(value) == samples else value
        if isinstance(value, Mapping):
            return {key: cut(each) for key, each in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, (tuple, list)):
            return type(value)(map(cut, value))
        return value

    return cut(batch)


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
