"""Losses and scores of networks on rows of tensors, summed over pieces and ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.tasks.base import Evaluation
from wellcond.lab.tasks.classification import batch_accuracy

_TOP = 5


class Objective(Protocol):
    """A loss, and the scores that go with it."""

    @property
    def metric(self) -> Metric:
        """The score that counts."""

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""

    def train_score(self, output: Tensor, targets: Tensor) -> Tensor | None:
        """Return what `SeedData.train_score` does."""

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return what the scores are made of, float64, [k]: to be added up over pieces and ranks."""

    def evaluation(self, sums: list[float], rows: int) -> Evaluation:
        """Return the scores of so many rows."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; accuracy, also among the five highest logits if there are more classes.

    Attributes:
        classes: How many there are to tell apart.
        smoothing: Share of the target that is spread over all classes, in training.
    """

    classes: int
    smoothing: float = 0.0
    metric = ACCURACY

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits [n, classes]."""
        return F.cross_entropy(output, targets, label_smoothing=self.smoothing)

    def train_score(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return how many are right."""
        return batch_accuracy(output, targets)

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses, and how many are right, and among the first."""
        logits = output.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        first = logits.argmax(1) == targets
        among = logits.topk(min(_TOP, self.classes), dim=1).indices == targets[:, None]
        return torch.stack([loss.double(), first.sum().double(), among.sum().double()])

    def evaluation(self, sums: list[float], rows: int) -> Evaluation:
        """Return accuracy and mean cross-entropy."""
        loss, first, among = sums
        metrics = {f"top-{_TOP}": 100.0 * among / rows} if self.classes > _TOP else {}
        return Evaluation(100.0 * first / rows, loss / rows, rows, metrics)


@dataclass(frozen=True)
class Regression:
    """Squared error of the standardized target; root mean squared error in its own unit, and R².

    Attributes:
        mean: Of the target, of the rows that train.
        std: Its standard deviation there.
        worst: What the mean of all rows that do not test would score on those that do.
    """

    mean: float
    std: float
    worst: float

    @property
    def metric(self) -> Metric:
        """The score that counts."""
        return Metric("RMSE", unit="", higher_is_better=False, worst=self.worst)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return half the mean squared error of outputs [n, 1], in standard deviations of the target.

        Half of it has the gradients that learning rates of classification suit.
        """
        return 0.5 * F.mse_loss(output.squeeze(1), self._standardized(targets, output))

    def train_score(self, output: Tensor, targets: Tensor) -> None:
        """Return None: the loss says it."""

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the squared errors, and the first two powers of the targets."""
        wanted = (targets.double() - self.mean) / self.std
        errors = output.squeeze(1).double() - wanted
        return torch.stack([errors.square().sum(), wanted.sum(), wanted.square().sum()])

    def evaluation(self, sums: list[float], rows: int) -> Evaluation:
        """Return the root mean squared error; R² is undefined, and left out, where the targets are all equal."""
        squares, first, second = sums
        spread = second - first**2 / rows
        metrics = {"R2": 1.0 - squares / spread} if spread > 1e-12 * max(second, 1.0) else {}
        return Evaluation(self.std * math.sqrt(squares / rows), 0.5 * squares / rows, rows, metrics)

    def _standardized(self, targets: Tensor, like: Tensor) -> Tensor:
        return ((targets - self.mean) / self.std).to(like.dtype)


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token; bits for each, and how many are guessed.

    Attributes:
        tokens: How many there are to tell apart.
        level: What a token is: ``"character"`` or ``"byte"``.
    """

    tokens: int
    level: str

    @property
    def metric(self) -> Metric:
        """The score that counts; a run that diverged counts as guessing."""
        return Metric(f"bits per {self.level}", unit="bits", higher_is_better=False, worst=math.log2(self.tokens))

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of logits [n, positions, tokens]."""
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    def train_score(self, output: Tensor, targets: Tensor) -> None:
        """Return None: the loss says it, and to compute it again would take time."""

    def sums(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the losses, how many are right, and how many there are."""
        logits, wanted = output.flatten(0, 1).float(), targets.flatten()
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        right = (logits.argmax(1) == wanted).sum()
        return torch.stack([loss.double(), right.double(), torch.full_like(right, len(wanted)).double()])

    def evaluation(self, sums: list[float], rows: int) -> Evaluation:
        """Return bits per token, the loss in nats, and the share of tokens that have the highest logit."""
        loss, right, counted = sums
        return Evaluation(loss / counted / math.log(2.0), loss / counted, rows, {"accuracy": 100.0 * right / counted})
