"""Transforms by their names, for code and for config files that name them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from wellcond.transforms.base import GradientTransform
from wellcond.transforms.centralize import GradientCentralization
from wellcond.transforms.constraints import NormClipping, ZScore
from wellcond.transforms.orthogonalize import Orthogonalize
from wellcond.transforms.preconditioner.transform import FeatureDescent, FeatureWhitening
from wellcond.transforms.projection import GradientProjection

TRANSFORMS: dict[str, type[GradientTransform]] = {
    kind.name: kind
    for kind in (
        GradientCentralization,
        FeatureWhitening,
        FeatureDescent,
        GradientProjection,
        Orthogonalize,
        NormClipping,
        ZScore,
    )
}
"""From a transform's name, as in ``stats()`` and in parameter groups, to its class."""


def named(transforms: Iterable[GradientTransform | str]) -> tuple[GradientTransform, ...]:
    """Return transforms with those that are given by name made, with their default options.

    Args:
        transforms: Transforms, or names in `TRANSFORMS`.

    Raises:
        ValueError: If no transform has the name.

    Example:
        >>> [type(transform).__name__ for transform in named(["centralization", FeatureWhitening(damping=0.01)])]
        ['GradientCentralization', 'FeatureWhitening']
    """
    return tuple(_by_name(transform) if isinstance(transform, str) else transform for transform in transforms)


def _by_name(name: str) -> GradientTransform:
    if name in TRANSFORMS:
        return TRANSFORMS[name]()
    by_class = {kind.__name__: called for called, kind in TRANSFORMS.items()}
    near = difflib.get_close_matches(name, [*TRANSFORMS, *by_class], n=1)
    guess = f": did you mean {by_class.get(near[0], near[0])!r}?" if near else ":"
    raise ValueError(f"no transform is called {name!r}{guess} Known: {', '.join(TRANSFORMS)}")
