"""Runs a comparison: every trial with every seed, the choice of a trial, and the runs at equal wall time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from wellcond.lab.comparison.choice import choose
from wellcond.lab.engines.select import execute
from wellcond.lab.hardware.launch import from_first, launched
from wellcond.lab.methods.method import Method
from wellcond.lab.plan import Plan
from wellcond.lab.runs.records import RunRecord, RunSpec, RunStore
from wellcond.lab.training.progress import RunProgress
from wellcond.lab.trials import Trial


@dataclass(frozen=True)
class TimedRuns:
    """A method's runs in a share of its baseline's wall time: how many steps fit in it, and one run a seed."""

    steps: int
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True)
class MethodRuns:
    """Everything that was run of one method.

    Attributes:
        method: The method.
        baseline: The name of what its gains and costs are measured against; its own for a baseline.
        trials: Its grid, with the runs of each trial, one a seed; of those not chosen, only of the seeds that choose.
        chosen: The trial that validation chose.
        runs: Its runs, in the order of the seeds.
        time_ratio: Its time per step over the baseline's; None where no pair of runs has times.
        evaluation_ratio: Its time to evaluate an image over the baseline's; None where no pair has times.
        memory_ratio: Its peak memory over the baseline's; None where no pair has it.
        timed: Its runs at shares of the baseline's wall time, by share.
    """

    method: Method
    baseline: str
    trials: dict[Trial, tuple[RunRecord, ...]]
    chosen: Trial
    runs: tuple[RunRecord, ...]
    time_ratio: float | None
    evaluation_ratio: float | None
    memory_ratio: float | None
    timed: dict[float, TimedRuns] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        plan: What was compared.
        records: Every run.
        methods: What was run of each method, by its name.
    """

    plan: Plan
    records: dict[RunSpec, RunRecord]
    methods: dict[str, MethodRuns]


def run_comparison(plan: Plan, store: RunStore, progress: RunProgress, equal_time: bool = True) -> Comparison:
    """Execute what the store does not have yet, and choose what depends on it.

    Args:
        plan: What to compare.
        store: Where finished runs are kept; those already there are not repeated.
        progress: Told of every finished run.
        equal_time: Train each method but the baselines again for its baseline's wall time.

    Returns:
        The comparison with all its runs.

    Raises:
        RunFailedError: If a run fails; the finished ones are kept.
    """
    records: dict[RunSpec, RunRecord] = {}
    shares = plan.settings.time_shares if equal_time else ()
    again = [(share, method) for share in shares for method in plan.methods if not _is_full_run(plan, share, method)]
    other_seeds = range(plan.trial_seeds, plan.settings.seeds)
    timed_runs = len(again) * plan.settings.seeds
    _complete(plan, plan.specs(), store, records, progress, len(plan.methods) * len(other_seeds) + timed_runs)
    chosen = compared(plan, records).methods.values()
    others = [plan.table[found.chosen][seed] for seed in other_seeds for found in chosen]
    _complete(plan, others, store, records, progress, later=timed_runs)
    comparison = compared(plan, records, {found.method.name: found.chosen for found in chosen})
    rows = {}
    for share, method in again:
        found = comparison.methods[method.name]
        if found.time_ratio is not None:
            whole = plan.table[comparison.methods[found.baseline].chosen][0].steps
            rows[share, method.name] = plan.row(found.chosen, max(1, round(share * whole / found.time_ratio)))
    # A budget of exactly a full run is that full run, which is there already.
    missing = [spec for seed in zip(*rows.values(), strict=True) for spec in seed if spec not in records]
    _complete(plan, list(dict.fromkeys(missing)), store, records, progress, later=0)
    for (share, name), row in rows.items():
        timed = TimedRuns(row[0].steps, tuple(records[spec] for spec in row))
        comparison.methods[name].timed[share] = timed
    return comparison


