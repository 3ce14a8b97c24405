"""Five tasks of two classes, one after another: gradient projection beside training on, EWC, and replay.

    python benchmarks/continual.py --data digits --json docs/results/continual-digits.json
    python benchmarks/continual.py --data FOLDER --image-size 16 --json docs/results/continual-cifar10-jpeg.json

One output for each class; the loss of a task is over all ten, or over its own two (``--loss own``). The task is known
when its images are told apart (task-incremental), or not (among all classes). Forgetting is what the accuracy on a task
loses from the time right after it was learned to the end, the mean over all tasks but the last. Strength and energy are
chosen by the accuracy at the end on images that do not train, of a seed of their own. Parameters of the optimizer are
the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from measured import Scores, note, options, report, title_of
from torch import Tensor, nn

import wellcond
from wellcond.lab.data.load import LabelledImages, load_data

TASKS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
GRID: dict[str, Sequence[float | None]] = {
    "training on": (None,),
    "EWC": (10.0, 100.0, 1000.0),
    "replay of 200": (None,),
    "projection": (0.9, 0.97, 0.99, 0.999),
}


def network(shape: Sequence[int], width: int) -> nn.Module:
    """Return a network of two hidden layers for small images, with two convolutions before them for larger ones."""
    if shape[1] <= 8:
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.ReLU()]
    else:
        side = shape[1] // 4
        layers = [nn.Conv2d(shape[0], 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()]
        layers += [nn.Linear(64 * side * side, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Consolidation:
    """Elastic weight consolidation (Kirkpatrick et al. 2017): a penalty by the diagonal Fisher information."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.kept: list[tuple[list[Tensor], list[Tensor]]] = []

    def penalty(self, model: nn.Module) -> Tensor:
        """Return the penalty of all tasks so far."""
        total = torch.zeros(())
        for places, fishers in self.kept:
            for parameter, place, fisher in zip(model.parameters(), places, fishers, strict=True):
                total = total + (fisher * (parameter - place).square()).sum()
        return self.strength / 2 * total

    def keep(self, model: nn.Module, images: Tensor, samples: int = 200) -> None:
        """Take the Fisher information at these images, of labels that the model itself draws."""
        fishers = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for image in images[:samples]:
            logits = model(image.unsqueeze(0))
            drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
            gradients = torch.autograd.grad(F.cross_entropy(logits, drawn), list(model.parameters()))
            for fisher, gradient in zip(fishers, gradients, strict=True):
                fisher += gradient.square() / min(samples, len(images))
        self.kept.append(([parameter.detach().clone() for parameter in model.parameters()], fishers))


