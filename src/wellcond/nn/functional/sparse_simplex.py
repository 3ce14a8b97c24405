"""SparsestMax: probabilities that a growing circle drives to a single one (Shao et al., 2019)."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemax(logits: Tensor) -> Tensor:
    """Project logits on the probability simplex: the nearest point to them, often with exact zeros.

    Args:
        logits: Shape (..., K), K ≥ 1.

    Returns:
        Shape (..., K); at least 0, of sum 1 along the last axis.

    Source: Martins and Astudillo, 2016, algorithm 1.

    Example:
        >>> sparsemax(torch.tensor([0.7, 0.5, -1.0]))
        tensor([0.6000, 0.4000, 0.0000])
    """
    logits = logits - logits.detach().amax(-1, keepdim=True)  # So that large ones do not lose the 1 below.
    ordered = logits.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    ranks = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
    kept = (1 + ranks * ordered > sums).sum(-1, keepdim=True)
    # A mask in place of an index, which the compiler would have to look at.
    threshold = torch.where(ranks == kept, sums - 1, 0.0).sum(-1, keepdim=True) / kept
    return (logits - threshold).clamp_min(0)


def sparsestmax(logits: Tensor, radius: float | Tensor) -> Tensor:
    """Project logits on the part of the probability simplex that is outside of a circle around its centre.

    For r = 0 this is `sparsemax`; as r grows to 1, the circle leaves less and less of the simplex, in the end its
    corners alone. Where the circle's point is off the simplex, a zero is fixed there and the rest goes on with the
    smaller simplex and the circle that it cuts out of this one's. As in the authors' code, zeros that `sparsemax` gives
    already are fixed before: the first circle is around the centre of what is left.

    Where the largest logits are equal no direction leads away from the centre: the first of them is taken to be larger,
    so the weights sum to 1 there, too, and their gradient is that of `sparsemax`.

    Args:
        logits: Shape (..., K), K ≥ 1.
        radius: r, in [0, 1]; a tensor leaves compiled code as it is when its value changes.

    Returns:
        Shape (..., K); at least 0, of sum 1 along the last axis.

    Source: Shao et al., Learning Sparse Switchable Normalization via SparsestMax, CVPR 2019.

    Example:
        >>> logits = torch.tensor([0.6, 0.4, 0.3])
        >>> sparsestmax(logits, 0.0), sparsestmax(logits, 0.5), sparsestmax(logits, 1.0)
        (tensor([0.5000, 0.3000, 0.2000]), tensor([0.7191, 0.2562, 0.0247]), tensor([1., 0., 0.]))
    """
    squared = torch.as_tensor(radius, dtype=logits.dtype, device=logits.device).square()
    weights, centre = sparsemax(logits), None
    for _ in range(logits.shape[-1] - 1):
        inside = weights > 0
        left = inside.sum(-1, keepdim=True)
        now = inside / left.to(logits.dtype)
        # A corner stays; so does what is out of the circle already, or has just been pushed on to it.
        stays = left == 1
        if centre is not None:
            squared = (squared - _squared_norm(now - centre)).clamp_min(0)
            stays = stays | (now == centre).all(-1, keepdim=True)
        centre = now
        pushed = _pushed(weights, centre, inside, squared)
        stays = stays | (_squared_norm(weights - centre) >= squared)
        moved = torch.where(stays, weights, pushed)
        # Rounding in the sum must not bring back what is fixed at zero.
        weights = sparsemax(torch.where(inside, moved, -9.0))
    return weights


def _pushed(weights: Tensor, centre: Tensor, inside: Tensor, squared: Tensor) -> Tensor:
    """Move weights away from the centre, on to the circle of this squared radius."""
    away = weights - centre
    tied = _squared_norm(away.detach()) <= (16 * torch.finfo(weights.dtype).eps) ** 2
    index = inside.to(torch.int64).argmax(-1, keepdim=True)
    first = torch.zeros_like(weights).scatter(-1, index, 1.0) - centre
    # Not the weights themselves where they are tied: 0/0 would spread through the gradient of `where`.
    direction = torch.where(tied, first, away)
    direction = direction / _squared_norm(direction).clamp_min(torch.finfo(weights.dtype).tiny).sqrt()
    pushed = centre + squared.sqrt() * direction
    return torch.where(tied, weights + (pushed - weights).detach(), pushed)


def _squared_norm(vectors: Tensor) -> Tensor:
    return vectors.square().sum(-1, keepdim=True)
