"""A checkpoint of a batch-normalized network trained with 2 images a batch: one pass makes it evaluate with BSR.

Each image has a light of its own here, so the statistics of a batch of two are far from those of one image. On the
plain digits they are close, and BSR did not lower the loss.
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wellcond


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return handwritten digits, each in a light of its own: what batches of two do not agree about."""
    data = load_digits()
    light = torch.rand(2, len(data.images), 1, 1, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32) / 16 * (0.2 + 0.8 * light[0]) + light[1]
    return images.unsqueeze(1), torch.tensor(data.target)


def publish(file: Path, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train with 2 images a batch, and save what people publish: a state dict."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(images), (2,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    torch.save(model.state_dict(), file)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    outputs = model.eval()(images)
    return float((outputs.argmax(1) == labels).float().mean()), float(F.cross_entropy(outputs, labels))


def main(steps: int = 1000) -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    images, labels = digits()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "published.pth"
        publish(file, images[:1000], labels[:1000], steps)
        model = network()
        model.load_state_dict(torch.load(file))
    found = {"as published": evaluate(model, images[1000:], labels[1000:])}

    # The line that wellcond adds: one pass over training images at the batch it was trained with; weights untouched.
    wellcond.calibrate(model, images[:1000].split(100), batch_size=2)

    found["calibrated"] = evaluate(model, images[1000:], labels[1000:])
    for name, (right, loss) in found.items():
        print(f"{name}: {right:.1%} of {len(images) - 1000} test images right, loss {loss:.3f}")
    return found


if __name__ == "__main__":
    main()
