"""A character-level GPT on generated text, in one file; its class knows nothing of wellcond."""

import math
import random

import torch
from torch import nn
from torch.nn import functional as F

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "ran", "to", "red", "barn", "by", "old", "mill")


def make_text(length: int) -> str:
    """Return sentences of known words in random order."""
    draws = random.Random(0)
    return " ".join(draws.choice(WORDS) for _ in range(length))


class Block(nn.Module):
    """Attention and a small network, each added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.attention(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A transformer decoder."""

    def __init__(self, characters: int, length: int, width: int):
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads=2) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Characters:
    """Next-character prediction, measured in bits."""

    epochs, score, higher_is_better = 2, "bits per character", False

    def __init__(self, length: int = 32, width: int = 32):
        text = make_text(2000)
        self.alphabet = sorted(set(text))
        self.ids = torch.tensor([self.alphabet.index(character) for character in text])
        self.length, self.width = length, width
        self.parts = dict(zip(("train", "validation", "test"), self.ids.split(math.ceil(len(text) / 3)), strict=True))

    def model(self, seed):
        return GPT(len(self.alphabet), self.length, self.width)

    def batches(self, seed, epoch):
        draws = torch.Generator().manual_seed(1000 * seed + epoch)
        for _ in range(10):
            yield self._window(torch.randint(len(self.parts["train"]) - self.length - 1, (16,), generator=draws))

    def _window(self, starts, part="train"):
        places = starts[:, None] + torch.arange(self.length + 1)
        return self.parts[part][places]

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def scores(self, model, split):
        starts = torch.arange(0, len(self.parts[split]) - self.length - 1, self.length)
        loss = float(self.loss(model, self._window(starts, split)))
        return {"bits per character": loss / math.log(2), "loss": loss}
