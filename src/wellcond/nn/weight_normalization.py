"""Weight normalization, and its centred form: a layer's weight as a length and a direction for each output unit."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.layouts import Layout
from wellcond.nn.standardize import OfUnits, layout_for
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import checked

_Module = TypeVar("_Module", bound=nn.Module)


class WeightNormalization(OfUnits):
    """ŵ = g·v/‖v‖ of each output unit over its inputs; `weight_normalize` attaches it to a layer.

    Args:
        module: The layer whose weight it normalizes.
        layout: The rule for that weight.
        centred: Take the mean of v out first.
    """

    def __init__(self, module: nn.Module, layout: Layout, centred: bool) -> None:
        super().__init__(module, layout)
        self.centred = centred

    @property
    def leaves_a_mean(self) -> bool:
        """Whether the units may have a mean after this step."""
        return not self.centred

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        """Normalize.

        Args:
            length: g, broadcasts to v.
            direction: v, of the weight's shape.

        Returns:
            v's shape and dtype.
        """
        wide = self._wide(direction)
        return (wide * (length.to(wide.dtype) / self._length(wide))).to(direction.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return g and v of a weight."""
        return self._length(self._wide(weight)).to(weight.dtype), weight

    def extra_repr(self) -> str:
        """Say what it was made with."""
        return f"centred={self.centred}"

    def _wide(self, weight: Tensor) -> Tensor:
        return self._centred(weight) if self.centred else weight.to(statistics_dtype(weight.dtype))

    def _length(self, wide: Tensor) -> Tensor:
        inputs = math.prod(self.layout.matrix(self.settings, torch.empty(wide.shape, device="meta")).shape[2:])
        square = self.layout.unit_mean(self.settings, wide.square()) * inputs
        # A unit without any direction stays zero, and has a finite gradient.
        return square.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()


@checked
def weight_normalize(module: _Module, name: str = "weight", centred: bool = True) -> _Module:
    """Let a layer compute with ŵ = g·(v − mean)/‖v − mean‖ (Huang et al., "Centered Weight Normalization", 2017).

    Every output unit's weight w becomes a length g times a direction, both learned; the mean is over all the unit's
    inputs. They begin as ‖w − mean‖ and w, so the layer computes as before but for the mean. Without `centred` that is
    weight normalization (Salimans and Kingma, 2016), and what `torch.nn.utils.parametrizations.weight_norm` does.

    g and v are parameters of their own, `module.parametrizations.weight.original0` and `original1`: make the optimizer
    afterwards. `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")` ends it and keeps ŵ.

    Args:
        module: A layer that `wellcond.layouts.layout_of` knows: linear, (transposed) convolution, embedding, attention.
        name: The attribute that holds the weight.
        centred: Take the mean out.

    Returns:
        The module itself.

    Raises:
        TypeError: If no layout is known for the module.
        ValueError: If `name` is not a weight of it, is parametrized already or not initialized, or if the units have a
            single input each.

    Example:
        >>> layer = weight_normalize(nn.Linear(4, 2))
        >>> layer.weight.mean(1).abs().max() < 1e-7
        tensor(True)
        >>> torch.allclose(layer.weight.norm(dim=1), layer.parametrizations.weight.original0.flatten())
        True
    """
    layout = layout_for(module, name)
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name} is parametrized already: a length and a direction must be the first to make it")
    parametrize.register_parametrization(module, name, WeightNormalization(module, layout, centred))
    return module
