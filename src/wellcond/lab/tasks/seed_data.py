"""One seed of a task on one rank's device: its epochs, its loss, and its evaluation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from wellcond.lab.data.epochs import Epochs
from wellcond.lab.data.randomness import Strand, seeded
from wellcond.lab.errors import DataError
from wellcond.lab.runs.metric import Metric
from wellcond.lab.runs.stopwatch import Stopwatch
from wellcond.lab.tasks.batch_parts import Share, on_device, rows_of, shared
from wellcond.lab.tasks.evaluation import ROLES, Evaluation, Role
from wellcond.runtime.ranks import Ranks

LOSS = "loss"
"""What scores call the loss of evaluation, if they give one."""


class SeedData(Protocol):
    """One seed's data on one rank's device.

    Attributes:
        roles: What can be evaluated: ``("test",)`` where nothing validates, else both.
    """

    roles: tuple[Role, ...] = ROLES

    def batches(self) -> Epochs[Any]:
        """Return the training batches from the first epoch on: this rank's share of each global batch."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss of a batch, a scalar with its graph."""

    def train_score(self, output: Any, batch: Any) -> Tensor | None:
        """Return what the task's score of a training batch is made of, from what the loss has computed anyway.

        Args:
            output: What the network's last forward pass in `loss` returned.
            batch: The batch.

        Returns:
            Float64, [2], on the device: a sum over this rank's samples, and their number. The epoch's score is the
            quotient of both, each summed over steps and ranks. None where training batches have no such score.
        """
        return None

    def stop(self, scores: list[float]) -> bool:
        """Return whether the run ends after these scores on the validation split, one an epoch."""
        return False

    def is_sound(self, model: nn.Module) -> bool:
        """Return whether a network whose scores are not numbers is none that diverged; False where nobody can say."""
        return False

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return what the network scores; the same on every rank.

        Args:
            model: The network, in evaluation mode; called under ``torch.no_grad``.
            role: The samples.
            stopwatch: Runs in forward passes only.
        """


class Scored(Protocol):
    """The part of a task that a seed's data are made of."""

    @property
    def metric(self) -> Metric:
        """The score that counts."""

    @property
    def splits(self) -> tuple[Role, ...]:
        """What can be evaluated."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""

    @property
    def batches(self) -> Callable[..., Iterable[Any]]:
        """Returns an epoch's batches."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch."""

    def train_score(self, output: Any, batch: Any) -> Tensor | float | None:
        """Return the score of a batch; None without one."""

    def scores(self, model: nn.Module, split: Any) -> Mapping[str, float]:
        """Return the scores on a split."""

    def stop(self, scores: list[float]) -> bool:
        """Return whether a run ends now."""


