"""Chooses each method's trial from validation figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, TypeVar

from wellcond.lab.comparison.statistics import spread
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.runs.records import RunRecord

_Trial = TypeVar("_Trial")


def choose(
    trials: Mapping[_Trial, Sequence[RunRecord]], metric: Metric = ACCURACY, target: float | None = None
) -> _Trial:
    """Choose the trial whose final validation score is best; of several that cannot be told apart, the quickest.

    Where training ends on a plateau, the best of a few means is a coin flip, on which the curves before the end depend.
    So every trial whose validation score after the last epoch is within one standard error (of the differences, paired
    by seed) of the best stays in, and among these the best mean validation score over all epochs decides. A tie goes
    to the lower validation loss at the end if evaluation has one, then to the first in the grid. A trial with diverged
    runs loses to one with fewer.

    With a target, the trials that reach it on validation with the most seeds stay in, and of these the ones that take
    the fewest epochs to it, on average.

    Args:
        trials: From each trial to its runs, one a seed, in the same order of seeds.
        metric: What the score is, and which direction is better.
        target: The score to reach; None to choose by the score at the end.

    Returns:
        The trial.
    """
    diverged = {trial: sum(run.diverged for run in runs) for trial, runs in trials.items()}
    steadiest = [trial for trial in trials if diverged[trial] == min(diverged.values())]
    if diverged[steadiest[0]]:
        return steadiest[0]
    if target is not None:
        steadiest = _quickest(trials, steadiest, metric, target)

    def scores(trial: _Trial) -> list[float]:
        return [metric.sign * run.epochs[-1].validation_score for run in trials[trial]]

    loss = {trial: _mean_loss(trials[trial]) for trial in steadiest}
    quickness = {
        trial: fmean(metric.sign * epoch.validation_score for run in trials[trial] for epoch in run.epochs)
        for trial in steadiest
    }
    best = max(steadiest, key=lambda trial: (fmean(scores(trial)), -loss[trial]))
    as_good = [trial for trial in steadiest if _within_one_standard_error(scores(best), scores(trial))]
    return max(as_good, key=lambda trial: (quickness[trial], -loss[trial]))


def _quickest(
    trials: Mapping[_Trial, Sequence[RunRecord]], candidates: Sequence[_Trial], metric: Metric, target: float
) -> list[_Trial]:
    """Return the trials that reach the target with the most seeds, and of these those that take the fewest epochs."""
    reached = {
        trial: [
            epoch for run in trials[trial] if (epoch := epochs_to(run, metric, target, "validation_score")) is not None
        ]
        for trial in candidates
    }
    order = {trial: (-len(epochs), fmean(epochs) if epochs else 0.0) for trial, epochs in reached.items()}
    return [trial for trial in candidates if order[trial] == min(order.values())]


def epochs_to(
    run: RunRecord, metric: Metric, target: float, score: Literal["validation_score", "test_score"]
) -> int | None:
    """Return the first epoch, counted from 1, whose score is the target or better; None if there is none.

    Args:
        run: The run.
        metric: Which direction is better.
        target: The score to reach.
        score: Which score.
    """
    sign = metric.sign
    values = (getattr(epoch, score) for epoch in run.epochs)
    return next((epoch for epoch, value in enumerate(values, start=1) if sign * value >= sign * target), None)


def _within_one_standard_error(best: Sequence[float], other: Sequence[float]) -> bool:
    differences = spread([a - b for a, b in zip(best, other, strict=True)])
    error = 0.0 if differences.std is None else differences.std / math.sqrt(differences.count)
    return differences.mean <= error


def _mean_loss(records: Sequence[RunRecord]) -> float:
    """Return the mean validation loss after the last epoch; 0, which decides nothing, where evaluation has none."""
    losses = [loss for run in records if (loss := run.epochs[-1].validation_loss) is not None]
    return fmean(losses) if losses else 0.0
