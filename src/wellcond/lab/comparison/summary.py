"""A comparison in numbers: what the table, the report and results.json all show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from wellcond.lab.comparison.compare import Comparison, MethodRuns, TimedRuns
from wellcond.lab.comparison.statistics import Difference, Spread, epochs_to, paired_difference, spread
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.records import Coverage, RunRecord
from wellcond.lab.trials import Trial


@dataclass(frozen=True)
class GridPoint:
    """One lr of a method's grid: means over the seeds.

    Attributes:
        lr: The lr.
        validation_score: After the last epoch, in percent: what the choice goes by first (see `choose_lr`). None if
            a run diverged.
        validation_loss: After the last epoch: what decides a tie. None if a run diverged, or evaluation has no loss.
        early_test_score: After the early epoch, in percent: shows whether an early gain hangs on the choice.
        diverged_runs: Runs that ended with a NaN or infinite loss.
    """

    lr: float
    validation_score: float | None
    validation_loss: float | None
    early_test_score: float | None
    diverged_runs: int


@dataclass(frozen=True)
class EqualTime:
    """A method in its baseline's wall time: its steps, its test score, and the difference to the baseline."""

    steps: int
    score: Spread
    difference: Difference
    others: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """One seed's run at the chosen lr, one number an epoch; scores and metrics (of the test images) in percent."""

    seed: int
    seconds: tuple[float, ...]
    train_loss: tuple[float, ...]
    validation_score: tuple[float, ...]
    validation_loss: tuple[float | None, ...]
    test_score: tuple[float, ...]
    test_loss: tuple[float | None, ...]
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodSummary:
    """What one method gained and cost.

    Attributes:
        name: The method.
        description: What it is.
        baseline: What the differences and the time ratio are against; its own name for a baseline.
        lr: The lr chosen on validation.
        lr_edge: ``"lowest"`` or ``"highest"`` if that is the end of the grid, otherwise None.
        lr_grid: What it was chosen from.
        scores: Test score after the epochs that the table shows, by epoch.
        epochs_to_target: Mean epochs to the target over the seeds that reached it; None if none did.
        reached_target: How many seeds reached it.
        early_difference: Paired difference after the early epoch; None for a baseline or without an early epoch.
        final_difference: Paired difference after the last epoch; None for a baseline.
        milliseconds_per_step: Median over all runs; None if every run diverged at once.
        time_ratio: Time per step over the baseline's.
        evaluation_ratio: Time to evaluate an image over the baseline's; None where it is the same network: for a
            baseline, and for a method with its baseline's layers.
        equal_time: The method at equal wall time; None for a baseline.
        diverged_runs: Runs, of all lrs and budgets, that ended with a NaN or infinite loss.
        warnings: What the transforms and layers warned of.
        curves: The runs at the chosen lr.
        transforms: Names of its transforms.
        norm: Kind of its normalization layers; None for batch normalization.
        layers: What it does to convolutions; None for nothing.
        recipe: What it trains with, as it would be written.
        extras: What the layers of these runs have learned: from a kind of `EXTRAS` to each seed's, None for a run that
            has none.
        seconds_per_epoch: Median seconds of the steps of a whole epoch; None if every run diverged at once.
        memory: The bytes that training takes (see `measure_memory`); None where they were not counted.
        memory_ratio: Its peak over the baseline's.
        coverage: What each transform does with each parameter and keeps for it, by transform.
    """

    name: str
    description: str
    baseline: str
    lr: float
    lr_edge: str | None
    lr_grid: tuple[GridPoint, ...]
    scores: dict[int, Spread]
    epochs_to_target: float | None
    reached_target: int
    early_difference: Difference | None
    final_difference: Difference | None
    milliseconds_per_step: float | None
    time_ratio: float | None
    evaluation_ratio: float | None
    equal_time: EqualTime | None
    diverged_runs: int
    warnings: tuple[str, ...]
    curves: tuple[Curve, ...]
    extras: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    transforms: tuple[str, ...] = ()
    norm: str | None = None
    layers: str | None = None
    recipe: str = ""
    seconds_per_epoch: float | None = None
    memory: Memory | None = None
    memory_ratio: float | None = None
    coverage: dict[str, Coverage] = field(default_factory=dict)

    @property
    def is_baseline(self) -> bool:
        """Whether it is measured against itself."""
        return self.name == self.baseline


@dataclass(frozen=True)
class Summary:
    """A comparison in numbers.

    Attributes:
        score: What the score is called.
        seeds: How many paired seeds.
        epochs: Epochs of a run.
        steps: Steps of a run.
        shown_epochs: The epochs that the table shows.
        early_epoch: The epoch of the early difference; None for runs of one epoch.
        target: The test score to which epochs are counted.
        chance: The score of guessing.
        jobs: Runs at the same time.
        ghost_batch: Images of the groups that batch statistics were taken over in training; None for the whole batch.
        methods: In the order of the comparison.
        machines: What executed the runs: one, or several of a cluster.
    """

    score: str
    seeds: int
    epochs: int
    steps: int
    shown_epochs: tuple[int, ...]
    early_epoch: int | None
    target: float
    chance: float
    jobs: int
    ghost_batch: int | None
    methods: tuple[MethodSummary, ...]
    machines: tuple[str, ...] = ()

    @property
    def compares_evaluation(self) -> bool:
        """Whether some method evaluates with other layers than its baseline."""
        return any(method.evaluation_ratio is not None for method in self.methods)

    def families(self) -> dict[str, tuple[MethodSummary, ...]]:
        """Return, for each baseline, itself and the methods that are measured against it."""
        names = dict.fromkeys(method.baseline for method in self.methods)
        return {name: tuple(method for method in self.methods if method.baseline == name) for name in names}


