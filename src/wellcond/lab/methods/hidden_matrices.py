"""An optimizer of matrices, such as torch's Muon, for the hidden weights of any network, and AdamW for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

_REST = "adamw_"


class HiddenMatrices(torch.optim.Optimizer):
    """Two optimizers as one: the first sees each hidden weight as a matrix, units by inputs.

    The matrices are views of the weights where their memory allows: a convolution's kernel is flattened without a copy.

    Args:
        kind: The class that updates matrices.
        hidden: Weights of two or more dimensions.
        rest: All other parameters.
        lr: The lr of the matrices.
        **options: Options of the first; those that begin with ``adamw_`` are AdamW's, and ``adamw_lr`` its lr.
    """

    def __init__(
        self,
        kind: Callable[..., torch.optim.Optimizer],
        hidden: Sequence[nn.Parameter],
        rest: Sequence[nn.Parameter],
        lr: float,
        **options: Any,
    ) -> None:
        of_rest = {key.removeprefix(_REST): value for key, value in options.items() if key.startswith(_REST)}
        own = {key: value for key, value in options.items() if not key.startswith(_REST)}
        groups = [
            {"params": list(hidden), "lr": lr, "use_muon": True},
            {"params": list(rest), "lr": of_rest.pop("lr", lr), "use_muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], {})
        self.weights = [*hidden, *rest]
        # Both train views, none of the model's own parameters: what is attached belongs here, where all of them are.
        self.views = [nn.Parameter(weight.detach().reshape(len(weight), -1)) for weight in hidden]
        self.matrices = kind(self.views, lr=lr, **own) if hidden else None
        self.views += [nn.Parameter(weight.detach()) for weight in rest]
        others = self.views[len(hidden) :]
        self.rest = torch.optim.AdamW(others, lr=groups[1]["lr"], **of_rest) if rest else None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            inner = self.matrices if group["use_muon"] else self.rest
            assert inner is not None
            inner.param_groups[0]["lr"] = group["lr"]
        for weight, view in zip(self.weights, self.views, strict=True):
            # A copy where the weight's memory has another order (channels_last).
            view.data = weight.detach().reshape(view.shape)
            view.grad = None if weight.grad is None else weight.grad.reshape(view.shape)
        for inner in (self.matrices, self.rest):
            if inner is not None:
                inner.step()
        for weight, view in zip(self.weights, self.views, strict=True):
            if view.data_ptr() != weight.data_ptr():
                weight.copy_(view.view(weight.shape))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        inner = {"matrices": self.matrices, "rest": self.rest}
        return super().state_dict() | {name: each.state_dict() for name, each in inner.items() if each is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of both."""
        state_dict = dict(state_dict)
        for name, inner in (("matrices", self.matrices), ("rest", self.rest)):
            if inner is not None:
                inner.load_state_dict(state_dict.pop(name))
        super().load_state_dict(state_dict)


def options_of_rest() -> list[str]:
    """Return the options of the AdamW that trains the rest."""
    known = inspect.signature(torch.optim.AdamW).parameters
    return [f"{_REST}{name}" for name in ("lr", "betas", "eps", "weight_decay") if name in known]
