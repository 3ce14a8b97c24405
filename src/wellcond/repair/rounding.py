"""Rounds weights to few bits after training, and takes the statistics anew that this makes stale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wellcond.calibration.models import calibrate
from wellcond.layouts import find_layers
from wellcond.runtime.checks import Predicate, checked
from wellcond.runtime.models import unwrapped


@checked
def round_weights(
    model: nn.Module,
    bits: int,
    loader: Iterable[Any] | None = None,
    *,
    per: Literal["channel", "tensor"] = "channel",
    where: Predicate | None = None,
    **options: Any,
) -> nn.Module:
    """Round a model's weights to few bits, in place, and give it the statistics that it has then.

    The weights of linear layers and convolutions become w = s·k with integers |k| ≤ 2ᵇ⁻¹ − 1 and a scale s = max |w| /
    (2ᵇ⁻¹ − 1), for each output channel or for the whole tensor; biases, normalizations and embeddings stay. They are
    floating-point numbers still, as simulated quantization has them. What a library of quantized layers makes of a
    model (torchao's ``quantize_``) is repaired by `wellcond.calibrate` alone, which runs whatever layers there are.

    Args:
        model: Any model.
        bits: b, from 2 to 16.
        loader: Training data, as `wellcond.calibrate` takes it. None: the statistics stay those of the weights before.
        per: A scale for each output ``"channel"``, or one for the ``"tensor"``.
        where: Which layers: a predicate of (qualified name, module). All of them by default.
        **options: Further ones of `wellcond.calibrate`.

    Returns:
        `model`.

    Raises:
        ValueError: If an argument is out of its range, or no layer is selected.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> _ = round_weights(model, 3, [torch.randn(8, 4)])
        >>> len(model[0].weight[0].unique()) <= 7
        True
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be between 2 and 16, got {bits}")
    found = [
        layer
        for layer in find_layers(unwrapped(model))
        if layer.layout.kind in ("linear", "conv") and (where is None or where(layer.module_name, layer.module))
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution to round, or `where` selects none")
    largest = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for layer in {layer.weight: layer for layer in found}.values():
            _round(layer.layout.matrix(layer.module, layer.weight.data), largest, per == "channel")
    return model if loader is None else calibrate(model, loader, **options)


def _round(matrix: Tensor, largest: int, by_channel: bool) -> None:
    """Round a view [groups, out, *inputs] in place."""
    size = matrix.abs()
    scale = size.amax(tuple(range(2, matrix.dim())), keepdim=True) if by_channel else size.amax()
    step = (scale / largest).clamp_min(torch.finfo(matrix.dtype).tiny)
    matrix.copy_((matrix / step).round().clamp(-largest, largest) * step)
