"""Two networks merged into one, and one rounded to 3 bits: what stale statistics cost, and what a pass brings back."""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wellcond


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def trained(seed: int, images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(steps: int = 80) -> dict[str, float]:
    images, labels = digits()
    train, test = (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    first, second = (trained(seed, *train, steps) for seed in range(2))
    loader = train[0].split(100)

    # The lines that wellcond adds: channels that match, statistics that fit.
    matched = wellcond.repair.align(copy.deepcopy(second), first, loader)
    rounded = wellcond.repair.round_weights(copy.deepcopy(first), bits=3, per="tensor")
    models = {
        "first": first,
        "second": second,
        "average": wellcond.repair.average([first, second]),
        "average, channels matched": wellcond.repair.average([first, matched]),
        "average, channels matched, calibrated": wellcond.repair.merge(first, second, loader),
        "rounded to 3 bits": rounded,
        "rounded to 3 bits, calibrated": wellcond.calibrate(copy.deepcopy(rounded), loader),
    }
    found = {name: accuracy(model, *test) for name, model in models.items()}
    for name, share in found.items():
        print(f"{name}: {share:.1%} of {len(test[0])} test images right")
    return found


if __name__ == "__main__":
    main()
