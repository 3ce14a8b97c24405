"""Weight centralization and standardization: each output unit's weights with zero mean, and with unit variance."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellcond.layouts import Layout, layout_of
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import checked, checks_itself, is_finite_number, shown

_Module = TypeVar("_Module", bound=nn.Module)


class OfUnits(nn.Module):
    """A parametrization by statistics of each output unit's weights; bases one that `parametrize` registers.

    Args:
        module: The layer whose weight it makes.
        layout: The rule for that weight.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        # Not the layer itself, which would be a submodule of its own parametrization.
        self.settings = _settings(module)

    @property
    def leaves_a_mean(self) -> bool:
        """Whether the units may have a mean after this step."""
        return False

    def _centred(self, weight: Tensor) -> Tensor:
        wide = weight.to(statistics_dtype(weight.dtype))
        return wide - self.layout.unit_mean(self.settings, wide)


class WeightCentralization(OfUnits):
    """ŵ = w − mean of each output unit over its inputs; `weight_centralize` attaches it to a layer.

    Args:
        module: The layer whose weight it centralizes.
        layout: The rule for that weight.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Centralize.

        Args:
            weight: As the layer has it.

        Returns:
            The same shape and dtype; statistics are computed in float32 or wider.
        """
        return self._centred(weight).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the weight itself: what is assigned to the layer's weight is what will be changed."""
        return weight


class WeightStandardization(WeightCentralization):
    """ŵ = (w − mean)/√(var + ε) of each output unit over its inputs; `weight_standardize` attaches it to a layer.

    Args:
        module: The layer whose weight it standardizes.
        layout: The rule for that weight.
        eps: ε, added to the variance.
    """

    def __init__(self, module: nn.Module, layout: Layout, eps: float) -> None:
        super().__init__(module, layout)
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        """Standardize.

        Args:
            weight: As the layer has it.

        Returns:
            The same shape and dtype; statistics are computed in float32 or wider.
        """
        centred = self._centred(weight)
        variance = self.layout.unit_mean(self.settings, centred.square())
        return (centred * torch.rsqrt(variance + self.eps)).to(weight.dtype)

    def extra_repr(self) -> str:
        """Say what it was made with."""
        return f"eps={self.eps}"


@checked
@checks_itself("eps")
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
    if not is_finite_number(eps) or eps <= 0:
        raise ValueError(f"eps must be positive, got {shown(eps)}")
    layout = layout_for(module, name)
    parametrize.register_parametrization(module, name, WeightStandardization(module, layout, eps))
    return module


@checked
def weight_centralize(module: _Module, name: str = "weight") -> _Module:
    """Let a layer compute with its centralized weight, ŵ = w − mean of each output unit over its inputs.

    As `weight_standardize` without the division: for `MovingAverageBatchNorm*`, which subtracts no mean of features
    (Yan et al., 2020). `convert_norm(model, to="mabn")` calls it.

    Args:
        module: A layer that `wellcond.layouts.layout_of` knows: linear, (transposed) convolution, embedding, attention.
        name: The attribute that holds the weight.

    Returns:
        The module itself.

    Raises:
        TypeError: If no layout is known for the module.
        ValueError: If `name` is not a weight of it, is centralized or standardized already or not initialized, or if
            the units have a single input each, which would leave nothing but zeros.

    Example:
        >>> weight_centralize(nn.Linear(4, 2)).weight.mean(1).abs().max() < 1e-7
        tensor(True)
    """
    layout = layout_for(module, name)
    parametrize.register_parametrization(module, name, WeightCentralization(module, layout))
    return module


def why_not_centralized(module: nn.Module, name: str = "weight") -> str | None:
    """Return why a layer's weight cannot be centralized; None if it can."""
    try:
        layout_for(module, name)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def layout_for(module: nn.Module, name: str) -> Layout:
    """Return the rule for a weight whose units have a mean to take out."""
    layout = layout_of(module)
    if layout is None:
        raise TypeError(f"no layout is known for {type(module).__name__}: see wellcond.layouts.register_layout")
    weights = [known for known, _ in layout.weights(module) if isinstance(getattr(module, known, None), Tensor)]
    if name not in weights:
        kind = parametrize.type_before_parametrizations(module).__name__
        raise ValueError(f"name must be one of the weights {weights} of {kind}, got {name!r}")
    for step in _steps(module, name):
        if isinstance(step, WeightCentralization) and not step.leaves_a_mean:
            done = "standardized" if isinstance(step, WeightStandardization) else "centralized"
            raise ValueError(f"{name} is {done} already")
    weight: Tensor = getattr(module, name)
    if nn.parameter.is_lazy(weight):
        raise ValueError(f"{name} is not initialized yet: call the lazy module on a batch first")
    layout = layout.of_weight(name)
    inputs = math.prod(layout.matrix(module, torch.empty(weight.shape, device="meta")).shape[2:])
    if inputs < 2:
        raise ValueError(f"each output unit of {name} must have at least 2 inputs, got {inputs}: {module!r}")
    return layout


def _steps(module: nn.Module, name: str) -> list[nn.Module]:
    """Return the parametrizations of a weight."""
    if not parametrize.is_parametrized(module, name):
        return []
    return list(module.get_submodule(f"parametrizations.{name}").children())


def _settings(module: nn.Module) -> nn.Module:
    """Return something with a module's public settings as attributes, without its tensors: for its layout to read."""
    settings = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return cast(nn.Module, SimpleNamespace(**settings))
