r"""How long each layer's step is: over the layers of a network, and from one step to the next.

    python benchmarks/layer_steps.py --data cifar10-jpeg-train.parquet --json docs/results/layer-steps.json \
        "SGD(momentum=0.9, weight_decay=5e-4) @ 0.04" "SGD(momentum=0.9, weight_decay=5e-4) + FeatureWhitening @ 0.04"

Each method, written as in the lab and with its learning rate after @, trains the same network on the same batches under
a cosine schedule. The relative step of a weight matrix or a convolution is the norm of what a step changes over the
norm of the weights, and over the schedule's factor at that step. Printed are

- how unlike layers are: the largest over the smallest of the layers' mean relative steps;
- how unlike steps are: the standard deviation of a layer's gradients' norms, and of its relative steps, over their
  means, in each epoch; the median over layers and epochs.
"""

from __future__ import annotations

import argparse
from itertools import chain, repeat
from statistics import fmean, median, stdev

import torch
import torch.nn.functional as F
from measured import Scores, note, options, report, title_of
from torch import Tensor, nn

from wellcond.lab.data.batches import TrainingBatches, channel_moments
from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split
from wellcond.lab.methods.method import method
from wellcond.lab.methods.spec import Method, Refresh
from wellcond.lab.networks.registry import MODELS, initial_model

Norms = dict[str, list[float]]
"""By the name of a weight: a norm a step."""


def main() -> None:
    """Measure."""
    given = arguments()
    data = load_data(given.data, given.image_size, None, given.train_images)
    scores: Scores = {}
    for seed in range(given.seeds):
        split = draw_split(data.pool.labels, given.train_images, 1, seed)
        images = data.pool.images[torch.from_numpy(split.train)]
        labels = torch.from_numpy(data.pool.labels[split.train])
        for text in given.methods:
            # Made anew, so that all methods see the same batches.
            batches = TrainingBatches(images, labels, channel_moments(images), given.batch, "crop-flip", seed)
            formula, _, lr = text.rpartition("@")
            model = initial_model(given.model, data.channels, len(data.pool.classes), seed)
            gradients, steps = lengths(model, batches, method(formula.strip()), float(lr), given.epochs)
            an_epoch = len(next(iter(steps.values()))) // given.epochs
            note(
                scores,
                text,
                layers_unlike=unlike_layers(steps),
                gradients_unlike=unlike_steps(gradients, an_epoch),
                steps_unlike=unlike_steps(steps, an_epoch),
            )
    about = (
        f"{title_of(given.data, data)}, {given.train_images} training images of {given.image_size} × "
        f"{given.image_size}, {given.model}, {given.epochs} epochs of batch {given.batch}"
    )
    report(given, about, scores, percent=False, digits=2)


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = options(__doc__)
    parser.add_argument("methods", nargs="+", metavar="METHOD @ LR")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="resnet8", choices=sorted(MODELS))
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--train-images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args()


def lengths(model: nn.Module, batches: TrainingBatches, trained: Method, lr: float, epochs: int) -> tuple[Norms, Norms]:
    """Train, and return the norms of the gradients, and the relative steps without the schedule's part in them.

    Args:
        model: The network; trained in place.
        batches: One epoch's batches, anew each time.
        trained: How.
        lr: The lr at the start of the cosine.
        epochs: Epochs.
    """
    total = epochs * len(batches)
    optimizer, _ = trained.build(model, lr, Refresh.for_run_of(total))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    gradients: Norms = {name: [] for name in weights}
    steps: Norms = {name: [] for name in weights}
    model.train()
    for images, labels in chain.from_iterable(repeat(batches, epochs)):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        before: dict[str, Tensor] = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, weight in weights.items():
            assert weight.grad is not None
            gradients[name].append(float(weight.grad.norm()))
        trained.clipping.apply(optimizer)
        factor = float(schedule.get_last_lr()[0]) / lr
        optimizer.step()
        for name, weight in weights.items():
            relative = (weight.detach() - before[name]).norm() / before[name].norm()
            steps[name].append(float(relative) / factor)
        schedule.step()
    return gradients, steps


def unlike_layers(steps: Norms) -> float:
    """Return the largest over the smallest of the layers' means.

    >>> unlike_layers({"a": [1.0, 3.0], "b": [0.5, 0.5]})
    4.0
    """
    means = [fmean(values) for values in steps.values()]
    return max(means) / min(means)


def unlike_steps(values: Norms, an_epoch: int) -> float:
    """Return the standard deviation over the mean, of each layer in each epoch: their median.

    Args:
        values: By layer, a value a step.
        an_epoch: Steps of an epoch.

    >>> round(unlike_steps({"a": [1.0, 3.0, 2.0, 2.0], "b": [1.0, 3.0, 1.0, 3.0]}, 2), 3)
    0.707
    """
    parts = [layer[start : start + an_epoch] for layer in values.values() for start in range(0, len(layer), an_epoch)]
    return median(stdev(part) / fmean(part) for part in parts)


if __name__ == "__main__":
    main()