def run(
    method: str,
    value: float | None,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    width: int,
    steps: int,
    lr: float,
    own: bool,
) -> dict[str, float]:
    """Learn the tasks one after another, and return what was known at the end, and what was forgotten."""
    model = network(train[0].shape[1:], width)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    ewc = Consolidation(value or 0.0)
    memory: list[tuple[Tensor, Tensor]] = []
    handle = None
    if method.startswith("projection"):
        where: Any = "update" if method == "projection" else "gradient"
        handle = wellcond.attach(optimizer, model, wellcond.GradientProjection(energy=value or 1.0, where=where))
    known, among_all = [], []
    for task, classes in enumerate(TASKS):
        images, labels = _of(train, classes)
        for _ in range(steps):
            batch = torch.randint(len(images), (64,))
            loss = _loss(model(images[batch]), labels[batch], own)
            if method == "EWC":
                loss = loss + ewc.penalty(model)
            if memory:
                old_images, old_labels = (torch.cat(parts) for parts in zip(*memory, strict=True))
                again = torch.randint(len(old_images), (64,))
                loss = (loss + task * _loss(model(old_images[again]), old_labels[again], own)) / (task + 1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # EWC's penalty may explode
            optimizer.step()
        if method == "EWC":
            ewc.keep(model, images)
        elif method.startswith("replay"):
            memory.append((images, labels))
            memory = [(x[: 200 // len(memory)], y[: 200 // len(memory)]) for x, y in memory]
        elif handle is not None:
            handle.protect(wellcond.second_moments(model, images.split(500)))
        known.append([_accuracy(model, _of(test, each), each) for each in TASKS])
        among_all.append([_accuracy(model, _of(test, each), None) for each in TASKS])
    return {
        "accuracy": _mean(known[-1]),
        "forgetting": _mean([known[task][task] - known[-1][task] for task in range(4)]),
        "accuracy_among_all_classes": _mean(among_all[-1]),
        "forgetting_among_all_classes": _mean([among_all[task][task] - among_all[-1][task] for task in range(4)]),
        "when_learned": _mean([known[task][task] for task in range(5)]),
    }


def _loss(logits: Tensor, labels: Tensor, own: bool) -> Tensor:
    """Return the cross entropy over all classes, or over the two of each label's task, which stand side by side."""
    if not own:
        return F.cross_entropy(logits, labels)
    pairs = logits.unflatten(1, (5, 2)).gather(1, (labels // 2).view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)
    return F.cross_entropy(pairs, labels % 2)


def _of(data: tuple[Tensor, Tensor], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    chosen = torch.isin(data[1], torch.tensor(classes))
    return data[0][chosen], data[1][chosen]


@torch.no_grad()
def _accuracy(model: nn.Module, data: tuple[Tensor, Tensor], classes: Sequence[int] | None) -> float:
    logits = model(data[0])
    if classes is None:
        return (logits.argmax(1) == data[1]).double().mean().item()
    own = torch.tensor(classes)
    return (own[logits[:, own].argmax(1)] == data[1]).double().mean().item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tensors(images: LabelledImages) -> tuple[Tensor, Tensor]:
    return images.images.float() / 127.5 - 1, torch.from_numpy(images.labels).long()


def main() -> None:
    """Measure."""
    parser = options(__doc__)
    parser.add_argument("--data", required=True, help="digits, or a folder of parquet files as wellcond compare takes")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--train-images", type=int, default=10000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="of each task")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--loss", default="all", choices=("all", "own"), help="over which classes")
    given = parser.parse_args()
    data = load_data(given.data, given.image_size, None if given.data == "digits" else given.test_images)
    images, labels = _tensors(data.pool)
    test = _tensors(data.test)
    mean, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    images, test = (images - mean) / spread, ((test[0] - mean) / spread, test[1])

    def drawn(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        order = order[: min(given.train_images, len(images)) * 6 // 5]
        cut = len(order) * 5 // 6
        return (images[order[:cut]], labels[order[:cut]]), (images[order[cut:]], labels[order[cut:]])

    def measured(method: str, value: float | None, seed: int, with_test: bool) -> dict[str, float]:
        train, validation = drawn(seed)
        torch.manual_seed(seed)
        data = test if with_test else validation
        return run(method, value, train, data, given.width, given.steps, given.lr, given.loss == "own")

    chosen: dict[str, float | None] = {}
    for method, values in GRID.items():
        scores = (
            {value: measured(method, value, 1000, False)["accuracy"] for value in values} if len(values) > 1 else {}
        )
        chosen[method] = max(scores, key=lambda value: scores[value]) if scores else None
        print(method, scores, flush=True)
    # What the projection of the update adds.
    chosen["projection of gradients alone"] = chosen["projection"]
    scores: Scores = {}
    for seed in range(given.seeds):
        for method, value in chosen.items():
            note(scores, method, **measured(method, value, seed, True))
    loss = "all ten classes" if given.loss == "all" else "the two of each task"
    about = f"split {title_of(given.data, data)}, five tasks of two classes, {given.steps} steps each, loss over {loss}"
    report(given, about, scores, True, chosen=chosen)


if __name__ == "__main__":
    main()
