"""Normalizes by second moments, with a backward whose own statistic may be an average over batches (MABN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wellcond.nn.functional.batch_norm_kernels import gradient_sums, over, standardized
from wellcond.nn.functional.once import differentiable_once
from wellcond.numerics.moments import spread_samples, sum_samples

_NO_SECOND = (
    "Moving Average Batch Normalization has no second derivative, since its backward averages over batches: take "
    "another normalization where gradients are differentiated (gradient penalties, Hessians)"
)


def normalize_by_square(
    inputs: Tensor,
    shift: Tensor,
    square: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    elements: int | Tensor,
    average: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...] | None = None,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return γ·r·z + β with z = (x − c)/√(χ² + ε), and ∂L/∂x = (∂L/∂z − z·Ψ)/√(χ² + ε) with an average for Ψ.

    Ψ of the batch is the mean of z·∂L/∂z; with it alone, and χ² the batch's own, that is the derivative.

    Args:
        inputs: x, shape [N, C, *positions], any floating-point dtype and memory format.
        shift: c, shape [C].
        square: χ², shape [C], or [groups, C] with `sizes`, float32 or wider.
        scale: r, shaped as χ², a constant to the gradient.
        weight: γ, shape [C], or None for 1.
        bias: β, likewise, or None for 0.
        eps: ε.
        elements: Values behind each χ² of this batch; a tensor [groups, 1] where groups differ.
        average: From Ψ of the batch, shaped as χ², to that of the backward; called once for each backward pass.
        sizes: Samples of each group, in order; None for one group of all.
        all_reduce: Sums a tensor over the ranks that share the batch; None for this process alone.

    Returns:
        Of the inputs' shape, dtype and memory format. Its gradient cannot be differentiated again.

    Example:
        >>> x = torch.tensor([[3.0], [4.0]], requires_grad=True)
        >>> normalize_by_square(
        ...     x, torch.zeros(1), torch.tensor([25.0]), torch.ones(1), None, None, 0.0, 2, lambda psi: psi
        ... ).flatten()
        tensor([0.6000, 0.8000], grad_fn=<ViewBackward0>)
    """
    output: Tensor = _NormalizeBySquare.apply(
        inputs, weight, bias, shift, square, scale, eps, elements, average, sizes, all_reduce
    )
    return output


class _NormalizeBySquare(torch.autograd.Function):
    """`normalize_by_square`."""

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor,
        square: Tensor,
        scale: Tensor,
        eps: float,
        elements: int | Tensor,
        average: Callable[[Tensor], Tensor],
        sizes: tuple[int, ...] | None,
        all_reduce: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Normalize."""
        gain = scale if weight is None else scale * weight.to(scale.dtype)
        if sizes is not None:
            samples = sum(sizes)
            shift, square, gain = shift.expand(samples, -1), spread_samples(square, sizes), spread_samples(gain, sizes)
            bias = bias if bias is None else bias.expand(samples, -1)
        return standardized(inputs, shift, square, gain, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs and what is of the size of the channels."""
        x, weight, bias, shift, square, scale, ctx.eps, elements, ctx.average, ctx.sizes, ctx.all_reduce = inputs
        ctx.elements = None if isinstance(elements, Tensor) else elements
        counted = elements if isinstance(elements, Tensor) else None
        ctx.save_for_backward(x, weight, bias, shift, square, scale, counted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, grad, saved)
        return (*differentiable_once(gradients, (grad, *saved), _NO_SECOND), *[None] * 8)


def _gradients(ctx: Any, grad: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight, bias, shift, square, scale, counted = saved
    sizes, elements = ctx.sizes, ctx.elements if counted is None else counted
    if sizes is not None:
        shift, spread = shift.expand(sum(sizes), -1), spread_samples(square, sizes)
    else:
        spread = square
    product, total = gradient_sums(grad, x, shift, spread, ctx.eps)
    if sizes is not None:
        product, total = sum_samples(product, sizes), sum_samples(total, sizes)
    of_weight, of_bias = scale * product, total
    gain = scale if weight is None else scale * weight.to(scale.dtype)
    # Ψ = mean of z·∂L/∂z; that of the batch on all ranks that share it.
    summed = product if ctx.all_reduce is None else ctx.all_reduce(product)
    psi = ctx.average(gain * summed / elements)
    if sizes is not None:
        of_weight, of_bias = of_weight.sum(0), of_bias.sum(0)
        gain, psi = spread_samples(gain, sizes), spread_samples(psi, sizes)
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    factor = torch.rsqrt(spread + ctx.eps)
    grad_x = None
    if wants_x:
        # (g·γr − z·Ψ)/√(χ² + ε), z = (x − c)/√(χ² + ε)
        along = -psi * factor.square()
        grad_x = torch.addcmul(over(-along * shift, x), x, over(along, x))
        grad_x = grad_x.addcmul_(grad.to(grad_x.dtype), over(gain * factor, x)).to(x.dtype)
    return (
        grad_x,
        of_weight.to(weight.dtype) if wants_weight else None,
        of_bias.to(bias.dtype) if wants_bias else None,
    )
