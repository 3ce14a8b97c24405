r"""How close each form of the second moment comes to the whole one: the cosine of their preconditioned gradients.

    python benchmarks/fidelity.py --data cifar10-jpeg-train.parquet --json docs/results/fidelity.json
    python benchmarks/fidelity.py --data cifar10-jpeg-train.parquet --model resnet18 --image-size 32 --batch 32 \
        --steps 100 --layers 6 --seeds 1 --json docs/results/fidelity-resnet18.json

A network is trained with SGD and momentum. Then every form sees the same further batches at the same weights, and
preconditions the last one's gradient; its cosine to that of the whole second moment is a mean over the 3 × 3
convolutions of 100 inputs or more, or some of them (``--layers``: wide ones take minutes to factorize whole). What a
form keeps of these layers is given beside the numbers that they have.
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
    "auto": {},
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


def measured_layers(model: nn.Module, most: int | None = None) -> list[str]:
    """Return the names of the 3 × 3 convolutions of 100 inputs or more: narrower ones are whole in every form.

    Args:
        model: The network.
        most: How many of them, evenly spaced from the first to the last; None: all.
    """
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.weight[0].numel() >= 100
    ]
    if most is None or most >= len(found):
        return found
    return [found[round(index * (len(found) - 1) / max(most - 1, 1))] for index in range(most)]


def fidelity(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Compare the forms, at both powers.

    Args:
        model: A trained network; left as it is.
        batches: What all forms see, one step a batch.
        layers: The names of the layers that are compared.

    Returns:
        By power and form: the cosine by layer, and what is kept for one number of the weights.
    """
    model = copy.deepcopy(model)
    weights = {name: model.get_submodule(name).weight for name in layers}
    # Each form has an optimizer of its own, which moves nothing: all see one forward pass and get one gradient.
    optimizers: dict[tuple[str, str], torch.optim.Optimizer] = {}
    for power, transform in POWERS.items():
        for form, options in FORMS.items():
            optimizer = optimizers[power, form] = torch.optim.SGD(model.parameters(), lr=0.0)
            if options is not None:
                # Sketches follow step by step; what is known of the whole one before the last step does not matter.
                every = max(1, len(batches) - 1) if form == "dense" else 1
                options = {"stats_every": 1, "solve_every": every, "solve_warmup": False, **options}
                wellcond.attach(optimizer, model, transform(where=lambda name, _: name in layers, **options))
    changed: dict[tuple[str, str], dict[str, Tensor]] = {}
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for key, optimizer in optimizers.items():
            for name, parameter in model.named_parameters():
                parameter.grad.copy_(gradients[name])
            optimizer.step()
            changed[key] = {name: weight.grad.double() for name, weight in weights.items()}
    return {
        power: {
            form: {
                "cosine": {
                    name: float(F.cosine_similarity(gradient.flatten(), changed[power, "dense"][name].flatten(), dim=0))
                    for name, gradient in changed[power, form].items()
                },
                "kept": _kept(optimizers[power, form], list(weights.values())),
            }
            for form in FORMS
        }
        for power in POWERS
    }


def _kept(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> float:
    """Return how many numbers a transform keeps for one of the weights."""
    kept = sum(
        value.numel()
        for weight in weights
        for key, value in optimizer.state.get(weight, {}).items()
        if str(key).startswith("wellcond_") and isinstance(value, Tensor)
    )
    return kept / sum(weight.numel() for weight in weights)


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
    parser.add_argument("--layers", type=int, help="how many layers, evenly spaced (default: all)")
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
        layers = measured_layers(model, options.layers)
        for power, rows in fidelity(model, batches[options.steps :], layers).items():
            for name, row in rows.items():
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
