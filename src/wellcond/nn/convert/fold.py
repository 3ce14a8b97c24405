"""Fold sparse switchable normalizations that have chosen into the plain layers that they have become."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from wellcond.nn.convert.norms import convert_norm
from wellcond.nn.norm.sparse_switchable import SparseSwitchableNorm
from wellcond.runtime.checks import WellcondWarning, checked


@checked
def fold_switchable(model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None) -> nn.Module:
    """Make plain layers of the sparse switchable normalizations that have chosen one normalizer, in place.

    A layer becomes `nn.InstanceNorm*`, `nn.GroupNorm` of one group, or `nn.BatchNorm*` (with ghost groups
    `GhostBatchNorm*`). It is the same object, with the same γ and β (`nn.convert_norm`), and computes the same, in
    training and in evaluation; that of batch normalization goes on with its running statistics. Two things are torch's:
    a batch that was synchronized over ranks is from then on each rank's own, and `nn.InstanceNorm*` refuses inputs of
    one position.

    Args:
        model: Any model, or one such layer.
        where: Which layers: a predicate of (qualified name, module). All of them by default.

    Returns:
        `model`. Layers that have not chosen yet, have chosen one normalizer for the means and another for the
        variances, or have unbiased variances, stay as they are.

    Raises:
        ValueError: If there is no such layer, or none can be folded.

    Warns:
        WellcondWarning: About layers that stay, by name, and why.

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
    found = {layer: _plain(layer) for layer in layers.values()}
    left = [f"{name!r} {found[layer]}" for name, layer in layers.items() if isinstance(found[layer], str)]
    if len(left) == len(layers):
        raise ValueError(f"no layer can be folded: {'; '.join(left)}. Train with SparsityScheduler up to radius 1")
    for plain in dict.fromkeys(each for each in found.values() if isinstance(each, _Plain)):
        alike = {layer for layer, own in found.items() if own == plain}
        options = {} if plain.group_size is None else {"group_size": plain.group_size}
        convert_norm(model, plain.kind, lambda _, module, alike=alike: module in alike, **options)  # type: ignore[misc]
    if left:
        warnings.warn(
            f"fold_switchable: these layers stay as they are: {'; '.join(left)}", WellcondWarning, stacklevel=3
        )
    return model


class _Plain(NamedTuple):
    """A plain layer, as `convert_norm` calls it."""

    kind: str
    group_size: int | None


def _plain(layer: SparseSwitchableNorm) -> _Plain | str:
    """Return the plain layer that does the same, or why there is none."""
    mean, var = layer.chosen
    if mean is None or var is None:
        return "has not chosen yet"
    if mean != var:
        return f"chose {mean!r} for the means and {var!r} for the variances (shared_logits=True chooses one)"
    if layer.unbiased:
        return "has unbiased=True, as no plain layer"
    if mean != "bn" or layer.group_size is None:
        return _Plain(mean, None)
    return _Plain("ghost", layer.group_size)
