"""Chooses each method's lr from validation figures alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from wellcond.lab.comparison.statistics import spread
from wellcond.lab.runs.records import RunRecord


def choose_lr(runs: Mapping[float, Sequence[RunRecord]]) -> float:
    """Choose the lr whose final validation score is best; of several that cannot be told apart, the quickest.

    Where training ends on a plateau, the best of a few means is a coin flip, on which the curves before the end depend.
    So every lr whose validation score after the last epoch is within one standard error (of the differences, paired
    by seed) of the best stays in, and among these the best mean validation score over all epochs decides. A tie goes
    to the lower validation loss at the end if evaluation has one, then to the lower lr. An lr with diverged runs loses
    to one with fewer.

    Args:
        runs: From each lr to its runs, one a seed, in the same order of seeds.

    Returns:
        The lr.
    """
    diverged = {lr: sum(run.diverged for run in records) for lr, records in runs.items()}
    steadiest = sorted(lr for lr in runs if diverged[lr] == min(diverged.values()))
    if diverged[steadiest[0]]:
        return steadiest[0]
    final = {lr: [run.epochs[-1].validation_score for run in runs[lr]] for lr in steadiest}
    loss = {lr: _mean_loss(runs[lr]) for lr in steadiest}
    quickness = {lr: fmean(e.validation_score for run in runs[lr] for e in run.epochs) for lr in steadiest}
    best = max(steadiest, key=lambda lr: (fmean(final[lr]), -loss[lr]))
    as_good = [lr for lr in steadiest if _within_one_standard_error(final[best], final[lr])]
    return max(as_good, key=lambda lr: (quickness[lr], -loss[lr]))


def _within_one_standard_error(best: Sequence[float], other: Sequence[float]) -> bool:
    differences = spread([a - b for a, b in zip(best, other, strict=True)])
    error = 0.0 if differences.std is None else differences.std / math.sqrt(differences.count)
    return differences.mean <= error


def _mean_loss(records: Sequence[RunRecord]) -> float:
    """Return the mean validation loss after the last epoch; 0, which decides nothing, where evaluation has none."""
    losses = [loss for run in records if (loss := run.epochs[-1].validation_loss) is not None]
    return fmean(losses) if losses else 0.0
