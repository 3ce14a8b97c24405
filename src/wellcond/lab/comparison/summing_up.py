"""Sums a comparison's runs up: means, paired differences, what is reached when, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from wellcond.lab.comparison.choice import epochs_to
from wellcond.lab.comparison.compare import Comparison, MethodRuns, TimedRuns
from wellcond.lab.comparison.statistics import Difference, paired_difference, probability_within, spread
from wellcond.lab.comparison.summary import (
    LEVEL,
    AtShare,
    Curve,
    EqualTime,
    GridPoint,
    MethodSummary,
    Summary,
    ToTarget,
)
from wellcond.lab.plan import Plan
from wellcond.lab.runs.files import rounded
from wellcond.lab.runs.records import RunRecord
from wellcond.lab.trials import Trial


def summarize(comparison: Comparison) -> Summary:
    """Return the comparison in numbers, rounded once: files and tables hold the same ones."""
    plan, chance = comparison.plan, comparison.plan.task.chance
    last = plan.template.epochs
    early = None if last == 1 else min(2, last - 1)
    first = comparison.methods[plan.baselines[plan.methods[0].name]]
    target = _target(plan, fmean(_scores(first.runs, last, chance)))
    shown = tuple(sorted({min(epoch, last) for epoch in (1, 2, 3, last)}))
    summary = Summary(
        score=plan.task.metric.name,
        seeds=plan.settings.seeds,
        epochs=last,
        steps=plan.steps,
        shown_epochs=shown,
        early_epoch=early,
        target=target,
        chance=chance,
        jobs=plan.settings.jobs,
        ghost_batch=plan.settings.ghost_batch,
        methods=tuple(
            _summarize_method(comparison, found, shown, early, target, chance) for found in comparison.methods.values()
        ),
        machines=tuple(sorted({record.machine for record in comparison.records.values()} - {""})),
        metric=plan.task.metric,
        mode=plan.settings.mode,
        sweeps=dict(plan.settings.sweeps),
        chosen_on="validation" if "validation" in plan.task.splits else "test",
        samples=plan.task.samples,
    )
    whole: Summary = rounded(summary)
    return whole


def _target(plan: Plan, level: float) -> float:
    """Return the target, or the baseline's own level for data about which nothing is known beforehand."""
    if plan.target is not None:
        return plan.target
    if plan.task.metric.is_percentage and plan.task.metric.higher_is_better:
        return float(max(1, math.floor(level)))
    # Cut to two digits in the direction that is easier to reach.
    sign = plan.task.metric.sign
    step = 10.0 ** (math.floor(math.log10(abs(level))) - 1) if level else 1.0
    return float(f"{sign * math.floor(sign * level / step) * step:.6g}")


def _summarize_method(
    comparison: Comparison,
    found: MethodRuns,
    shown: tuple[int, ...],
    early: int | None,
    target: float,
    chance: float,
) -> MethodSummary:
    plan, method, baseline = comparison.plan, found.method, comparison.methods[found.baseline]
    is_baseline = found is baseline

    def difference(epoch: int | None) -> Difference | None:
        if is_baseline or epoch is None:
            return None
        mine, theirs = (_scores(each.runs, epoch, chance) for each in (found, baseline))
        return paired_difference(mine, theirs)

    reached = [
        epoch for run in found.runs if (epoch := epochs_to(run, plan.task.metric, target, "test_score")) is not None
    ]
    tried = [run for runs in found.trials.values() for run in runs]
    times = [time for run in tried if (time := run.seconds_per_step) is not None]
    equal = found.timed.get(1.0)
    shorter = [run for timed in found.timed.values() if timed.steps != plan.steps for run in timed.runs]
    every = [*tried, *shorter]
    lr, swept = found.chosen.lr, dict(found.chosen.swept)
    values = {name: [dict(trial.swept)[name] for trial in found.trials] for name in swept}
    same_network = (method.norm, method.layers) == (baseline.method.norm, baseline.method.layers)
    return MethodSummary(
        name=method.name,
        description=method.description,
        baseline=found.baseline,
        lr=lr,
        lr_edge=_edge(lr, [trial.lr for trial in found.trials]),
        lr_grid=tuple(
            _grid_point(trial, trial == found.chosen, runs[: plan.trial_seeds], early, chance)
            for trial, runs in found.trials.items()
        ),
        scores={epoch: spread(_scores(found.runs, epoch, chance)) for epoch in shown},
        epochs_to_target=fmean(reached) if reached else None,
        reached_target=len(reached),
        early_difference=difference(early),
        final_difference=difference(plan.template.epochs),
        milliseconds_per_step=1000 * median(times) if times else None,
        time_ratio=found.time_ratio,
        evaluation_ratio=None if same_network else found.evaluation_ratio,
        equal_time=None if equal is None else _equal_time(comparison, found, equal, chance),
        diverged_runs=sum(run.diverged for run in every),
        warnings=tuple(sorted({warning for run in every for warning in run.warnings})),
        curves=tuple(_curve(seed, run) for seed, run in enumerate(found.runs)),
        extras={kind: tuple(run.extras.get(kind) for run in found.runs) for kind in _extras_of(found.runs)},
        transforms=tuple(transform.name for transform in method.transforms),
        norm=None if method.norm is None else method.norm.kind,
        layers=method.layers,
        seconds_per_epoch=median(times) * plan.steps_per_epoch if times else None,
        memory=next((run.memory for run in found.runs), None),
        memory_ratio=found.memory_ratio,
        coverage=next((run.coverage for run in found.runs), {}),
        recipe=found.chosen.method.text(plan.settings.ghost_batch),
        swept=swept,
        edges={name: edge for name, value in swept.items() if (edge := _edge(value, values[name])) is not None},
        to_target=_to_target(found, plan, target, chance),
        shares=_shares(comparison, found, chance),
        unfinished=tuple(seed for seed, run in enumerate(found.runs) if run.diverged),
    )