def summarize(comparison: Comparison) -> Summary:
    """Return the comparison in numbers."""
    plan = comparison.plan
    last = plan.epochs
    early = None if last == 1 else min(2, last - 1)
    first = comparison.methods[plan.baselines[plan.methods[0].name]]
    # The baseline's own level, for data about which nothing is known beforehand.
    level = fmean(_scores(first.runs, last, plan.chance))
    target = plan.target if plan.target is not None else float(max(1, math.floor(level)))
    shown = tuple(sorted({min(epoch, last) for epoch in (1, 2, 3, last)}))
    return Summary(
        score=plan.task.score,
        seeds=plan.settings.seeds,
        epochs=last,
        steps=plan.steps,
        shown_epochs=shown,
        early_epoch=early,
        target=target,
        chance=plan.chance,
        jobs=plan.settings.jobs,
        ghost_batch=plan.settings.ghost_batch,
        methods=tuple(
            _summarize_method(comparison, found, shown, early, target) for found in comparison.methods.values()
        ),
        machines=tuple(sorted({record.machine for record in comparison.records.values()} - {""})),
    )


def _summarize_method(
    comparison: Comparison, found: MethodRuns, shown: tuple[int, ...], early: int | None, target: float
) -> MethodSummary:
    plan, method, baseline = comparison.plan, found.method, comparison.methods[found.baseline]
    is_baseline = found is baseline

    def difference(epoch: int | None) -> Difference | None:
        if is_baseline or epoch is None:
            return None
        return paired_difference(*(_scores(each.runs, epoch, plan.chance) for each in (found, baseline)))

    reached = [
        epoch
        for run in found.runs
        if (epoch := epochs_to([record.test_score for record in run.epochs], target)) is not None
    ]
    times = [time for run in found.all_runs if (time := run.seconds_per_step) is not None]
    equal = found.timed.get(1.0)
    every = [*found.all_runs, *(equal.runs if equal is not None and equal.steps != plan.steps else ())]
    lr, lrs = found.chosen.lr, [trial.lr for trial in found.trials]
    edges = {min(lrs): "lowest", max(lrs): "highest"} if len(set(lrs)) > 1 else {}
    same_network = (method.norm, method.layers) == (baseline.method.norm, baseline.method.layers)
    return MethodSummary(
        name=method.name,
        description=method.description,
        baseline=found.baseline,
        lr=lr,
        lr_edge=edges.get(lr),
        lr_grid=tuple(_grid_point(trial, runs, early, plan.chance) for trial, runs in found.trials.items()),
        scores={epoch: spread(_scores(found.runs, epoch, plan.chance)) for epoch in shown},
        epochs_to_target=fmean(reached) if reached else None,
        reached_target=len(reached),
        early_difference=difference(early),
        final_difference=difference(plan.epochs),
        milliseconds_per_step=1000 * median(times) if times else None,
        time_ratio=found.time_ratio,
        evaluation_ratio=None if same_network else found.evaluation_ratio,
        equal_time=None if equal is None else _equal_time(comparison, found, equal),
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
    )


def _scores(runs: Sequence[RunRecord], epoch: int, chance: float) -> list[float]:
    """Return the test score of each run after an epoch, counted from 1; after divergence that of guessing."""
    return [run.epochs[epoch - 1].test_score if epoch <= len(run.epochs) else chance for run in runs]


def _equal_time(comparison: Comparison, found: MethodRuns, timed: TimedRuns) -> EqualTime:
    plan, baseline = comparison.plan, comparison.methods[found.baseline]

    def ends(runs: Sequence[RunRecord]) -> list[float]:
        return [plan.chance if run.diverged else run.epochs[-1].test_score for run in runs]

    others = {
        other.method.name: paired_difference(ends(timed.runs), ends(other.timed[1.0].runs))
        for other in comparison.methods.values()
        if other not in (found, baseline) and other.baseline == found.baseline and 1.0 in other.timed
    }
    difference = paired_difference(ends(timed.runs), _scores(baseline.runs, plan.epochs, plan.chance))
    return EqualTime(timed.steps, spread(ends(timed.runs)), difference, others)


def _extras_of(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(kind for run in runs for kind in run.extras))


def _grid_point(trial: Trial, runs: Sequence[RunRecord], early: int | None, chance: float) -> GridPoint:
    early_score = None if early is None else fmean(_scores(runs, early, chance))
    diverged = sum(run.diverged for run in runs)
    if diverged:
        return GridPoint(trial.lr, None, None, early_score, diverged)
    last = [run.epochs[-1] for run in runs]
    score = fmean(epoch.validation_score for epoch in last)
    losses = [epoch.validation_loss for epoch in last if epoch.validation_loss is not None]
    return GridPoint(trial.lr, score, fmean(losses) if losses else None, early_score, 0)


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
    )
