"""Weight standardization: a layer's weight with zero mean and unit variance for each output unit."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.layouts import Layout, layout_of
from wellcond.numerics.moments import statistics_dtype

_Module = TypeVar("_Module", bound=nn.Module)


class WeightStandardization(nn.Module):
    """ŵ = (w − mean)/√(var + ε) of each output unit over its inputs; `weight_standardize` attaches it to a layer.

    Args:
        module: The layer whose weight it standardizes.
        layout: The rule for that weight.
        eps: ε, added to the variance.
    """

    def __init__(self, module: nn.Module, layout: Layout, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.layout = layout
        # Not the layer itself, which would be a submodule of its own parametrization.
        self.settings = _settings(module)

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize.

        Args:
            weight: As the layer has it.

        Returns:
            The same shape and dtype; statistics are computed in float32 or wider.
        """
        wide = weight.to(statistics_dtype(weight.dtype))
        centred = wide - self.layout.unit_mean(self.settings, wide)
        variance = self.layout.unit_mean(self.settings, centred.square())
        return (centred * torch.rsqrt(variance + self.eps)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight itself: what is assigned to the layer's weight is what will be standardized."""
        return weight

    def extra_repr(self) -> str:
        """Say what it was made with."""
        return f"eps={self.eps}"


def weight_standardize(module: _Module, name: str = "weight", eps: float = 1e-5) -> _Module:
    """Let a layer compute with its standardized weight (Qiao et al., "Weight Standardization", 2019).

    Every output unit's weight w becomes ŵ = (w − mean)/√(var + ε), with mean and variance over all the unit's inputs:
    for a convolution over a group's input channels and the kernel. Gradients flow through both. The parameter itself
    stays as it is, and the same object: an optimizer of it goes on. It is `module.parametrizations.weight.original`
    from then on, also in the state dict. `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")` ends
    it and keeps ŵ as the weight, or with `leave_parametrized=False` w.

    The variance is biased and ε inside the root, as in the paper, in timm (where ε is 1e-6) and in BiT (1e-10). The
    paper's PyTorch code divides by the unbiased deviation plus 1e-5: its ŵ is smaller by √((n − 1)/n) for n inputs,
    which the normalization layer that follows takes out again. There is no gain: ŵ of n inputs has the norm √n, so the
    layer needs a normalization layer behind it.

    Args:
        module: A layer that `wellcond.layouts.layout_of` knows: linear, (transposed) convolution, embedding, attention.
        name: The attribute that holds the weight.
        eps: ε, positive.

    Returns:
        The module itself.

    Raises:
        TypeError: If no layout is known for the module.
        ValueError: If `name` is not a weight of it, is standardized already or not initialized, if `eps` is not
            positive, or if the units have a single input each, which would leave nothing but zeros.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for module in model.modules():
        ...     if isinstance(module, nn.Conv2d):
        ...         _ = weight_standardize(module)
        >>> model[0].weight.mean((1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    layout = layout_of(module)
    if layout is None:
        raise TypeError(f"no layout is known for {type(module).__name__}: see wellcond.layouts.register_layout")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps!r}")
    weights = [known for known, _ in layout.weights(module) if isinstance(getattr(module, known, None), Tensor)]
    if name not in weights:
        kind = parametrize.type_before_parametrizations(module).__name__
        raise ValueError(f"name must be one of the weights {weights} of {kind}, got {name!r}")
    if any(isinstance(step, WeightStandardization) for step in _steps(module, name)):
        raise ValueError(f"{name} is standardized already")
    weight: Tensor = getattr(module, name)
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{name} is not initialized yet: call the lazy module on a batch first")
    layout = layout.of_weight(name)
    inputs = math.prod(layout.matrix(module, torch.empty(weight.shape, device="meta")).shape[2:])
    if inputs < 2:
        raise ValueError(f"each output unit of {name} must have at least 2 inputs, got {inputs}: {module!r}")
    parametrize.register_parametrization(module, name, WeightStandardization(module, layout, eps))
    return module


def _steps(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the parametrizations of a weight."""
    if not parametrize.is_parametrized(module, name):
        return []
    return list(module.get_submodule(f"parametrizations.{name}").children())


def _settings(module: nn.Module) -> nn.Module:
    """Return something with a module's public settings as attributes, without its tensors: for its layout to read."""
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return cast(nn.Module, SimpleNamespace(**settings))
