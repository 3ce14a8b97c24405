"""Small constraints on gradients that the sources weigh Gradient Centralization against: Z-scores, and clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from wellcond.layouts import Layer
from wellcond.layouts.unusual import is_sharded
from wellcond.numerics.linalg import frobenius_norm
from wellcond.numerics.moments import statistics_dtype
from wellcond.runtime.checks import Predicate, check_fields
from wellcond.transforms.base import Coverage, GradientTransform, Slot
from wellcond.transforms.centralize import GradientCentralization
from wellcond.transforms.sharding import local, sum_over_shards, units


@dataclass(frozen=True)
class ZScore(GradientTransform):
    """Standardize the gradient of each output unit: (g_i − mean(g_i)) / std(g_i), of mean 0 and variance 1.

    The idea that Gradient Centralization was tried beside: its authors found that dividing by the deviation does not
    make training more stable, where the mean alone does (thesis 4.1). It is here to be compared with. A unit whose
    gradient is the same for all inputs gets zero.

    Args:
        layers: Which, as for `wellcond.GradientCentralization`.

    Raises:
        ValueError: If ``layers`` has another value.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = wellcond.attach(optimizer, model, wellcond.ZScore())
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> bool((model.weight.grad.square().mean(dim=1) - 1).abs().max() < 1e-5)
        True
    """

    name: ClassVar[str] = "zscore"

    layers: Literal["all", "conv"] | Predicate = "all"

    def __post_init__(self) -> None:
        GradientCentralization(self.layers)
        check_fields(self)

    def cover(self, layer: Layer) -> Coverage:
        """Cover what would be centred."""
        decision = GradientCentralization(self.layers).cover(layer)
        how = decision.how.replace("not centred:", "unchanged:").replace("gradient centred", "gradient standardized")
        return replace(decision, how=how)

    def update(self, slots: Sequence[Slot]) -> None:
        """Centre and divide; gradients that a scaler's scale multiplies stay multiplied by it."""
        for slot in slots:
            layer = slot.layer
            assert layer.weight.grad is not None
            gradient = units(layer, layer.weight.grad)
            if gradient.numel() == 0:
                continue  # a rank without any row
            # Divided by its size first: squares of small or scaled gradients leave the range of their precision.
            size = gradient.abs().amax()
            scaled = (gradient / torch.where(size > 0, size, 1.0)).to(statistics_dtype(gradient.dtype))
            scaled = scaled - layer.unit_mean(scaled)
            deviation = layer.unit_mean(scaled.square()).sqrt()
            scores = scaled / torch.where(deviation > 0, deviation, 1.0)
            gradient.copy_(scores if slot.grad_scale is None else scores * slot.grad_scale)


@dataclass(frozen=True)
class NormClipping(GradientTransform):
    """Shorten each layer's gradient to at most a norm, weight and bias together; shorter ones stay as they are.

    Clipping by layer, where ``torch.nn.utils.clip_grad_norm_`` shortens all layers by the largest one's excess.

    Args:
        max_norm: The largest norm that a layer's gradient keeps.

    Raises:
        ValueError: If ``max_norm`` is not a positive number.

    Example:
        >>> import wellcond
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = wellcond.attach(optimizer, model, wellcond.NormClipping(0.5))
        >>> model(torch.full((8, 4), 100.0)).sum().backward()
        >>> optimizer.step()
        >>> round(float(torch.hypot(model.weight.grad.norm(), model.bias.grad.norm())), 4)
        0.5
    """

    name: ClassVar[str] = "clipping"

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        value = self.max_norm
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"max_norm must be a positive number, got {value!r}")
        check_fields(self)

    def cover(self, layer: Layer) -> Coverage:
        """Cover every layer whose weight is what its gradient says."""
        if layer.unfit:
            return Coverage(False, f"unchanged: {layer.unfit}")
        bias = layer.bias is not None and layer.bias.requires_grad and _is_all_its_own(layer, layer.bias)
        return Coverage(True, f"clipped to a norm of {self.max_norm:g}", bias=bias)

    def update(self, slots: Sequence[Slot]) -> None:
        """Multiply what is too long."""
        gradients = [
            [local(g) for g in (slot.layer.weight.grad, _bias_gradient(slot)) if g is not None] for slot in slots
        ]
        squares = []
        for slot, parts in zip(slots, gradients, strict=True):
            dtype = statistics_dtype(slot.layer.weight.dtype)
            squares.append(torch.stack([frobenius_norm(part, dtype).square() for part in parts]).sum())
        totals = sum_over_shards(squares, [slot.layer.weight for slot in slots])
        for slot, parts, total in zip(slots, gradients, totals, strict=True):
            limit = self.max_norm if slot.grad_scale is None else self.max_norm * slot.grad_scale
            ratio = (limit / total.sqrt().clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1.0)
            for part in parts:
                part.mul_(ratio)


def _is_all_its_own(layer: Layer, bias: torch.Tensor) -> bool:
    """Whether a layer's bias is no part of one that several weights share."""
    return layer.bias_matrix(torch.empty(bias.shape, device="meta")).numel() == bias.numel()


def _bias_gradient(slot: Slot) -> torch.Tensor | None:
    """Return the gradient of the bias that goes with a weight, if it is sharded as that is."""
    bias = slot.bias
    return None if bias is None or is_sharded(bias) is not is_sharded(slot.layer.weight) else bias.grad
