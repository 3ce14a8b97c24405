"""Normalizes with given moments, of which a given share comes from the batch; one backward serves every variant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wellcond.nn.functional.batch_norm_kernels import gradient_sums, over, plain_gradient_sums, standardized
from wellcond.nn.functional.once import differentiable_once
from wellcond.numerics.moments import Moments, merge_samples, positions, spread_samples, sum_samples

AllReduce = Callable[[Tensor], Tensor]


def normalize(
    inputs: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    batch: Moments | None = None,
    batch_weight: float | Tensor = 1.0,
    sizes: tuple[int, ...] | None = None,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """Return (x − μ)/√(σ² + ε)·γ + β, differentiated through the part of μ and σ² that comes from this batch.

    μ = w·μ_B + constant and σ² = w·σ²_B + constant. With w = 1 this is batch normalization, with w = 0 a frozen one,
    with w = 1 − λ Momentum Batch Normalization, whose analytic backward (2.14 of the thesis) serves all of them. It can
    be differentiated twice, by way of the plain formula, unless it is synchronized over ranks.

    Args:
        inputs: Shape [N, C, *positions], any floating-point dtype and memory format; both are kept.
        mean: μ, shape [C], or [groups, C] with `sizes`, float32 or wider; a gradient passes through the batch only.
        var: σ², likewise.
        weight: γ, shape [C] or as the mean, or None for 1.
        bias: β, likewise, or None for 0.
        eps: ε.
        batch: The batch's own moments, shaped as the mean, and how many elements are behind each; None for w = 0.
        batch_weight: w, a float or a scalar tensor.
        sizes: Samples of each group, in order (`moments.ghost_sizes`); None for one group of all.
        all_reduce: Sums a tensor over the ranks that share the batch; None for this process alone.

    Returns:
        Of the inputs' shape, dtype and memory format.

    Example:
        >>> from wellcond.numerics.moments import batch_moments
        >>> x = torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> own = batch_moments(x)
        >>> normalize(x, own.mean, own.var, None, None, eps=0.0, batch=own)
        tensor([[-1.],
                [ 1.]], grad_fn=<NormalizeBackward>)
    """
    if batch is None:
        batch, batch_weight = Moments(mean, var, 1), 0.0
    # The compiler takes no tensor twice.
    own = (None, None) if batch.mean is mean else (batch.mean, batch.var)
    output: Tensor = Normalize.apply(
        inputs, weight, bias, mean, var, *own, batch.elements, batch_weight, eps, sizes, all_reduce
    )
    return output


class Normalize(torch.autograd.Function):
    """`normalize`, with the backward that its formula gives."""

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        batch_mean: Tensor | None,
        batch_var: Tensor | None,
        count: int | Tensor,
        batch_weight: float | Tensor,
        eps: float,
        sizes: tuple[int, ...] | None,
        all_reduce: AllReduce | None,
    ) -> Tensor:
        """Normalize."""
        if torch.compiler.is_compiling():
            return _formula(inputs, mean, var, weight, bias, eps, sizes)
        if sizes is None:
            return standardized(inputs, mean, var, weight, bias, eps)
        of_instances = (_spread_affine(weight, sizes), _spread_affine(bias, sizes))
        return standardized(inputs, spread_samples(mean, sizes), spread_samples(var, sizes), *of_instances, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs and what is of the size of the channels."""
        x, weight, bias, mean, var, batch_mean, batch_var, count, batch_weight, eps, sizes, all_reduce = inputs
        share, ctx.share = _split(batch_weight)
        elements, ctx.elements = _split(count)
        ctx.save_for_backward(x, weight, bias, mean, var, batch_mean, batch_var, share, elements)
        ctx.eps, ctx.sizes, ctx.all_reduce = eps, sizes, all_reduce

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of inputs, weight and bias."""
        x, weight, bias, mean, var, batch_mean, batch_var, share, elements = ctx.saved_tensors
        saved = _Saved(
            x,
            weight,
            bias,
            mean,
            var,
            Moments(
                mean if batch_mean is None else batch_mean,
                var if batch_var is None else batch_var,
                ctx.elements if elements is None else elements,
            ),
            ctx.share if share is None else share,
            ctx.eps,
            ctx.sizes,
            tuple(ctx.needs_input_grad[:3]),
        )
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            gradients = _gradients(grad, saved, ctx.all_reduce)
        elif ctx.all_reduce is None:
            gradients = _differentiable_gradients(grad, saved)
        else:
            gradients = _gradients_on_ranks(ctx, grad, saved)
        return (*gradients, None, None, None, None, None, None, None, None, None)


# `apply` asks for the signature on every call; asked once, a small layer's forward pass is a tenth faster.
Normalize.forward.__signature__ = inspect.signature(Normalize.forward)  # type: ignore[attr-defined]


class _Saved(NamedTuple):
    """What the backward needs of the forward."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    batch: Moments
    share: float | Tensor
    eps: float
    sizes: tuple[int, ...] | None
    needed: tuple[bool, ...]


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_NO_SECOND = (
    "a normalization that is synchronized over ranks has no second derivative, since the sums over ranks have none: "
    "make the layer with synchronize=False where gradients are differentiated (gradient penalties, Hessians)"
)


