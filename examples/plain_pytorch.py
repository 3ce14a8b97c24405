"""A plain PyTorch loop on handwritten digits, which can be stopped and goes on from its checkpoint exactly."""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wellcond


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def main(steps: int = 200, checkpoint: Path | None = None) -> nn.Module:
    """Train until so many steps are done; from the checkpoint on, if there is one."""
    torch.manual_seed(0)
    images, labels = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    # The line that wellcond adds: here Gradient Centralization and feature whitening over your own optimizer.
    handle = wellcond.attach(
        optimizer, model, wellcond.GradientCentralization(), wellcond.FeatureWhitening(stats_every=5, solve_every=25)
    )
    print(handle.report())

    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])  # With all that wellcond has learned about the features.
        done = saved["step"]

    for step in range(done, steps):
        batch = torch.randint(1500, (64,), generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if checkpoint is not None:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, checkpoint)
    model.eval()
    with torch.no_grad():
        correct = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    print(f"after {steps} steps: {correct:.1%} of 297 test images right")
    return model


if __name__ == "__main__":
    main()
