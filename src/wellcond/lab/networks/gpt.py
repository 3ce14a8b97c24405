"""Small GPTs: what language modelling is compared on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wellcond.lab.errors import unknown_name
from wellcond.lab.networks.gpt_specs import GPTS, GptSpec

# Of the head: it begins by guessing.
_STD = 0.02


class CausalAttention(nn.Module):
    """Self-attention of each position to those before it and to itself."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the attended features, [n, positions, features]."""
        samples, positions, _ = features.shape
        parts = self.queries_keys_values(features).view(samples, positions, 3, self.heads, -1)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(features.shape))
        return out


class Block(nn.Module):
    """Attention and a feed-forward net, each behind a layer normalization and beside a shortcut."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = CausalAttention(features, heads)
        self.norm2 = nn.LayerNorm(features)
        self.expand = nn.Linear(features, 4 * features)
        self.contract = nn.Linear(4 * features, features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the block's features, [n, positions, features]."""
        features = features + self.attention(self.norm1(features))
        fed: Tensor = self.contract(F.gelu(self.expand(self.norm2(features))))
        return features + fed


class Gpt(nn.Module):
    """A pre-LN transformer that predicts the next token of each position (Radford et al. 2019).

    Args:
        spec: Its size.
        tokens: How many tokens there are to tell apart.
    """

    def __init__(self, spec: GptSpec, tokens: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, spec.features)
        self.position = nn.Embedding(spec.block, spec.features)
        self.blocks = nn.Sequential(*(Block(spec.features, spec.heads) for _ in range(spec.layers)))
        self.norm = nn.LayerNorm(spec.features)
        self.head = nn.Linear(spec.features, tokens, bias=False)
        self._initialize(spec.layers)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the token after each position, [n, positions, tokens].

        Args:
            tokens: Integers, [n, positions], at most `spec.block` positions.
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        features = self.blocks(self.token(tokens) + self.position(places))
        logits: Tensor = self.head(self.norm(features))
        return logits

    def _initialize(self, layers: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, nn.Linear):
                # By the inputs, not GPT-2's 0.02, which suits widths of 2,500; by the depth where the residual stream
                # adds up.
                std = module.in_features**-0.5
                added = name.endswith((".out", ".contract"))
                nn.init.normal_(module.weight, std=std / (2 * layers) ** 0.5 if added else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=_STD)


def select_gpt(name: str) -> GptSpec:
    """Return the network of this name.

    Raises:
        LabError: If none has it.

    >>> select_gpt("gpt-tiny").block
    64
    """
    if name not in GPTS:
        raise unknown_name("model", name, GPTS)
    return GPTS[name]