def _edge(value: Any, grid: Sequence[Any]) -> str | None:
    """Return at which end of its grid a number lies, if it is one and the grid has more than one."""
    if len(set(grid)) < 2 or not all(isinstance(other, (int, float)) and not isinstance(other, bool) for other in grid):
        return None
    return {min(grid): "lowest", max(grid): "highest"}.get(value)


def _to_target(found: MethodRuns, plan: Plan, target: float, chance: float) -> ToTarget:
    last, p_value, sign = 0, None, plan.task.metric.sign
    for epoch in range(1, plan.template.epochs + 1):
        scores = _scores(found.runs, epoch, chance)
        p_value = probability_within([sign * score for score in scores], sign * target)
        if p_value is not None and p_value < LEVEL:
            last = epoch
            break
    if not last:
        return ToTarget(None, None, None, p_value)
    ends = [run.epochs[min(last, len(run.epochs)) - 1] for run in found.runs if run.epochs]
    return ToTarget(last, round(median(end.steps for end in ends)), median(end.seconds for end in ends), p_value)


def _shares(comparison: Comparison, found: MethodRuns, chance: float) -> tuple[AtShare, ...]:
    plan, baseline = comparison.plan, comparison.methods[found.baseline]
    full = _scores(baseline.runs, plan.template.epochs, chance)
    shares = []
    for share, timed in found.timed.items():
        ends = _ends(timed.runs, chance)
        beside = baseline.timed.get(share)
        same = None if found is baseline or beside is None else paired_difference(ends, _ends(beside.runs, chance))
        if share != 1.0:
            shares.append(AtShare(share, timed.steps, spread(ends), paired_difference(ends, full), same))
    return tuple(shares)


def _ends(runs: Sequence[RunRecord], chance: float) -> list[float]:
    """Return the last test score of each run."""
    return [chance if run.diverged else run.epochs[-1].test_score for run in runs]


def _scores(runs: Sequence[RunRecord], epoch: int, chance: float) -> list[float]:
    """Return the test score of each run after an epoch, counted from 1.

    After divergence it is that of guessing, after the end of a run that was stopped the last.
    """
    return [
        chance
        if epoch > len(run.epochs) and not run.stopped
        else run.epochs[min(epoch, len(run.epochs)) - 1].test_score
        for run in runs
    ]


def _equal_time(comparison: Comparison, found: MethodRuns, timed: TimedRuns, chance: float) -> EqualTime:
    plan, baseline = comparison.plan, comparison.methods[found.baseline]
    ends = _ends(timed.runs, chance)
    others = {
        other.method.name: paired_difference(ends, _ends(other.timed[1.0].runs, chance))
        for other in comparison.methods.values()
        if other.baseline == found.baseline and other is not found and other is not baseline and 1.0 in other.timed
    }
    difference = paired_difference(ends, _scores(baseline.runs, plan.template.epochs, chance))
    return EqualTime(timed.steps, spread(ends), difference, others)


def _extras_of(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(kind for run in runs for kind in run.extras))


def _grid_point(trial: Trial, chosen: bool, runs: Sequence[RunRecord], early: int | None, chance: float) -> GridPoint:
    last = [run.epochs[-1] for run in runs if not run.diverged]
    diverged = len(runs) - len(last)
    losses = [epoch.validation_loss for epoch in last if epoch.validation_loss is not None]
    return GridPoint(
        lr=trial.lr,
        validation_score=None if diverged else fmean(epoch.validation_score for epoch in last),
        validation_loss=None if diverged or not losses else fmean(losses),
        early_test_score=None if early is None else fmean(_scores(runs, early, chance)),
        diverged_runs=diverged,
        swept=dict(trial.swept),
        chosen=chosen,
    )


def _curve(seed: int, run: RunRecord) -> Curve:
    metrics = run.epochs[0].metrics if run.epochs else ()
    return Curve(
        seed=seed,
        seconds=tuple(epoch.seconds for epoch in run.epochs),
        train_loss=tuple(epoch.train_loss for epoch in run.epochs),
        validation_score=tuple(epoch.validation_score for epoch in run.epochs),
        validation_loss=tuple(epoch.validation_loss for epoch in run.epochs),
        test_score=tuple(epoch.test_score for epoch in run.epochs),
        test_loss=tuple(epoch.test_loss for epoch in run.epochs),
        metrics={name: tuple(epoch.metrics[name] for epoch in run.epochs) for name in metrics},
        train_score=tuple(epoch.train_score for epoch in run.epochs),
    )
