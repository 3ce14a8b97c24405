"""Optimizers by name: torch's, those of `pytorch_optimizer`, and two that need more than parameters and an lr."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

# What building adds itself, or what would change the meaning of a run.
_OURS = ("self", "params", "lr", "optimizer", "args", "kwargs", "maximize")
SECOND_ORDER = ("AdaHessian",)
"""Those that differentiate the gradient once more, so that backward has to keep its graph."""


def build_optimizer(name: str, model: nn.Module, lr: float, options: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer of all of a network's parameters.

    Args:
        name: A class of `torch.optim`, or else of `pytorch_optimizer`; ``"Muon"`` and ``"Lookahead"`` are the latter's.
        model: The network.
        lr: The lr.
        options: Further keyword arguments.
    """
    if name == "Muon":
        return _muon(model, lr, **options)
    if name == "Lookahead":
        return _lookahead(model, lr, **options)
    optimizer: Optimizer = _find(name)(model.parameters(), lr=lr, **options)
    return optimizer


def attached_to(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that transforms belong on: of one that wraps another, the wrapped.

    Its step takes the closure, and its state dict is what the wrapper saves.
    """
    inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def known_options(name: str) -> list[str]:
    """Return what options an optimizer of this name takes.

    >>> known_options("SGD")[:3]
    ['momentum', 'dampening', 'weight_decay']
    """
    if name == "Lookahead":
        return [*_arguments(_find(name)), *_arguments(_find("SGD"))]
    return _arguments(_find(name))


def _find(name: str) -> Callable[..., Any]:
    import torch

    if name not in ("Muon", "Lookahead") and hasattr(torch.optim, name):
        found: Callable[..., Any] = getattr(torch.optim, name)
        return found
    # Only now: it takes seconds to import.
    import pytorch_optimizer

    found = getattr(pytorch_optimizer, name)
    return found


def _arguments(kind: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in _OURS]


def _muon(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Return Muon for the weights of all layers but the last, and AdamW (``adamw_lr``) for everything else.

    As its authors advise: the classifier, the biases and the normalization layers have no use for orthogonal updates.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    hidden = {id(parameter) for parameter in weights[:-1]}

    def group(inside: bool) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if (id(parameter) in hidden) == inside]

    groups: Iterable[dict[str, Any]] = [
        {"params": group(True), "use_muon": True},
        {"params": group(False), "use_muon": False},
    ]
    optimizer: Optimizer = _find("Muon")(groups, lr=lr, **options)
    return optimizer


def _lookahead(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Return Lookahead over SGD."""
    own = {name: options.pop(name) for name in _arguments(_find("Lookahead")) if name in options}
    optimizer: Optimizer = _find("Lookahead")(_find("SGD")(model.parameters(), lr=lr, **options), **own)
    return optimizer
