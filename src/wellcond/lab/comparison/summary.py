"""A comparison in numbers: what the table, the report and results.json all show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from wellcond.lab.comparison.choice import epochs_to
from wellcond.lab.comparison.compare import Comparison, MethodRuns, TimedRuns
from wellcond.lab.comparison.statistics import Difference, Spread, paired_difference, probability_within, spread
from wellcond.lab.plan import Plan
from wellcond.lab.runs.files import rounded
from wellcond.lab.runs.memory import Memory
from wellcond.lab.runs.metric import ACCURACY, Metric
from wellcond.lab.runs.records import Coverage, RunRecord
from wellcond.lab.trials import Trial

LEVEL = 0.01
"""The probability below which a mean counts as beyond the target, as speed-run boards have it."""


@dataclass(frozen=True)
class GridPoint:
    """One trial of a method's grid: means over the seeds.

    Attributes:
        lr: The lr.
        validation_score: After the last epoch: what the choice goes by first (see `choose`). None if a run diverged.
        validation_loss: After the last epoch: what decides a tie. None if a run diverged, or evaluation has no loss.
        early_test_score: After the early epoch: shows whether an early gain hangs on the choice.
        diverged_runs: Runs that ended with a NaN or infinite loss.
        swept: The other options that it sets, by name.
    """

    lr: float
    validation_score: float | None
    validation_loss: float | None
    early_test_score: float | None
    diverged_runs: int
    swept: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What it sets, in words."""
        return ", ".join([f"lr {self.lr:g}", *(f"{name} {value}" for name, value in self.swept.items())])


@dataclass(frozen=True)
class EqualTime:
    """A method in its baseline's wall time: its steps, its test score, and the difference to the baseline."""

    steps: int
    score: Spread
    difference: Difference
    others: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class AtShare:
    """A method in a share of its baseline's wall time, with a complete schedule of its own.

    Attributes:
        share: The share of the time of the baseline's full run.
        steps: The steps that fit in it.
        score: The test score after them.
        difference: To the baseline's full run; of a baseline, to its own.
        same_time: To the baseline in the same share of time; None for a baseline.
    """

    share: float
    steps: int
    score: Spread
    difference: Difference
    same_time: Difference | None


@dataclass(frozen=True)
class ToTarget:
    """When a method's mean over the seeds is beyond the target by more than chance.

    Attributes:
        epoch: The first such epoch; None if there is none.
        steps: The steps until then.
        seconds: The training seconds until then, the median over the seeds.
        p_value: How likely a mean so far beyond the target would be by chance, in that epoch or else in the last.
    """

    epoch: int | None
    steps: int | None
    seconds: float | None
    p_value: float | None


