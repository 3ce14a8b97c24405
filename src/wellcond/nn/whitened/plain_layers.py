"""`nn.Linear` and `nn.Conv2d`: the arguments that they were made with, and plain layers of given parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def arguments_of(layer: nn.Module, expected: type[nn.Linear] | type[nn.Conv2d]) -> dict[str, Any]:
    """Return what makes another layer of the same shape, without memory of its own.

    Raises:
        TypeError: If the layer is not of this very type: subclasses use their parameters otherwise.
        ValueError: If its weight is computed by parametrizations.

    >>> arguments_of(nn.Linear(3, 2), nn.Linear)
    {'in_features': 3, 'out_features': 2, 'bias': True, 'device': 'meta', 'dtype': torch.float32}
    """
    if parametrize.is_parametrized(layer):
        raise ValueError(
            "layer must not be parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if type(layer) is not expected:
        raise TypeError(f"layer must be an nn.{expected.__name__}, got {type(layer).__name__}")
    return geometry_of(layer)


def geometry_of(layer: nn.Module) -> dict[str, Any]:
    """Return the plain arguments of an `nn.Linear`, an `nn.Conv2d` or a subclass of these."""
    arguments = {name: getattr(layer, name) for name in (_CONV if isinstance(layer, nn.Conv2d) else _LINEAR)}
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return arguments | {"bias": layer.bias is not None, "device": "meta", "dtype": weight.dtype}


def with_parameters(
    plain: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None, training: bool
) -> nn.Linear | nn.Conv2d:
    """Give a plain layer parameters and a mode, and return it."""
    plain.weight = nn.Parameter(weight)
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return plain.train(training)