def _gradients(grad: Tensor, saved: _Saved, all_reduce: AllReduce | None) -> Gradients:
    """Return ∂L/∂x (2.14), ∂L/∂γ = Σ ∂L/∂y·x̂ and ∂L/∂β = Σ ∂L/∂y."""
    x, weight, bias, mean, var, batch, share, eps, sizes, needed = saved
    through_batch = needed[0] and not (isinstance(share, float) and share == 0.0)
    grad_weight = grad_bias = None
    if through_batch or needed[1] or needed[2]:
        product, total = _sums(grad, x, mean, var, eps, sizes)
        grad_weight = _as_affine(product, weight) if needed[1] else None
        grad_bias = _as_affine(total, bias) if needed[2] else None
    if not needed[0]:
        return None, grad_weight, grad_bias
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    if not through_batch:
        return (grad * over(spread_samples(scale, sizes), x)).to(x.dtype), grad_weight, grad_bias
    if all_reduce is not None:
        product, total = all_reduce(torch.stack([product, total])).unbind()
    # ∂L/∂x = scale·(∂L/∂y − w/m·Σ ∂L/∂y − w/m·(x − μ_B)/√(σ² + ε)·Σ ∂L/∂y·x̂)
    part = scale * (share / batch.elements) if isinstance(share, float) else scale * share / batch.elements
    return _combine(grad, scale, saved, part * product, part * total), grad_weight, grad_bias


def _combine(grad: Tensor, scale: Tensor, saved: _Saved, product: Tensor, total: Tensor) -> Tensor:
    """Return grad·scale − (x − μ_B)/√(σ² + ε)·product − total in x's dtype and memory format."""
    x, mean, var, eps, sizes = saved.x, saved.batch.mean, saved.var, saved.eps, saved.sizes
    if torch.compiler.is_compiling():
        scale, product, total, mean, var = (
            over(spread_samples(part, sizes), x) for part in (scale, product, total, mean, var)
        )
        return (grad * scale - (x - mean) * (torch.rsqrt(var + eps) * product) - total).to(x.dtype)
    if sizes is None and x.dtype == mean.dtype:
        # Torch's evaluation kernel is the fastest x·a + b. One buffer of x's size, as in its own backward.
        return standardized(x, mean, var, -product, -total, eps).addcmul_(grad, over(scale, x))
    along = -product * torch.rsqrt(var + eps)
    offset = -total - along * mean
    scale, along, offset = (over(spread_samples(part, sizes), x) for part in (scale, along, offset))
    combined = torch.addcmul(offset, x, along)
    return combined.addcmul_(grad.to(combined.dtype), scale).to(x.dtype)


