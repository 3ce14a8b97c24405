"""Chooses each method's trial from validation figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeVar

from wellcond.lab.comparison.statistics import spread
from wellcond.lab.runs.records import RunRecord

_Trial = TypeVar("_Trial")


def choose(trials: Mapping[_Trial, Sequence[RunRecord]]) -> _Trial:
    """Choose the trial whose final validation score is best; of several that cannot be told apart, the quickest.

    Where training ends on a plateau, the best of a few means is a coin flip, on which the curves before the end depend.
    So every trial whose validation score after the last epoch is within one standard error (of the differences, paired
    by seed) of the best stays in, and among these the best mean validation score over all epochs decides. A tie goes
    to the lower validation loss at the end if evaluation has one, then to the first in the grid. A trial with diverged
    runs loses to one with fewer.

    Args:
        trials: From each trial to its runs, one a seed, in the same order of seeds.

    Returns:
        The trial.
    """
    diverged = {trial: sum(run.diverged for run in runs) for trial, runs in trials.items()}
    steadiest = [trial for trial in trials if diverged[trial] == min(diverged.values())]
    if diverged[steadiest[0]]:
        return steadiest[0]
    final = {trial: [run.epochs[-1].validation_score for run in trials[trial]] for trial in steadiest}
    loss = {trial: _mean_loss(trials[trial]) for trial in steadiest}
    quickness = {trial: fmean(e.validation_score for run in trials[trial] for e in run.epochs) for trial in steadiest}
    best = max(steadiest, key=lambda trial: (fmean(final[trial]), -loss[trial]))
    as_good = [trial for trial in steadiest if _within_one_standard_error(final[best], final[trial])]
    return max(as_good, key=lambda trial: (quickness[trial], -loss[trial]))


def _within_one_standard_error(best: Sequence[float], other: Sequence[float]) -> bool:
    differences = spread([a - b for a, b in zip(best, other, strict=True)])
    error = 0.0 if differences.std is None else differences.std / math.sqrt(differences.count)
    return differences.mean <= error


def _mean_loss(records: Sequence[RunRecord]) -> float:
    """Return the mean validation loss after the last epoch; 0, which decides nothing, where evaluation has none."""
    losses = [loss for run in records if (loss := run.epochs[-1].validation_loss) is not None]
    return fmean(losses) if losses else 0.0