def _is_full_run(plan: Plan, share: float, method: Method) -> bool:
    """Return whether a method's runs in a share of its baseline's time are those of all epochs."""
    return share == 1.0 and plan.baselines[method.name] == method.name


def compared(plan: Plan, records: dict[RunSpec, RunRecord], chosen: Mapping[str, Trial] | None = None) -> Comparison:
    """Return the comparison that runs amount to.

    Args:
        plan: What was compared.
        records: The runs of all epochs: of every trial with the seeds that choose, of the chosen ones with all.
        chosen: The trial of each method; None chooses them.
    """
    runs = {trial: tuple(records[spec] for spec in row if spec in records) for trial, row in plan.table.items()}
    grids = {name: {trial: runs[trial] for trial in trials} for name, trials in plan.trials.items()}
    if chosen is None:
        target = plan.target if plan.settings.mode == "target" else None
        seeds = plan.trial_seeds
        tried = {name: {trial: runs[:seeds] for trial, runs in trials.items()} for name, trials in grids.items()}
        chosen = {name: choose(trials, plan.task.metric, target) for name, trials in tried.items()}
    # With batches of several sizes, steps at one place of two grids need not be alike: only the chosen ones count.
    alike = "batch_size" not in dict(plan.settings.sweeps)
    methods = {}
    for method in plan.methods:
        mine, baseline = grids[method.name], plan.baselines[method.name]
        theirs = grids[baseline]
        places = list(zip(mine, theirs, strict=True)) if alike else []
        both_chosen = (chosen[method.name], chosen[baseline])
        # Where the first seeds choose, the other seeds have runs of what was chosen alone, perhaps at unlike places.
        if both_chosen not in places and (not alike or plan.trial_seeds < plan.settings.seeds):
            places.append(both_chosen)
        pairs = [
            (one, other)
            for ours, reference in places
            for one, other in zip(mine[ours], theirs[reference], strict=False)
            if one.epochs and other.epochs
        ]
        methods[method.name] = MethodRuns(
            method=method,
            baseline=baseline,
            trials=mine,
            chosen=chosen[method.name],
            runs=mine[chosen[method.name]],
            time_ratio=paired_ratio(pairs, lambda run: run.seconds_per_step),
            evaluation_ratio=paired_ratio(pairs, lambda run: run.evaluation_seconds),
            memory_ratio=paired_ratio(pairs, lambda run: None if run.memory is None else run.memory.peak),
        )
    return Comparison(plan, records, methods)


def paired_ratio(
    pairs: Iterable[tuple[RunRecord, RunRecord]], measured: Callable[[RunRecord], float | None]
) -> float | None:
    """Return the median, over pairs of runs, of what was measured of the first over the second.

    The median, because a machine that does something else for a moment spoils a few pairs by a lot.

    Args:
        pairs: A method's runs, each with its baseline's of the same seed and place in the grid.
        measured: What to take of a run; None where it has none.

    Returns:
        The ratio; None where no pair has both.
    """
    both = [(measured(mine), measured(theirs)) for mine, theirs in pairs]
    ratios = [mine / theirs for mine, theirs in both if mine is not None and theirs is not None]
    return median(ratios) if ratios else None


def _complete(
    plan: Plan,
    specs: Sequence[RunSpec],
    store: RunStore,
    records: dict[RunSpec, RunRecord],
    progress: RunProgress,
    later: int,
) -> None:
    """Add the records of these runs; `later` is how many more runs are to come after them, as far as is known."""
    # What the first rank finds, so that all train the same runs.
    kept = from_first(lambda: {spec: record for spec in specs if (record := store.load(spec)) is not None})
    records.update(kept)
    missing = [spec for spec in specs if spec not in kept]
    progress.expect(missing=len(missing), kept=len(kept), later=later)
    for spec, record in execute(plan, missing, store):
        if launched().rank == 0:
            store.save(spec, record)
        records[spec] = record
        progress.advance(spec.method.name)
