"""Muon over feature descent ("Newton-Muon") for a small transformer's hidden matrices, AdamW for the rest."""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wellcond


class Reader(nn.Module):
    """Reads a sequence of letters and says it backwards."""

    def __init__(self, width: int = 32, letters: int = 12, length: int = 10) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, letters)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.letters(text) + self.places))


def main(steps: int = 100, plain: bool = False) -> list[float]:
    torch.manual_seed(0)
    model = Reader()
    hidden = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    others = [p for name, p in model.named_parameters() if name not in hidden]
    muon = torch.optim.Muon(hidden.values(), lr=0.05, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=3e-3)

    if not plain:
        # The line that wellcond adds: Muon orthogonalizes G·(M + damping)⁻¹ in the place of G.
        handle = wellcond.attach(muon, model, wellcond.FeatureDescent(stats_every=5, solve_every=25))
        print("\n".join(line for line in handle.report().splitlines() if "preconditioned" in line))

    losses = []
    for step in range(steps):
        text = torch.randint(12, (32, 10), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(text).flatten(0, 1), text.flip(1).flatten())
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{'Muon' if plain else 'Muon over feature descent'}: loss {losses[0]:.2f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="Muon alone")
    main(plain=parser.parse_args().plain)
