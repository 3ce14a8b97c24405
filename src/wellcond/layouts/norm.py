"""Norm layers' affine parameters: every element scales its own normalized feature x̂, and shifts it."""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from wellcond.layouts.layout import Layout, Rows


class NormLayout(Layout):
    """An element-wise scale (and shift): one 1 × 1 matrix per element."""

    kind = "norm"
    missing_rows = "an element-wise scale"

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """View as [elements, 1, 1]."""
        return weight.flatten().unsqueeze(-1).unsqueeze(-1)

    def bias_matrix(self, module: nn.Module, bias: Tensor) -> Tensor:
        """View as [elements, 1]."""
        return bias.flatten().unsqueeze(-1)

    def groups(self, module: nn.Module) -> int:
        """Return the number of elements."""
        return cast(Tensor, module.weight).numel()


class BatchNormLayout(NormLayout):
    """Batch and instance normalization: E[(x̂, 1)(x̂, 1)ᵀ] is the identity by construction (thesis 5.13)."""

    missing_rows = "normalized over each channel, so its second moment is the identity"


class LayerNormLayout(NormLayout):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: x̂ of one element over all samples and positions."""

    has_rows = True

    def trailing(self, module: nn.Module) -> int | None:
        """Return the number of axes that are normalized."""
        return len(cast(nn.LayerNorm, module).normalized_shape)

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Normalize without the affine parameters.

        Returns:
            Shape [elements, n, 1].
        """
        norm = cast(nn.LayerNorm, module)
        shape = list(norm.normalized_shape)
        if isinstance(module, nn.RMSNorm):
            normalized = F.rms_norm(inputs, shape, eps=module.eps)
        else:
            normalized = F.layer_norm(inputs, shape, eps=norm.eps)
        return normalized.reshape(-1, math.prod(shape)).mT.unsqueeze(-1)


class GroupNormLayout(NormLayout):
    """``nn.GroupNorm``: x̂ of one channel over all samples and positions."""

    has_rows = True

    def rows(self, module: nn.Module, inputs: Tensor) -> Rows:
        """Normalize without the affine parameters.

        Returns:
            Shape [channels, n, 1].
        """
        norm = cast(nn.GroupNorm, module)
        normalized = F.group_norm(inputs, norm.num_groups, eps=norm.eps)
        return normalized.movedim(1, 0).reshape(norm.num_channels, -1, 1)
