"""The precision in which gradients are multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from wellcond.layouts import Layer
from wellcond.numerics import moments

Precision = Literal["float32", "tf32", "bfloat16"]

PRECISIONS: tuple[str, ...] = get_args(Precision)


def layer_dtype(layer: Layer) -> torch.dtype:
    """Return the precision in which a layer's statistics are kept: float32, or wider where its weight is wider."""
    return moments.statistics_dtype(layer.weight.dtype)


def product_dtype(layer: Layer, precision: Precision) -> torch.dtype:
    """Return the dtype in which a layer's gradient is multiplied: bfloat16, or that of its statistics."""
    return torch.bfloat16 if precision == "bfloat16" else layer_dtype(layer)


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """Let float32 products round their inputs to TF32 where the GPU can, if that is asked for.

    Args:
        precision: ``"tf32"`` asks for it; any other leaves the setting alone.
    """
    if precision != "tf32" or not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
