"""Refuses inputs whose every value would be normalized alone, which leaves nothing but the bias."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


class RefuseSingleValues:
    """A forward pre-hook of `nn.GroupNorm` and `nn.InstanceNorm*`: each set that they normalize must have two values.

    Torch refuses that for one sample alone; for more, `nn.GroupNorm` returns β whatever the input.

    Args:
        name: Of the layer, for the error.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise a ValueError if the input has one value in each set."""
        if not args:
            return
        shape = args[0].shape
        if isinstance(module, nn.GroupNorm):
            channels = module.num_channels // module.num_groups
            values = channels * math.prod(shape[2:])
            what = f"a group of {channels} channels" if channels > 1 else "a group of one channel"
        else:
            assert isinstance(module, nn.modules.instancenorm._InstanceNorm)
            # Two dimensions are [N, C] where a batch normalization was, not the [C, L] that torch takes them for.
            values = 1 if len(shape) == 2 else math.prod(shape[2:])
            if values == 1:
                raise ValueError(
                    f"{self.name!r}: expected more than 1 spatial element for each of num_features="
                    f"{module.num_features} channels of a sample, which {module} normalizes by themselves: of an input "
                    f"of size {list(shape)} with one value in each nothing but the bias would be left"
                )
            return
        if values == 1:
            raise ValueError(
                f"{self.name!r}: {module} would normalize {what} by itself, which has one value in an input of size "
                f"{list(shape)}: nothing but the bias would be left. Give groups more channels, or leave this layer "
                "out of the conversion with `where`"
            )
