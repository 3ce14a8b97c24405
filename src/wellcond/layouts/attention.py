"""``nn.MultiheadAttention``: three input projections, packed or apart, and an output projection that nobody calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wellcond.layouts.layout import Layout, Rows
from wellcond.runtime.random_state import random_numbers_kept

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionLayout(Layout):
    """``nn.MultiheadAttention``: each of its weights has a rule of its own."""

    has_rows = True
    forward_uses = ("merge_masks",)

    def weights(self, module: nn.Module) -> list[tuple[str, str | None]]:
        """Name the packed projection, or the three separate ones; their bias is packed in either case."""
        return [(name, "in_proj_bias") for name in ("in_proj_weight", *_PROJECTIONS)]

    def of_weight(self, name: str) -> Layout:
        """Return the rule of the packed projection, or of one of three."""
        return _Projection(_PROJECTIONS.index(name)) if name in _PROJECTIONS else _PackedProjection()

    def adopted(self, module: nn.Module) -> Mapping[str, Layout]:
        """Adopt the output projection, whose weight is used without calling it."""
        return {"out_proj": _OutputProjection()}


class _Projecting(Layout):
    """A rule that looks at query, key and value."""

    has_rows = True

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick query, key and value."""
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        picked = tuple(given.get(name) for name in ("query", "key", "value"))
        return picked if all(isinstance(value, Tensor) for value in picked) else None


class _PackedProjection(_Projecting):
    """``in_proj_weight`` (3 · out, in): one matrix each for query, key and value."""

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [3, out, in]."""
        return torch.unflatten(weight, 0, (3, -1))

    def groups(self, module: nn.Module) -> int:
        """Return three."""
        return 3

    def rows(self, module: nn.Module, inputs: Tensor, *further: Tensor) -> Rows:
        """Return query, key and value as rows; in self-attention they are one."""
        return _joined([value.reshape(-1, value.shape[-1]) for value in (inputs, *further)])


class _Projection(_Projecting):
    """One of ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``, (out, in) each; its bias is a third of one."""

    def __init__(self, index: int) -> None:
        self.index = index

    def bias_matrix(self, module: nn.Module, bias: Tensor) -> Tensor:
        """View this projection's third as [1, out]."""
        return torch.unflatten(bias, 0, (3, -1))[self.index : self.index + 1]

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Pick the one that this projection multiplies."""
        picked = super().inputs(module, args, kwargs)
        return None if picked is None else (picked[self.index],)

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Flatten all axes but the last into rows."""
        return inputs.reshape(1, -1, inputs.shape[-1])


class _OutputProjection(Layout):
    """``out_proj``, whose input — the heads' joined values — exists only inside its parent's forward."""

    has_rows = True
    reruns = True

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Run the parent's attention once more with the identity as its output projection.

        This costs one attention forward on the steps that take statistics. Random generators stand as before
        afterwards.
        """
        attention = cast(nn.MultiheadAttention, module)
        weight = attention.out_proj.weight
        # A shallow copy whose `forward` is called directly: no hook, the watching one included, runs twice.
        twin = object.__new__(type(attention))  # FSDP2's classes refuse `copy.copy`
        twin.__dict__ = attention.__dict__ | {
            "_modules": {"out_proj": _identity_projection(weight)},
            # In evaluation, without gradients, torch would take a path of its own, which wants a bias.
            "training": True,
            "dropout": attention.dropout if attention.training else 0.0,
        }
        floats = {key: _like(weight, value) for key, value in kwargs.items()}
        plain = torch.autocast(weight.device.type, enabled=False)
        with torch.no_grad(), random_numbers_kept(weight.device), plain:
            joined = twin.forward(*(_like(weight, value) for value in args), **floats)[0]
        return (joined,)

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Flatten all axes but the last into rows."""
        return inputs.reshape(1, -1, inputs.shape[-1])


def _identity_projection(weight: Tensor) -> nn.Module:
    projection = nn.Linear(weight.shape[1], weight.shape[1], bias=False, device="meta")
    projection.weight = nn.Parameter(
        torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), requires_grad=False
    )
    return projection


def _like(weight: Tensor, value: Any) -> Any:
    """Cast a floating-point argument to the weight's dtype, as autocast would have cast both."""
    return value.to(weight.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _joined(rows: Sequence[Tensor]) -> Rows:
    """Stack rows of one length; keep them apart where the lengths differ (cross-attention)."""
    return torch.stack(list(rows)) if len({len(part) for part in rows}) == 1 else rows
