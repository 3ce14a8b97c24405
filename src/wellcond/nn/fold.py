"""Fold sparse switchable normalizations that have chosen into the plain layers that they have become."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from wellcond.nn.convert import convert_norm
from wellcond.nn.sparse_switchable import SparseSwitchableNorm
from wellcond.nn.switchable import NORMALIZERS


def fold_switchable(model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None) -> nn.Module:
    """Make plain layers of the sparse switchable normalizations that have chosen one normalizer, in place.

    A layer becomes `nn.InstanceNorm*`, `nn.GroupNorm` of one group, or `nn.BatchNorm*`. It is the same object, with the
    same γ and β (`nn.convert_norm`), and computes the same, in training and in evaluation; that of batch normalization
    goes on with its running statistics.

    Args:
        model: Any model, or one such layer.
        where: Which layers: a predicate of (qualified name, module). All of them by default.

    Returns:
        `model`. Layers that have not chosen yet, or have chosen one normalizer for the means and another for the
        variances, stay as they are.

    Raises:
        ValueError: If there is no such layer, or none has chosen.

    Warns:
        UserWarning: About layers that stay, by name.

    Example:
        >>> import torch
        >>> from wellcond.nn import SparseSwitchableNorm2d
        >>> model = nn.Sequential(SparseSwitchableNorm2d(8, shared_logits=True))
        >>> model[0].radius = 1.0  # equal logits: the first is chosen
        >>> _ = model(torch.randn(2, 8, 3, 3))
        >>> type(fold_switchable(model)[0]).__name__
        'InstanceNorm2d'
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, SparseSwitchableNorm) and (where is None or where(name, layer))
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no SparseSwitchableNorm1d, 2d or 3d to fold")
    kinds = {layer: _foldable(layer) for layer in layers.values()}
    if not any(kinds.values()):
        raise ValueError(
            f"none of the {len(layers)} layers has chosen one normalizer for its means and variances: train with "
            "SparsityScheduler up to radius 1, with shared_logits=True"
        )
    for kind in NORMALIZERS:
        of_kind = {layer for layer, own in kinds.items() if own == kind}
        if of_kind:
            convert_norm(model, kind, lambda _, module, of_kind=of_kind: module in of_kind)  # type: ignore[misc]
    left = [name for name, layer in layers.items() if kinds[layer] is None]
    if left:
        warnings.warn(
            f"fold_switchable: {', '.join(map(repr, left))} chose no normalizer, or not the same for means and "
            "variances, and stay as they are",
            stacklevel=2,
        )
    return model


def _foldable(layer: SparseSwitchableNorm) -> str | None:
    """Return the kind of plain layer that does the same; None if there is none."""
    mean, var = layer.chosen
    return mean if mean == var and not (layer.unbiased and mean != "bn") else None
