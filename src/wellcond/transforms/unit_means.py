"""The means of output units of many weights: by one product with a vector each where a unit's weights lie in a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from wellcond.layouts import Layer, Layout
from wellcond.transforms.base import Scalar
from wellcond.transforms.sharding import units

# Products of half precision may round every partial sum.
_DTYPES = (torch.float32, torch.float64)
# Up to this size a sum is made of all weights and gradients at once: calls cost more than memory.
_SMALL = 1 << 16


class UnitMeans:
    """The layers whose gradients are averaged together.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        # Of which layers a unit's weights lie in a row where the memory is contiguous.
        self._in_rows = [
            layer.layout.output_axis == 0 and type(layer.layout).unit_mean is Layout.unit_mean for layer in layers
        ]
        self._columns = [(-1, *[1] * (layer.weight.dim() - 1)) for layer in layers]
        self._are_plain = all(_is_plain(layer.weight) for layer in layers)
        self._shares: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def gradients(self) -> list[Tensor]:
        """Return the weights' gradients, as `units` gives them."""
        return self._units([layer.weight.grad for layer in self.layers])

    def _units(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        found = [tensor for tensor in tensors if tensor is not None]
        if self._are_plain:
            return found
        return [units(layer, tensor) for layer, tensor in zip(self.layers, found, strict=True)]

    def of(self, gradients: Sequence[Tensor], factor: Scalar = 0.0) -> list[Tensor]:
        """Return each output unit's mean of ``gradient + factor * weight``.

        Args:
            gradients: One a layer, as `units` gives it.
            factor: By what the weights are multiplied; a number that is 0 leaves them out.

        Returns:
            Tensors that broadcast to the gradients' shapes.
        """
        if isinstance(factor, Tensor):
            both = zip(self.of(gradients), self.of_weights(), strict=True)
            return [mean + factor * of_weight for mean, of_weight in both]
        weights = self._units([layer.weight for layer in self.layers]) if factor else gradients
        in_rows = [
            fits and _is_contiguous(gradient) and (not factor or _is_contiguous(weight))
            for fits, gradient, weight in zip(self._in_rows, gradients, weights, strict=True)
        ]
        small = [index for index, fits in enumerate(in_rows) if fits and factor and gradients[index].numel() <= _SMALL]
        summed = dict(zip(small, _added(gradients, weights, small, factor), strict=True))
        means = []
        for index, gradient in enumerate(gradients):
            if not in_rows[index]:
                mean = self.layers[index].unit_mean(gradient)
                means.append(mean + factor * self.layers[index].unit_mean(weights[index]) if factor else mean)
                continue
            rows = summed.get(index, gradient).flatten(1)  # a shard may have no units
            share = self._share(rows)
            mean = torch.mv(rows, share)
            if factor and index not in summed:
                mean = torch.addmv(mean, weights[index].view(rows.shape), share, alpha=factor)
            means.append(mean.view(self._columns[index]))
        return means

    def of_weights(self) -> list[Tensor]:
        """Return each output unit's mean weight."""
        return self.of(self._units([layer.weight for layer in self.layers]))

    def _share(self, rows: Tensor) -> Tensor:
        """Return a vector of 1/n: rows times it are their means."""
        key = (rows.shape[1], rows.dtype, rows.device)
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = rows.new_full((key[0],), 1.0 / key[0])
        return share


def add(tensors: Sequence[Tensor], amounts: Sequence[Tensor], sign: int) -> None:
    """Add to each tensor, in place, what broadcasts to its shape, or subtract it.

    Args:
        tensors: To be changed.
        amounts: One a tensor.
        sign: 1 or −1.
    """
    if not tensors:
        return
    if all(map(_is_plain, tensors)):
        (torch._foreach_add_ if sign > 0 else torch._foreach_sub_)(list(tensors), list(amounts))
        return
    for tensor, amount in zip(tensors, amounts, strict=True):  # sharded ones do not stand beside others
        tensor.add_(amount, alpha=sign)


def _added(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], indices: Sequence[int], factor: float
) -> Sequence[Tensor]:
    if not indices:
        return ()
    chosen = [gradients[index] for index in indices], [weights[index] for index in indices]
    return torch._foreach_add(*chosen, alpha=factor)


def _is_contiguous(tensor: Tensor) -> bool:
    return _is_plain(tensor) and tensor.dtype in _DTYPES and tensor.is_contiguous()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor or type(tensor) is Parameter
