"""Second moments that attached transforms keep of layers' inputs, as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wellcond.moments.collection import SecondMoments
from wellcond.moments.layer_moment import LayerMoment
from wellcond.transforms.base import GradientTransform, Slot


def running_moments(transforms: Sequence[GradientTransform], slots: Mapping[str, Sequence[Slot]]) -> SecondMoments:
    """Return what transforms have found of E[x xᵀ], each layer's from the first one that knows it.

    Args:
        transforms: What is attached.
        slots: The slots of each by its name.

    Returns:
        By the layer's name, or the weight's where a layer has several; what is not known, with the reason.

    Raises:
        ValueError: If none of them keeps second moments.
    """
    keeping = [each for each in transforms if type(each).second_moments is not GradientTransform.second_moments]
    if not keeping:
        names = ", ".join(type(each).__name__ for each in transforms)
        raise ValueError(
            f"no second moments are kept by {names}: attach FeatureWhitening or FeatureDescent, or take them with "
            "wellcond.second_moments(model, loader)"
        )
    found: dict[str, LayerMoment] = {}
    skipped: dict[str, str] = {}
    modules: dict[str, str] = {}
    for transform in keeping:
        for slot in slots[transform.name]:
            modules |= {use.name: use.module_name for use in slot.uses}
            known = transform.second_moments(slot) if slot.coverage.applies else {}
            found |= {name: moment for name, moment in known.items() if name not in found}
            if not known:
                skipped[slot.layer.name] = "nothing was seen yet" if slot.coverage.applies else slot.coverage.how
    several = list(modules.values())
    keys = {name: module if several.count(module) == 1 else name for name, module in modules.items()}
    return SecondMoments(
        {keys[name]: moment for name, moment in found.items()},
        {name: keys[name] for name in found},
        skipped={keys[name]: why for name, why in skipped.items() if name not in found},
    )
