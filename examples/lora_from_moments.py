"""Start LoRA's A in the leading directions of each layer's input, on the text that a small GPT is to learn."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


def gpt(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Embedding(256, width), Block(width), Block(width), nn.Linear(width, 256))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int, directions: Tensor | None) -> None:
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        if directions is not None:  # Of the size of the random start.
            self.a.weight.data.copy_(directions.T * (self.a.weight.norm() / rank**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def adapt(model: nn.Module, rank: int, batches: list[Tensor] | None) -> None:
    names = [n for n, m in model.requires_grad_(False).named_modules() if isinstance(m, nn.Linear) and "." in n]
    # The line that wellcond adds: E[x xᵀ] of the input of each of these layers.
    moments = wellcond.second_moments(model, batches, where=lambda n, _: n in names) if batches else None
    for name in names:
        directions = None if moments is None else moments.eigh(name).eigenvectors[:, -rank:].float()
        model.set_submodule(name, LoRA(model.get_submodule(name), rank, directions))


def windows(text: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return text[torch.randint(len(text) - 65, (count, 1), generator=draw) + torch.arange(65)]


def train(model: nn.Module, text: Tensor, steps: int, lr: float, seed: int = 0) -> list[float]:
    held, draw, losses = [p for p in model.parameters() if p.requires_grad], torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.AdamW(held, lr=lr, weight_decay=0.0)
    for _ in range(steps):
        batch = windows(text, 16, draw)
        loss = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 100) -> dict[str, list[float]]:
    english, python = (torch.tensor(list((t.__doc__ or "").encode())) for t in (nn.Transformer, F.conv2d))
    losses = {}
    for start, batches in (("random", None), ("aligned", [windows(python, 64, torch.Generator())[:, :-1]])):
        torch.manual_seed(0)
        train(model := gpt(), english, steps, 3e-3)
        adapt(model, 4, batches)
        losses[start] = train(model, python, steps, 3e-3)
        print(f"{start}: {losses[start][0]:.3f} → {losses[start][-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
