"""Optimizers of pytorch_optimizer whose steps are not taken as others' are, made to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def sam(kind: Any) -> Callable[..., Any]:
    """Return SAM whose step takes both its gradients by the closure; pytorch_optimizer's wants the first one made."""

    class SAM(kind):  # type: ignore[misc]  # known when it is called
        def step(self, closure: Callable[[], Any]) -> Any:
            with torch.enable_grad():
                loss = closure()
            super().step(closure)
            return loss

    return SAM


def kron(kind: Any) -> Callable[..., Any]:
    """Return PSGD whose products begin at the gradient.

    Torch takes einsum's factors from left to right (unless opt_einsum is installed), and there the gradient comes last:
    the product of all preconditioners, which has as many numbers as the square of the gradient, would be made first.
    """

    class Kron(kind):  # type: ignore[misc]  # known when it is called
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with _FromTheRight():
                super().step()
            return loss

    return Kron


class _FromTheRight(TorchFunctionMode):
    """Reverses the factors of einsum, which changes the order of work and not the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and len(args) > 3 and isinstance(args[0], str):
            inputs, _, output = args[0].partition("->")
            args = (f"{','.join(reversed(inputs.split(',')))}->{output}", *reversed(args[1:]))
        return func(*args, **(kwargs or {}))
