"""A linear head on frozen, ill-conditioned features: how many learning rates are good, and how long training takes.

    python benchmarks/linear_head.py --json docs/results/linear-head.json
    python benchmarks/linear_head.py --data cifar10-jpeg-train.parquet --json docs/results/linear-head-cifar10-jpeg.json

The features are random 5 × 5 filters, ReLU, averaged over a grid of cells, as they come: neither centred nor scaled;
the last one is the constant 1, so that the head is one matrix. The objective is cross-entropy and a penalty λ/2 ‖W‖²
within the loss, no method has weight decay of its own, and so all have one and the same minimum. It is found in float64
by LBFGS until its gradient vanishes. First-order methods start from zero weights, take minibatches, and bring their
rate down by a cosine; each has as many rates on its grid as any other, a factor √10 apart.

A rate is good if its test accuracy, the mean over seeds, comes within 0.5 points of the best: that of the method and
rate with the best mean accuracy on validation images. Epochs and seconds are those until the training loss is within
1 % of the minimum, after the epoch, or the evaluation, at which that is so for the first time; of first-order methods
at the rate at which most seeds get there, and the soonest. Seconds are the processor's, so that other work on the
machine does not count; evaluations of the loss for these curves are not timed.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from measured import title_of
from sklearn.linear_model import LogisticRegression
from timing import setting, write
from torch import Tensor, nn

import wellcond
from wellcond.lab.data.load import ImageData, LabelledImages, load_data
from wellcond.lab.data.splits import draw_split

Build = Callable[[nn.Module, float, int], torch.optim.Optimizer]
RATES = [10 ** (exponent / 2) for exponent in range(-8, 4)]
CLOSE = 1.01
SINGULAR = 1e-13
POINTS = 0.5


def preconditioned(kind: Any, **options: Any) -> Build:
    """Return what builds a named optimizer of wellcond with whole second moments and intervals that suit the run."""
    return lambda model, lr, steps: kind(
        model, lr=lr, momentum=0.9, second_moment="dense", **wellcond.optim.intervals(steps), **options
    )


METHODS: dict[str, Build] = {
    "SGDM": lambda model, lr, steps: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "FSGD": preconditioned(wellcond.optim.FSGD),
    "FSGD, damping 1e-3 relative": preconditioned(wellcond.optim.FSGD, damping=1e-3, damping_mode="relative"),
    "W-SGDM": preconditioned(wellcond.optim.WSGDM),
    "AdamW": lambda model, lr, steps: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
    "Muon": lambda model, lr, steps: torch.optim.Muon(model.parameters(), lr=lr, weight_decay=0.0),
}
LBFGS, SCIKIT = "LBFGS (torch)", "LogisticRegression (scikit-learn)"


@dataclass
class Problem:
    """One seed's features and labels, and the minimum.

    Attributes:
        train: Features [n, d], the last of them 1, and labels.
        val: Likewise, to choose rates with.
        test: Likewise, to measure.
        classes: How many.
        penalty: λ.
        minimum: The least loss known.
        condition: Of the training features' second moment: its largest eigenvalue over the smallest, over the median,
            of those above 1e-13 times the largest.
        rank: Its effective rank (Σλ)² / Σλ².
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int
    penalty: float
    minimum: float = math.inf
    condition: tuple[float, float] = (math.inf, math.inf)
    rank: float = 0.0

    def loss(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """Return cross-entropy and penalty."""
        return F.cross_entropy(logits, labels) + self.penalty / 2 * weight.square().sum()

    def whole_loss(self, weight: Tensor) -> Tensor:
        """Return the loss of all images that train, in the weight's precision."""
        features, labels = self.train
        return self.loss(features.to(weight.dtype) @ weight.mT, labels, weight)

    def is_close(self, loss: float) -> bool:
        """Whether a loss is within 1 % of the minimum."""
        return loss <= CLOSE * self.minimum

    def head(self) -> nn.Linear:
        """Return a head of zero weights."""
        head = nn.Linear(self.train[0].shape[1], self.classes, bias=False)
        nn.init.zeros_(head.weight)
        return head

    def scores(self, weight: Tensor) -> dict[str, float]:
        """Return the accuracies in percent and the training loss."""
        found = {"loss": self.whole_loss(weight).item()}
        for name, (features, labels) in (("val", self.val), ("test", self.test)):
            found[name] = 100 * (features @ weight.mT).argmax(1).eq(labels).float().mean().item()
        return found


def features_of(images: Tensor, filters: Tensor, cells: int) -> Tensor:
    """Return the averages of rectified filter responses over cells of an image, and the constant 1.

    Args:
        images: Pixels from 0 to 1.
        filters: Shape [filters, channels, 5, 5].
        cells: The averages' grid is so many cells high and wide.
    """
    maps = F.relu(F.conv2d(images, filters, padding=2))
    found = F.adaptive_avg_pool2d(maps, cells).flatten(1)
    return torch.cat([found, torch.ones(len(found), 1)], dim=1)


def problem_of(data: ImageData, given: argparse.Namespace, seed: int) -> Problem:
    """Return a seed's problem, with its minimum found."""
    split = draw_split(data.pool.labels, given.train_images, given.val_images, seed)
    generator = torch.Generator().manual_seed(seed)
    filters = torch.randn(given.filters, data.channels, 5, 5, generator=generator) / math.sqrt(25 * data.channels)

    white = float(data.pool.images.max())

    def part(images: LabelledImages) -> tuple[Tensor, Tensor]:
        return features_of(images.images.float() / white, filters, given.cells), torch.from_numpy(images.labels)

    train, val = part(data.pool.take(split.train)), part(data.pool.take(split.validation))
    problem = Problem(train, val, part(data.test), len(data.pool.classes), given.penalty)
    wide = train[0].double()
    values = torch.linalg.eigvalsh(wide.mT @ wide / len(wide))
    values = values[values > SINGULAR * values[-1]]
    problem.condition = float(values[-1] / values[0]), float(values[-1] / values.median())
    problem.rank = float(values.sum().square() / values.square().sum())
    problem.minimum = minimum(problem)
    return problem


def lbfgs(problem: Problem, weight: Tensor, seen: Callable[[float], None] = lambda loss: None, **options: Any) -> None:
    """Minimize by torch's LBFGS with line search, and show every loss that it evaluates."""
    solver = torch.optim.LBFGS([weight], history_size=50, line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        solver.zero_grad()
        loss = problem.whole_loss(weight)
        loss.backward()
        seen(loss.item())
        return loss

    solver.step(closure)


def minimum(problem: Problem) -> float:
    """Return the least loss, in float64, where the gradient's largest entry is below 1e-9 or nothing moves any more."""
    weight = problem.head().double().weight
    lbfgs(problem, weight, max_iter=20_000, max_eval=40_000, tolerance_grad=1e-9, tolerance_change=1e-16)
    return problem.whole_loss(weight.detach()).item()


def descended(problem: Problem, build: Build, lr: float, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """Train by minibatches, and return accuracies, the loss, and when it came close to the minimum."""
    head, (features, labels) = problem.head(), problem.train
    per_epoch = len(features) // given.batch
    steps = given.epochs * per_epoch
    optimizer = build(head, lr, steps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    seconds, epochs_taken, seconds_taken = 0.0, math.inf, math.inf
    for epoch in range(1, given.epochs + 1):
        start = time.process_time()
        for rows in torch.randperm(len(features), generator=order).split(given.batch)[:per_epoch]:
            optimizer.zero_grad()
            problem.loss(head(features[rows]), labels[rows], head.weight).backward()
            optimizer.step()
            schedule.step()
        seconds += time.process_time() - start
        if epochs_taken == math.inf and problem.is_close(problem.whole_loss(head.weight.detach()).item()):
            epochs_taken, seconds_taken = epoch, seconds
    return {**problem.scores(head.weight.detach()), "epochs": epochs_taken, "seconds": seconds_taken}


def solved(problem: Problem) -> dict[str, float]:
    """Solve by torch's LBFGS; an epoch is one evaluation of the loss and its gradient."""
    weight = problem.head().weight
    losses: list[tuple[float, float]] = []
    start = time.process_time()
    lbfgs(problem, weight, lambda loss: losses.append((loss, time.process_time() - start)), max_iter=1000)
    arrived = next((index for index, (loss, _) in enumerate(losses) if problem.is_close(loss)), None)
    taken = (math.inf, math.inf) if arrived is None else (arrived + 1, losses[arrived][1])
    return {**problem.scores(weight.detach()), "epochs": taken[0], "seconds": taken[1]}


def solved_by_scikit(problem: Problem) -> dict[str, float]:
    """Solve by scikit-learn's LBFGS, with twice as many iterations each time until its loss is close.

    Its objective is ours divided by λ. Epochs are its iterations, of one evaluation or more each; seconds those of the
    first call that was close, accuracies those of the last, which goes on until it stops by itself.
    """
    features, labels = (part.numpy() for part in problem.train)
    arrived = math.inf, math.inf
    for iterations in (2**power for power in range(15)):
        solver = LogisticRegression(
            C=1 / (len(features) * problem.penalty), fit_intercept=False, tol=1e-5, max_iter=iterations
        )
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterations that were not enough
            solver.fit(features, labels)
        seconds = time.process_time() - start
        weight = torch.from_numpy(np.asarray(solver.coef_)).float()
        scores, taken = problem.scores(weight), int(np.max(solver.n_iter_))
        if arrived[0] == math.inf and problem.is_close(scores["loss"]):
            arrived = taken, seconds
        if taken < iterations:
            break
    return {**scores, "epochs": arrived[0], "seconds": arrived[1]}


def summary(found: dict[str, dict[str, list[dict[str, float]]]], epochs: int) -> dict[str, Any]:
    """Return the table: a row a method, its good rates, the rate chosen on validation, and when it came close.

    Args:
        found: By method and rate ("" for solvers, which have none) what each seed gave.
        epochs: Of the first-order methods, at most.
    """

    def mean(runs: list[dict[str, float]], key: str) -> float:
        return fmean(run[key] for run in runs)

    chosen = {name: max(rates, key=lambda rate: mean(rates[rate], "val")) for name, rates in found.items()}
    best = max(found, key=lambda name: mean(found[name][chosen[name]], "val"))
    least = mean(found[best][chosen[best]], "test") - POINTS
    rows = []
    for name, rates in found.items():
        good = [rate for rate, runs in rates.items() if mean(runs, "test") >= least]
        runs = rates[chosen[name]]
        count = f"{len(good)} of {len(rates)}" + (f" ({good[0]} to {good[-1]})" if good else "")
        cells = [name, count if len(rates) > 1 else f"has none; it is{'' if good else ' not'} within"]
        edge = chosen[name] in (next(iter(rates)), list(rates)[-1]) and len(rates) > 1
        cells += [_spread([run["test"] for run in runs], 1), chosen[name] + (" (edge)" if edge else "")]
        # The rate at which most seeds get there, and the soonest.
        soonest = min(rates, key=lambda rate: (-_arrivals(rates[rate]), median(run["epochs"] for run in rates[rate])))
        there = [run for run in rates[soonest] if run["epochs"] < math.inf]
        if there:
            few = "" if len(there) == len(rates[soonest]) else f" ({len(there)} of {len(rates[soonest])} seeds)"
            at = f", {soonest}" if soonest else ""
            cells += [f"{_spread([run['epochs'] for run in there], 1)}{few}{at}"]
            cells += [f"{median(run['seconds'] for run in there):.2f}"]
        else:
            nearest = min(median(run["excess"] for run in own) for own in rates.values())
            cells += [f"never; {100 * nearest:.1f} % above after {epochs}", ""]
        rows.append(cells)
    heads = ["method", f"rates within {POINTS} points", "test accuracy, %", "its rate"]
    return {"title": "", "heads": [*heads, "epochs to 1 %, at rate", "seconds to 1 %, median"], "rows": rows}


def _arrivals(runs: list[dict[str, float]]) -> int:
    return sum(run["epochs"] < math.inf for run in runs)


def _spread(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--image-size", type=int, help="default: 8 for digits, 16 for others")
    parser.add_argument("--train-images", type=int, default=1000)
    parser.add_argument("--val-images", type=int, default=300)
    parser.add_argument("--filters", type=int, default=16)
    parser.add_argument("--cells", type=int, default=4, help="the averages' grid is so many cells high and wide")
    parser.add_argument("--penalty", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=int, default=len(RATES), help="how many of the grid, from its upper end")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args()
    size = given.image_size or (8 if given.data == "digits" else 16)
    data = load_data(given.data, size, None, given.train_images)
    found: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in (*METHODS, LBFGS, SCIKIT)}
    conditions, ranks = [], []
    for seed in range(given.seeds):
        problem = problem_of(data, given, seed)
        conditions.append(problem.condition)
        ranks.append(problem.rank)
        print(f"seed {seed}: minimum {problem.minimum:.5f}, condition {problem.condition[0]:.3g}", flush=True)
        runs = [(name, f"{lr:.2g}", descended(problem, build, lr, given, seed)) for name, build, lr in _trials(given)]
        runs += [(LBFGS, "", solved(problem)), (SCIKIT, "", solved_by_scikit(problem))]
        for name, rate, run in runs:
            run["excess"] = run.pop("loss") / problem.minimum - 1
            found[name].setdefault(rate, []).append({key: round(value, 5) for key, value in run.items()})
    table = summary(found, given.epochs)
    width = given.filters * given.cells**2 + 1
    about = (
        f"{title_of(given.data, data)}, {given.train_images} training images of {size}x{size}: {width} random "
        f"features, condition number of their second moment {_range([c for c, _ in conditions])} (largest eigenvalue "
        f"over the median: {_range([c for _, c in conditions])}; effective rank {fmean(ranks):.1f}), "
        f"λ = {given.penalty:g}, batch {given.batch}, at most {given.epochs} epochs; {given.seeds} seeds, mean ± std. "
        f"scikit-learn {sklearn.__version__}, wellcond {wellcond.__version__}."
    )
    print(about, *(" | ".join(row) for row in (table["heads"], *table["rows"])), sep="\n")
    figures = {"about": about, "tables": [table], "results": found}
    write(given.json, setting(given, torch.device("cpu")) | figures)


def _trials(given: argparse.Namespace) -> Iterable[tuple[str, Build, float]]:
    return ((name, build, lr) for name, build in METHODS.items() for lr in RATES[-given.rates :])


def _range(values: list[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}"


if __name__ == "__main__":
    main()
