"""Reads a form's sums as the second moment of the layer's input, without the constant that stands for a bias."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from wellcond.layouts import Layer
from wellcond.moments.layer_moment import LayerMoment, MomentKind
from wellcond.numerics.low_rank import nystrom
from wellcond.transforms.preconditioner.factors import DiagonalFactor
from wellcond.transforms.preconditioner.form import Form
from wellcond.transforms.preconditioner.kronecker import KroneckerForm
from wellcond.transforms.preconditioner.tap_blocks import TapBlocksForm
from wellcond.transforms.preconditioner.tied import TiedForm


def layer_moment(
    form: Form,
    layer: Layer,
    averages: Mapping[str, Tensor],
    mean: Tensor | None = None,
    rows: tuple[float, ...] | None = None,
) -> LayerMoment:
    """Return the second moment that a form's averages are of.

    Args:
        form: The form.
        layer: Which use of the weight is meant, where it has several.
        averages: The form's averages by key, and the bases of its sketches; in float64, of finite numbers.
        mean: E[x], shape [groups, d], if it is known otherwise than from a bias's constant.
        rows: How many rows are behind each group.

    Returns:
        Of the rows that the weight multiplies; the constant 1 that a form with a bias appends to them is taken out.
    """
    window = layer.layout.window(layer.module)
    kernel = () if window is None else window.size
    # A row of what is no convolution may be products of two inputs' features.
    channels = form.channels if window is not None else form.channels * form.taps
    if isinstance(form, TiedForm):
        tokens = form.factor.tokens
        if layer.layout.one_hot:
            frequencies = averages["token_moment"]
            return LayerMoment("diagonal", 1, tokens, (), {"diagonal": frequencies}, frequencies, rows)
        return LayerMoment("dense", 1, form.factor.width, (), {"matrix": averages["second_moment"]}, None, rows)
    kind: MomentKind
    if isinstance(form, KroneckerForm):
        kind, tensors = "kronecker", _without_constant("channels", averages, "channel_", form.bias, 1 / form.taps)
        taps = averages["tap_second_moment"]
        if form.bias:
            taps = (taps * (form.channels + 1) - 1 / form.taps) / form.channels
        tensors["taps"] = taps
    elif isinstance(form, TapBlocksForm):
        first = torch.zeros(form.groups, form.taps, dtype=torch.float64)
        first[:, 0] = 1.0
        kind, tensors = "blocks", _without_constant("blocks", averages, "block_", form.bias, first.flatten())
        tensors = {key: value.unflatten(0, (form.groups, form.taps)) for key, value in tensors.items()}
    elif isinstance(form.factors[0], DiagonalFactor):
        kind, tensors = "diagonal", {"diagonal": averages["second_moment"]}
        mean = tensors["diagonal"]  # of one-hot rows
    else:
        tensors = _without_constant("matrix", averages, "", form.bias, 1.0)
        kind = "dense" if "matrix" in tensors else "sketch"
        if form.bias and kind == "dense":
            mean = averages["second_moment"][..., :-1, -1]
    return LayerMoment(kind, form.groups, channels, kernel, tensors, mean, rows)


def _without_constant(
    part: str, averages: Mapping[str, Tensor], prefix: str, bias: bool, square: float | Tensor
) -> dict[str, Tensor]:
    """Return a factor's matrix, or its sketch, of all inputs but the last, whose square has a known mean."""
    if f"{prefix}second_moment" in averages:
        matrix = averages[f"{prefix}second_moment"]
        return {part: matrix[..., :-1, :-1] if bias else matrix}
    product, basis, trace = (averages[f"{prefix}{name}"] for name in ("sketch", "basis", "trace"))
    if bias:
        # N = A Aᵀ is known whole; its part without the last input is of no higher rank, and so is its own sketch.
        vectors, values, _ = nystrom(product, basis, trace)
        half = (vectors * values.sqrt().unsqueeze(-2))[..., :-1, :]
        basis = torch.linalg.qr(half)[0]
        product, trace = half @ (half.mT @ basis), trace - square
    return {f"{part}_product": product, f"{part}_basis": basis, f"{part}_trace": trace}


def averages_of(form: Form, state: Mapping[str, Tensor | int], mass: float) -> dict[str, Tensor]:
    """Return what a slot's state says of a form's averages, divided by the moving average's mass, and its bases."""
    found = {}
    for factor in form.factors:
        for name in factor.shapes():
            value = state[factor.key(name)]
            if isinstance(value, Tensor) and (name in factor.averaged or name.endswith("basis")):
                wide = value.detach().to("cpu", torch.float64, copy=True)
                found[factor.key(name)] = wide / mass if name in factor.averaged else wide
    return found


def sums_bytes(form: Form) -> int:
    """Count the bytes of a form's sums and bases in float64."""
    return sum(
        8 * math.prod(shape)
        for factor in form.factors
        for name, shape in factor.shapes().items()
        if name in factor.averaged or name.endswith("basis")
    )
