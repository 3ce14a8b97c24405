"""Describes a weight's gradient before there is one: the precision and the ranks that treat it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.transforms.base import Slot
from wellcond.transforms.preconditioner.form import Form
from wellcond.transforms.sharding import local, whole


@dataclass(frozen=True, eq=False)
class Place:
    """A weight, and how its gradient is treated: the same at every step.

    Attributes:
        slot: The weight's slot.
        form: Of its second moment.
        dtype: In which norms are taken.
        product_dtype: In which the gradient is multiplied.
        is_sharded: Whether other ranks hold parts of the weight or its bias.
        is_partial: Whether this rank treats its own rows alone, and other ranks have further ones.
    """

    slot: Slot
    form: Form
    dtype: torch.dtype
    product_dtype: torch.dtype
    is_sharded: bool
    is_partial: bool

    def part(self, tensor: Tensor) -> Tensor:
        """Return what this rank treats of a tensor of the weight's or the bias's shape."""
        if not self.is_sharded:
            return tensor
        return local(tensor) if self.is_partial else whole(tensor)
