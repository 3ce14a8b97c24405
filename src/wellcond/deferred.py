"""Named optimizers from parameters alone, for configs that make the optimizer before they know the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from wellcond.transforms import Attachment, GradientTransform, attach

_WAITING = "wellcond_waiting"


def defer(optimizer: Optimizer, transform: GradientTransform) -> None:
    """Let an optimizer refuse to step until `attach_deferred` has attached a transform to it.

    Args:
        optimizer: The optimizer.
        transform: What is to be attached.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"this {type(optimizer).__name__} was made from parameters alone and waits for its model: give the trainer "
            "wellcond's callback, or call wellcond.optim.attach_deferred(optimizer, model) before training"
        )

    optimizer.__dict__[_WAITING] = (transform, optimizer.register_step_pre_hook(refuse))


def attach_deferred(optimizer: Optimizer, model: nn.Module) -> Attachment | None:
    """Attach what an optimizer that was made from parameters alone waits for.

    Args:
        optimizer: The optimizer; of `from_parameters`, or any other.
        model: The model that holds its parameters.

    Returns:
        The handle; None if the optimizer waits for nothing.

    Raises:
        ValueError: If the model shares no parameter with the optimizer.

    Example:
        >>> from wellcond.optim import from_parameters
        >>> model = nn.Linear(4, 2)
        >>> optimizer = from_parameters(model.parameters(), "wsgdm", lr=0.1, stats_every=10)
        >>> attach_deferred(optimizer, model).stats()["whitening"]["weights"]
        1
    """
    waiting = getattr(optimizer, _WAITING, None)
    if waiting is None:
        return None
    transform, hook = waiting
    handle = attach(optimizer, model, transform)
    hook.remove()
    del optimizer.__dict__[_WAITING]
    return handle


def parameters_of(params: ParamsT) -> list[Any]:
    """Return parameters or groups as a list.

    Raises:
        TypeError: If it is a module, or no list of parameters.
    """
    if isinstance(params, (nn.Module, torch.Tensor)) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be parameters or groups of them, got {type(params).__name__} (create takes a model)"
        )
    return list(params)
