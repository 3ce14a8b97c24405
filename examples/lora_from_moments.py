"""Start LoRA's A in the leading directions of each layer's input, on the text that a small GPT is to learn."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(*qkv, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:]))))


class GPT(nn.Module):
    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        return self.head(F.layer_norm(x, x.shape[-1:]))


class LoRA(nn.Module):
    """A frozen linear layer, and a product B A of low rank beside it that is zero at first."""

    def __init__(self, base: nn.Linear, rank: int, directions: Tensor | None) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)
        if directions is not None:
            with torch.no_grad():  # Of the size of the random start.
                self.a.weight.copy_(directions.T * (self.a.weight.norm() / rank**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def adapt(model: nn.Module, rank: int, batches: list[Tensor] | None) -> list[nn.Parameter]:
    """Put LoRA beside every linear layer of the blocks, aligned to these batches; return what is to be trained."""
    names = [n for n, m in model.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]
    model.requires_grad_(False)
    # The line that wellcond adds: E[x xᵀ] of the input of each of these layers.
    moments = wellcond.second_moments(model, batches, where=lambda n, _: n in names) if batches else None
    for name in names:
        directions = None if moments is None else moments.eigh(name).eigenvectors[:, -rank:].float()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRA(model.get_submodule(name), rank, directions))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: nn.Module, held: list[nn.Parameter], text: Tensor, steps: int, lr: float, seed: int = 0
) -> list[float]:
    optimizer, draw, losses = torch.optim.AdamW(held, lr=lr, weight_decay=0.0), torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        batch = windows(text, 16, draw)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def windows(text: Tensor, count: int, draw: torch.Generator, length: int = 65) -> Tensor:
    starts = torch.randint(len(text) - length, (count, 1), generator=draw)
    return text[starts + torch.arange(length)]


def main(steps: int = 100) -> dict[str, list[float]]:
    english, python = (torch.tensor(list((t.__doc__ or "").encode())) for t in (nn.Transformer, F.conv2d))
    losses = {}
    for start in ("random", "aligned"):
        torch.manual_seed(0)
        model = GPT()
        train(model, list(model.parameters()), english, steps, 3e-3)
        batches = [windows(python, 16, torch.Generator().manual_seed(i))[:, :-1] for i in range(4)]
        held = adapt(model, 4, batches if start == "aligned" else None)
        losses[start] = train(model, held, python, steps, 3e-3)
        print(f"{start}: {losses[start][0]:.3f} → {losses[start][-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
