"""Weight decay in the gradient, before the transforms behind it: the thesis compares feature descent's own with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from wellcond.layouts import Layer
from wellcond.transforms.base import Coverage, GradientTransform, Slot


@dataclass
class GradientDecay(GradientTransform):
    """Adds λW to the gradient of a weight, so that transforms behind it see G + λW (thesis, 5.2.6 and 5.4.5).

    An optimizer's own coupled decay comes after all transforms. Scales of norm layers and biases are left to it.

    Args:
        weight_decay: λ, at least 0.

    Raises:
        ValueError: If it is below 0.

    Example:
        >>> import torch, wellcond
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> handle = wellcond.attach(optimizer, layer, GradientDecay(weight_decay=0.25))
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.zeros(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> torch.equal(layer.weight.detach(), 0.75 * before)
        True
    """

    name: ClassVar[str] = "gradient_decay"
    weight_decay: float

    def __post_init__(self) -> None:
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")

    def cover(self, layer: Layer) -> Coverage:
        """Cover every weight but a norm layer's scale."""
        if layer.layout.kind == "norm":
            return Coverage(False, "no decay in the gradient: a norm layer's scale")
        return Coverage(True, f"decay of {self.weight_decay:g} in the gradient")

    def update(self, slots: Sequence[Slot]) -> None:
        """Add λW to the gradients, scaled as they are."""
        for slot in slots:
            weight = slot.layer.weight
            assert weight.grad is not None
            scale = slot.grad_scale
            weight.grad.add_(weight if scale is None else weight * scale, alpha=self.weight_decay)
