"""Reads the effect of an optimizer's weight decay on its parameters."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from wellcond.transforms.base import Decay, Scalar

# torch's optimizers that multiply the weights by 1 − lr·λ but do not say so in their parameter groups.
_DECOUPLED: tuple[type[Optimizer], ...] = tuple(
    getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
)
_COUPLED: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.RMSprop,
)
# Those that do say so.
_EITHER: tuple[type[Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
)

WeightDecayKind = Literal["auto", "coupled", "decoupled"]


def group_decay(optimizer: Optimizer, group: dict[str, Any], kind: WeightDecayKind) -> Decay | None:
    """Say what a parameter group's weight decay does in the coming step; None if its kind is not known.

    Args:
        optimizer: The optimizer.
        group: One of its parameter groups.
        kind: What the user says of the kind, or ``"auto"``.

    Returns:
        The decay; `exact` if the optimizer is one of torch's, or the user says of which kind it is. Not so, whatever is
        said, of those that show a scale of their own for steps and decay.
    """
    strength: Scalar = group.get("weight_decay", 0.0)
    if not isinstance(strength, Tensor) and strength == 0:
        return Decay()
    decoupled: bool | None
    if kind != "auto":
        decoupled = kind == "decoupled"
    elif "decoupled_weight_decay" in group or "weight_decouple" in group:
        decoupled = bool(group.get("decoupled_weight_decay", group.get("weight_decouple")))
    elif isinstance(optimizer, _DECOUPLED):
        decoupled = True
    else:
        decoupled = False if isinstance(optimizer, _COUPLED) else None
    if decoupled is None:
        return None
    of_torch = isinstance(optimizer, (*_DECOUPLED, *_COUPLED, *_EITHER))
    exact = of_torch or kind == "coupled" or (kind == "decoupled" and not _scales_steps(optimizer, group))
    if not decoupled:
        gradient = -strength if group.get("maximize", False) else strength
        # A fused optimizer under GradScaler is handed gradients still multiplied by the loss scale.
        scale = getattr(optimizer, "grad_scale", None)
        return Decay(gradient=gradient if scale is None else gradient * scale, exact=exact, told=kind != "auto")
    shrink = strength if group.get("fixed_decay", False) else strength * group["lr"]
    # … and takes no step at all when that scaler found infinities.
    found_inf = getattr(optimizer, "found_inf", None)
    return Decay(shrink=shrink if found_inf is None else shrink * (1 - found_inf), exact=exact, told=kind != "auto")


def _scales_steps(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether an optimizer multiplies lr by an estimate d (Prodigy, D-Adaptation), or averages weights."""
    return "d" in group or _averages(optimizer)


def _averages(optimizer: Optimizer) -> bool:
    """Whether an optimizer has other weights for evaluation than for training (schedule-free, SPlus)."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def mixed_with(reference: weakref.ref[Optimizer], weight: Tensor) -> list[Tensor]:
    """Return the further copies of a weight that an optimizer moves beside it and mixes into it.

    Schedule-free optimizers have one, z: ``eval()`` and every step take the weight towards it.

    Args:
        reference: To the optimizer.
        weight: The weight.

    Returns:
        Tensors of the weight's shape, of the optimizer's state; none before its first step.
    """
    optimizer = reference()
    if optimizer is None or not _averages(optimizer):
        return []
    other = optimizer.state.get(weight, {}).get("z")
    return [other] if isinstance(other, Tensor) and other.shape == weight.shape else []
