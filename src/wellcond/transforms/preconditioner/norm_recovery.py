"""The norms of gradients before and after the product, and by what the products are to be multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from wellcond.numerics.linalg import frobenius_norms
from wellcond.transforms.preconditioner.form import Scratch
from wellcond.transforms.preconditioner.place import Place
from wellcond.transforms.sharding import sum_over_shards

NormRecovery = Literal["restore", "fixed", "none"]
GradientPairs = Sequence[tuple[Tensor, "Tensor | None"]]


class Norms:
    """The Frobenius norms of weights' gradients, each together with its bias's.

    Args:
        parts: Tensors of any shape and precision, the second of each pair may be None; all on one device.
        dtype: In which the squares are added.
        scratch: Where a zero is kept.
    """

    def __init__(self, parts: GradientPairs, dtype: torch.dtype, scratch: Scratch) -> None:
        biases = [bias for _, bias in parts if bias is not None]
        norms = frobenius_norms([*(weight for weight, _ in parts), *biases], dtype)
        self.weights = norms[: len(parts)]
        self.biases: list[Tensor] | None = None
        if biases:
            zero = scratch.zero(norms[0])
            of_biases = iter(norms[len(parts) :])
            self.biases = [zero if bias is None else next(of_biases) for _, bias in parts]

    def of(self, indices: Sequence[int]) -> Norms:
        """Return those of some layers."""
        chosen = Norms.__new__(Norms)
        chosen.weights = [self.weights[index] for index in indices]
        chosen.biases = None if self.biases is None else [self.biases[index] for index in indices]
        return chosen


def joint(*norms: Norms, scratch: Scratch) -> Tensor:
    """Return norms of weight and bias together.

    Args:
        *norms: Of the same layers.
        scratch: Where a zero is kept.

    Returns:
        Shape [len(norms), layers].
    """
    if all(each.biases is None for each in norms):
        return torch.stack([norm for each in norms for norm in each.weights]).view(len(norms), -1)
    zero = scratch.zero(norms[0].weights[0])
    parts = (each.biases or [zero] * len(each.weights) for each in norms)
    both = [norm for each, biases in zip(norms, parts, strict=True) for norm in (*each.weights, *biases)]
    of_weights, of_biases = torch.stack(both).view(len(norms), 2, -1).unbind(1)
    return torch.hypot(of_weights, of_biases)


def norm_ratios(places: Sequence[Place], before: Norms | None, after: Norms, scratch: Scratch) -> Tensor:
    """Return by which number each layer's changed gradient is to be multiplied.

    Args:
        places: The layers.
        before: ‖G‖, of this rank's rows where other ranks have further ones. They are restored: ‖G‖ / ‖Ĝ‖ (thesis
            5.16, 6.7). None: each layer gets its fixed norm / ‖Ĝ‖, multiplied by the loss scale where the optimizer is
            to divide by that.
        after: ‖Ĝ‖ likewise.
        scratch: Where a zero is kept.

    Returns:
        Shape [layers]; finite where Ĝ = 0.
    """
    norms = joint(after, scratch=scratch) if before is None else joint(before, after, scratch=scratch)
    partial = [index for index, place in enumerate(places) if place.is_partial]
    if partial:
        # The squares of the ranks' norms are added in one collective per mesh.
        weights = [places[index].slot.layer.weight for index in partial]
        squares = sum_over_shards([norms[:, index].square() for index in partial], weights)
        for index, total in zip(partial, squares, strict=True):
            norms[:, index] = total.sqrt()
    if before is not None:
        old, new = norms.unbind()
        return old / new.clamp_min(torch.finfo(new.dtype).tiny)
    ratios = []
    for place, norm in zip(places, norms[0].unbind(), strict=True):
        fixed, grad_scale = place.form.fixed_norm, place.slot.grad_scale
        wanted = fixed if grad_scale is None else fixed * grad_scale
        # A norm that underflows says nothing of the direction: no step then, rather than a huge one.
        ratios.append(torch.where(norm == 0, 0.0, (wanted / norm).clamp_max(torch.finfo(norm.dtype).max)))
    return torch.stack(ratios)
