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


def shampoo(kind: Any) -> Callable[..., Any]:
    """Return Shampoo whose state dict holds tensors; pytorch_optimizer's holds objects, which no safe load takes."""

    class ScalableShampoo(kind):  # type: ignore[misc]  # known when it is called
        def state_dict(self) -> Any:
            found = super().state_dict()
            plain = {
                index: {key: _tensors_of(value) for key, value in entry.items()}
                for index, entry in found["state"].items()
            }
            return {**found, "state": plain}

        def load_state_dict(self, state_dict: Any) -> None:
            entries = state_dict["state"]
            others = {
                index: {key: value for key, value in entry.items() if not isinstance(value, dict)}
                for index, entry in entries.items()
            }
            super().load_state_dict({**state_dict, "state": others})
            held = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
            for index, (group, parameter) in enumerate(held):
                if index in entries:
                    loaded, gradients = self.state[parameter], [other.grad for _, other in held]
                    # Its objects are made of parameters that have a gradient and no state.
                    for _, other in held:
                        other.grad = None
                    parameter.grad, self.state[parameter] = torch.zeros_like(parameter), {}
                    self.init_group(group)
                    for (_, other), gradient in zip(held, gradients, strict=True):
                        other.grad = gradient
                    self.state[parameter].update(loaded)
                    for key, value in entries[index].items():
                        if isinstance(value, dict):
                            vars(self.state[parameter][key]).update(value)

    return ScalableShampoo


def _tensors_of(value: Any) -> Any:
    """Return an object of pytorch_optimizer as its tensors by name, and anything else as it is."""
    if not type(value).__module__.startswith("pytorch_optimizer."):
        return value

    def holds_tensors(item: Any) -> bool:
        return isinstance(item, torch.Tensor) or (
            isinstance(item, list) and all(isinstance(part, torch.Tensor) for part in item)
        )

    return {name: item for name, item in vars(value).items() if holds_tensors(item)}


class _FromTheRight(TorchFunctionMode):
    """Reverses the factors of einsum, which changes the order of work and not the result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum and len(args) > 3 and isinstance(args[0], str):
            inputs, _, output = args[0].partition("->")
            args = (f"{','.join(reversed(inputs.split(',')))}->{output}", *reversed(args[1:]))
        return func(*args, **(kwargs or {}))
