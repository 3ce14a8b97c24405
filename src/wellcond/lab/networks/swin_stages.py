"""The stages of torchvision's Swin transformers as feature maps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn


class SwinStages(nn.Module):
    """Shows every stage's output, normalized, in the layout of convolutions.

    Args:
        features: Of torchvision's network: the patches' embedding, then stages with a merging between two of them.
        channels: Of the stages.
    """

    def __init__(self, features: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.features = features
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Return the maps, from the largest on."""
        found = OrderedDict[str, Tensor]()
        for place, layer in enumerate(self.features.children()):
            images = layer(images)
            # Embedding or merging, then a stage.
            if place % 2 == 1:
                stage = place // 2
                found[str(stage)] = self.norms[stage](images).permute(0, 3, 1, 2).contiguous()
        return found