def _sums(
    grad: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float, sizes: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """Return Σ ∂L/∂y·(x − μ)/√(σ² + ε) and Σ ∂L/∂y of each group, shaped as the mean."""
    if torch.compiler.is_compiling():
        means, variances = (spread_samples(part, sizes).expand(x.shape[:2]) for part in (mean, var))
        product, total = plain_gradient_sums(grad, x, means, variances, eps)
        return sum_samples(product, sizes), sum_samples(total, sizes)
    if sizes is None:
        return gradient_sums(grad, x, mean, var, eps)
    if x.is_contiguous():
        product, total = gradient_sums(grad, x, spread_samples(mean, sizes), spread_samples(var, sizes), eps)
        return sum_samples(product, sizes), sum_samples(total, sizes)
    groups = zip(grad.split(sizes), x.split(sizes), mean, var, strict=True)
    sums = [gradient_sums(*group, eps) for group in groups]
    return torch.stack([product for product, _ in sums]), torch.stack([total for _, total in sums])


def _formula(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    sizes: tuple[int, ...] | None,
) -> Tensor:
    """Normalize as the formula is written: for the compiler, which fuses it, and for second derivatives."""
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    y = (x.to(mean.dtype) - over(spread_samples(mean, sizes), x)) * over(spread_samples(scale, sizes), x)
    if bias is not None:
        y = y + over(bias if bias.dim() == 1 else spread_samples(bias, sizes), x)
    # Where it changes nothing, a cast would cut the compiled graph off from its gradient (torch 2.11).
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _differentiable_gradients(grad: Tensor, saved: _Saved) -> Gradients:
    """Return the gradients as differentiable functions of the inputs and of the incoming gradient."""
    x, weight, bias, mean, var, batch, share, eps, sizes, needed = saved
    wide = x.to(mean.dtype)
    axes = tuple(range(2, x.dim()))
    if positions(x) == 1:
        own = Moments(wide.flatten(1), torch.zeros_like(wide.flatten(1)), 1)
    else:
        own_var, own_mean = torch.var_mean(wide, axes, correction=0)
        own = Moments(own_mean, own_var, 1)
    own = merge_samples(own, sizes)
    mean = mean + share * (own.mean - batch.mean)
    var = var + share * (own.var - batch.var)
    y = _formula(x, mean, var, weight, bias, eps, sizes)
    wanted = [tensor for tensor, wants in zip((x, weight, bias), needed, strict=True) if wants and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grad_x, grad_weight, grad_bias = (next(found) if wants else None for wants in needed)
    return grad_x, grad_weight, grad_bias


def _gradients_on_ranks(ctx: Any, grad: Tensor, saved: _Saved) -> Gradients:
    """Return the gradients; differentiating them again is refused, since sums over ranks are not differentiable."""
    with torch.no_grad():
        gradients = _gradients(grad, saved, ctx.all_reduce)
    return cast(Gradients, differentiable_once(gradients, (grad, *ctx.saved_tensors), _NO_SECOND))


def _split(value: float | Tensor) -> tuple[Tensor | None, float | None]:
    """Return a tensor as something to save, and a number as something to keep."""
    return (value, None) if isinstance(value, Tensor) else (None, value)


def _spread_affine(affine: Tensor | None, sizes: Sequence[int]) -> Tensor | None:
    """Return [N, C] of [C] or [groups, C]."""
    if affine is None:
        return None
    return affine.expand(sum(sizes), -1) if affine.dim() == 1 else spread_samples(affine, sizes)


def _as_affine(sums: Tensor, affine: Tensor | None) -> Tensor | None:
    """Return sums over each group as the gradient of [C] or [groups, C]."""
    if affine is None:
        return None
    return (sums if affine.dim() == sums.dim() else sums.sum(0)).to(affine.dtype)
