"""Changes a network's layers as methods ask: convolutions and linear layers, or batch normalization in places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

LAYERS = {
    "ws": "weight_standardize(every convolution)",
    "wn": "weight_normalize(every convolution and linear layer)",
    "nd": "convert_layers(to='nd') in place of batch normalization",
    "wnn": "convert_layers(to='wnn')",
    "gwnn": "convert_layers(to='gwnn')",
    "eigen": "convert_layers(to='eigen')",
    "ibn-a": "ibn_a(model)",
    "ibn-b": "ibn_b(model)",
}
"""What can be done, and which function of `wellcond.nn` does it."""


def change_layers(model: nn.Module, kind: str, options: Mapping[str, Any]) -> nn.Module:
    """Change a network's layers, in place.

    Args:
        model: The network.
        kind: A key of `LAYERS`.
        options: Keyword arguments of the function that does it.
    """
    if kind in ("ibn-a", "ibn-b"):
        import wellcond.nn

        change = wellcond.nn.ibn_a if kind == "ibn-a" else wellcond.nn.ibn_b
        # Of a network that stands on one that is known, that one.
        change(getattr(model, "trunk", model), **options)
        return model
    if kind == "ws":
        return _standardize(model, **options)
    if kind == "wn":
        return _normalize(model, **options)
    if kind == "nd":
        return _deconvolve(model, **options)
    from wellcond.nn import convert_layers

    return convert_layers(model, to=kind, **options)


def _standardize(model: nn.Module, **options: Any) -> nn.Module:
    from torch import nn

    from wellcond.nn import weight_standardize

    for module in model.modules():
        # A unit with a single input would have nothing but zeros left.
        if isinstance(module, nn.Conv2d) and module.weight[0].numel() > 1:
            weight_standardize(module, **options)
    return model


def _normalize(model: nn.Module, **options: Any) -> nn.Module:
    from torch import nn

    from wellcond.nn import weight_normalize

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight[0].numel() > 1:
            weight_normalize(module, **options)
    return model


def _deconvolve(model: nn.Module, **options: Any) -> nn.Module:
    """Let convolutions remove correlations, as in the paper: they get a bias, and batch normalization goes."""
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    from wellcond.nn import convert_layers

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0, 0, 0]))
        elif isinstance(module, _BatchNorm):
            model.set_submodule(name, nn.Identity())
    return convert_layers(model, to="nd", **options)
