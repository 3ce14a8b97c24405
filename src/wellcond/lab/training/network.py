"""The network that a run begins with."""

from __future__ import annotations

import torch
from torch import nn

from wellcond.lab.runs.records import RunSpec
from wellcond.lab.tasks.base import Task


def initial_network(task: Task, spec: RunSpec) -> nn.Module:
    """Return a run's network before its first step, on the CPU.

    Args:
        task: What makes the network.
        spec: The run: its seed draws the weights, its method changes the layers.
    """
    model = task.initial_model(spec.model, spec.seed, spec.weights)
    # After the weights are drawn: the methods of a seed share them, whatever layers they train with.
    model = spec.method.with_layers(model, spec.ghost_batch)
    # A batch needs no change: what a convolution with such weights returns is channels last, too.
    return model.to(memory_format=torch.channels_last) if spec.channels_last else model
