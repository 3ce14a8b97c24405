"""Reads the transforms that the frameworks' callbacks attach: themselves, or names, as a config file gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from wellcond.deferred import attach_deferred
from wellcond.transforms import Attachment, GradientTransform, attach, attachments
from wellcond.transforms.by_name import named
from wellcond.transforms.wrappers import inner_optimizer


class Attaching:
    """Attaches transforms to optimizers that a framework has made.

    Args:
        transforms: What to attach, from left to right: transforms, or their names.

    Raises:
        TypeError: If one is of another type.
        ValueError: If no transform has a name.
    """

    def __init__(self, transforms: Sequence[GradientTransform | str] | None) -> None:
        if isinstance(transforms, (str, GradientTransform)):
            transforms = (transforms,)
        self.transforms = named(transforms or ())
        for transform in self.transforms:
            if not isinstance(transform, GradientTransform):
                raise TypeError(
                    f"transforms must be transforms such as FeatureWhitening() or names such as 'whitening', "
                    f"got {transform!r}"
                )

    def attach(self, optimizers: Iterable[object], model: nn.Module) -> list[Attachment]:
        """Attach the transforms to each optimizer, unless it has them from an earlier fit.

        Args:
            optimizers: The optimizers, also in a framework's wrapper.
            model: The model that holds their parameters.

        Returns:
            Everything that is attached to the optimizers now, by whomever.
        """
        found: list[Attachment] = []
        for optimizer in optimizers:
            attach_deferred(inner_optimizer(optimizer), model)
            there = {transform for handle in attachments(optimizer) for transform in handle.transforms}
            missing = [transform for transform in self.transforms if transform not in there]
            if missing:
                attach(optimizer, model, *missing)  # type: ignore[arg-type]  # it unwraps what frameworks wrap
            found += attachments(optimizer)
        return found


def refuse_to_do_nothing(callback: object, does: bool) -> None:
    """Raise if a callback has nothing to do: a config that names it expects something.

    Args:
        callback: The callback.
        does: Whether it has.

    Raises:
        ValueError: If it has not.
    """
    if not does:
        raise ValueError(
            f"{type(callback).__name__} has nothing to do: give it transforms (such as transforms=['whitening']) or a "
            "schedule, or attach to the optimizer yourself before training (wellcond.attach)"
        )
