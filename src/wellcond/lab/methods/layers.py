"""What methods do to a network's layers: to its convolutions, or to batch normalization in chosen places."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

LAYERS = {
    "ws": "weight_standardize(every convolution)",
    "nd": "convert_layers(to='nd') in place of batch normalization",
    "ibn-a": "ibn_a(model)",
}
"""What can be done, and how the report writes it."""


def change_layers(model: nn.Module, kind: str) -> nn.Module:
    """Change a network's layers, in place.

    Args:
        model: The network.
        kind: A key of `LAYERS`.
    """
    if kind == "ibn-a":
        from wellcond.nn import ibn_a

        # Of a network that stands on one that is known, that one.
        ibn_a(getattr(model, "trunk", model))
        return model
    return _standardize(model) if kind == "ws" else _deconvolve(model)


def _standardize(model: nn.Module) -> nn.Module:
    from torch import nn

    from wellcond.nn import weight_standardize

    for module in model.modules():
        # A unit with a single input would have nothing but zeros left.
        if isinstance(module, nn.Conv2d) and module.weight[0].numel() > 1:
            weight_standardize(module)
    return model


def _deconvolve(model: nn.Module) -> nn.Module:
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
    return convert_layers(model, to="nd")