@dataclass(frozen=True)
class Curve:
    """One seed's run of the chosen trial, one number an epoch; `metrics` are of the test images."""

    seed: int
    seconds: tuple[float, ...]
    train_loss: tuple[float, ...]
    validation_score: tuple[float, ...]
    validation_loss: tuple[float | None, ...]
    test_score: tuple[float, ...]
    test_loss: tuple[float | None, ...]
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    train_score: tuple[float | None, ...] = ()


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
        swept: The other options that the chosen trial sets, by name.
        edges: ``"lowest"`` or ``"highest"`` for each of them that is at the end of its grid.
        to_target: When the mean over the seeds is beyond the target.
        shares: The method in shares of the baseline's wall time.
        unfinished: The seeds whose run of the chosen trial diverged.
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
    swept: dict[str, Any] = field(default_factory=dict)
    edges: dict[str, str] = field(default_factory=dict)
    to_target: ToTarget | None = None
    shares: tuple[AtShare, ...] = ()
    unfinished: tuple[int, ...] = ()

    @property
    def is_baseline(self) -> bool:
        """Whether it is measured against itself."""
        return self.name == self.baseline

    def is_chosen(self, point: GridPoint) -> bool:
        """Return whether a trial is the one that was chosen."""
        return (point.lr, point.swept) == (self.lr, self.swept)

    def at_shares(self, epochs: int) -> dict[float, Spread]:
        """Return its score at each share of the baseline's time that was compared.

        Args:
            epochs: Epochs of a full run.
        """
        full = self.scores[epochs] if self.is_baseline else None if self.equal_time is None else self.equal_time.score
        return {shorter.share: shorter.score for shorter in self.shares} | ({} if full is None else {1.0: full})


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
        chance: What a diverged run counts as, such as the score of guessing.
        jobs: Runs at the same time.
        ghost_batch: Images of the groups that batch statistics were taken over in training; None for the whole batch.
        methods: In the order of the comparison.
        machines: What executed the runs: one, or several of a cluster.
        metric: What the score is: its unit, and which direction is better.
        mode: What trials were chosen for: ``"final"`` scores, or the fewest epochs to the ``"target"``.
        sweeps: The options that were swept beside the lr, with their values.
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
    metric: Metric = ACCURACY
    mode: str = "final"
    sweeps: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    chosen_on: str = "validation"

    @property
    def points(self) -> str:
        """What differences of the score are counted in."""
        return "points" if self.metric.is_percentage else self.metric.unit

    @property
    def compares_evaluation(self) -> bool:
        """Whether some method evaluates with other layers than its baseline."""
        return any(method.evaluation_ratio is not None for method in self.methods)

    def families(self) -> dict[str, tuple[MethodSummary, ...]]:
        """Return, for each baseline, itself and the methods that are measured against it."""
        names = dict.fromkeys(method.baseline for method in self.methods)
        return {name: tuple(method for method in self.methods if method.baseline == name) for name in names}


def read_summary(content: dict[str, Any]) -> Summary:
    """Return the comparison that a results.json holds, also one of an earlier version.

    Args:
        content: What the file holds.
    """
    from pydantic import TypeAdapter

    # What earlier versions did not measure.
    absent = {"evaluation_ratio": None}
    methods = [absent | method for method in content["methods"]]
    return TypeAdapter(Summary).validate_python({"ghost_batch": None, **content, "methods": methods})


def summarize(comparison: Comparison) -> Summary:
    """Return the comparison in numbers, rounded once: files and tables hold the same ones."""
    plan = comparison.plan
    last = plan.epochs
    early = None if last == 1 else min(2, last - 1)
    first = comparison.methods[plan.baselines[plan.methods[0].name]]
    target = _target(plan, fmean(_scores(first.runs, last, plan.chance)))
    shown = tuple(sorted({min(epoch, last) for epoch in (1, 2, 3, last)}))
    summary = Summary(
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
        methods=tuple(
            _summarize_method(comparison, found, shown, early, target) for found in comparison.methods.values()
        ),
        machines=tuple(sorted({record.machine for record in comparison.records.values()} - {""})),
        metric=plan.task.metric,
        mode=plan.settings.mode,
        sweeps=dict(plan.settings.sweeps),
        chosen_on="validation" if "validation" in plan.task.splits else "test",
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
    comparison: Comparison, found: MethodRuns, shown: tuple[int, ...], early: int | None, target: float
) -> MethodSummary:
    plan, method, baseline = comparison.plan, found.method, comparison.methods[found.baseline]
    is_baseline = found is baseline

    def difference(epoch: int | None) -> Difference | None:
        if is_baseline or epoch is None:
            return None
        mine, theirs = (_scores(each.runs, epoch, plan.chance) for each in (found, baseline))
        return paired_difference(mine, theirs)

    reached = [
        epoch for run in found.runs if (epoch := epochs_to(run, plan.task.metric, target, "test_score")) is not None
    ]
    times = [time for run in found.all_runs if (time := run.seconds_per_step) is not None]
    equal = found.timed.get(1.0)
    shorter = [run for timed in found.timed.values() if timed.steps != plan.steps for run in timed.runs]
    every = [*found.all_runs, *shorter]
    lr, swept = found.chosen.lr, dict(found.chosen.swept)
    values = {name: [dict(trial.swept)[name] for trial in found.trials] for name in swept}
    same_network = (method.norm, method.layers) == (baseline.method.norm, baseline.method.layers)
    return MethodSummary(
        name=method.name,
        description=method.description,
        baseline=found.baseline,
        lr=lr,
        lr_edge=_edge(lr, [trial.lr for trial in found.trials]),
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
        swept=swept,
        edges={name: edge for name, value in swept.items() if (edge := _edge(value, values[name])) is not None},
        to_target=_to_target(found, plan, target),
        shares=_shares(comparison, found),
        unfinished=tuple(seed for seed, run in enumerate(found.runs) if run.diverged),
    )