class TaskSeed(SeedData):
    """One seed of a task that says what it is by its four methods alone.

    The global generators of Python, numpy and torch are seeded by seed and epoch while batches are made and while the
    network is scored, and left as they were: what is drawn there is the same for every method and after a resume.

    Args:
        task: The task.
        seed: The seed.
        device: Where the batches go.
        rank: Which process of the run this is.
        ranks: How many processes the run has.
    """

    def __init__(self, task: Scored, seed: int, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.task, self.seed, self.device = task, seed, device
        self.rank, self.ranks = rank, ranks
        self.roles = tuple(role for role in ROLES if role in task.splits)

    def batches(self) -> Epochs[Any]:
        """Return the training batches."""
        return Epochs(self.epoch_batches, self.task.steps_per_epoch)

    def epoch_batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Yield an epoch's batches on the device, this rank's share of each.

        Args:
            epoch: Its number.
            first: How many to leave out.

        Raises:
            DataError: If the epoch has not as many batches as others, or one cannot be shared.
        """
        expected, number = self.task.steps_per_epoch, first if "skip" in self._taken else 0
        for batch in self._given(epoch, first):
            number += 1
            if number > expected:
                break
            if number > first:
                yield on_device(batch, self.device)
        if number != expected:
            how_many = f"more than {expected}" if number > expected else str(number)
            raise DataError(
                f"batches(seed={self.seed}, epoch={epoch}) gives {how_many} batches, and the first epoch of seed 0 "
                f"{expected}: every epoch must have equally many"
            )

    @cached_property
    def _taken(self) -> frozenset[str]:
        """The arguments beside seed and epoch that the task's `batches` takes."""
        parameters = inspect.signature(self.task.batches).parameters
        return frozenset({"skip", "rank", "ranks"} & set(parameters))

    def _given(self, epoch: int, first: int) -> Iterator[Any]:
        more = {name: value for name, value in self._options(first).items() if name in self._taken}
        strand = Strand(f"batches of epoch {epoch}", self.seed, self.device)
        with strand.drawn():
            iterator = iter(self.task.batches(self.seed, epoch, **more))
        own = "rank" in self._taken
        while True:
            with strand.drawn():
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch if own else shared(batch, self.rank, self.ranks)

    def _options(self, first: int) -> dict[str, int]:
        return {"skip": first, "rank": self.rank, "ranks": self.ranks}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss of a batch."""
        if isinstance(batch, Share):
            return self.task.loss(model, batch.batch) * batch.weight
        return self.task.loss(model, batch)

    def train_score(self, output: Any, batch: Any) -> Tensor | None:
        """Return a batch's score, weighted by its rows."""
        own = batch.batch if isinstance(batch, Share) else batch
        score = self.task.train_score(output, own)
        if score is None:
            return None
        rows = max(1, rows_of(own))
        mean = torch.as_tensor(score, dtype=torch.float64, device=self.device).detach()
        if mean.dim():
            raise DataError(f"train_score must return one number, got a tensor of shape {list(mean.shape)}")
        return torch.stack([rows * mean, torch.full_like(mean, rows)])

    def stop(self, scores: list[float]) -> bool:
        """Return whether the run ends after these scores."""
        return bool(self.task.stop(scores))

    def is_sound(self, model: nn.Module) -> bool:
        """Return whether weights, buffers and the loss of a training batch are finite."""
        values = [*model.parameters(), *model.buffers()]
        finite = all(bool(value.isfinite().all()) for value in values if value.is_floating_point())
        with torch.no_grad():
            loss = self.loss(model, next(iter(self.batches())))
        return finite and bool(loss.isfinite())

    def evaluate(self, model: nn.Module, role: Role, stopwatch: Stopwatch) -> Evaluation:
        """Return what the network scores; of several ranks the first one's figures count."""
        whole = Stopwatch(self.device)
        with seeded(f"scores of {role}", self.seed, self.device), ForwardPasses(model, stopwatch) as passes:
            whole.start()
            given = self.task.scores(model, role)
            whole.stop()
        if not passes.count:  # called otherwise than as a whole
            stopwatch.seconds += whole.seconds
        figures: dict[str, float] = Ranks(self.ranks > 1).gather_objects(read_scores(given, self.task.metric, role))[0]
        name = self.task.metric.name
        score = figures.pop(name)
        loss = score if name == LOSS else figures.pop(LOSS, None)
        return Evaluation(score, loss, max(1, passes.samples), figures)


class ForwardPasses:
    """Times a network's forward passes in a block, and counts their samples.

    Args:
        model: The network.
        stopwatch: Runs in them.
    """

    def __init__(self, model: nn.Module, stopwatch: Stopwatch) -> None:
        self.model, self.stopwatch = model, stopwatch
        self.count = self.samples = 0
        self._within = 0

    def __enter__(self) -> ForwardPasses:
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, arguments: Any, options: Any) -> None:
        self._within += 1
        if self._within == 1:
            self.count += 1
            self.samples += rows_of((arguments, options))
            self.stopwatch.start()

    def _end(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._within -= 1
        if self._within == 0:
            self.stopwatch.stop()


def read_scores(given: Any, metric: Metric, role: str) -> dict[str, float]:
    """Return a task's scores as numbers.

    Args:
        given: What `Task.scores` returned.
        metric: The score that counts.
        role: Of which samples.

    Raises:
        DataError: If it is no mapping, a score is no number, or the one that counts is missing or off its scale.

    >>> read_scores({"accuracy": torch.tensor(90.0)}, Metric("accuracy"), "test")
    {'accuracy': 90.0}
    """
    if not isinstance(given, Mapping):
        raise DataError(f"scores() must return numbers by name, got {type(given).__name__}")
    figures = {}
    for name, value in given.items():
        try:
            figures[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(f"scores(): {name} must be a number, got {type(value).__name__}") from None
    if metric.name not in figures:
        found = ", ".join(figures) or "none"
        raise DataError(f"scores() must give the metric {metric.name!r} of the {role} split, got {found}")
    score = figures[metric.name]
    low, high = metric.span
    if math.isfinite(score) and not low <= score <= high:
        raise DataError(
            f"scores() gave {metric.name} = {score:g}, and a percentage is from 0 to 100: give another unit, such as "
            f"Metric({metric.name!r}, unit='')"
        )
    return figures
