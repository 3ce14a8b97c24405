"""The networks of on_gpu.py: a ResNet-50 for ImageNet, a GPT of 124 million parameters, and both at toy size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from wellcond.lab.networks.cifar_stem import bottleneck_resnet


def large_resnet(toy: bool) -> nn.Module:
    """Return torchvision's ResNet-50, or a tiny net of the same blocks."""
    return bottleneck_resnet(3, 10, (8, 16), (1, 1)) if toy else ResNet(Bottleneck, [3, 4, 6, 3])


@dataclass(frozen=True)
class GptSize:
    """The sizes of a GPT."""

    tokens: int
    context: int
    width: int
    heads: int
    layers: int


class Block(nn.Module):
    """Attention, then an MLP, each after a LayerNorm."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.first, self.second = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features after the block."""
        parts = self.attention(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """GPT-2: learned positions, blocks, and a head that is tied to the tokens' table."""

    def __init__(self, size: GptSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.tokens, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.tokens, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next tokens."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores
