"""A comparison in numbers: what the table, the report and results.json all show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from wellcond.lab.comparison.compare import Comparison
from wellcond.lab.comparison.statistics import Difference, Spread, epochs_to, paired_difference, spread
from wellcond.lab.methods.method import Method
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.records import Coverage, RunRecord


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
        chosen_on: The split that chooses the lr: ``"validation"``, or ``"test"`` where the task has no other.
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
    chosen_on: str = "validation"

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
    first = next(method for method in plan.methods if method.name == plan.baselines[plan.methods[0].name])
    finals = [run.test_score(last, plan.chance) for run in comparison.runs(first)]
    # The baseline's own level, for data about which nothing is known beforehand.
    target = plan.target if plan.target is not None else float(max(1, math.floor(fmean(finals))))
    shown = tuple(sorted({min(epoch, last) for epoch in (1, 2, 3, last)}))
    return Summary(
        score=plan.task.metric.name,
        seeds=plan.settings.seeds,
        epochs=last,
        steps=plan.steps,
        shown_epochs=shown,
        early_epoch=early,
        target=target,
        chance=plan.chance,
        jobs=plan.settings.jobs,
        ghost_batch=plan.settings.ghost_batch,
        methods=tuple(_summarize_method(comparison, method, shown, early, target) for method in plan.methods),
        machines=tuple(sorted({record.machine for record in comparison.records.values()} - {""})),
        chosen_on="validation" if "validation" in plan.task.splits else "test",
    )


def _summarize_method(
    comparison: Comparison, method: Method, shown: tuple[int, ...], early: int | None, target: float
) -> MethodSummary:
    plan = comparison.plan
    baseline = next(other for other in plan.methods if other.name == plan.baselines[method.name])
    runs, baseline_runs = comparison.runs(method), comparison.runs(baseline)

    def scores(some_runs: list[RunRecord], epoch: int) -> list[float]:
        return [run.test_score(epoch, plan.chance) for run in some_runs]

    def difference(epoch: int | None) -> Difference | None:
        if method is baseline or epoch is None:
            return None
        return paired_difference(scores(runs, epoch), scores(baseline_runs, epoch))

    equal_time = None
    equal_runs = _equal_runs(comparison, method)
    if equal_runs:
        ends = _ends(equal_runs, plan.chance)
        equal_time = EqualTime(
            comparison.equal_time_steps[method.name],
            spread(ends),
            paired_difference(ends, scores(baseline_runs, plan.epochs)),
            {
                other.name: paired_difference(ends, _ends(_equal_runs(comparison, other), plan.chance))
                for other in plan.methods
                if other not in (method, baseline) and plan.baselines[other.name] == baseline.name
            },
        )
    reached = [
        epoch for run in runs if (epoch := epochs_to([record.test_score for record in run.epochs], target)) is not None
    ]
    all_runs = [run for lr in method.lrs for run in comparison.runs(method, lr)]
    times = [time for run in all_runs if (time := run.seconds_per_step) is not None]
    extra = equal_runs if equal_time is not None and equal_time.steps != plan.steps else []
    lr = comparison.chosen[method.name]
    edges = {method.lrs[0]: "lowest", method.lrs[-1]: "highest"} if len(method.lrs) > 1 else {}
    same_network = (method.norm, method.layers) == (baseline.norm, baseline.layers)
    return MethodSummary(
        name=method.name,
        description=method.description,
        baseline=baseline.name,
        lr=lr,
        lr_edge=edges.get(lr),
        lr_grid=tuple(_grid_point(lr, comparison.runs(method, lr), early, plan.chance) for lr in method.lrs),
        scores={epoch: spread(scores(runs, epoch)) for epoch in shown},
        epochs_to_target=fmean(reached) if reached else None,
        reached_target=len(reached),
        early_difference=difference(early),
        final_difference=difference(plan.epochs),
        milliseconds_per_step=1000 * median(times) if times else None,
        time_ratio=comparison.time_ratios[method.name],
        evaluation_ratio=None if same_network else comparison.evaluation_ratios[method.name],
        equal_time=equal_time,
        diverged_runs=sum(run.diverged for run in (*all_runs, *extra)),
        warnings=tuple(sorted({warning for run in (*all_runs, *extra) for warning in run.warnings})),
        curves=tuple(_curve(seed, run) for seed, run in enumerate(runs)),
        extras={kind: tuple(run.extras.get(kind) for run in runs) for kind in _extras_of(runs)},
        transforms=tuple(transform.name for transform in method.transforms),
        norm=None if method.norm is None else method.norm.kind,
        layers=method.layers,
        seconds_per_epoch=median(times) * plan.steps_per_epoch if times else None,
        memory=next((run.memory for run in runs), None),
        memory_ratio=comparison.memory_ratios[method.name],
        coverage=next((run.coverage for run in runs), {}),
        recipe=method.text(plan.settings.ghost_batch),
    )


def _extras_of(runs: list[RunRecord]) -> list[str]:
    return list(dict.fromkeys(kind for run in runs for kind in run.extras))


def _equal_runs(comparison: Comparison, method: Method) -> list[RunRecord]:
    steps = comparison.equal_time_steps.get(method.name)
    return [] if steps is None else comparison.runs(method, steps=steps)


def _ends(runs: list[RunRecord], chance: float) -> list[float]:
    return [chance if run.diverged else run.epochs[-1].test_score for run in runs]


def _grid_point(lr: float, runs: list[RunRecord], early: int | None, chance: float) -> GridPoint:
    early_score = None if early is None else fmean(run.test_score(early, chance) for run in runs)
    diverged = sum(run.diverged for run in runs)
    if diverged:
        return GridPoint(lr, None, None, early_score, diverged)
    last = [run.epochs[-1] for run in runs]
    score = fmean(epoch.validation_score for epoch in last)
    losses = [epoch.validation_loss for epoch in last if epoch.validation_loss is not None]
    return GridPoint(lr, score, fmean(losses) if losses else None, early_score, 0)


def _metrics_of(run: RunRecord) -> list[str]:
    return list(run.epochs[0].metrics) if run.epochs else []


def _curve(seed: int, run: RunRecord) -> Curve:
    return Curve(
        seed=seed,
        seconds=tuple(epoch.seconds for epoch in run.epochs),
        train_loss=tuple(epoch.train_loss for epoch in run.epochs),
        validation_score=tuple(epoch.validation_score for epoch in run.epochs),
        validation_loss=tuple(epoch.validation_loss for epoch in run.epochs),
        test_score=tuple(epoch.test_score for epoch in run.epochs),
        test_loss=tuple(epoch.test_loss for epoch in run.epochs),
        metrics={name: tuple(epoch.metrics[name] for epoch in run.epochs) for name in _metrics_of(run)},
    )