def _edge(value: Any, grid: Sequence[Any]) -> str | None:
    """Return at which end of its grid a number lies, if it is one and the grid has more than one."""
    if len(set(grid)) < 2 or not all(isinstance(other, (int, float)) and not isinstance(other, bool) for other in grid):
        return None
    return {min(grid): "lowest", max(grid): "highest"}.get(value)


def _to_target(found: MethodRuns, plan: Plan, target: float) -> ToTarget:
    last, p_value, sign = 0, None, plan.task.metric.sign
    for epoch in range(1, plan.epochs + 1):
        scores = _scores(found.runs, epoch, plan.chance)
        p_value = probability_within([sign * score for score in scores], sign * target)
        if p_value is not None and p_value < LEVEL:
            last = epoch
            break
    if not last:
        return ToTarget(None, None, None, p_value)
    ends = [run.epochs[min(last, len(run.epochs)) - 1] for run in found.runs if run.epochs]
    return ToTarget(last, round(median(end.steps for end in ends)), median(end.seconds for end in ends), p_value)


def _shares(comparison: Comparison, found: MethodRuns) -> tuple[AtShare, ...]:
    plan, baseline = comparison.plan, comparison.methods[found.baseline]
    full = _scores(baseline.runs, plan.epochs, plan.chance)
    shares = []
    for share, timed in found.timed.items():
        ends = _ends(timed.runs, plan.chance)
        beside = baseline.timed.get(share)
        same = None if found is baseline or beside is None else paired_difference(ends, _ends(beside.runs, plan.chance))
        if share != 1.0:
            shares.append(AtShare(share, timed.steps, spread(ends), paired_difference(ends, full), same))
    return tuple(shares)


def _ends(runs: Sequence[RunRecord], chance: float) -> list[float]:
    """Return the last test score of each run."""
    return [chance if run.diverged else run.epochs[-1].test_score for run in runs]


def _scores(runs: Sequence[RunRecord], epoch: int, chance: float) -> list[float]:
    """Return the test score of each run after an epoch, counted from 1; after divergence that of guessing."""
    return [run.test_score(epoch, chance) for run in runs]


def _equal_time(comparison: Comparison, found: MethodRuns, timed: TimedRuns) -> EqualTime:
    plan, baseline = comparison.plan, comparison.methods[found.baseline]
    ends = _ends(timed.runs, plan.chance)
    others = {
        other.method.name: paired_difference(ends, _ends(other.timed[1.0].runs, plan.chance))
        for other in comparison.methods.values()
        if other.baseline == found.baseline and other is not found and other is not baseline and 1.0 in other.timed
    }
    difference = paired_difference(ends, _scores(baseline.runs, plan.epochs, plan.chance))
    return EqualTime(timed.steps, spread(ends), difference, others)


def _extras_of(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(kind for run in runs for kind in run.extras))


def _grid_point(trial: Trial, runs: Sequence[RunRecord], early: int | None, chance: float) -> GridPoint:
    early_score = None if early is None else fmean(_scores(runs, early, chance))
    diverged = sum(run.diverged for run in runs)
    swept = dict(trial.swept)
    if diverged:
        return GridPoint(trial.lr, None, None, early_score, diverged, swept)
    last = [run.epochs[-1] for run in runs]
    score = fmean(epoch.validation_score for epoch in last)
    losses = [epoch.validation_loss for epoch in last if epoch.validation_loss is not None]
    return GridPoint(trial.lr, score, fmean(losses) if losses else None, early_score, 0, swept)


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
