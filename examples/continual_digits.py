"""Learn the digits two at a time without forgetting: gradients stay out of the span of what was learned before."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wellcond

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def of_task(images: Tensor, labels: Tensor, task: int) -> tuple[Tensor, Tensor]:
    chosen = torch.isin(labels, torch.tensor(TASKS[task]))
    return images[chosen], labels[chosen]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, task: int) -> float:
    """Return how often the right one of a task's two digits is told."""
    images, labels = of_task(images, labels, task)
    classes = torch.tensor(TASKS[task])
    with torch.no_grad():
        return (classes[model.eval()(images)[:, classes].argmax(1)] == labels).double().mean().item()


def main(steps: int = 100, energy: float | None = 0.99) -> list[list[float]]:
    """Return the accuracy on each task (columns) after each task (rows); energy=None trains without projection."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    if energy is not None:
        # The line that wellcond adds: updates stay out of what is protected, which is nothing at first.
        handle = wellcond.attach(optimizer, model, wellcond.GradientProjection(energy=energy))
    history = []
    for task in range(len(TASKS)):
        own, targets = of_task(images, labels, task)
        for _ in range(steps):
            batch = torch.randint(len(own), (32,))
            optimizer.zero_grad()
            F.cross_entropy(model(own[batch]), targets[batch]).backward()
            optimizer.step()
        if energy is not None:
            # From now on the layers answer to this task's features as they do now.
            handle.protect(wellcond.second_moments(model, own.split(256)))
            print(handle.stats()["projection"])
        history.append([accuracy(model, test_images, test_labels, past) for past in range(task + 1)])
        print(" ".join(f"{score:6.1%}" for score in history[-1]))
    return history


if __name__ == "__main__":
    main()
