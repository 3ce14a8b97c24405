"""How close each form of the second moment comes to the whole one: the cosine of their preconditioned gradients.

    python benchmarks/fidelity.py --data cifar10-jpeg-train.parquet --json docs/results/fidelity.json

A network is trained with SGD and momentum. Then every form sees the same further batches at the same weights, and
preconditions the last one's gradient; its cosine to that of the whole second moment is a mean over the 3 × 3
convolutions of 100 inputs or more. What a form keeps of these layers is given beside the numbers that they have.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import setting, write
from torch import Tensor, nn

import wellcond
from wellcond import FeatureDescent, FeatureWhitening
from wellcond.lab.data.batches import Batch, TrainingBatches, channel_moments
from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split
from wellcond.lab.networks.registry import MODELS, initial_model

POWERS = {"1/2": FeatureWhitening, "1": FeatureDescent}
FORMS: dict[str, dict[str, Any] | None] = {
    "plain gradient": None,
    "kronecker": {"second_moment": "kronecker"},
    "blocks": {"second_moment": "blocks"},
    "blocks, rank 8": {"second_moment": "blocks", "rank": 8},
    "low_rank": {"second_moment": "low_rank"},
    "dense": {"second_moment": "dense"},
}


def train(model: nn.Module, batches: Sequence[Batch], lr: float) -> None:
    """Train with SGD and momentum, one step a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def measured_layers(model: nn.Module) -> list[str]:
    """Return the names of the 3 × 3 convolutions of 100 inputs or more: narrower ones are whole in every form."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.weight[0].numel() >= 100
    ]


def preconditioned(
    model: nn.Module, batches: Sequence[Batch], transform: wellcond.GradientTransform | None
) -> tuple[dict[str, Tensor], float]:
    """Return the last batch's gradients as the transform leaves them, and what it keeps for one number of a weight."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if transform is not None:
        wellcond.attach(optimizer, model, transform)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    weights = {name: model.get_submodule(name).weight for name in measured_layers(model)}
    kept = sum(
        value.numel()
        for weight in weights.values()
        for key, value in optimizer.state.get(weight, {}).items()
        if str(key).startswith("wellcond_") and isinstance(value, Tensor)
    )
    return {name: weight.grad for name, weight in weights.items()}, kept / sum(w.numel() for w in weights.values())


def fidelity(model: nn.Module, batches: Sequence[Batch], power: type) -> dict[str, dict[str, Any]]:
    """Compare the forms of one power.

    Args:
        model: A trained network; left as it is.
        batches: What each form sees, one step a batch.
        power: `FeatureWhitening` or `FeatureDescent`.

    Returns:
        By form: the cosine by layer, and what is kept.
    """
    found = {
        name: preconditioned(
            model, batches, None if options is None else power(stats_every=1, solve_every=1, **options)
        )
        for name, options in FORMS.items()
    }
    dense, _ = found["dense"]
    return {
        name: {
            "cosine": {
                layer: float(F.cosine_similarity(gradient.double().flatten(), dense[layer].double().flatten(), dim=0))
                for layer, gradient in gradients.items()
            },
            "kept": kept,
        }
        for name, (gradients, kept) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--model", default="resnet8", choices=sorted(MODELS))
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--observed", type=int, default=8, help="batches that the second moments are taken from")
    parser.add_argument("--lr", type=float, default=0.06)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    data = load_data(options.data, options.image_size, None, options.train_images)
    results: dict[str, dict[str, Any]] = {name: {"kept": 0.0, "cosine": {p: {} for p in POWERS}} for name in FORMS}
    for seed in range(options.seeds):
        split = draw_split(data.pool.labels, options.train_images, 1, seed)
        images = data.pool.images[torch.from_numpy(split.train)]
        labels = torch.from_numpy(data.pool.labels[split.train])
        epochs = TrainingBatches(images, labels, channel_moments(images), options.batch, "flip", seed)
        batches = list(islice(chain.from_iterable(repeat(epochs)), options.steps + options.observed))
        model = initial_model(options.model, data.channels, len(data.pool.classes), seed)
        train(model, batches[: options.steps], options.lr)
        for power, transform in POWERS.items():
            for name, row in fidelity(model, batches[options.steps :], transform).items():
                results[name]["kept"] = row["kept"]
                for layer, cosine in row["cosine"].items():
                    results[name]["cosine"][power].setdefault(layer, []).append(cosine)
    for name, row in results.items():
        means = {p: statistics.fmean(chain.from_iterable(layers.values())) for p, layers in row["cosine"].items()}
        row["mean_cosine"] = means
        print(f"{name:16} {'   '.join(f'p = {p}: {mean:.3f}' for p, mean in means.items())}   kept {row['kept']:.2f}")
    run = {name: getattr(options, name) for name in ("steps", "observed", "seeds", "image_size", "train_images")}
    run |= {"data": Path(options.data).name, "wellcond": wellcond.__version__}
    write(options.json, setting(options, torch.device("cpu")) | {"fidelity": run, "results": results})


if __name__ == "__main__":
    main()
