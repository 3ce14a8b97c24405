"""Reads the arguments of `nn.Linear` and `nn.Conv2d`, and makes plain layers of given parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.runtime.checks import LARGEST_SIZE, check_choice, check_positive_integer, shown

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


def check_linear(in_features: int, out_features: int) -> None:
    """Raise a ValueError unless these are sizes of a linear layer.

    >>> check_linear(0, 4)
    Traceback (most recent call last):
        ...
    ValueError: in_features must be a positive integer, got 0
    """
    check_positive_integer("in_features", in_features, LARGEST_SIZE)
    check_positive_integer("out_features", out_features, LARGEST_SIZE)


def check_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    groups: int,
) -> None:
    """Raise a ValueError unless these are a convolution's.

    >>> check_convolution(3, 4, (3, 0), 1, 0, 1, 1)
    Traceback (most recent call last):
        ...
    ValueError: kernel_size must be a positive integer, got 0
    """
    for name, size in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        check_positive_integer(name, size, LARGEST_SIZE)
    for name, pair in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        for number in pair if isinstance(pair, (tuple, list)) else (pair,):
            check_positive_integer(name, number, LARGEST_SIZE)
    if isinstance(padding, str):
        check_choice("padding", padding, ("same", "valid"))
        return
    for number in padding if isinstance(padding, (tuple, list)) else (padding,):
        if not 0 <= number <= LARGEST_SIZE:
            raise ValueError(f"padding must not be negative, nor more than {LARGEST_SIZE}, got {shown(number)}")


def with_parameters(
    plain: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None, training: bool
) -> nn.Linear | nn.Conv2d:
    """Give a plain layer parameters and a mode, and return it."""
    plain.weight = nn.Parameter(weight)
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return plain.train(training)
