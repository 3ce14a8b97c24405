"""Adapts a network to the inputs that it meets, by letting them have a part in the statistics it evaluates with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wellcond.calibration.replay import named_batch_norms
from wellcond.calibration.undoing import thawed_meanwhile
from wellcond.nn.convert.frozen import frozen_norms
from wellcond.nn.convert.then_activation import parts_of
from wellcond.nn.functional.normalize import normalize
from wellcond.nn.norm.base import StatisticsNorm
from wellcond.numerics.moments import batch_moments
from wellcond.runtime.checks import Predicate, checked
from wellcond.runtime.models import unwrapped


@checked
@contextmanager
def adapting(
    model: nn.Module, weight: float = 0.1, *, remember: bool = False, where: Predicate | None = None
) -> Iterator[nn.Module]:
    """Have a model's batch normalizations evaluate with a part of each batch's own statistics, for a ``with`` block.

    Inputs of another kind than those of training (noise, blur, another camera) have other statistics, and a network
    that evaluates them with those of training loses much. Each batch, of one sample even, is normalized with
    μ = (1 − w)·μ_running + w·μ_batch, and σ² likewise (AlphaBN). With `remember` the mixture is where the next batch
    begins: a moving average over what the model meets, which suits inputs of one kind, one after the other. After the
    block the statistics are what they were.

    For single samples `wellcond.calibrate` has two kinds that are found from training data: ``"evalnorm"``, and
    ``"bsr"``, which need no block.

    Args:
        model: In evaluation mode; layers in training mode normalize as they do.
        weight: w, from 0 to 1.
        remember: Whether the statistics move on with the batches.
        where: Which normalizations: a predicate of (qualified name, module). All of them by default.

    Yields:
        `model`.

    Raises:
        TypeError: If a layer evaluates by other statistics than running ones, or has its own `forward`.
        ValueError: If the weight is out of its range, or there is no such layer.

    Source: You, Li, Zhao: "Test-time batch statistics calibration for covariate shift" (2021); Schneider et al.,
    "Improving robustness against common corruptions by covariate shift adaptation" (NeurIPS 2020).

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1, affine=False)).eval()
        >>> with adapting(model, weight=0.5):
        ...     output = model(torch.tensor([[9.0], [11.0]]))  # μ = 5, σ² = 1
        >>> [round(value, 3) for value in output.flatten().tolist()]
        [4.0, 6.0]
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must lie in [0, 1], got {weight}")
    inner = unwrapped(model)
    frozen = [
        layer
        for layer, names in frozen_norms(inner).items()
        if where is None or any(where(name, layer) for name in names)
    ]
    with ExitStack() as stack:
        stack.enter_context(thawed_meanwhile(frozen, again=True))
        layers = named_batch_norms(inner, where)[0]
        if not layers:
            raise ValueError(f"{type(inner).__name__} has no batch normalization with running statistics to adapt")
        for name, layer in layers.items():
            _check(name, layer)
        if "torch._dynamo" in sys.modules:  # Compiled code knows nothing of what stands in for the layers.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in layers.values():
            stack.callback(layer.__dict__.pop, "forward", None)
            layer.__dict__["forward"] = _Mixing(layer, weight, remember)
        yield model


class _Mixing:
    """Stands in for a layer's forward; the layer itself is only read."""

    def __init__(self, layer: _BatchNorm, weight: float, remember: bool) -> None:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self._layer, self._weight, self._remember = layer, weight, remember
        wide = torch.promote_types(layer.running_mean.dtype, torch.float32)
        self._mean, self._var = layer.running_mean.to(wide, copy=True), layer.running_var.to(wide, copy=True)

    def __call__(self, input: Tensor) -> Tensor:
        """Normalize with the mixture."""
        layer = self._layer
        if layer.training or len(input) == 0:
            output: Tensor = type(layer).forward(layer, input)
            return output
        layer._check_input_dim(input)
        own = batch_moments(input.detach())
        mean = torch.lerp(self._mean, own.mean.to(self._mean.dtype), self._weight)
        var = torch.lerp(self._var, own.var.to(self._var.dtype), self._weight)
        if self._remember:
            self._mean, self._var = mean, var
        output = normalize(input, mean, var, layer.weight, layer.bias, layer.eps)
        if parts_of(layer) is not None:  # timm's layers drop and activate, too.
            output = layer.get_submodule("act")(layer.get_submodule("drop")(output))
        return output


def _check(name: str, layer: _BatchNorm) -> None:
    if "forward" in vars(layer):
        raise TypeError(f"{name!r} has its own 'forward', set on this one object: what it does is not known")
    plain = type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if isinstance(layer, StatisticsNorm):
        own = type(layer).normalize_with_estimates is StatisticsNorm.normalize_with_estimates
        plain = own and layer.tracks_batch_moments
    if not plain and parts_of(layer) is None:
        raise TypeError(
            f"{name!r}, a {type(layer).__name__}, does not evaluate with running statistics alone: leave it out with "
            "`where`"
        )
