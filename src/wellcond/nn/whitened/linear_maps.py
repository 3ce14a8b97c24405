"""Amortized layers as linear layers and as convolutions; plain layers become them, and they become plain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.layouts import WhitenedConvLayout, WhitenedLinearLayout, register_layout
from wellcond.nn.whitened.amortized import AmortizedLayer
from wellcond.nn.whitened.plain_layers import arguments_of, geometry_of, with_parameters
from wellcond.numerics.pieces import in_pieces

if TYPE_CHECKING:
    from typing_extensions import Self


class AmortizedLinear(AmortizedLayer, nn.Linear):
    """The part of such a layer that knows `nn.Linear`."""

    def map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a linear layer."""
        return F.linear(input, weight, bias)

    def output_rows(self, output: Tensor) -> Tensor:
        """Flatten all axes but the last."""
        return output.reshape(1, -1, output.shape[-1])

    def input_rows(self, input: Tensor) -> Iterator[Tensor]:
        """Lay the input out as rows."""
        yield cast(Tensor, self.layout.rows(self, input))

    @classmethod
    def from_layer(cls, layer: nn.Linear, **options: Any) -> Self:
        """Make a layer that takes over a plain layer's parameters, and so begins as that layer.

        Args:
            layer: An `nn.Linear`.
            options: As for the constructor.

        Raises:
            TypeError: If the layer is of another type.
        """
        new = cls(**arguments_of(layer, nn.Linear), **options)
        take_over(new, layer)
        return new

    @torch.no_grad()
    def to_plain(self) -> nn.Linear:
        """Return an `nn.Linear` that computes the same."""
        weight, bias = self.folded()
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta", weight.dtype)
        with_parameters(plain, weight, bias, self.training)
        return plain


class AmortizedConv2d(AmortizedLayer, nn.Conv2d):
    """The part of such a layer that knows `nn.Conv2d`."""

    def map(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply a convolution with this layer's stride, padding, dilation and groups."""
        return cast(Tensor, self._conv_forward(input, weight, bias))

    def output_rows(self, output: Tensor) -> Tensor:
        """Lay out every position as a row of each group's channels."""
        return torch.unflatten(output, -3, (self.groups, -1)).movedim((-4, -3), (0, -1)).flatten(1, -2)

    def input_rows(self, input: Tensor) -> Iterator[Tensor]:
        """Lay the padded input's patches out as rows, a few samples at a time."""
        batch = input.unsqueeze(0) if input.dim() == 3 else input
        numbers = batch[:1].numel() * math.prod(self.kernel_size) // math.prod(self.stride)
        for piece in in_pieces(batch, numbers):
            yield cast(Tensor, self.layout.rows(self, piece))

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, **options: Any) -> Self:
        """Make a layer that takes over a plain layer's parameters, and so begins as that layer.

        Args:
            layer: An `nn.Conv2d`.
            options: As for the constructor.

        Raises:
            TypeError: If the layer is of another type.
        """
        new = cls(**arguments_of(layer, nn.Conv2d), **options)
        take_over(new, layer)
        return new

    @torch.no_grad()
    def to_plain(self) -> nn.Conv2d:
        """Return an `nn.Conv2d` that computes the same."""
        weight, bias = self.folded()
        arguments = geometry_of(self) | {"out_channels": weight.shape[0], "bias": bias is not None}
        plain = nn.Conv2d(**arguments)
        with_parameters(plain, weight, bias, self.training)
        return plain


def take_over(new: AmortizedLayer, layer: nn.Linear | nn.Conv2d) -> None:
    """Give a new layer a plain one's parameters and mode."""
    new.weight, new.bias = layer.weight, layer.bias
    new.start()
    new.train(layer.training)


register_layout(AmortizedLinear, WhitenedLinearLayout())
register_layout(AmortizedConv2d, WhitenedConvLayout())
