"""Gradient clipping as part of a method: between backward and step, by torch's own functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Clipping:
    """The limit of a method's gradients, before its optimizer and its transforms see them.

    Attributes:
        norm: Of all gradients together (Pascanu et al., 2013); longer ones are shortened. None: no limit.
        value: Of each entry; larger ones are cut off, before the norm is taken. None: no limit.
    """

    norm: float | None = None
    value: float | None = None

    def __bool__(self) -> bool:
        return self.norm is not None or self.value is not None

    @property
    def settings(self) -> list[tuple[str, float]]:
        """The settings that a method is written with.

        >>> Clipping(norm=1.0).settings
        [('clip_norm', 1.0)]
        """
        both = {"clip_norm": self.norm, "clip_value": self.value}
        return [(name, limit) for name, limit in both.items() if limit is not None]

    def apply(self, optimizer: Optimizer) -> None:
        """Clip the gradients of an optimizer's parameters, in place."""
        if not self:
            return
        from torch.nn.utils import clip_grad_norm_, clip_grad_value_

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.value is not None:
            clip_grad_value_(parameters, self.value)
        if self.norm is not None:
            clip_grad_norm_(parameters, self.norm)
