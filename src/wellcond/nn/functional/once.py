"""Gradients that cannot be differentiated again, and raise an error if someone tries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def differentiable_once(
    gradients: Sequence[Tensor | None], depend_on: Iterable[Tensor | None], reason: str
) -> tuple[Tensor | None, ...]:
    """Return gradients as they are, but let a derivative of them raise instead of being wrong.

    `torch.autograd.function.once_differentiable` looks at incoming gradients alone. Those of a sum are constants: what
    a second derivative has from the tensors that the forward pass saved is then missing without an error.

    Args:
        gradients: Without a graph.
        depend_on: All tensors that they were computed from: incoming gradients and saved tensors.
        reason: Why there is no second derivative, and what to do.

    Returns:
        The same values. Where a graph is recorded (`create_graph=True`) and one of the tensors is in it, a backward
        pass through them raises a RuntimeError with the reason.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> (doubled,) = differentiable_once([2 * x.detach()], [x], "no second derivative of 2x: take another function")
        >>> doubled.backward()
        Traceback (most recent call last):
            ...
        RuntimeError: no second derivative of 2x: take another function
    """
    sources = [tensor for tensor in depend_on if tensor is not None and tensor.requires_grad]
    if not torch.is_grad_enabled() or not sources:
        return tuple(gradients)
    present = [gradient for gradient in gradients if gradient is not None]
    marked = iter(_Refusal.apply(reason, len(present), *present, *sources))
    return tuple(gradient if gradient is None else next(marked) for gradient in gradients)


class _Refusal(torch.autograd.Function):
    """Passes tensors on; its backward raises."""

    @staticmethod
    def forward(reason: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the first tensors."""
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the reason."""
        ctx.reason = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Refuse."""
        raise RuntimeError(ctx.reason)
