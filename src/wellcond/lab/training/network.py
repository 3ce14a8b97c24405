"""The network that a run begins with."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from wellcond.lab.runs.records import RunSpec
from wellcond.lab.tasks.base import Task

# `nn.Module.to` takes one order for all, and raises where a network has convolutions of two and of three axes.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def initial_network(task: Task, spec: RunSpec) -> nn.Module:
    """Return a run's network before its first step, on the CPU.

    Args:
        task: What makes the network.
        spec: The run: its seed draws the weights, its method changes the layers.
    """
    model = task.initial_model(spec.model, spec.seed, spec.weights)
    # After the weights are drawn: the methods of a seed share them, whatever layers they train with.
    model = spec.method.with_layers(model, spec.ghost_batch)
    if spec.channels_last:
        _store_channels_last(model)
    return model


def _store_channels_last(model: nn.Module) -> None:
    """Store the weights of convolutions so; a batch needs no change, since what they return is so, too."""
    for tensor in (*model.parameters(), *model.buffers()):
        order = None if is_lazy(tensor) else _CHANNELS_LAST.get(tensor.dim())
        if order is not None:
            # Not `contiguous`, which leaves the strides of a single channel, by which torch tells the order.
            tensor.data = tensor.data.to(memory_format=order)
