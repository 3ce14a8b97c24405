"""Ways to evaluate one trained network: how far each is from training (disparity, thesis 3.23), and its test accuracy.

A ResNet-8 is trained with batch normalization in ghost groups of m images. The same weights are then evaluated with

- EMA: the running statistics, as torch does; "precise": averaged anew over the training set, with the final weights;
- EvalNorm, with weights of 1/m, and with the weights that fit the training set best;
- BSR, from the sums kept in training ("online") and from a calibration pass over the training set; negative weights
  clamped, or by non-negative least squares.

    python benchmarks/norm_inference.py --data cifar10-jpeg-train.parquet --json docs/results/norm-inference.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import setting, write
from torch import Tensor, nn

import wellcond
from wellcond.lab.data.batches import TrainingBatches, channel_moments, evaluation_batches
from wellcond.lab.data.load import load_data
from wellcond.lab.data.splits import draw_split
from wellcond.lab.networks.registry import initial_model

Evaluation = tuple[str, Callable[[nn.Module], nn.Module]]


def train(model: nn.Module, batches: TrainingBatches, epochs: int, lr: float) -> None:
    """Train with SGD and a cosine schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(batches))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def solved(nonneg: str) -> Callable[[nn.Module], nn.Module]:
    """Return what solves a model's regressions in this way."""

    def change(model: nn.Module) -> nn.Module:
        for layer in model.modules():
            if isinstance(layer, wellcond.nn.BSRBatchNorm2d):
                layer.nonneg = nonneg
                layer.solve()
        return model

    return change


def ways(batches: TrainingBatches, m: int) -> Iterator[tuple[str, str, Callable[[nn.Module], nn.Module]]]:
    """Yield each way's name, its kind of disparity, and what makes a model that was trained with BSR evaluate so."""

    def calibrated(what: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: wellcond.calibrate(model, batches, m, what, **options)

    yield "EMA", "ema", lambda model: wellcond.nn.convert_norm(model, to="bn")
    yield "EMA, precise", "ema", lambda model: calibrated("bn")(wellcond.nn.convert_norm(model, to="bn"))
    yield "EvalNorm, 1/m", "evalnorm", calibrated("evalnorm", learn=False)
    yield "EvalNorm, fitted", "evalnorm", calibrated("evalnorm")
    yield "BSR online, clamp", "bsr", solved("clamp")
    yield "BSR online, nnls", "bsr", solved("nnls")
    yield "BSR calibrated, clamp", "bsr", lambda model: solved("clamp")(calibrated("bsr")(model))
    yield "BSR calibrated, nnls", "bsr", lambda model: solved("nnls")(calibrated("bsr")(model))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, moments: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy in percent."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(some).argmax(1) == truth).sum()) for some, truth in evaluation_batches(images, labels, moments)
        )
    return 100.0 * right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8], help="m, images of a ghost group")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--train-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    data = load_data(options.data, None, options.test_images, options.train_images)
    labels = torch.from_numpy(data.pool.labels)
    test = data.test.images, torch.from_numpy(data.test.labels)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for m in options.groups:
        for seed in range(options.seeds):
            split = draw_split(data.pool.labels, options.train_images, 1, seed)
            part = torch.from_numpy(split.train)
            moments = channel_moments(data.pool.images[part])
            batches = TrainingBatches(data.pool.images[part], labels[part], moments, 32, "flip", seed)
            model = initial_model("resnet8", data.channels, len(data.pool.classes), seed)
            train(wellcond.nn.convert_norm(model, to="bsr", group_size=m), batches, options.epochs, options.lr)
            # Those of other ghost groups than the fits have seen: another shuffle, another augmentation.
            fresh = TrainingBatches(data.pool.images[part], labels[part], moments, 32, "flip", seed + 1000)
            for name, kind, change in ways(batches, m):
                evaluated = change(copy.deepcopy(model))
                measured = wellcond.diagnostics.disparity(evaluated, fresh, batch_size=m, max_batches=20).mean[kind]
                row = found.setdefault(str(m), {}).setdefault(name, {"disparity": [], "accuracy": []})
                row["disparity"].append(measured)
                row["accuracy"].append(accuracy(evaluated, *test, moments))
        for name, row in found[str(m)].items():
            cells = [
                f"{statistics.fmean(row[what]):7.3f} +- {statistics.stdev(row[what]):.3f}"
                if options.seeds > 1
                else f"{row[what][0]:7.3f}"
                for what in ("disparity", "accuracy")
            ]
            print(f"m = {m}  {name:24} disparity {cells[0]}   test accuracy {cells[1]}", flush=True)
    device = torch.device("cpu")
    write(
        options.json,
        setting(options, device) | {"options": {k: str(v) for k, v in vars(options).items()}, "results": found},
    )


if __name__ == "__main__":
    main()
