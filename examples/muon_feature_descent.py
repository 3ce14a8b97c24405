"""Muon over feature descent ("Newton-Muon") for a small transformer's hidden matrices, AdamW for the rest.

It shows how the two are combined, not a gain: the loss after 100 and after 150 steps, with Muon's learning rate at
0.01, 0.02 and 0.05, was lower than that of Muon alone in one of these six settings.
"""

import argparse
from pathlib import Path

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


def main(steps: int = 100, plain: bool = False, checkpoint: Path | None = None) -> list[float]:
    """Train until so many steps are done; from the checkpoint on, if there is one."""
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

    parts, done = {"model": model, "muon": muon, "adamw": adamw}, 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        done = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    losses = []
    for step in range(done, steps):
        text = torch.randint(12, (32, 10), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(text).flatten(0, 1), text.flip(1).flatten())
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    if checkpoint is not None:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": steps}, checkpoint)
    print(f"{'Muon' if plain else 'Muon over feature descent'}: loss {losses[0]:.2f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="Muon alone")
    main(plain=parser.parse_args().plain)
